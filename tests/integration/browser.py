"""A headless Chromium, driven by the DevTools protocol over its pipe; nothing to install beside it."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PATIENCE_SECONDS = 60.0
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    # Containers have neither user namespaces nor a large /dev/shm.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--mute-audio",
    "--window-size=1280,900",
)


class Browser:
    """One page of one browser.

    Attributes:
        problems: Errors and warnings of its console, exceptions, and requests that went anywhere.
    """

    def __init__(self, profile: Path) -> None:
        assert EXECUTABLE is not None
        their_input, self._output = os.pipe()
        self._input, their_output = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        shell = f'exec "$0" "$@" 3</dev/fd/{their_input} 4>/dev/fd/{their_output}'
        self._process = subprocess.Popen(
            ["sh", "-c", shell, EXECUTABLE, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(their_input, their_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._received = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False
        self.problems: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        (page,) = (target for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._input)
        os.close(self._output)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._output, json.dumps(message).encode() + b"\0")
        while True:
            received = self._receive()
            if received.get("id") == number:
                assert "error" not in received, f"{method}: {received['error']}"
                return received["result"]

    def before_pages(self, script: str) -> None:
        """Has a script run before those of every page that is opened."""
        self.send("Page.addScriptToEvaluateOnNewDocument", source=script)

    def open(self, path: Path) -> None:
        """Loads a file."""
        self._loaded = False
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def run(self, expression: str) -> Any:
        """The value of an expression in the page, awaited if it is a promise."""
        answer = self.send(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=False,
        )
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while not (value := self.run(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def click(self, selector: str, *, at: tuple[float, float] = (0.5, 0.5)) -> None:
        """Presses the mouse on an element, by default in its middle."""
        left, top, width, height = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
        )
        place = {"x": left + at[0] * width, "y": top + at[1] * height}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **place, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key, by the name that `KeyboardEvent.key` has for it."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}.get(key)
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        codes = {"windowsVirtualKeyCode": code or ord(key[0].upper())}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, **codes)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **codes)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the page's window in CSS pixels, and the colour scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if width < 600 else 1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Writes what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE_SECONDS
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._input], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._input, 2**20) if ready else b""
            assert chunk, "the browser does not answer"
            self._received += chunk
        text, self._received = self._received.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        self._notice(message.get("method"), message.get("params", {}))
        return message

    def _notice(self, method: str | None, details: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.problems.append(str([argument.get("value") for argument in details["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(details["exceptionDetails"]))
        elif method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.problems.append(details["entry"]["text"])
        elif method == "Network.requestWillBeSent" and details["type"] != "Document":
            self.problems.append(f"request: {details['request']['url'][:200]}")

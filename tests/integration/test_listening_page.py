"""The listening report in a real browser: what it plays, shows, counts and lets be operated."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from browser import EXECUTABLE, Browser
from scipy.stats import binomtest

from ear_vae.evaluation.listening.excerpts import Excerpt, ExcerptSpan, Signal, measured
from ear_vae.evaluation.listening.page import means_of, page_text

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="needs a Chromium: apt-get install chromium")

RATE = 44_100
SECONDS = 3.0
HOSTILE = '</script><img src=x onerror="window.hacked=1"><b>&amp;'
LONG = "Some/Very-Long_System-Name.without.any.space.that.could.be.broken-v2.1"
# What reaches the loudspeakers, with the time of the audio clock at which it is read.
LISTEN = """
window.taps = [];
const connect = AudioNode.prototype.connect;
AudioNode.prototype.connect = function (destination, ...rest) {
  if (destination instanceof AudioDestinationNode) {
    let tap = window.taps.find(({ context }) => context === destination.context);
    if (!tap) {
      const analyser = new AnalyserNode(destination.context, { fftSize: 4096 });
      tap = { context: destination.context, analyser };
      window.taps.push(tap);
    }
    connect.call(this, tap.analyser);
  }
  return connect.call(this, destination, ...rest);
};
window.heard = async () => {
  // After the page has shown where it is.
  await new Promise(requestAnimationFrame);
  const { context, analyser } = window.taps[0];
  const samples = new Float32Array(analyser.fftSize);
  analyser.getFloatTimeDomainData(samples);
  const encoded = btoa(String.fromCharCode(...new Uint8Array(samples.buffer)));
  return [context.currentTime, Number(document.querySelector("#seek").value), encoded];
};
"""


class Heard(NamedTuple):
    """What sounds: which signal, where in it, how much of it, when by the audio clock; and what is shown."""

    column: int
    position: float
    gain: float
    time: float
    shown: float


def noise(seed: int, level: float = 0.1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Equal channels, of which an analyser hears the mean.
    return (level * torch.randn(1, int(SECONDS * RATE), generator=generator)).expand(2, -1)


def an_excerpt(name: str, first_seed: int) -> Excerpt:
    names = ("Original", HOSTILE, LONG, "third")
    levels = (0.1, 0.05, 0.1, 0.2)
    signals = [
        Signal(system, noise(first_seed + index, level))
        for index, (system, level) in enumerate(zip(names, levels, strict=True))
    ]
    return measured(Excerpt(ExcerptSpan(name, Path("x"), 61.5, SECONDS), RATE, tuple(signals)))


@pytest.fixture(scope="module")
def excerpts() -> list[Excerpt]:
    return [an_excerpt(f"folder/{HOSTILE}", 0), an_excerpt("second", 10)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        started.before_pages(LISTEN)
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, excerpts: list[Excerpt]) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_text(excerpts, title=HOSTILE, means=means_of(excerpts)), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Browser, file: Path) -> Iterator[Browser]:
    """The report, freshly opened; nothing may have gone wrong in the end."""
    browser.problems.clear()
    browser.resize(1280, 900)
    browser.open(file)
    browser.wait("document.querySelectorAll('[data-drawn]').length > 0")
    yield browser
    assert browser.problems == []


def listen(page: Browser, excerpt: Excerpt) -> Heard:
    """Finds what reaches the loudspeakers in the signals of an excerpt, which loops."""
    page.wait("window.taps.length > 0")
    time, shown, encoded = page.run("window.heard()")
    samples = np.frombuffer(base64.b64decode(encoded), dtype=np.float32).astype(np.float64)
    length = excerpt.signals[0].audio.shape[1]
    best = Heard(-1, 0.0, 0.0, time, shown)
    for column, signal in enumerate(excerpt.signals):
        known = signal.audio[0].double().numpy()
        spectra = np.fft.rfft(known) * np.conj(np.fft.rfft(samples, length))
        products = np.fft.irfft(spectra, length)
        start = int(products.argmax())
        part = known[(start + np.arange(len(samples))) % length]
        gain = products[start] / (part @ part)
        explained = np.linalg.norm(gain * part) / max(np.linalg.norm(samples), 1e-9)
        if explained > 0.999:
            best = Heard(column, ((start + len(samples)) % length) / RATE, gain, time, shown)
    return best


def sounds(page: Browser, excerpt: Excerpt, column: int) -> Heard:
    """Waits until nothing but that signal has been heard for the length of what is looked at."""
    for _ in range(100):
        heard = listen(page, excerpt)
        if heard.column == column:
            return heard
    raise AssertionError(f"signal {column} never sounds alone, but {heard}")


def drift(before: Heard, after: Heard) -> float:
    """By how much the position has moved more than the audio clock, in seconds."""
    moved = after.position - before.position - (after.time - before.time)
    return (moved + SECONDS / 2) % SECONDS - SECONDS / 2


def pressed(page: Browser, within: str) -> list[int]:
    buttons = f"[...document.querySelectorAll('{within} [aria-pressed]')]"
    states = page.run(f"{buttons}.map((button) => button.getAttribute('aria-pressed'))")
    return [index for index, state in enumerate(states) if state == "true"]


def test_it_opens_from_disk_and_names_are_text(page: Browser) -> None:
    assert page.run("window.hacked") is None
    assert page.run("document.querySelector('h1').textContent") == HOSTILE
    assert page.run("document.querySelector('#excerpt-0').textContent") == f"folder/{HOSTILE}"
    assert page.run("document.title") == f"{HOSTILE} – listening report"
    heads = page.run("[...document.querySelectorAll('#means thead th')].map((head) => head.textContent)")
    assert heads == ["Metric", HOSTILE, LONG, "third"]
    assert page.run("document.querySelectorAll('img').length") == 0


def test_it_plays_on_and_switches_at_the_same_position(page: Browser, excerpts: list[Excerpt]) -> None:
    one = excerpts[0]
    page.click("#play")
    first = sounds(page, one, 0)
    later = sounds(page, one, 0)
    assert later.time > first.time
    assert abs(drift(first, later)) < 0.02
    data = json.loads(page.run("document.getElementById('data').textContent"))["excerpts"][0]["signals"]
    assert first.gain == pytest.approx(data[0]["matched"], rel=1e-2)
    for column in (2, 1, 3, 0):
        page.click(f"#bar-signals button:nth-child({column + 1})")
        heard = sounds(page, one, column)
        assert abs(drift(first, heard)) < 0.02
        # What is stored was lowered to full scale; the loudness is the original's.
        signal = one.signals[column]
        expected = 10 ** (signal.gain_db / 20) * data[0]["matched"]
        assert heard.gain == pytest.approx(expected, rel=1e-2)
        assert pressed(page, "#bar-signals") == [column]
        assert pressed(page, ".excerpt:first-child .grid") == [column]
    page.click("#play")
    page.wait("document.querySelector('#play').getAttribute('aria-label') === 'Play'")
    stopped = page.run("document.querySelector('#time').textContent")
    page.wait(f"window.taps[0].context.currentTime > {heard.time + 0.3}")
    assert page.run("document.querySelector('#time').textContent") == stopped
    assert listen(page, one).column == -1


def test_all_signals_start_together_and_the_loop_has_no_gap(page: Browser, excerpts: list[Excerpt]) -> None:
    page.click(".excerpt:first-child .waveform", at=(0.5, 0.5))
    before = sounds(page, excerpts[0], 0)
    page.wait(f"window.taps[0].context.currentTime > {before.time + SECONDS}")
    page.press("4")
    after = sounds(page, excerpts[0], 3)
    assert abs(drift(before, after)) < 0.02


def test_pictures_choose_the_excerpt_the_signal_and_the_place(page: Browser, excerpts: list[Excerpt]) -> None:
    page.click(".excerpt:nth-child(2) .column:nth-child(3) .levels", at=(0.5, 0.5))
    heard = sounds(page, excerpts[1], 2)
    assert 0 <= heard.position - SECONDS / 2 < 1.0
    # Shown in tenths; the end of what is heard may be a few blocks behind.
    assert heard.shown == pytest.approx(heard.position, abs=0.15)
    page.click(".excerpt:first-child .column:nth-child(2) .hear-it")
    assert sounds(page, excerpts[0], 1).position < 1.0


def test_keys(page: Browser, excerpts: list[Excerpt]) -> None:
    page.press(" ")
    first = sounds(page, excerpts[0], 0)
    page.press("3")
    heard = sounds(page, excerpts[0], 2)
    assert abs(drift(first, heard)) < 0.02
    page.press("ArrowRight")
    page.press("ArrowRight")
    moved = sounds(page, excerpts[0], 2)
    assert drift(heard, moved) % SECONDS == pytest.approx(2 % SECONDS, abs=0.1)
    quiet = sounds(page, excerpts[0], 2).gain
    page.press("2")
    matched = sounds(page, excerpts[0], 1).gain
    page.press("m")
    page.wait("document.querySelector('#match').getAttribute('aria-pressed') === 'false'")
    page.wait(f"window.taps[0].context.currentTime > {sounds(page, excerpts[0], 1).time + 0.2}")
    assert sounds(page, excerpts[0], 1).gain < 0.6 * matched
    assert quiet == pytest.approx(matched / 2, rel=0.05)
    page.press("n")
    sounds(page, excerpts[1], 1)
    page.press("p")
    sounds(page, excerpts[0], 1)
    page.press("9")
    assert pressed(page, "#bar-signals") == [1]
    # Without the loop it ends by itself, at the beginning.
    page.press("l")
    page.press("ArrowRight")
    page.wait("document.querySelector('#play').getAttribute('aria-label') === 'Play'")
    assert page.run("document.querySelector('#time').textContent").startswith("0.0 of")
    page.run("document.querySelector('.help').open = true")
    page.click("#shortcuts")
    page.press("4")
    assert pressed(page, "#bar-signals") == [1]


def test_space_and_enter_belong_to_the_focused_button(page: Browser, excerpts: list[Excerpt]) -> None:
    page.run("document.querySelector('#bar-signals').previousElementSibling.querySelector('input').focus()")
    page.press("Tab")
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == HOSTILE
    assert page.run("document.activeElement.matches(':focus-visible')")
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert pressed(page, "#bar-signals") == [1]
    assert page.run("document.querySelector('#announcement').textContent") == f"You hear {HOSTILE}"
    page.press("Tab")
    page.press(" ")
    assert pressed(page, "#bar-signals") == [2]
    assert page.run("window.taps.length") == 0
    # After the mouse, Space is for playing.
    page.click("#bar-signals button")
    page.press(" ")
    sounds(page, excerpts[0], 0)


def test_abx_counts_what_is_known_to_be_right(page: Browser, excerpts: list[Excerpt]) -> None:
    page.press("t")
    page.run("document.querySelector('#abx-setup').elements.b.value = '3'")
    page.run("document.querySelector('#abx-setup').elements.trials.value = '8'")
    page.click("#abx-setup .primary")
    wrong = {2, 5}
    seen = set()
    for trial in range(8):
        page.wait(f"document.querySelector('#abx-count').textContent === 'Trial {trial + 1} of 8'")
        page.press("b")
        known = sounds(page, excerpts[0], 3)
        page.press("a")
        sounds(page, excerpts[0], 0)
        page.press("x")
        assert pressed(page, "#abx-trial") == [1]
        # Nothing on the page says which one it is.
        assert pressed(page, "#bar-signals") == []
        assert pressed(page, ".grid") == []
        page.wait(f"window.taps[0].context.currentTime > {known.time + 0.3}")
        x = next(heard for _ in range(100) if (heard := listen(page, excerpts[0])).column >= 0)
        assert abs(drift(known, x)) < 0.02
        seen.add(x.column)
        is_a = x.column == 0
        page.press("1" if is_a != (trial in wrong) else "2")
    # Eight tosses that fall alike happen once in 128 runs; more often than that they may not.
    assert seen <= {0, 3}
    assert page.run("document.querySelector('#abx-score').textContent") == "6 of 8 right"
    p = binomtest(6, 8, alternative="greater").pvalue
    assert float(page.run("document.querySelector('#abx-p').dataset.p")) == pytest.approx(p, rel=1e-12)
    assert page.run("document.querySelector('#abx-p').textContent") == f"p = {p:.3f}"
    page.click("#abx-close")
    page.wait("document.querySelectorAll('#bar-signals [aria-pressed=true]').length === 1")
    assert pressed(page, "#bar-signals") == [0]
    page.press("t")
    page.run("document.querySelector('#abx-setup').elements.a.value = '3'")
    page.run("document.querySelector('#abx-setup').elements.b.value = '3'")
    page.click("#abx-setup .primary")
    assert "two different" in page.run("document.querySelector('#abx-status').textContent")
    page.press("Escape")
    assert page.run("document.querySelector('#abx').open") is False


def test_abx_tosses_a_fair_coin(page: Browser) -> None:
    """Which X it is comes from the browser's random bytes, bit by bit."""
    page.run("window.tosses = 0")
    page.run("crypto.getRandomValues = (bytes) => { window.tosses += 1; return bytes.fill(1); }")
    page.press("t")
    page.click("#abx-setup .primary")
    for _ in range(10):
        page.press("1")
    assert page.run("document.querySelector('#abx-score').textContent") == "10 of 10 right"
    assert page.run("window.tosses") == 11
    p = binomtest(10, 10, alternative="greater").pvalue
    assert float(page.run("document.querySelector('#abx-p').dataset.p")) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_width_scrolls_sideways(page: Browser, width: int) -> None:
    page.resize(width, 800, dark=True)
    for opened in (False, True):
        page.run(f"document.querySelector('.help').open = {str(opened).lower()}")
        assert page.run("document.documentElement.scrollWidth") <= width
    page.press("t")
    dialog = "document.querySelector('#abx')"
    assert page.run(f"{dialog}.scrollWidth <= {dialog}.clientWidth")
    # What a finger must hit.
    heights = "[...document.querySelectorAll('.bar button')].map((each) => each.offsetHeight)"
    assert min(page.run(heights)) >= 32


def test_a_screen_reader_finds_names_and_headings(page: Browser) -> None:
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    by_role: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            by_role.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "slider", "image", "table", "columnheader", "rowheader", "region"):
        assert by_role[role], role
        assert all(by_role[role]), (role, by_role[role])
    assert by_role["heading"] == [HOSTILE, f"folder/{HOSTILE}", "second"]
    assert "Means over the 2 excerpts below" in by_role["table"]
    assert any(name.startswith("SI-SDR dB (higher is better)") for name in by_role["rowheader"])
    cells = [name for role in ("cell", "gridcell") for name in by_role.get(role, [])]
    # Loudness and true peak differ in every table.
    assert sum(name.endswith(" (best)") for name in cells) >= 3 * 2
    assert by_role["slider"] == ["Position in the excerpt"]


def test_what_a_metric_is_stands_below_its_name(page: Browser) -> None:
    page.resize(390, 800)
    for metric, words in (("ICPC", "phase of each channel"), ("CCPC", "phase between left and right")):
        for table in ("#means", ".excerpt"):
            rows = f"[...document.querySelectorAll('{table} tbody th')]"
            about = f"{rows}.find((row) => row.textContent.startsWith('{metric}')).querySelector('.about')"
            assert words in page.run(f"{about}.textContent")
            assert page.run(f"{about}.offsetHeight") >= 10


def test_a_page_that_is_still_drawing_says_so(browser: Browser, file: Path, tmp_path: Path) -> None:
    browser.before_pages(
        "if (location.pathname.endsWith('/slow.html'))"
        "BaseAudioContext.prototype.decodeAudioData = () => new Promise(() => {});"
    )
    browser.resize(1280, 900)
    slow = tmp_path / "slow.html"
    slow.write_bytes(file.read_bytes())
    notice = "document.querySelector('.drawing')"
    browser.open(slow)
    browser.wait(f"{notice} !== null")
    assert browser.run(f"{notice}.textContent") == "Drawing the pictures…"
    assert browser.run(f"{notice}.offsetHeight") > 10
    browser.open(file)
    browser.wait("document.querySelectorAll('[data-drawn]').length > 0")
    assert browser.run("document.querySelector('[data-drawn] .drawing').offsetHeight") == 0


def pixels(page: Browser, column: int, kind: str) -> np.ndarray:
    """[height, width, 3] of a picture."""
    canvas = f"document.querySelector('.column:nth-child({column + 1}) .{kind} canvas')"
    width, height = page.run(f"[{canvas}.width, {canvas}.height]")
    encoded = page.run(
        f"(() => {{ const {{ data }} = {canvas}.getContext('2d').getImageData(0, 0, {width}, {height});"
        "let text = ''; for (let i = 0; i < data.length; i += 8192)"
        "text += String.fromCharCode(...data.subarray(i, i + 8192)); return btoa(text); })()"
    )
    return np.frombuffer(base64.b64decode(encoded), np.uint8).reshape(height, width, 4)[..., :3].astype(float)


def test_pictures_show_frequencies_and_differences(browser: Browser, tmp_path: Path) -> None:
    time = torch.arange(int(2 * RATE)) / RATE
    deep, high = (0.2 * torch.sin(2 * torch.pi * hz * time).expand(2, -1) for hz in (250.0, 5000.0))
    signals = (
        Signal("Original", deep + high),
        Signal("no treble", deep),
        Signal("inverted", -(deep + high)),
        Signal("wide", torch.stack((deep[0] + high[0], -deep[0] - high[0]))),
    )
    excerpt = Excerpt(ExcerptSpan("tones", Path("x"), 0.0, 2.0), RATE, signals)
    figures = dict.fromkeys(measured(excerpt).signals[1].figures, 0.0)
    signals = (signals[0], *(Signal(s.name, s.audio, figures=figures) for s in signals[1:]))
    one = Excerpt(excerpt.span, RATE, signals)
    file = tmp_path / "tones.html"
    file.write_text(page_text([one], title="tones", means=means_of([one])), encoding="utf-8")
    browser.problems.clear()
    browser.resize(1280, 900)
    browser.open(file)
    browser.wait("document.querySelectorAll('[data-drawn]').length === 1")

    def row(hz: float, height: int) -> int:
        return int((1 - np.log(hz / 40) / np.log(20_000 / 40)) * height)

    levels = pixels(browser, 0, "levels").sum(axis=2).mean(axis=1)
    height = len(levels)
    brightest = np.argsort(levels)[-40:]
    for hz in (250.0, 5000.0):
        assert np.abs(brightest - row(hz, height)).min() <= 1
        assert levels[row(hz, height)] > 500
    assert levels[row(1000.0, height)] < 250
    assert pixels(browser, 1, "levels").sum(axis=2).mean(axis=1)[row(5000.0, height)] < 250
    # Red, green, blue: what is missing is blue, what is there is white, as is all of what is only inverted.
    difference = pixels(browser, 1, "difference").mean(axis=1)
    missing, there = difference[row(5000.0, height)], difference[row(250.0, height)]
    assert missing[2] > missing[0] + 100
    np.testing.assert_allclose(there, 255, atol=2)
    np.testing.assert_allclose(pixels(browser, 2, "difference"), 255, atol=2)
    # An inverted signal differs by twice itself, which has all of it.
    residual = pixels(browser, 2, "residual").sum(axis=2).mean(axis=1)
    assert residual[row(250.0, height)] > 500
    # Correlation upwards for equal channels, downwards for opposite ones.
    plain, wide = (pixels(browser, column, "stereo") for column in (0, 3))
    up, down = int(0.75 * len(plain)), int(0.9 * len(plain))
    # Where nothing is painted there is nothing.
    assert plain[up].any()
    assert not plain[down].any()
    assert wide[down].any()
    assert not wide[up].any()
    assert browser.problems == []

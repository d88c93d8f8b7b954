"""Where the wall time of `ear-vae reconstruct` goes, from the start of its process to its end.

    python benchmarks/command.py AUDIO [AUDIO ...] [--seconds 300] [--model MODEL ...] [--format mp3]
        [--repeats 1] [OPTIONS OF ear-vae reconstruct]

Joins the files, over and over, to one of so many seconds, and has a process of its own rebuild it with each
model in turns. `wide` stands for a model of the published size with random weights, which is written to a
temporary folder first. The network's time is that of the tiles and of the transformer as the main thread sees
it; "rest" is what it waits for beside that: reading, resampling, writing, the ends of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDE = "wide"
IMPORT, LOAD, PREPARE, NETWORK, REST = "import", "load", "prepare", "network", "rest"
STARTED, TIMES = "EAR_VAE_BENCHMARK_STARTED", "EAR_VAE_BENCHMARK_TIMES"


def serve(arguments: list[str]) -> int:
    """Runs the command in this process, and writes down what its parts took."""
    seconds: dict[str, float] = defaultdict(float)
    started = float(os.environ[STARTED])

    from ear_vae.cli import files, reconstruct
    from ear_vae.cli.main import main as command
    from ear_vae.inference import compiling, tiling
    from ear_vae.inference.runner import Runner

    assert reconstruct
    seconds[IMPORT] = time.monotonic() - started

    def time_calls(owner: Any, name: str, part: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*positional: Any, **named: Any) -> Any:
            start, inner = time.monotonic(), sum(seconds.values())
            try:
                return original(*positional, **named)
            finally:
                seconds[part] += time.monotonic() - start - (sum(seconds.values()) - inner)

        setattr(owner, name, timed)

    time_calls(files, "load_model", LOAD)
    time_calls(compiling, "compile_snake", PREPARE)
    time_calls(tiling, "run_tiled", NETWORK)
    time_calls(Runner, "transform", NETWORK)
    code = command(arguments)
    Path(os.environ[TIMES]).write_text(json.dumps(seconds), encoding="utf-8")
    return code


def measure(arguments: list[str], folder: Path) -> dict[str, float]:
    """Seconds of each part of one run, and what is left of the whole."""
    # As the command line sets it, where torch is not loaded yet.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, TIMES: str(folder / "times.json")}
    started = time.monotonic()
    environment[STARTED] = str(started)
    subprocess.run([sys.executable, __file__, "--serve", *arguments], env=environment, check=True)
    whole = time.monotonic() - started
    seconds = dict.fromkeys((IMPORT, LOAD, PREPARE, NETWORK), 0.0)
    seconds |= json.loads((folder / "times.json").read_text(encoding="utf-8"))
    return {**seconds, REST: whole - sum(seconds.values())}


def make_input(sources: list[Path], seconds: float, path: Path) -> None:
    """Joins files, over and over, to one of a length."""
    import torch

    from ear_vae.audio import read_audio, write_audio
    from ear_vae.dsp.resampling import resample

    pieces, rate, missing = [], 44_100, round(seconds * 44_100)
    while missing > 0:
        for source in sources:
            audio, own_rate = read_audio(source)
            piece = resample(audio.expand(2, -1), own_rate, rate)[:, : max(missing, 0)]
            missing -= piece.shape[-1]
            pieces.append(piece)
    write_audio(path, torch.cat(pieces, dim=1), rate, peak="scale")


def make_model(folder: Path) -> None:
    """A model of the published size with random weights."""
    import torch

    from ear_vae import EarVAE, EarVAEConfig

    torch.manual_seed(0)
    EarVAE(EarVAEConfig(), name=WIDE).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path, metavar="AUDIO")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--format", default="mp3", help="of the file that is read (%(default)s)")
    parser.add_argument("--repeats", type=int, default=1)
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / f"source.{arguments.format}"
        make_input(arguments.sources, arguments.seconds, source)
        models = arguments.model or [WIDE, "ear-vae-tiny"]
        if WIDE in models and not Path(WIDE).exists():
            make_model(folder / WIDE)
        runs: dict[str, list[dict[str, float]]] = defaultdict(list)
        for _ in range(arguments.repeats):
            for model in models:
                path = str(folder / WIDE) if model == WIDE and not Path(WIDE).exists() else model
                command = ["reconstruct", str(source), str(folder / "rebuilt.wav"), "--force"]
                runs[model].append(measure([*command, "--model", path, "--quiet", *options], folder))
    print(f"{arguments.seconds:g} s of {arguments.format}, {' '.join(options) or 'no options'}")
    print(f"{'':16}{'whole':>10}", *(f"{part:>18}" for part in (IMPORT, LOAD, PREPARE, NETWORK, REST)))
    for model, found in runs.items():
        median = {part: statistics.median(run[part] for run in found) for part in found[0]}
        whole = sum(median.values())
        cells = [f"{median[part]:8.2f} s {100 * median[part] / whole:5.1f} %" for part in median]
        print(f"{model[-16:]:16}{whole:8.2f} s", *(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(sys.argv[2:]))
    main()

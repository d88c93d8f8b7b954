"""How well a model rebuilds a folder of music: the figures that a small codec is judged by.

    python benchmarks/reconstruction.py MUSIC [--model ear-vae-tiny] [--pattern '**/gt.*'] [--json OUT.json]

Of every file, an excerpt (seconds 10 to 22 by default) is rebuilt and compared by the paper's metrics and by
the energy from 5 to 15 kHz relative to the original's. With `--whole` the whole file is rebuilt too, to look
where averages do not:

- quiet: how much louder a 400 ms stretch is than the original's at most, where that is below -60 dBFS;
- silence: the loudest 400 ms stretch in dBFS where the original is digital silence;
- edges: the error of the first and last 20 ms relative to that of the whole file, in dB, the larger one.

A figure that a file has no place for is shown as `-`. The last line holds the medians.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ear_vae import EarVAE, EarVAEError
from ear_vae.audio import find_audio_files, read_audio
from ear_vae.evaluation import measure

TREBLE_HZ = (5_000.0, 15_000.0)
QUIET_DBFS = -60.0
STRETCH_SECONDS, STEP_SECONDS = 0.4, 0.1
EDGE_SECONDS = 0.02
_POWER_FLOOR = 1e-20

# Title, width and decimals of each figure; coherences are from 0 to 1, and shown in per cent.
COLUMNS = {
    "si_sdr_db": ("SI-SDR dB", 9, 2),
    "mel_distance": ("mel", 6, 3),
    "stft_distance": ("STFT", 6, 3),
    "icpc": ("ICPC %", 7, 2),
    "ccpc": ("CCPC %", 7, 2),
    "treble_db": ("5-15 kHz dB", 11, 2),
}
PERCENT = ("icpc", "ccpc")
WHOLE_COLUMNS = {
    "quiet_db": ("quiet dB", 8, 1),
    "silence_dbfs": ("silence dBFS", 12, 1),
    "edges_db": ("edges dB", 8, 1),
}


def band_level_db(audio: Tensor, sample_rate: int, band_hz: tuple[float, float] = TREBLE_HZ) -> float:
    """Energy of audio [C, T] in a band, in dB."""
    power = torch.fft.rfft(audio.double()).abs().square()
    first, last = (round(hz / sample_rate * audio.shape[-1]) for hz in band_hz)
    return float(10 * power[..., first:last].sum().clamp(min=_POWER_FLOOR).log10())


def stretches_dbfs(audio: Tensor, sample_rate: int) -> Tensor:
    """Level of each 400 ms stretch of audio [C, T] in dBFS, over all channels; starts are 100 ms apart."""
    length, step = round(STRETCH_SECONDS * sample_rate), round(STEP_SECONDS * sample_rate)
    power = audio.double().square().mean(dim=0)
    if len(power) < length:
        return power.new_empty(0)
    return 10 * power.unfold(0, length, step).mean(dim=-1).clamp(min=_POWER_FLOOR).log10()


def quiet_db(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """See `quiet` above; NaN where the original is never that quiet, or silent."""
    x, y = stretches_dbfs(estimate, sample_rate), stretches_dbfs(target, sample_rate)
    # Digital silence has a bound of its own.
    quiet = (y < QUIET_DBFS) & (y > 10 * math.log10(_POWER_FLOOR))
    return float((x - y)[quiet].max()) if bool(quiet.any()) else math.nan


def silence_dbfs(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """See `silence` above; NaN where the original is never silent."""
    x, y = stretches_dbfs(estimate, sample_rate), stretches_dbfs(target, sample_rate)
    silent = y <= 10 * math.log10(_POWER_FLOOR)
    return float(x[silent].max()) if bool(silent.any()) else math.nan


def edges_db(estimate: Tensor, target: Tensor, sample_rate: int) -> float:
    """See `edges` above."""
    error = (estimate - target).double().square()
    length = round(EDGE_SECONDS * sample_rate)
    edge = max(float(error[:, :length].mean()), float(error[:, -length:].mean()))
    return 10 * math.log10(max(edge, _POWER_FLOOR) / max(float(error.mean()), _POWER_FLOOR))


def excerpt_figures(estimate: Tensor, target: Tensor, sample_rate: int) -> dict[str, float]:
    """The figures of `COLUMNS`, of audio [2, T]."""
    names = [name for name in COLUMNS if name != "treble_db"]
    found = measure(estimate, target, sample_rate=sample_rate, names=names)
    treble = band_level_db(estimate, sample_rate) - band_level_db(target, sample_rate)
    return {name: float(found[name]) for name in names} | {"treble_db": treble}


def whole_figures(estimate: Tensor, target: Tensor, sample_rate: int) -> dict[str, float]:
    """The figures of `WHOLE_COLUMNS`, of audio [2, T]."""
    return {
        "quiet_db": quiet_db(estimate, target, sample_rate),
        "silence_dbfs": silence_dbfs(estimate, target, sample_rate),
        "edges_db": edges_db(estimate, target, sample_rate),
    }


def row_of(
    rebuild: Callable[[Tensor, int], Tensor],
    path: Path,
    *,
    start_seconds: float,
    seconds: float,
    whole: bool,
) -> dict[str, float]:
    """All figures of one file, rebuilt by `rebuild(audio, sample_rate)`.

    Raises:
        EarVAEError: The file cannot be read, or ends before the excerpt.
    """
    audio, sample_rate = read_audio(path)
    audio = audio.expand(2, -1)
    first = round(start_seconds * sample_rate)
    target = audio[:, first : first + round(seconds * sample_rate)]
    if target.shape[1] < sample_rate:
        raise EarVAEError(f"{path}: ends before the excerpt at {start_seconds:g} s; choose another --start")
    row = excerpt_figures(rebuild(target, sample_rate), target, sample_rate)
    if whole:
        row |= whole_figures(rebuild(audio, sample_rate), audio, sample_rate)
    return row


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over the files that have it; NaN where none has."""
    result = {}
    for name in rows[0]:
        values = [row[name] for row in rows if math.isfinite(row[name])]
        result[name] = statistics.median(values) if values else math.nan
    return result


def line_of(row: Mapping[str, float], label: str) -> str:
    """A line of the table."""
    cells = []
    for name, (_, width, decimals) in (COLUMNS | WHOLE_COLUMNS).items():
        if name in row:
            value = row[name] * (100 if name in PERCENT else 1)
            cells.append(f"{value:{width}.{decimals}f}" if math.isfinite(value) else "-".rjust(width))
    return "  ".join([*cells, label])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="MUSIC")
    parser.add_argument("--model", default="ear-vae-tiny", help="as for ear-vae reconstruct (%(default)s)")
    parser.add_argument("--pattern", default="**/*", help="which files of the folder (%(default)s)")
    parser.add_argument("--start", type=float, default=10.0, help="of the excerpt, in seconds (%(default)g)")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of the excerpt (%(default)g)")
    parser.add_argument("--whole", action="store_true", help="also rebuild whole files")
    parser.add_argument("--json", type=Path, help="write the figures of every file")
    options = parser.parse_args(arguments)
    try:
        vae = EarVAE.from_pretrained(options.model)
        wanted = set(options.folder.glob(options.pattern))
        paths = [path for path in find_audio_files(options.folder) if path in wanted]
        if not paths:
            raise EarVAEError(f"{options.folder}: no audio file is called like {options.pattern!r}")

        def rebuild(audio: Tensor, sample_rate: int) -> Tensor:
            with torch.inference_mode():
                return vae.reconstruct(audio, sample_rate=sample_rate)

        columns = COLUMNS | (WHOLE_COLUMNS if options.whole else {})
        print("  ".join([*(title.rjust(width) for title, width, _ in columns.values()), "file"]))
        rows = {}
        for path in paths:
            name = str(path.relative_to(options.folder))
            rows[name] = row_of(
                rebuild,
                path,
                start_seconds=options.start,
                seconds=options.seconds,
                whole=options.whole,
            )
            print(line_of(rows[name], name), flush=True)
    except EarVAEError as error:
        print(f"reconstruction.py: {error}", file=sys.stderr)
        return 1
    print(line_of(medians(list(rows.values())), "median"))
    if options.json:
        finite = {
            name: {key: value if math.isfinite(value) else None for key, value in row.items()}
            for name, row in rows.items()
        }
        options.json.write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

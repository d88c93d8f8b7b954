"""What `encode_dataset` costs beside the encoder itself: throughput, overhead per file, memory.

    python benchmarks/encode_dataset.py MUSIC
    python benchmarks/encode_dataset.py MUSIC --decoding
    python benchmarks/encode_dataset.py --short 100 10000

With a folder of audio: the same excerpts as mp3 and as flac, encoded as a data set and by the encoder alone,
from audio that is decoded already, turn by turn; the best of the repeats. With --decoding: how fast one
thread decodes mp3 and flac to 44.1 kHz, and how large they are. With --short: one-second files and a model
that costs next to nothing. Each measurement has a process of its own, whose peak of memory it is,
without those that decode.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ear_vae import EarVAE, EarVAEConfig
from ear_vae.audio import find_audio_files, read_audio, resample, stream_audio, write_audio
from ear_vae.dsp.resampling import resample_stream
from ear_vae.encoding import encode_dataset

RATE = 44_100
SMALL = EarVAEConfig(
    channels=4, channel_multipliers=(1, 2, 2), strides=(4, 8, 8), latent_dim=8, transformer_depth=0
)


def model(name: str) -> EarVAE:
    torch.manual_seed(0)
    if name in ("published", "small"):
        return EarVAE(EarVAEConfig() if name == "published" else SMALL).eval().requires_grad_(False)
    return EarVAE.from_pretrained(name)


def excerpts(music: Path, folder: Path, count: int, seconds: int) -> float:
    """Writes excerpts as mp3 and flac; returns their length together."""
    total = 0.0
    for number, path in enumerate(find_audio_files(music)[:count]):
        audio, rate = read_audio(path, num_samples=seconds * 48_000)
        audio = resample(audio, rate, RATE)[:, : seconds * RATE]
        for format in ("mp3", "flac"):
            write_audio(folder / f"{number:03}.{format}", audio, RATE, peak="clip")
            total += audio.shape[1] / RATE
    return total


def measure(what: str, name: str, folder: Path, out: Path, optimize: bool) -> dict[str, float]:
    """Seconds, peak of memory, and how much that is beyond what it was before."""
    vae = model(name)
    with torch.inference_mode():
        if optimize:
            vae.optimize_for_inference()
        vae.encode(torch.zeros(2, 4 * RATE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "alone":
        decoded = [resample(*read_audio(path), RATE) for path in find_audio_files(folder)]
        started = time.perf_counter()
        with torch.inference_mode():
            for audio in decoded:
                vae.encode(audio)
        seconds = time.perf_counter() - started
    else:
        started = time.perf_counter()
        result = encode_dataset(folder, out, vae, files_per_shard=64, optimize=optimize)
        seconds = time.perf_counter() - started
        assert not result.num_failures
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_mb": peak / 1024, "more_mb": (peak - before) / 1024}


def in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", *arguments]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def throughput(music: Path, names: list[str], count: int, seconds: int, repeats: int, optimize: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        source.mkdir()
        total = excerpts(music, source, count, seconds)
        print(f"{2 * count} files, {total:.0f} s of audio, {torch.get_num_threads()} threads")
        for name in names:
            times: dict[str, list[float]] = {"alone": [], "data set": []}
            memory = {}
            for repeat in range(repeats):
                for what in times:
                    found = in_a_process(what, name, str(source), f"{folder}/{name}-{repeat}", optimize)
                    times[what].append(found["seconds"])
                    memory[what] = found
            best = {what: min(found) for what, found in times.items()}
            print(
                f"{name}: encoder alone {total / best['alone']:.2f}x real time, data set "
                f"{total / best['data set']:.2f}x: {100 * best['alone'] / best['data set']:.1f} %; peaks "
                f"{memory['alone']['peak_mb']:.0f} and {memory['data set']['peak_mb']:.0f} MB"
            )


def decoding(music: Path, count: int, seconds: int, repeats: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for rate in (RATE, 48_000):
            for format in ("mp3", "flac"):
                files, total = [], 0.0
                for number, path in enumerate(find_audio_files(music)[:count]):
                    audio, own_rate = read_audio(path, num_samples=seconds * 48_000)
                    audio = resample(audio, own_rate, rate)[:, : seconds * rate]
                    files.append(Path(folder, f"{number}-{rate}.{format}"))
                    write_audio(files[-1], audio, rate, peak="clip")
                    total += audio.shape[1] / rate
                times = []
                for _ in range(repeats):
                    started = time.perf_counter()
                    for file in files:
                        with stream_audio(file) as (info, blocks):
                            for _ in resample_stream(blocks, info.sample_rate, RATE):
                                pass
                    times.append(time.perf_counter() - started)
                size = sum(file.stat().st_size for file in files) / total * 3600 / 1e6
                print(f"{format} at {rate} Hz: {total / min(times):.0f}x real time, {size:.0f} MB an hour")


def short(counts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            source = Path(folder, str(count))
            source.mkdir()
            generator = torch.Generator().manual_seed(0)
            first = source / "0.wav"
            write_audio(first, 0.1 * torch.randn(2, RATE, generator=generator), RATE, subtype="PCM_16")
            content = first.read_bytes()
            for number in range(1, count):
                # Not links: each is read for itself.
                (source / f"{number}.wav").write_bytes(content)
            alone, whole = (
                in_a_process(what, "small", str(source), f"{folder}/out-{count}", "")
                for what in ("alone", "data set")
            )
            print(
                f"{count} files of 1 s: encoder alone {1000 * alone['seconds'] / count:.2f} ms a file, "
                f"data set {1000 * whole['seconds'] / count:.2f} ms, of its own "
                f"{1000 * (whole['seconds'] - alone['seconds']) / count:.2f} ms; "
                f"peak {whole['peak_mb']:.0f} MB, {whole['more_mb']:.0f} MB more than before"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("music", nargs="?", type=Path)
    parser.add_argument(
        "--model", action="append", default=[], help="published, ear-vae-tiny, a folder; repeatable"
    )
    parser.add_argument(
        "--count", type=int, default=2, help="excerpts (%(default)s), each as mp3 and as flac"
    )
    parser.add_argument("--seconds", type=int, default=30, help="length of each (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--optimize", action="store_true")
    parser.add_argument("--decoding", action="store_true")
    parser.add_argument("--short", nargs="+", type=int, default=[], metavar="COUNT")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, name, folder, out, optimize = options.measure
        print(json.dumps(measure(what, name, Path(folder), Path(out), bool(optimize))))
        return
    if options.music and options.decoding:
        decoding(options.music, options.count, options.seconds, options.repeats)
    elif options.music:
        names = options.model or ["published", "ear-vae-tiny"]
        optimize = "yes" if options.optimize else ""
        throughput(options.music, names, options.count, options.seconds, options.repeats, optimize)
    if options.short:
        short(options.short)


if __name__ == "__main__":
    main()

"""How fast encode and decode are, against the straight path and against what the machine can do.

    python benchmarks/inference.py [--quick] [--optimize] [--seconds 1 10 60 600] [--batch 1 4 16]
        [--most-seconds 1000] [--json OUT.json]

Random weights of the published size. In one run, turn by turn: `straight`, the network as published (weight
norm on, the plain Snake formula, the whole clip at once, eager; on a GPU with and without TF32), `ear_vae`,
in float32 and in bfloat16, and `diffusers`, its AutoencoderOobleck of the same width, where that library is
installed; `--optimize` adds `ear_vae_optimized`, after `EarVAE.optimize_for_inference`, and on a GPU
`ear_vae_switched`, the same with the fused sums and the reduced sine of
`ear_vae.network.snake_common.switches`. Each has a process of its own, so that its peak memory can be told. A
time is the median of the repeats after two that are not counted: a CUDA graph is recorded in the second.

On a GPU all begin and end with tensors there; `ear_vae_from_host` goes from the host's memory and back. One
has all its runs before the next begins, and then gives back the memory it keeps.

Peak memory is what a process holds at most beyond Python and torch: weights, audio and activations. The
straight path is left out where batch times length exceeds 60 s. The fraction of the peak is that of the best
of several matrix products on the same device, in the same dtype and with the same threads, each through two
libraries. The fraction of convolutions, for `ear_vae` and `ear_vae_optimized` on a CPU, is that of the rate
at which the machine convolves: after the timed runs, every convolution of the run is repeated by itself, on
random input of the same shape, dtype and layout, with its kernel reordered beforehand; what they take in all,
by the median of each times its number of calls, over the time of the whole run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ear_vae import EarVAE, EarVAEConfig
from ear_vae._atomic import atomic_path
from ear_vae.dsp._torchaudio import functional as functional_of_torchaudio
from ear_vae.network.blocks import Snake, convolutions, keep_kernels
from ear_vae.network.snake_common import switches
from ear_vae.training.weight_norm import apply_weight_norm

STRAIGHT, OURS, OPTIMIZED, DIFFUSERS = "straight", "ear_vae", "ear_vae_optimized", "diffusers"
SWITCHED = "ear_vae_switched"
FROM_HOST = "ear_vae_from_host"
TILED = (OURS, OPTIMIZED, FROM_HOST, SWITCHED)
UNCOUNTED = 2
CONVOLUTION_REPEATS = 5
DIRECTIONS = ("encode", "decode")
MOST_STRAIGHT_SECONDS = 60
MATRIX_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (1024, 2048, 4096, 8192)}
COLUMNS = (
    *("implementation", "direction", "seconds", "batch", "device", "dtype", "time_s", "times_real_time"),
    *("ratio_to_straight", "gflops", "peak_gflops", "fraction_of_peak", "fraction_of_convolutions"),
    *("peak_memory_mb", "max_abs_error"),
)


class PlainSnake(nn.Module):
    """The formula as it is written down, one operation at a time."""

    def __init__(self, snake: Snake) -> None:
        super().__init__()
        self.log_alpha, self.log_beta = snake.log_alpha, snake.log_beta

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.log_alpha.exp()[:, None], self.log_beta.exp()[:, None]
        return x + 1 / (beta + 1e-9) * torch.pow(torch.sin(x * alpha), 2)


def straight(vae: EarVAE) -> dict[str, Callable[[Tensor], Tensor]]:
    """Both directions as published."""
    for parent in list(vae.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Snake):
                setattr(parent, name, PlainSnake(child))
    apply_weight_norm(vae)

    def decode(latents: Tensor) -> Tensor:
        assert vae.transformer is not None
        return vae.decoder(vae.transformer(latents))

    return {"encode": lambda audio: vae.encoder(audio).chunk(2, dim=1)[0], "decode": decode}


def ours(vae: EarVAE) -> dict[str, Callable[[Tensor], Tensor]]:
    """Both directions as the package offers them."""
    return {"encode": lambda audio: vae.encode(audio).mean, "decode": vae.decode}


def of_diffusers(config: EarVAEConfig) -> tuple[nn.Module, dict[str, Callable[[Tensor], Tensor]]]:
    """The peer: the same blocks and widths, without the transformer."""
    # diffusers imports torchaudio, which has to come up without its extension where that does not fit.
    functional_of_torchaudio()
    from diffusers import AutoencoderOobleck

    model = AutoencoderOobleck(
        encoder_hidden_size=config.channels,
        decoder_channels=config.channels,
        downsampling_ratios=list(config.strides),
        channel_multiples=list(config.channel_multipliers),
        decoder_input_channels=config.latent_dim,
        audio_channels=config.audio_channels,
        sampling_rate=config.sample_rate,
    ).eval()
    return model, {
        "encode": lambda audio: model.encode(audio).latent_dist.mode(),
        "decode": lambda latents: model.decode(latents).sample,
    }


def build(
    implementation: str, channels: int, device: str, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Callable[[Tensor], Tensor]]]:
    """The network with the weights that seed 0 gives, and its two directions."""
    torch.manual_seed(0)
    config = EarVAEConfig(channels=channels)
    if implementation == DIFFUSERS:
        peer, directions = of_diffusers(config)
        return peer.to(device=device, dtype=dtype), directions
    vae = EarVAE(config).eval().requires_grad_(False)
    vae.cast(dtype)
    vae.to(device=device)
    if implementation == SWITCHED:
        switches.fused_sums, switches.sine = True, "reduced"
    if implementation in (OPTIMIZED, SWITCHED):
        with warnings.catch_warnings():
            # It would mean that the row shows something else than its name says.
            warnings.filterwarnings("error", "runs without being compiled")
            vae.optimize_for_inference()
    return vae, straight(vae) if implementation == STRAIGHT else ours(vae)


def example(direction: str, seconds: float, batch: int, config: EarVAEConfig) -> Tensor:
    """Noise as audio [B, C, T] or as latents [B, D, N]."""
    generator = torch.Generator().manual_seed(1)
    frames = round(seconds * config.sample_rate) // config.downsampling_ratio
    if direction == "encode":
        shape = (batch, config.audio_channels, frames * config.downsampling_ratio)
        return 0.1 * torch.randn(shape, generator=generator)
    return torch.randn(batch, config.latent_dim, frames, generator=generator)


def convolution_seconds(vae: EarVAE, run: Callable[[], Tensor]) -> float:
    """How long the convolutions of a run take when nothing else is done."""
    calls: Counter[tuple[Any, ...]] = Counter()

    def record(module: nn.Module, inputs: tuple[Tensor], options: dict[str, Any]) -> None:
        (x,) = inputs
        calls[module, x.shape, x.stride(), x.dtype, tuple(options.items())] += 1

    hooks = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for network in (vae.encoder, vae.decoder)
        for module in convolutions(network)
    ]
    run()
    for hook in hooks:
        hook.remove()
    total = 0.0
    with keep_kernels():
        for (module, shape, stride, dtype, options), count in calls.items():
            x = torch.empty_strided(shape, stride, dtype=dtype).normal_()
            times = []
            for _ in range(UNCOUNTED + CONVOLUTION_REPEATS):
                start = time.perf_counter()
                module(x, **dict(options))
                times.append(time.perf_counter() - start)
            total += count * statistics.median(times[UNCOUNTED:])
    return total


def serve(
    pipe: Connection, implementation: str, channels: int, device: str, dtype: str, threads: int
) -> None:
    """A process with one implementation: runs what it is sent, and tells time, memory and the result."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    before = resident_bytes()
    weight_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    # The network lives as long as its directions do.
    network, directions = build(implementation, channels, device, weight_dtype)
    config = EarVAEConfig(channels=channels)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        if order == "release":
            if device == "cuda":
                torch.cuda.empty_cache()
            pipe.send("released")
            continue
        direction, seconds, batch, wanted = order
        x = example(direction, seconds, batch, config)
        if implementation != FROM_HOST:
            x = x.to(device=device, dtype=weight_dtype)
        if wanted == "convolutions":
            assert isinstance(network, EarVAE)
            with torch.inference_mode():
                pipe.send(convolution_seconds(network, partial(directions[direction], x)))
            continue
        reset_peak(device)
        with torch.inference_mode():
            start = now(device)
            y = directions[direction](x)
            elapsed = now(device) - start
        pipe.send(
            (elapsed, peak_bytes(device, before), y.float().cpu().numpy() if wanted == "result" else None)
        )
        del x, y


def processor() -> str:
    """The processor, and what it has for bfloat16, as far as this torch tells."""
    tell = getattr(torch.cpu, "get_capabilities", dict)
    facts = tell()
    names = [name for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16") if facts.get(name)]
    return " ".join([facts.get("cpu_name") or platform.processor() or "CPU", *names])


def now(device: str) -> float:
    """The time, once a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_bytes() -> int:
    """What this process holds now; 0 where the system does not tell."""
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(lines[0].split()[1]) * 1024


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str, before: int) -> int | None:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    high = status_bytes("VmHWM")
    return high - before if high else None


def flops(direction: str, seconds: float, batch: int, channels: int) -> int:
    """Operations of the published network on such a clip, counted on shapes alone."""
    with torch.device("meta"):
        config = EarVAEConfig(channels=channels)
        vae = EarVAE(config)
        x = torch.empty(example(direction, seconds, batch, config).shape)
    assert vae.transformer is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encoder(x) if direction == "encode" else vae.decoder(vae.transformer(x))
    return int(counter.get_total_flops())


def matrix_peak(device: str, dtype: str, sizes: Sequence[int]) -> float:
    """The best of several matrix products, in operations per second.

    Each size is multiplied as matrices and as a convolution of kernel size 1, which is the same product in
    another library: on a CPU torch has matrices multiplied by MKL, which is slow on processors that are not
    Intel's, and convolutions by oneDNN.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    weight_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(weight_dtype) for _ in range(2))
        image = a.T[None, :, None, :].contiguous(memory_format=torch.channels_last)
        kernels = b.T[:, :, None, None].contiguous(memory_format=torch.channels_last)
        for product in (lambda a=a, b=b: a @ b, lambda x=image, w=kernels: functional.conv2d(x, w)):
            times = []
            for _ in range(6):
                start = now(device)
                product()
                times.append(now(device) - start)
            best = max(best, 2 * size**3 / statistics.median(times[1:]))
    return best


class Contender:
    """One implementation in its process."""

    def __init__(self, implementation: str, arguments: argparse.Namespace, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.implementation, self.dtype = implementation, dtype
        self._pipe, other = context.Pipe()
        settings = (other, implementation, arguments.channels, arguments.device, dtype, arguments.threads)
        self._process = context.Process(target=serve, args=settings, daemon=True)
        self._process.start()
        other.close()
        if self._answer() != "ready":
            raise SystemExit(f"{implementation} does not start")

    @property
    def process_id(self) -> int:
        """That of the system."""
        assert self._process.pid is not None
        return self._process.pid

    def run(self, *order: Any) -> tuple[float, int | None, Any]:
        self._pipe.send(order)
        return self._answer()

    def convolution_seconds(self, direction: str, seconds: float, batch: int) -> float:
        """What the convolutions of such a run take alone."""
        self._pipe.send((direction, seconds, batch, "convolutions"))
        return self._answer()

    def release(self) -> None:
        """Has memory given back that is kept for the next run."""
        self._pipe.send("release")
        self._answer()

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            return None


def compare(
    contenders: list[Contender], direction: str, seconds: float, batch: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender, run in turns, on a GPU one after the other."""
    runs: dict[int, list[tuple[float, int | None, Any]]] = {}
    order = [
        (turn, number) for turn in range(UNCOUNTED + arguments.repeats) for number in range(len(contenders))
    ]
    if arguments.device == "cuda":
        order.sort(key=lambda turn_number: turn_number[1])
    for turn, number in order:
        contender = contenders[number]
        result = contender.run(direction, seconds, batch, "result" if turn == 0 else "time")
        if result is None:
            raise SystemExit(f"{contender.implementation} ended at {direction} of {batch} x {seconds:g} s")
        runs.setdefault(number, []).append(result)
        if turn == UNCOUNTED + arguments.repeats - 1:
            contender.release()
    operations = flops(direction, seconds, batch, arguments.channels)
    reference = next((n for n, c in enumerate(contenders) if c.implementation == STRAIGHT), None)
    rows = []
    for number, contender in enumerate(contenders):
        elapsed = statistics.median(time_s for time_s, _, _ in runs[number][UNCOUNTED:])
        straight_s = (
            None
            if reference is None
            else statistics.median(time_s for time_s, _, _ in runs[reference][UNCOUNTED:])
        )
        peak = arguments.peaks[contender.dtype]
        alone = None
        if arguments.device == "cpu" and contender.implementation in (OURS, OPTIMIZED):
            alone = contender.convolution_seconds(direction, seconds, batch)
        memory = max((m for _, m, _ in runs[number] if m is not None), default=None)
        comparable = reference is not None and contender.implementation != DIFFUSERS
        error = abs(runs[number][0][2] - runs[reference][0][2]).max() if comparable else None
        rows.append(
            {
                "implementation": contender.implementation,
                "direction": direction,
                "seconds": seconds,
                "batch": batch,
                "device": arguments.device,
                "dtype": contender.dtype,
                "time_s": elapsed,
                "times_real_time": seconds * batch / elapsed,
                "ratio_to_straight": straight_s and straight_s / elapsed,
                "gflops": operations / elapsed / 1e9,
                "peak_gflops": peak / 1e9,
                "fraction_of_peak": operations / elapsed / peak,
                "fraction_of_convolutions": alone and alone / elapsed,
                "peak_memory_mb": memory and memory / 1e6,
                "max_abs_error": None if error is None else float(error),
            }
        )
    return rows


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return "" if value is None else str(value)


def contenders_of(arguments: argparse.Namespace) -> list[Contender]:
    """The implementations that this machine can run, the straight path in single precision first."""
    wanted = [(STRAIGHT, "float32"), (OURS, "float32")]
    wanted.append((OURS, "bfloat16"))
    if arguments.device == "cuda":
        wanted += [(STRAIGHT, "tf32"), (OURS, "tf32")]
        wanted += [(FROM_HOST, "float32"), (FROM_HOST, "bfloat16")]
    if arguments.optimize:
        wanted += [(OPTIMIZED, "float32"), (OPTIMIZED, "bfloat16")]
        if arguments.device == "cuda":
            wanted.append((OPTIMIZED, "tf32"))
            wanted += [(SWITCHED, "float32"), (SWITCHED, "bfloat16")]
    try:
        import diffusers  # noqa: F401

        wanted.append((DIFFUSERS, "float32"))
    except ImportError:
        print("diffusers is not installed and left out", file=sys.stderr)
    return [Contender(implementation, arguments, dtype) for implementation, dtype in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one clip of 10 s")
    parser.add_argument("--optimize", action="store_true", help="also after EarVAE.optimize_for_inference")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1, 10, 60, 600])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels", type=int, default=128, help="narrower than published")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--matrix-sizes", type=int, nargs="+", help="of the products that tell the peak")
    parser.add_argument("--most-seconds", type=float, default=float("inf"), help="of a clip times its batch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.batch = [10], [1]
    torch.set_num_threads(arguments.threads)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    print(f"{name}, {arguments.threads} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    contenders = contenders_of(arguments)
    dtypes = {contender.dtype for contender in contenders}
    sizes = arguments.matrix_sizes or MATRIX_SIZES[arguments.device]
    arguments.peaks = {dtype: matrix_peak(arguments.device, dtype, sizes) for dtype in dtypes}
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows: list[dict[str, Any]] = []
    for seconds in arguments.seconds:
        for batch in arguments.batch:
            if seconds * batch > arguments.most_seconds:
                continue
            able = [
                c for c in contenders if c.implementation in TILED or seconds * batch <= MOST_STRAIGHT_SECONDS
            ]
            for direction in DIRECTIONS:
                for row in compare(able, direction, seconds, batch, arguments):
                    print("| " + " | ".join(cell(row[column]) for column in COLUMNS) + " |", flush=True)
                    rows.append(row)
                if arguments.json:
                    # After each clip, so that a run that is ended keeps what it has measured.
                    with atomic_path(arguments.json, overwrite=True) as temporary:
                        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for contender in contenders:
        contender.close()


if __name__ == "__main__":
    main()

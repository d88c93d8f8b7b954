"""What the kernels of the network reach on a device, one by one and in the whole.

    python benchmarks/gpu_kernels.py micro|profile [--device cuda] [--channels 128] [--frames 512]
        [--blocks 5] [--repeats 20] [--minutes 8] --json OUT.json

`micro`: every shape of convolution of encoder and decoder, in float32, TF32 and bfloat16, with plain and with
channels-last memory, for the latter also with the kernel reordered before; the Snake with each sine, alone
and with bias and residual added, and what it reads and writes per second; and the networks with the switches
of `ear_vae.network.snake` on and off. `profile`: time by kernel of a pass of encoder and decoder in bfloat16,
with sums fused and without, beside what each block would take at the assumed rates of arithmetic and memory.
Stops after `--minutes`, keeping what is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ear_vae import EarVAE, EarVAEConfig
from ear_vae._atomic import atomic_path
from ear_vae.network.blocks import Snake, keep_kernels
from ear_vae.network.snake import DeferredSum
from ear_vae.network.snake_common import Sine, switches

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"plain": torch.contiguous_format, "channels last": torch.channels_last}
# Assumed of a large GPU in bfloat16: convolutions, those of 128 channels, and memory.
FLOPS_PER_SECOND, NARROW_FLOPS_PER_SECOND, BYTES_PER_SECOND = 520e12, 390e12, 2.85e12
NARROW = 128
# Reads and writes of an activation in a residual unit: two convolutions, their biases, two Snakes, the sum;
# and where the Snakes add biases and sum.
PASSES_A_UNIT = {False: 15, True: 10}
UNITS_A_BLOCK = 3


def seconds_of(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median after two calls that are not counted."""
    times = []
    for _ in range(2 + repeats):
        start = now(device)
        call()
        times.append(now(device) - start)
    return statistics.median(times[2:])


def now(device: str) -> float:
    """The time, once a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def config_of(arguments: argparse.Namespace) -> EarVAEConfig:
    """The published network, or narrower, or its first blocks only."""
    published = EarVAEConfig()
    return EarVAEConfig(
        channels=arguments.channels,
        channel_multipliers=published.channel_multipliers[: arguments.blocks],
        strides=published.strides[: arguments.blocks],
    )


def networks(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, tuple[nn.Module, Tensor]]:
    """Encoder and decoder with random weights, and input as inference gives it to them."""
    config = config_of(arguments)
    vae = EarVAE(config).eval().requires_grad_(False).to(device=arguments.device, dtype=dtype)
    shapes = {
        "encoder": (1, config.audio_channels, 1, arguments.frames * config.downsampling_ratio),
        "decoder": (1, config.latent_dim, 1, arguments.frames),
    }
    return {
        name: (
            getattr(vae, name),
            torch.randn(shape, device=arguments.device, dtype=dtype).contiguous(
                memory_format=torch.channels_last
            ),
        )
        for name, shape in shapes.items()
    }


def shapes_of(network: nn.Module, x: Tensor, kind: type | tuple[type, ...]) -> list[tuple[nn.Module, Tensor]]:
    """Modules of a kind with what they get, one for each geometry."""
    found: dict[str, tuple[nn.Module, Tensor]] = {}

    def remember(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.setdefault(f"{module} {list(given[0].shape)}", (module, given[0]))

    hooks = [m.register_forward_pre_hook(remember) for m in network.modules() if isinstance(m, kind)]
    network(x)
    for hook in hooks:
        hook.remove()
    return list(found.values())


def micro(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each measurement."""
    device, repeats = arguments.device, arguments.repeats
    for precision, dtype in PRECISIONS.items():
        allow_tf32(precision == "tf32")
        for name, (network, x) in networks(arguments, dtype).items():
            for module, given in shapes_of(network, x, (nn.Conv1d, nn.ConvTranspose1d)):
                assert isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
                output = module(given)
                # A transposed convolution has its kernel at each place of its input.
                places = given if isinstance(module, nn.ConvTranspose1d) else output
                flops = 2 * module.weight.numel() * places.shape[-1] * places.shape[0]
                moved = (given.numel() + output.numel() + module.weight.numel()) * given.element_size()
                for layout, kept in (("plain", False), ("channels last", False), ("channels last", True)):
                    image = given.contiguous(memory_format=LAYOUTS[layout])
                    with keep_kernels() if kept else nullcontext():
                        seconds = seconds_of(lambda m=module, i=image: m(i), device, repeats)
                    yield {
                        "what": "convolution",
                        "network": name,
                        "module": str(module),
                        "input": list(given.shape),
                        "precision": precision,
                        "layout": layout,
                        "kernel_reordered_before": kept,
                        "seconds": seconds,
                        "flops_per_second": flops / seconds,
                        "bytes_per_second": moved / seconds,
                    }
    allow_tf32(False)
    for precision in ("float32", "bfloat16"):
        for name, (network, x) in networks(arguments, PRECISIONS[precision]).items():
            snakes = shapes_of(network, x, Snake)
            for sine in get_args(Sine):
                # Triton's interpreter and the plain formula know only the exact one.
                if device == "cpu" and sine != "exact":
                    continue
                switches.sine = sine
                for module, given in snakes:
                    assert isinstance(module, Snake)
                    for row in snake_rows(module, given, device, repeats):
                        yield {"network": name, "precision": precision, "sine": sine, **row}
                for fused in (False, True):
                    switches.fused_sums = fused
                    yield {
                        "what": "network",
                        "network": name,
                        "precision": precision,
                        "sine": sine,
                        "fused_sums": fused,
                        "seconds": seconds_of(lambda n=network, i=x: n(i), device, repeats),
                    }
                switches.fused_sums = False
            switches.sine = "exact"
            for traced in (False, True):
                switches.traced_formula = traced
                torch.compiler.reset()
                compiled = torch.compile(network)
                try:
                    seconds = seconds_of(lambda c=compiled, i=x: c(i), device, repeats)
                except Exception as error:
                    # A compiler may be missing; the other rows are worth having.
                    print(f"torch.compile: {str(error).splitlines()[:1]}")
                    continue
                yield {
                    "what": "network after torch.compile",
                    "network": name,
                    "precision": precision,
                    "traced_formula": traced,
                    "seconds": seconds,
                }
            switches.traced_formula = False


def snake_rows(snake: Snake, x: Tensor, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """The Snake of a tensor, of a sum, and of a sum that is kept as well."""
    bias, residual = torch.randn(x.shape[1], device=x.device, dtype=x.dtype), torch.randn_like(x)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "x": (lambda: snake(x), 2),
        "x + bias": (lambda: snake(DeferredSum(x, bias)), 2),
        "x + bias + residual, kept": (lambda: snake.with_input(DeferredSum(x, bias, residual)), 4),
    }
    for of, (call, passes) in calls.items():
        seconds = seconds_of(call, device, repeats)
        yield {
            "what": "snake",
            "of": of,
            "input": list(x.shape),
            "seconds": seconds,
            "bytes_per_second": passes * x.numel() * x.element_size() / seconds,
        }


def roofline(arguments: argparse.Namespace, fused: bool) -> dict[str, Any]:
    """Seconds of the residual units of each block at the assumed rates, for one direction in bfloat16."""
    config = config_of(arguments)
    positions, blocks = arguments.frames * config.downsampling_ratio, []
    for (width, _), stride in zip(config.block_widths, config.strides, strict=True):
        flops = UNITS_A_BLOCK * 2 * (7 + 1) * width**2 * positions
        moved = UNITS_A_BLOCK * PASSES_A_UNIT[fused] * 2 * width * positions
        rate = NARROW_FLOPS_PER_SECOND if width <= NARROW else FLOPS_PER_SECOND
        blocks.append(
            {
                "width": width,
                "flops": flops,
                "bytes": moved,
                "seconds_of_arithmetic": flops / rate,
                "seconds_of_memory": moved / BYTES_PER_SECOND,
            }
        )
        positions //= stride
    assumed = [FLOPS_PER_SECOND, BYTES_PER_SECOND]
    return {"what": "roofline", "fused_sums": fused, "assumed": assumed, "blocks": blocks}


def profiled(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time by kernel (by operator on a CPU), and the roofline."""
    on_gpu = arguments.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for fused in (False, True):
        switches.fused_sums = fused
        yield roofline(arguments, fused)
        for name, (network, x) in networks(arguments, torch.bfloat16).items():
            seconds = seconds_of(lambda n=network, i=x: n(i), arguments.device, arguments.repeats)
            with profile(activities=activities) as seen:
                network(x)
                now(arguments.device)
            rows = sorted(
                (
                    {
                        "name": event.key,
                        "calls": event.count,
                        "seconds": (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
                        / 1e6,
                    }
                    for event in seen.key_averages()
                ),
                key=lambda row: -row["seconds"],
            )
            found = {"network": name, "fused_sums": fused, "seconds": seconds, "kernels": rows[:40]}
            yield {"what": "pass", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("micro", "profile"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--channels", type=int, default=128, help="narrower than published")
    parser.add_argument("--blocks", type=int, default=5, help="only the first blocks of the published five")
    parser.add_argument("--frames", type=int, default=512, help="latent frames of the input")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    result: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "complete": False,
        "rows": [],
    }
    ends = time.monotonic() + 60 * arguments.minutes
    try:
        with torch.no_grad():
            for row in {"micro": micro, "profile": profiled}[arguments.stage](arguments):
                result["rows"].append(row)
                print(json.dumps(row)[:200], flush=True)
                if time.monotonic() > ends:
                    break
            else:
                result["complete"] = True
    finally:
        # The rows that there are outlive an error in the next.
        with atomic_path(arguments.json, overwrite=True) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

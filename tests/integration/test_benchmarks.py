"""What the benchmarks say: the tables of the ablation and of the paper, and the parts of a step."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import soundfile
import torch
from script_loading import load_script
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ear_vae import EarVAEConfig, EarVAEError
from ear_vae.network.discriminator import DiscriminatorConfig
from ear_vae.training import EarVAEModule
from ear_vae.training.module import ObjectiveConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


@pytest.fixture(scope="module")
def script(repository: Path) -> Callable[[str], ModuleType]:
    """A benchmark by its name."""
    return lambda name: load_script(repository / "benchmarks" / f"{name}.py")


@pytest.fixture
def ablation(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a training that only says what it was asked to do."""
    module = script("ablation")
    monkeypatch.setattr(module, "train", lambda settings: (settings, None))
    return module


def run(
    ablation: ModuleType, results: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> list[dict[str, Any]]:
    """The trainings that a run of the script asks for; A-weighting gives 1 dB more, or ½ with seed 2."""
    asked: list[dict[str, Any]] = []

    def evaluate(settings: dict[str, Any], data: None) -> dict[str, float]:
        asked.append(settings)
        better = (settings["objective"].get("weighting") == "a") / (1 + (settings["seed"] == 2))
        return dict.fromkeys(ablation.METRICS, 0.0) | {"si_sdr_db": settings["seed"] + better}

    monkeypatch.setattr(ablation, "evaluate", evaluate)
    common = ["--data", "here", "--validation", "there", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *common, *options])
    ablation.main()
    return asked


def test_the_ablation_trains_what_is_missing(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results.jsonl"
    few = ("--variants", "base", "A-weighting", "--seeds", "1")
    assert len(run(ablation, results, monkeypatch, *few)) == 2
    assert run(ablation, results, monkeypatch, *few) == []
    (seed, other) = run(ablation, results, monkeypatch, *few, "2")
    assert (seed["seed"], other["seed"]) == (2, 2)
    assert len(run(ablation, results, monkeypatch, *few, "--steps", "7")) == 2
    assert len([json.loads(line) for line in results.read_text().splitlines()]) == 6
    results.write_text(results.read_text() + '{"settings": \n')
    with pytest.raises(EarVAEError, match=r"results\.jsonl: line 7 is no result"):
        run(ablation, results, monkeypatch, *few)


def test_the_ablations_variants_differ_in_one_thing(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = run(ablation, tmp_path / "results.jsonl", monkeypatch, "--seeds", "0")
    base = next(settings for settings, name in zip(asked, ablation.VARIANTS, strict=True) if name == "base")
    for settings, name in zip(asked, ablation.VARIANTS, strict=True):
        different = {key for key in base if settings[key] != base[key]}
        assert len(different) == (name != "base"), name
        EarVAEModule(EarVAEConfig(**settings["config"]), objective=ObjectiveConfig(**settings["objective"]))


def test_the_ablations_table(
    ablation: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 1, 2, 3 and of 2, 2.5, 4: the differences 1, ½, 1 have mean 0.83 and deviation 0.29."""
    options = ("--variants", "base", "A-weighting", "--seeds", "1", "2", "3")
    run(ablation, tmp_path / "results.jsonl", monkeypatch, *options)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    first = [row[:2] for row in rows if len(row) > 1]
    assert first[1:3] == [["| base", "2.00 ± 1.00"], ["| A-weighting", "2.83 ± 1.04"]]
    assert first[-1] == ["| A-weighting", "**+0.83 ± 0.29**"]
    assert rows[-1][2] == "+0.000 ± 0.000"
    run(ablation, tmp_path / "results.jsonl", monkeypatch, "--variants", "A-weighting", "--seeds", "1")
    assert "difference" not in capsys.readouterr().out


class _SlowBatches(Dataset[Tensor]):
    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        self.clock[0] += self.seconds
        return 0.1 * torch.randn(2, 2, 4096, generator=torch.Generator().manual_seed(index))


class _Busy(torch.autograd.Function):
    """Does nothing, and lets a clock of our own run while it does it."""

    @staticmethod
    def forward(context: Any, x: Tensor, clock: list[float], before: float, after: float) -> Tensor:
        context.clock, context.after = clock, after
        clock[0] += before
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        context.clock[0] += context.after
        return gradient, None, None, None


@pytest.mark.parametrize("balanced", [False, True])
def test_the_parts_of_a_step(
    balanced: bool,
    script: Callable[[str], ModuleType],
    tiny_config: EarVAEConfig,
    tiny_discriminator: DiscriminatorConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Time that only data, generator, losses and discriminator take is booked where it belongs."""
    benchmark = script("training_step")
    clock = [0.0]
    monkeypatch.setattr(benchmark, "now", lambda: clock[0])
    module = EarVAEModule(
        tiny_config,
        objective=ObjectiveConfig(
            weights={"instantaneous_frequency": 0, "group_delay": 0, "log_magnitude": 0}, balanced=balanced
        ),
        discriminator=tiny_discriminator,
    )

    def busy(owner: nn.Module, name: str, before: float, after: float) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda x, *rest: original(_Busy.apply(x, clock, before, after), *rest), raising=False
        )

    busy(module.vae.decoder, "forward", 1, 10)
    busy(module.objective, "terms", 100, 1_000)
    assert module.discriminator is not None
    busy(module.discriminator, "forward", 10_000, 100_000)
    ledger = benchmark.Ledger()
    measure = benchmark.Measure(ledger, warmup=1, steps=1)
    batches = _SlowBatches(clock, 1_000_000)
    L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[measure],
        profiler=benchmark.DataTime(ledger),
    ).fit(module, DataLoader(batches, batch_size=None))
    found = {part: seconds for part, seconds in ledger.seconds.items() if seconds}
    expected = {
        benchmark.DATA: 1_000_000,
        benchmark.GENERATOR: 1,
        benchmark.GENERATOR_BACK: 10,
        benchmark.LOSSES: 100,
        benchmark.JUDGE: 20_000,
        benchmark.FEEDBACK: 20_000,
    }
    if balanced:
        # Two terms come back through the losses, two through the discriminator.
        expected[benchmark.BALANCER] = 2 * 1_000 + 2 * 100_000
    else:
        expected |= {benchmark.LOSSES_BACK: 1_000, benchmark.FEEDBACK_BACK: 100_000}
    assert found == expected
    assert measure.plain_seconds == sum(expected.values())


@pytest.mark.slow
def test_paper_table(
    script: Callable[[str], ModuleType],
    noise: Callable[..., Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = script("paper_table")
    rate = 44_100
    audio, error = noise(2, 4 * rate, seed=0), noise(2, 4 * rate, seed=1)
    layouts = {"{system}/{name}": "by_system", "{name}/{system}": "by_name"}
    for layout, folder in layouts.items():
        for name in ("a", "b"):
            for system, level in {"gt": 0, "near": 0.1, "far": 1}.items():
                path = tmp_path / folder / (layout.format(system=system, name=name) + ".wav")
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, (audio + level * error).T.numpy(), rate, subtype="FLOAT")
    tables = []
    for layout, folder in layouts.items():
        assert table.main([str(tmp_path / folder), "--layout", layout]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[0].splitlines()]
    assert [line[0] for line in lines] == ["", "---", "near", "far"]
    near, far = (dict(zip(lines[0], line, strict=True)) for line in lines[2:])
    # Noise that is 20 dB below, and one of equal level; nearly uncorrelated with the original.
    assert float(near["SI-SDR dB ↑"]) == pytest.approx(20, abs=0.2)
    assert float(far["SI-SDR dB ↑"]) == pytest.approx(0, abs=0.2)
    assert near["files"] == far["files"] == "2"
    assert float(near["ICPC % ↑"]) > float(far["ICPC % ↑"]) > 30

    # Originals alone, through a model; the second run finds the first one's rows.
    rows = tmp_path / "rows.jsonl"
    options = [str(tmp_path / "by_system" / "gt"), "--layout", "{name}", "--model", "ear-vae-tiny"]
    assert table.main([*options, "--rows", str(rows)]) == 0
    first, written = capsys.readouterr().out, rows.read_text(encoding="utf-8").split()
    assert "| ear-vae-tiny |" in first
    assert table.main([*options, "--rows", str(rows)]) == 0
    assert capsys.readouterr().out == first
    assert rows.read_text(encoding="utf-8").split() == written

    for wrong, reason in {
        ("--layout", "{system}"): "no {name}",
        ("--layout", "{name}/{system}", "--original", "truth"): "no originals called 'truth'",
        ("--layout", "{name}"): "originals only",
    }.items():
        assert table.main([str(tmp_path / "by_name"), *wrong]) == 1
        assert reason in capsys.readouterr().err


def test_reconstruction_figures(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of estimates whose faults are known: treble 6 dB too low, noise in silence, a click at the end."""
    benchmark = script("reconstruction")
    rate = 44_100
    time = torch.arange(4 * rate) / rate
    low, high = (torch.sin(2 * math.pi * hz * time).expand(2, -1) for hz in (400.0, 9_000.0))
    target = 0.3 * low + 0.1 * high
    figures = benchmark.excerpt_figures(0.3 * low + 0.05 * high, target, rate)
    assert figures["treble_db"] == pytest.approx(-6.02, abs=0.01)
    assert figures["si_sdr_db"] == pytest.approx(10 * math.log10((0.3**2 + 0.1**2) / 0.05**2), abs=0.2)

    target[:, : 2 * rate] = 0
    estimate = target.clone()
    estimate[:, rate // 2 : 3 * rate // 2] = 1e-3
    figures = benchmark.whole_figures(estimate, target, rate)
    assert figures["silence_dbfs"] == pytest.approx(-60, abs=0.01)
    assert math.isnan(figures["quiet_db"])
    quiet = target.clone()
    quiet[:, : 2 * rate] = 5e-4  # -66 dBFS
    assert benchmark.whole_figures(estimate, quiet, rate)["quiet_db"] == pytest.approx(6.02, abs=0.01)
    clicking = 0.99 * target
    clicking[:, -1] += 0.5
    length = round(0.02 * rate)
    edge = (clicking - target)[:, -length:].square().mean() / (clicking - target).square().mean()
    found = benchmark.whole_figures(clicking, target, rate)["edges_db"]
    assert found == pytest.approx(10 * math.log10(float(edge)), abs=1e-3)
    assert found > 10

    soundfile.write(tmp_path / "gt.wav", target.T.numpy(), rate, subtype="FLOAT")
    soundfile.write(tmp_path / "other.wav", target.T.numpy(), rate, subtype="FLOAT")
    json_file = tmp_path / "figures.json"
    options = ["--start", "2", "--seconds", "2", "--whole", "--json", str(json_file)]
    assert benchmark.main([str(tmp_path), "--pattern", "**/gt.*", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["file", "gt.wav", "median"]
    # In per cent, as in every table.
    assert lines[0].split()[4:6] == ["ICPC", "%"]
    assert float(lines[1].split()[3]) > 1
    assert json.loads(json_file.read_text(encoding="utf-8"))["gt.wav"].keys() == {
        *benchmark.COLUMNS,
        *benchmark.WHOLE_COLUMNS,
    }
    assert benchmark.main([str(tmp_path), "--start", "60"]) == 1
    assert "ends before the excerpt" in capsys.readouterr().err

"""Runs the blocks of code in README.md, MODEL_CARD.md, docs and examples, and the examples in docstrings.

Each page has a folder of its own with short audio and small models, in which its blocks run in their order.
A block after `<!-- only parsed: REASON -->` is not run: a command line is taken by the real parser of its
program, Python is compiled. Of a diff both sides are compiled; tests/integrations runs them beside the
programs they are about.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest
import soundfile
import torch
import yaml
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from sybil.parsers.rest import DocTestParser
from tests.integrations.documentation import sides_of_diff

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent
RATE = 44_100
LANGUAGES = ("python", "sh", "diff", "yaml")
ONLY_PARSED = re.compile(r"<!-- only parsed: (\S[^\n]*) -->\n\Z")
# Patterns of what takes too long or a download, and what the tests take instead.
SMALLER = {
    r"\bear_vae_44k\b(?!\.pyt)": "small",  # the published weights
    r"--model (dac|sao)\b": "",  # other codecs, which are downloaded
    r"range\(0, 160_000\)": "range(0, 32)",
    r"num_workers=4": "num_workers=0",
}
# Programs of the system, which change it.
NOT_OURS = ("apt", "eval", "source")


class _Parsed(BaseException):
    """The program has taken its arguments; that is all that was asked."""


def page(document: Document) -> Iterator[Region]:
    """All blocks of code of a page as one example: later ones need what earlier ones made.

    Raises:
        ValueError: A block is in a language that nothing here can run.
    """
    found = []
    for region in FencedCodeBlockLexer(r"\w*")(document):
        language, source = region.lexemes["language"], region.lexemes["source"]
        if language in ("", "bibtex"):
            continue  # what a program prints, or what is cited
        if language not in LANGUAGES:
            raise ValueError(f"{document.path}: a block in {language!r}, expected one of {LANGUAGES}")
        before = document.text[: region.start]
        found.append((language, source, before.count("\n") + 1, bool(ONLY_PARSED.search(before))))
    if found:
        yield Region(0, len(document.text), parsed=found, evaluator=evaluate_page)


def evaluate_page(example: Example) -> None:
    """Runs the blocks of a page in its folder."""
    before = Path.cwd()
    os.chdir(example.namespace["workplace"])
    try:
        for language, source, line, only_parsed in example.parsed:
            print(f"{example.path}:{line}")  # which pytest shows where one fails
            evaluate_block(example, language, source, line, only_parsed=only_parsed)
    finally:
        os.chdir(before)


def evaluate_block(example: Example, language: str, source: str, line: int, *, only_parsed: bool) -> None:
    """Runs or checks one block."""
    if language == "diff":
        for side in sides_of_diff(source):
            compile(side, example.path, "exec")
        return
    if language == "yaml":
        assert isinstance(yaml.safe_load(source), dict)
        return
    for name, smaller in SMALLER.items():
        source = re.sub(name, smaller, source)
    if language == "sh":
        for words in command_lines(source):
            run_command(words, only_parsed=only_parsed)
        return
    # As many lines before it as in the page, for a traceback that tells the right one.
    code = compile("\n" * line + source, example.path, "exec")
    if not only_parsed:
        exec(code, example.namespace)


def command_lines(source: str) -> list[list[str]]:
    """The words of each command of a block."""
    lines = source.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str], *, only_parsed: bool) -> None:
    """Runs a command line, or has its program parse it."""
    from ear_vae.cli.main import main

    words = [word for word in words if not re.match(r"^[A-Z_]+=", word)]  # variables of the environment
    program, *arguments = words
    if program == "ear-vae":
        if not only_parsed:
            assert main(arguments) == 0
        elif arguments[0] == "fit":
            with pytest.raises(SystemExit) as left:
                main([*arguments, "--print_config"])
            assert left.value.code == 0
        else:
            from ear_vae.cli.options import parse

            parse(arguments)
    elif program == "python":
        assert only_parsed, "say why it is not run: <!-- only parsed: REASON -->"
        parse_as_script(ROOT / arguments[0], arguments[1:])
    elif program == "pip":
        check_extras(arguments)
    elif program == "cp":
        assert (ROOT / arguments[0]).is_file()
    elif program.startswith("./scripts/"):
        assert os.access(ROOT / program, os.X_OK)
    else:
        assert program in NOT_OURS, f"nothing here knows the program {program}"


def _and_stop(parse_args: Callable[..., Any]) -> Callable[..., Any]:
    def stop(*given: Any, **options: Any) -> None:
        parse_args(*given, **options)
        raise _Parsed

    return stop


def parse_as_script(script: Path, arguments: list[str]) -> None:
    """Runs a script up to where it has parsed its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(str(script.parent))
        # Lightning's command line has the other one.
        for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
            patch.setattr(parser, "parse_args", _and_stop(parser.parse_args))
        with contextlib.suppress(_Parsed):
            runpy.run_path(str(script), run_name="__main__")
            pytest.fail(f"{script} parsed no arguments")


def check_extras(arguments: list[str]) -> None:
    """`pip install` of this package: with extras that there are."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert arguments[0] == "install"
    ours = [argument for argument in arguments[1:] if not argument.startswith(("-", "https://", "torch"))]
    for requirement in ours:
        found = re.fullmatch(r"(?:\.|ear-vae)(?:\[([\w,]+)\])?", requirement)
        assert found, requirement
        assert set(filter(None, (found[1] or "").split(","))) <= set(known["optional-dependencies"])


def write_audio(path: Path, seconds: float = 0.5) -> None:
    """Noise of two channels with a tone, the same for one name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(path.name))
    time = np.arange(int(seconds * RATE))[:, None] / RATE
    noise = 0.02 * generator.standard_normal((len(time), 2))
    soundfile.write(path, 0.2 * np.sin(2 * np.pi * 220 * time) + noise, RATE)


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`, a folder with a narrow model of the published strides, and the same in the authors' layout."""
    from ear_vae import EarVAE, EarVAEConfig
    from ear_vae.pretrained import convert

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pages")
    EarVAE(EarVAEConfig(channels=4)).save_pretrained(folder / "small")
    (folder / "pretrained_weight").mkdir()
    convert(folder / "small", folder / "pretrained_weight" / "ear_vae_44k.pyt")
    (folder / "config").mkdir()
    shutil.copy(folder / "small" / "config.json", folder / "config" / "model_config.json")
    for stage in ("third", "fourth"):
        shutil.copytree(folder / "small", folder / "runs" / f"tiny_{stage}" / "model")
    return folder


@pytest.fixture
def workplace(tmp_path_factory: pytest.TempPathFactory, small_models: Path) -> Path:
    """The folder in which the blocks of a page run, with all that pages name."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(small_models, folder, dirs_exist_ok=True)
    for name in ("song.mp3", "examples/piece.ogg", "music/a.wav"):
        write_audio(folder / name)
    for name in ("MUSIC", "OTHER_MUSIC", "CHOSEN", "ORIGINALS", "REBUILT"):
        write_audio(folder / name / "a.wav")
        write_audio(folder / name / "train" / "song.flac", seconds=0.8)
    (folder / "list.csv").write_text("path,prompt\nmusic/a.wav,a tone\n")
    np.save(folder / "latents.npy", np.zeros((1, 64, 20), np.float32))
    return folder


@pytest.fixture
def audio() -> torch.Tensor:
    """[2, T] at 44.1 kHz, the audio that a page has already."""
    return 0.1 * torch.randn(2, RATE // 2, generator=torch.Generator().manual_seed(0))


pages = Sybil(
    parsers=[page],
    patterns=["README.md", "MODEL_CARD.md", "docs/*.md", "examples/*.md", "examples/*/*.md"],
    fixtures=["workplace", "audio"],
)
docstrings = Sybil(parsers=[DocTestParser()], path="src", pattern="*.py")
pytest_collect_file = (pages + docstrings).pytest()

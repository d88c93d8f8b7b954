"""Finding out which rebuilt file belongs to which original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ear_vae.audio.folders import find_files
from ear_vae.audio.formats import AUDIO_EXTENSIONS
from ear_vae.errors import EarVAEError

DEFAULT_PATTERN = "{name}"


@dataclass(frozen=True)
class Pair:
    """An original and what a system made of it.

    Attributes:
        name: Path of the original inside its folder, with `/`, without extension.
        target: Path of the original.
        estimate: Path of the rebuilt file; None where a model is still to make it.
    """

    name: str
    target: Path
    estimate: Path | None = None


@dataclass(frozen=True)
class Pairs:
    """Pairs, and files that belong to none.

    Attributes:
        pairs: Pairs, sorted by name.
        without_estimate: Names of originals that have no rebuilt file.
        without_target: Rebuilt files that belong to no original.
        unreadable: Parts of the folders that could not be read, as in `ear_vae.audio.folders.Found`.
    """

    pairs: tuple[Pair, ...]
    without_estimate: tuple[str, ...] = ()
    without_target: tuple[Path, ...] = ()
    unreadable: tuple[str, ...] = ()


def find_targets(target: Path) -> Pairs:
    """Lists the originals in a folder, or the one file, without estimates.

    Files that this package rebuilt from others there are none, see `ear_vae.audio.folders.Found`.

    Args:
        target: Folder of originals, searched with its subfolders, or one file.

    Raises:
        EarVAEError: There is no such file or folder, no audio in it, or two files of one name.
    """
    if target.is_file():
        return Pairs((Pair(target.stem, target),))
    originals, unreadable = _by_name(target, are_originals=True)
    return Pairs(tuple(Pair(name, path) for name, path in originals.items()), unreadable=unreadable)


def find_pairs(target: Path, estimate: Path, *, pattern: str = DEFAULT_PATTERN) -> Pairs:
    """Pairs the files of two folders by name, or two single files.

    Args:
        target: Folder of originals, searched with its subfolders, or one file.
        estimate: Folder of rebuilt audio, or one file, as `target`.
        pattern: Name of the rebuilt file inside its folder, without extension, with `{name}` for that of the
            original, such as `{name}_ear_vae`.

    Raises:
        EarVAEError: A missing, empty or mixed pair of paths, a pattern without `{name}`, two files of one
            name, or no pair at all.
    """
    for path in (target, estimate):
        if not path.exists():
            raise EarVAEError(f"{path}: no such file or folder")
    if target.is_file() != estimate.is_file():
        folder, file = (target, estimate) if estimate.is_file() else (estimate, target)
        raise EarVAEError(f"{folder} is a folder and {file} a file; give two folders or two files")
    if target.is_file():
        return Pairs((Pair(target.stem, target, estimate),))
    if "{name}" not in pattern:
        raise EarVAEError(f"the pattern {pattern!r} has no {{name}} in it, for the name of the original")
    originals, unseen = _by_name(target, are_originals=True)
    rebuilt, unseen_too = _by_name(estimate, are_originals=False)
    wanted = {name: pattern.replace("{name}", name) for name in originals}
    if target.resolve() == estimate.resolve() and pattern != DEFAULT_PATTERN:
        # In a shared folder, the estimate of one file is not an original itself.
        for made in set(wanted.values()):
            originals.pop(made, None)
    pairs = tuple(
        Pair(name, path, rebuilt[wanted[name]]) for name, path in originals.items() if wanted[name] in rebuilt
    )
    if not pairs:
        name = next(iter(originals))
        raise EarVAEError(
            f"no file of {estimate} belongs to one of {target}: for {name} there should be {wanted[name]}, "
            f"there is for example {next(iter(rebuilt))}; give a pattern that says how they are named",
            argument="pattern",
            value=...,
        )
    used = {pair.estimate for pair in pairs} | set(originals.values())
    return Pairs(
        pairs,
        tuple(name for name in originals if wanted[name] not in rebuilt),
        tuple(path for path in rebuilt.values() if path not in used),
        tuple(dict.fromkeys((*unseen, *unseen_too))),
    )


def _by_name(folder: Path, *, are_originals: bool) -> tuple[dict[str, Path], tuple[str, ...]]:
    if not folder.exists():
        raise EarVAEError(f"{folder}: no such file or folder")
    found: dict[str, Path] = {}
    seen = find_files(folder, AUDIO_EXTENSIONS)
    for path in seen.originals if are_originals else seen.files:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise EarVAEError(f"{found[name]} and {path} have the same name; remove or rename one of them")
        found[name] = path
    if not found:
        raise EarVAEError(f"{folder}: holds no audio files")
    return found, seen.unreadable

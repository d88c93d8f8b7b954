"""What holds for the source as a whole: its names, and no use of what other libraries keep to themselves."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

FOLDERS = ("src", "tests", "benchmarks", "examples")
# What its library documents under such a name, and nowhere else.
DOCUMENTED = {
    "torch.utils._python_dispatch.TorchDispatchMode",  # "Extending PyTorch", on modes
    "torch._subclasses.fake_tensor.FakeTensorMode",  # torch.compile programming model, "Fake tensor"
}
# Operators are no Python attributes, though they are called like ones.
OPERATORS = "torch.ops."


def parsed(folder: Path) -> dict[str, ast.Module]:
    """Every module below a folder, by its path relative to it."""
    files = sorted(folder.rglob("*.py"))
    return {file.relative_to(folder).as_posix(): ast.parse(file.read_text("utf-8")) for file in files}


def public_definitions(module: ast.Module) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in module.body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_no_two_public_functions_or_classes_have_one_name(repository: Path) -> None:
    """Who meets a name knows what it is, without looking at the import."""
    places: dict[str, list[str]] = defaultdict(list)
    for place, module in parsed(repository / "src" / "ear_vae").items():
        for name in public_definitions(module):
            places[name].append(place)
    assert len(places) > 200
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def modules_named(module: ast.Module, known: Set[str]) -> set[str]:
    """Modules of this package that a module imports, wherever it does, or names for a later import."""
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and not node.level:
            # A module of a package, or what a module or package defines.
            paths = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {path if path in known else str(node.module) for path in paths}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            found |= {str(a.value) for a in node.args if isinstance(a, ast.Constant)}
    return found & set(known)


def test_no_import_goes_round_in_a_circle(repository: Path) -> None:
    """Imports within functions count, too: they are where a circle hides."""
    modules = {
        "ear_vae." + place.removesuffix(".py").removesuffix("/__init__").replace("/", "."): module
        for place, module in parsed(repository / "src" / "ear_vae").items()
        if place != "__init__.py"
    }
    graph = {name: modules_named(module, modules.keys()) for name, module in modules.items()}
    assert sum(map(len, graph.values())) > 300
    graphlib.TopologicalSorter(graph).prepare()


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def imported(module: ast.Module, own: set[str]) -> dict[str, str]:
    """What the names that are bound by imports of other people's libraries stand for."""
    bound: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name if alias.asname else alias.name.partition(".")[0]
                bound[alias.asname or path] = path
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    known = own | sys.stdlib_module_names
    return {name: path for name, path in bound.items() if path.partition(".")[0] not in known}


def path_of(node: ast.expr, bound: dict[str, str]) -> str:
    """The dotted path of `a.b.c` where a is imported; empty for anything else."""
    if isinstance(node, ast.Name):
        return bound.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := path_of(node.value, bound)):
        return f"{owner}.{node.attr}"
    return ""


def inherited(node: ast.ClassDef) -> set[str]:
    """The private attributes of `self` that a class uses and does not make."""
    used: set[str] = set()
    made: set[str] = set()
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        ):
            (used if isinstance(inner.ctx, ast.Load) else made).add(inner.attr)
        elif isinstance(inner, ast.FunctionDef):
            made.add(inner.name)
        elif isinstance(inner, ast.Name):
            made.add(inner.id)
        elif isinstance(inner, ast.Constant):
            made.add(str(inner.value))
    return {name for name in used - made if is_private(name)}


def foreign_private_names(module: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of other people's libraries that a module imports, reaches into, or inherits."""
    bound = imported(module, own)
    yield from filter(is_private, bound.values())
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            yield from filter(is_private, [path_of(node, bound)])
        elif isinstance(node, ast.ClassDef) and node.bases and all(path_of(b, bound) for b in node.bases):
            yield from (f"{path_of(node.bases[0], bound)}.{name}" for name in inherited(node))


@pytest.mark.parametrize("folder", FOLDERS)
def test_private_names_of_other_libraries_are_left_alone(repository: Path, folder: str) -> None:
    own = {"ear_vae", *(file.stem for place in FOLDERS for file in (repository / place).rglob("*.py"))}
    found = {
        (place, name)
        for place, module in parsed(repository / folder).items()
        for name in foreign_private_names(module, own)
        if not name.startswith(OPERATORS) and not any(name.startswith(known) for known in DOCUMENTED)
    }
    assert found == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._foreach_lerp_([])", {"torch._foreach_lerp_"}),
        ("import torch as t\nt.nn._x.y", {"torch.nn._x", "torch.nn._x.y"}),
        ("from lightning.pytorch import _graveyard", {"lightning.pytorch._graveyard"}),
        ("from huggingface_hub._x import y", {"huggingface_hub._x.y"}),
        (
            "from torch import nn\nclass A(nn.Module):\n    def f(self): self._x",
            {"torch.nn.Module._x"},
        ),
        ("from torch import nn\nclass A(nn.Module):\n    _own = 1\n    def f(self): self._own", set()),
        ("import os\nfrom ear_vae import _atomic\nos._exit(_atomic._x)", set()),
        ("import soundfile\nsoundfile.__libsndfile_version__", set()),
    ],
)
def test_what_counts_as_private(source: str, found: set[str]) -> None:
    assert set(foreign_private_names(ast.parse(source), {"ear_vae"})) == found

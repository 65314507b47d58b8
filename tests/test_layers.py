"""The arrows of the design: who may import whom, and what nobody imports.

`flow` ← `models`, `processing` ← `pipeline`, `data` ← `training`, `evaluation`, `experiments`,
`serving` ← `cli`. Imports are read from the source, those inside functions and under
TYPE_CHECKING included: a name that a layer must not know, it must not know for its types either.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import janusflow

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "janusflow"

# Each row may import the rows above it, and itself; neighbours in a row may, but not in a circle.
ROWS = [
    {"errors", "version"},
    {"flow"},
    {"files", "settings"},  # above flow, which gets numbers and needs neither
    {"models", "processing"},
    {"pipeline", "drawing", "requests", "data", "compat"},
    {"training", "evaluation", "experiments", "serving"},
    {"cli", "commands"},
]
RANK = {layer: rank for rank, row in enumerate(ROWS) for layer in row}
# The package's __init__ only forwards names, lazily; no layer stands above it or below it.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SCRIPTS = sorted((ROOT / "sampling").rglob("*.py"))

FLOW_MAY_IMPORT = {"torch", "torchdiffeq", "numpy", "diffusers.schedulers", "janusflow"}
NOBODY_IMPORTS = {"torchvision", "timm", "attrdict", "pickle", "janus"}
FACADE = {
    **janusflow._LAZY,
    "__version__": "janusflow.version",
    **dict.fromkeys(vars(janusflow.errors), "janusflow.errors"),
}


class Import(NamedTuple):
    module: str  # absolute, as far as the source tells
    line: int
    at_top: bool  # runs when the file is imported


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    if path.name == "__main__.py":  # a way into the command; nothing imports it
        return "cli"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[Import]:
    """Yield every import of a file, `from a import b` as `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        at_top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = FACADE.get(alias.name) if origin == "janusflow" else None
                yield Import(full or f"{origin}.{alias.name}", node.lineno, at_top)


def inner_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (layer, line) for every import of a part of the package."""
    for found in imports_of(path):
        parts = found.module.split(".")
        if parts[0] == "janusflow" and len(parts) > 1:
            yield parts[1], found.line


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_layer_imports_only_what_stands_below_it(path: Path) -> None:
    layer = layer_of(path)
    assert layer in RANK, f"{layer} has no place in the layers of this test; give it one"
    wrong = [
        f"{label(path)}:{line} imports janusflow.{other}"
        for other, line in inner_imports(path)
        if RANK.get(other, len(ROWS)) > RANK[layer]
    ]
    assert not wrong


def test_layers_do_not_import_each_other_in_a_circle() -> None:
    below: dict[str, set[str]] = {}
    for path in FILES:
        layer = layer_of(path)
        below.setdefault(layer, set()).update(o for o, _ in inner_imports(path) if o != layer)
    while leaves := [layer for layer in below if not below[layer] & below.keys()]:
        for layer in leaves:
            del below[layer]
    assert not below, f"these import each other in a circle: {sorted(below)}"


def test_flow_knows_torch_and_nothing_of_language_models() -> None:
    files = [path for path in FILES if layer_of(path) == "flow"]
    assert files
    wrong = [
        f"{label(path)}:{found.line} imports {found.module}"
        for path in files
        for found in imports_of(path)
        if found.module.split(".")[0] not in sys.stdlib_module_names
        and not any(f"{found.module}.".startswith(f"{allowed}.") for allowed in FLOW_MAY_IMPORT)
    ]
    assert not wrong


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *FILES, *SCRIPTS], ids=label)
def test_no_file_imports_what_the_project_does_without(path: Path) -> None:
    wrong = [
        f"{label(path)}:{found.line} imports {found.module}"
        for found in imports_of(path)
        if found.module.split(".")[0] in NOBODY_IMPORTS
    ]
    assert not wrong


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *FILES, *SCRIPTS], ids=label)
def test_no_file_runs_code_from_a_checkpoint(path: Path) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    wrong = []
    for call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if given.get("trust_remote_code", "False") != "False":
            wrong.append(f"{label(path)}:{call.lineno} sets trust_remote_code")
        if ast.unparse(call.func) == "torch.load" and given.get("weights_only") != "True":
            wrong.append(f"{label(path)}:{call.lineno} loads without weights_only=True")
    assert not wrong


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(p) != "experiments"], ids=label)
def test_matplotlib_is_imported_where_something_is_plotted_and_not_before(path: Path) -> None:
    wrong = [
        f"{label(path)}:{found.line}"
        for found in imports_of(path)
        if found.at_top and found.module.split(".")[0] == "matplotlib"
    ]
    assert not wrong

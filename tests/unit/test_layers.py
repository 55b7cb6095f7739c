"""The house: a file imports strictly lower layers, or its siblings in its package; other borders too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mpiddp"

# The modules and packages directly under mpiddp/, lowest layer first. The files of the first may import each other.
LAYERS = (
    {"errors", "config", "dtypes", "log", "processes", "trace", "uncompiled", "version"},
    {"agreement", "binding", "failure", "gpus", "launch", "worker", "world"},
    {"memory"},
    {"transport"},
    {"collectives", "compression"},
    {"engine", "op"},
    {"process_set", "timeline"},
    {"sets", "surroundings"},
    {"runtime"},
    {"built", "device", "ops", "recording"},
    {"optimizer", "functions", "metrics", "sampler", "sync_batch_norm", "backend"},
    {"checkpoint", "elastic"},
    {"__init__", "cli"},
    {"__main__", "torch"},
    {"as_horovod"},
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
MOST_LINES, MOST_LINES_OF_THE_ROOT = 300, 80

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module or package directly under mpiddp/ that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the name, directly under mpiddp/, of everything that a file imports from the package."""
    package = ("mpiddp", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names] if base == ("mpiddp",) else [base]
        for name in names:
            if name[0] == "mpiddp" and len(name) > 1:
                yield node.lineno, name[1]


def test_every_module_has_a_layer() -> None:
    unknown = {name_of(path) for path in FILES} - set(LAYER_OF)
    assert not unknown, f"give {sorted(unknown)} a place in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_lower_layers(path: Path) -> None:
    own = name_of(path)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {own} (layer {LAYER_OF[own]}) imports {other} (layer {LAYER_OF[other]})"
        for line, other in imports(path)
        if other in LAYER_OF
        and other != own
        and LAYER_OF[other] >= LAYER_OF[own]
        and not LAYER_OF[other] == LAYER_OF[own] == 0
    ]
    assert not wrong, "\n".join(wrong)


def test_only_config_touches_the_environment() -> None:
    touching = {
        path.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv") and is_os(node.value))
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & {"environ"})
    }
    assert touching <= {"config.py"}


def is_os(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "os"


def test_files_stay_short() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in FILES}
    assert not {name: n for name, n in lines.items() if n > MOST_LINES}
    assert lines["mpiddp/__init__.py"] <= MOST_LINES_OF_THE_ROOT


def test_every_module_says_what_it_offers() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path in FILES
        if path.name not in ("__init__.py", "__main__.py") and "\n__all__" not in path.read_text()
    ]
    assert not without

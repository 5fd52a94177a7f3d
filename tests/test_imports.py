"""Imports point one way, and modules stay readable in one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlaif"

# Lowest first. A module may import from its own layer and from those before it, never from a later one.
LAYERS = [
    {"", "config", "records", "folders", "near_duplicates", "processes", "progress", "redaction", "text"},
    {"errors", "settings_files"},
    {"gold", "constitution", "losses", "chat", "splits", "evaluation.statistics"},
    {
        "attention",
        "bundled",
        "models",
        "decoding",
        "generation",
        "in_line",
        "loading",
        "lora",
        "artifacts",
        "locks",
        "engines",
        "policy",
        "preference_model",
        "prefix",
        "sharding",
        "siblings",
        "trunk",
    },
    {"sampling", "labeling", "preferences", "demonstrations", "rewards", "methods", "evaluation", "reporting"},
    {"cli"},
    {"sample", "label", "audit", "train", "evaluate", "report", "run"},
]
PARTS = [f"config.{name}" for name in ("checks", "choices", "models", "labeling", "training", "commands")]
# Modules that know less than their layer would allow.
NARROW = {
    **{module: {"config", *PARTS} for module in PARTS},
    "near_duplicates": {"text"},
    "records": set(),
    "processes": set(),
    "folders": {"records"},
    "locks": {"records"},
    "progress": {"records"},
    "text": set(),
    "losses": set(),
    "gold": {"records", "text"},
    "config": {*PARTS},
    "errors": {"config", "records"},
    "settings_files": {"records"},
    "cli": {"config", "errors", "folders", "processes", "records", "redaction", "settings_files", "text"},
    "loading": {"records"},
    "engines.base": {"config", "records"},
    "engines.limits": {"config"},
    "engines.breaker": {"records", "engines.wire"},
    "evaluation.statistics": set(),
}


def module_name(path: Path) -> str:
    """``labeling/label.py`` -> ``labeling.label``; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    """Layer of a module: that of its longest listed prefix."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, names in enumerate(LAYERS):
            if ".".join(parts[:length]) in names:
                return number
    raise AssertionError(f"rlaif.{module} is in no layer: put it into LAYERS")


def imported(module: str) -> Iterator[tuple[str, int]]:
    """Modules of this package that a module imports, anywhere in it but under TYPE_CHECKING, with line numbers."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"rlaif.{module}, line {node.lineno}: relative import"
            # ``from rlaif import losses`` imports a module, ``from rlaif.losses import gae`` a name.
            names = [
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}"[6:] in MODULES else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name == "rlaif" or name.startswith("rlaif."):
                yield name.removeprefix("rlaif").removeprefix("."), node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_no_import_from_a_higher_layer(module):
    up = [
        f"rlaif.{module}, line {line}: imports rlaif.{other}"
        for other, line in imported(module)
        if layer(other) > layer(module)
    ]
    assert not up, "\n".join(up)


@pytest.mark.parametrize("module", NARROW)
def test_narrow_modules(module):
    assert {other for other, _ in imported(module)} <= NARROW[module]


def test_no_cycles():
    graph = {module: {other for other, _ in imported(module) if other != module} for module in MODULES}
    # Importing a package runs its __init__ first; a package and its own modules do not count as a cycle.
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other in sorted(graph[module]):
            if other:
                visit(other, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_commands_are_not_imported_below_the_commands():
    commands = LAYERS[-1]
    for module in MODULES:
        if module not in commands:
            assert not {other for other, _ in imported(module)} & commands, module


def test_upward_imports_are_seen(tmp_path, monkeypatch):
    """The test above must be able to fail: also inside functions, and not for type checkers only."""
    file = tmp_path / "losses.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from rlaif.train import train\n"
        "def f():\n    from rlaif import run\n    import rlaif.methods.ppo\n"
    )
    monkeypatch.setitem(MODULES, "losses", file)
    found = dict(imported("losses"))
    assert found == {"run": 5, "methods.ppo": 6}
    assert all(layer(other) > layer("losses") for other in found)


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_short(module):
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 500

"""The house's own rules: lint, format, types, and which file may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "raystar"

# Imports go downward in this order (design, section 1); a module may import only what stands before it.
ORDER = [
    "errors", "journal", "storage", "config", "dataset", "kernels", "model", "loss", "distributed", "step", "compile",
    "parity", "speed", "checkpoint", "ruler", "codec", "grid", "trainer", "rungs", "summary", "saved", "ledger",
    "table", "spool", "tracking", "space", "retention", "cluster", "trial", "driver", "export", "record", "plan",
    "outcome", "sweep", "tune", "train",
]  # fmt: skip
MAY_IMPORT = {"ray": {"cluster", "trial", "driver", "space", "sweep"}, "mlflow": {"tracking"}}


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["lint", "format", "types"]
)
def test_checkers(command: list[str]) -> None:
    found = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_imports_go_downward() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)
    for module in ORDER:
        below = set(ORDER[: ORDER.index(module)])
        for name in _imports(PACKAGE / f"{module}.py"):
            if name.startswith("raystar."):
                used = name.split(".")[1]
                assert used not in set(ORDER) - below, f"{module} imports {used}, which stands above it"


@pytest.mark.parametrize("library", ["ray", "mlflow"])
def test_who_imports(library: str) -> None:
    users = {
        path.stem for path in PACKAGE.rglob("*.py") if any(name.split(".")[0] == library for name in _imports(path))
    }
    assert users == MAY_IMPORT[library]


@pytest.mark.parametrize("module", ["raystar.trainer", "raystar.ruler", "raystar.export", "raystar.dataset"])
def test_training_and_export_run_without_ray_and_mlflow(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('ray', 'mlflow', 'diffusers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path.name}:{node.name}")
    assert not missing

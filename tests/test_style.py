"""The house's own rules: lint, format, types, and which file may import what."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.kit.support import ROOT

PACKAGE = ROOT / "raystar"

# The rooms, from the ground up: a folder imports only folders that stand before it. Commands stand above them all.
FOLDERS = [
    "demo", "base", "config", "tracking", "data", "model", "pictures", "ruler", "training", "exported", "search",
    "record", "backend", "page", "sweep",
]  # fmt: skip
COMMANDS = {"tune", "train", "score", "encode", "translate", "export", "report", "distill", "pyfunc"}
MAY_IMPORT = {
    "ray": ("backend/",),
    "mlflow": ("tracking/mlflow/", "exported/serving.py"),
}


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


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_file_has_a_room() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == COMMANDS | {"__init__", "__main__"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FOLDERS)


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md"])
def test_the_tree_is_the_documents(document: str) -> None:
    """Every room, from the top of the house down."""
    text = (ROOT / document).read_text()
    text = text[max(0, text.find("\nraystar/ ")) :]
    named = re.findall(r"^(?:  |\| `)(\w+)/", text, re.MULTILINE)
    assert named == FOLDERS[::-1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_downward(folder: str) -> None:
    above = (COMMANDS | set(FOLDERS)) - set(FOLDERS[: FOLDERS.index(folder) + 1])
    for path in (PACKAGE / folder).rglob("*.py"):
        used = {name.split(".")[1] for name in _imports(path) if name.startswith("raystar.")}
        assert not used & above, f"{_name(path)} imports {used & above}, which stand above {folder}/"


@pytest.mark.parametrize("library", ["ray", "mlflow"])
def test_who_imports(library: str) -> None:
    users = {
        _name(path) for path in PACKAGE.rglob("*.py") if any(name.split(".")[0] == library for name in _imports(path))
    }
    assert users
    assert not {user for user in users if not user.startswith(MAY_IMPORT[library])}


def test_no_private_name_is_imported_from_elsewhere() -> None:
    """What another file uses is that file's seam, and has a name without an underscore and a docstring."""
    found = {
        f"{_name(path)}: {name}"
        for path in PACKAGE.rglob("*.py")
        for name in _imports(path)
        if name.startswith("raystar.") and re.fullmatch(r"_[^_].*", name.rpartition(".")[2])
    }
    assert not found


@pytest.mark.parametrize(
    "module",
    [
        "training.trainer", "ruler.ruler", "exported.model", "data.bank", "pictures.encoding", "pictures.distilling",
        "export", "encode", "translate", "report",
    ],
)  # fmt: skip
def test_training_and_export_run_without_ray_and_mlflow(module: str) -> None:
    code = f"import sys, raystar.{module}; print([m for m in ('ray', 'mlflow', 'diffusers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def _calls(tree: ast.AST) -> list[tuple[str, dict[str, str]]]:
    """Every call with its keyword arguments, as they are written."""
    return [
        (ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}
MUST_SAY = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "yaml.load": ("Loader", "StrictLoader"),
}


def _unsafe(source: str) -> list[str]:
    """What would run code that a file holds."""
    tree = ast.parse(source)
    found = [name for name, _ in _calls(tree) if name in RUNS_CODE]
    for name, words in _calls(tree):
        key, value = MUST_SAY.get(name, ("", ""))
        if (
            words.get(key, "") != value
            or words.get("shell") == "True"
            or (
                name.startswith(("pickle.", "cloudpickle.", "marshal.", "shelve.", "dill.", "joblib."))
                and not name.endswith("Error")
            )
        ):
            found.append(name)
    # Under another name none of this would be seen.
    aliased = {"load", "loads", "Unpickler", "unsafe_load", "full_load", "system", "popen"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy", "pickle", "yaml", "os", "marshal"):
            found += [alias.name for alias in node.names if alias.name in aliased]
    return found


def test_nothing_runs_code_that_a_file_holds() -> None:
    found = {str(path): unsafe for path in PACKAGE.rglob("*.py") if (unsafe := _unsafe(path.read_text()))}
    assert not found
    from raystar.config.strict_yaml import StrictLoader

    assert issubclass(StrictLoader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "np.load(path)",
        "yaml.load(text, Loader=yaml.Loader)", "yaml.unsafe_load(text)", "pickle.loads(data)", "pickle.Unpickler(file)",
        "eval(text)", "exec(text)", "from torch import load", "from pickle import loads as read", "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)  # fmt: skip
def test_code_that_would_be_run_is_found(source: str) -> None:
    assert _unsafe(source)


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


LONG = {"demo/painter.py", "demo/scene.py", "demo/sprites.py"}  # pictures in code
"""Files that may be longer than the others, and hold longer functions and classes."""


def test_nothing_is_too_long_to_be_read() -> None:
    """Files of 400 lines, classes of 300, functions of 60; and half of all functions under 10."""
    found, lengths = [], []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if _name(path) in LONG:
            continue
        if text.count("\n") > 400:
            found.append(f"{_name(path)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            length = (node.end_lineno or 0) - node.lineno + 1
            if isinstance(node, ast.FunctionDef):
                lengths.append(length)
            if length > (300 if isinstance(node, ast.ClassDef) else 60):
                found.append(f"{_name(path)}: {node.name}, {length} lines")
    assert not found
    assert statistics.median(lengths) < 10

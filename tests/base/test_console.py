"""The library logs and prints nothing; commands print what it logs."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from raystar.base.console import PROGRESS, shown, shows
from tests.kit.support import ROOT, write_latents

LOGGER = logging.getLogger("raystar.somewhere")
PRINTS = {  # and why
    "base/console.py": "what is logged, for commands",
    "backend/nodes.py": "a line rewritten in place, where records are printed",
    "data/pack.py": "a line rewritten in place, where records are printed",
    "training/display.py": "a line rewritten in place, where records are printed",
    "demo/__main__.py": "a command",
    "config/__main__.py": "a command",
}


def say_all() -> None:
    LOGGER.log(PROGRESS, "half way")
    LOGGER.info("100 % is no format, nor is %s")
    LOGGER.warning("mind")
    LOGGER.error("wrong")


def test_what_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    with shown():
        say_all()
    printed = capsys.readouterr()
    assert printed.out == "100 % is no format, nor is %s\n"
    assert printed.err == "half way\nnote: mind\nerror: wrong\n"


def test_a_line_that_finds_no_room_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with shown(), open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        LOGGER.warning("x" * 100_000)
        monkeypatch.undo()


TRAINS = """
import logging, sys
from raystar.data.bank import open_bank
from raystar.training.trainer import Trainer
from tests.kit.support import tiny_config
if sys.argv[2] == "logs":
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
    logging.getLogger("raystar").setLevel(logging.DEBUG)
config = tiny_config(sys.argv[1], training__epochs=1, training__progress_style="percent")
list(Trainer(config, open_bank(config, sys.argv[1] + "/cache")).run())
logging.getLogger("raystar.somewhere").warning("mind")
"""


def trained(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TRAINS, str(folder), how], cwd=ROOT, capture_output=True, text=True, check=True
    )


def test_who_imports_raystar_decides_what_is_shown(tmp_path: Path) -> None:
    write_latents(tmp_path)
    silent = trained(tmp_path, "nothing")
    assert silent.stdout == silent.stderr == ""
    logs = trained(tmp_path, "logs")
    assert logs.stderr == ""
    assert "raystar.training.display PROGRESS epoch 1/1  d_loss " in logs.stdout
    assert "raystar.somewhere WARNING mind" in logs.stdout


def test_within_itself_it_continues() -> None:
    with shown():
        assert shows()
        with shown():
            pass
        assert shows()


def test_who_prints() -> None:
    """Whatever else printed could not be silenced by who imports it."""
    package = ROOT / "raystar"
    printing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.parent != package
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    }
    assert printing == set(PRINTS)


def test_a_reader_that_goes_costs_no_trace() -> None:
    """As with `| head`: whoever reads has seen enough."""
    command = f"{sys.executable} -m raystar.config configs/demo.yaml | head -1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "# configs/demo.yaml, as raystar reads it\n"
    assert done.stderr == ""
    assert done.returncode in (0, 141)

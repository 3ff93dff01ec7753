"""What a sweep's screen says of what happens elsewhere: in the processes of trials, and inside of Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from raystar import train, tune
from raystar.backend.tune_hooks import Heard, Warden
from raystar.base.errors import RaystarError, in_short
from raystar.config.load import to_mapping
from tests.kit.support import ROOT, tiny_config
from tests.sweep.test_tune_requests import SPACE, Files, refusal


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# -- a whole sweep ---------------------------------------------------------------------------------


BREAKS = """
import sys
from raystar import tune
from raystar.base.console import run_cli
from raystar.sweep.live_table import Board

ended, shown = [], Board.changed

def breaks(self, record, score=None):
    shown(self, record, score)
    ended.extend([] if record.status == "running" else [record.trial])
    if len(ended) == 2:
        raise ValueError("a screen\\nof two lines")

Board.changed = breaks
run_cli(tune.main)
"""
"""A sweep whose screen breaks when the second of its trials has ended."""


def test_a_sweep_tells_once_what_its_trials_note_and_in_words_what_ends_it(files: Files) -> None:
    """Two trials find no compiler, each in its process; then, inside of one of Tune's hooks, something breaks."""
    values = to_mapping(tiny_config(files.latents, training__epochs=1, training__use_amp=True, model__base_dim=32))
    files.config.write_text(yaml.safe_dump(values))
    files.space.write_text(yaml.safe_dump(SPACE | {"finalists": 0, "scheduler": {"type": "none"}}))
    tools = files.folder / "bin"
    tools.mkdir()
    for folder in filter(os.path.isdir, os.get_exec_path()):
        for path in Path(folder).iterdir():
            if path.name not in ("c++", "g++", "clang++") and not (tools / path.name).is_symlink():
                (tools / path.name).symlink_to(path)
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment |= {"PATH": str(tools), "RAYSTAR_CACHE_DIR": str(files.folder / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", BREAKS, *files.arguments("--name", "s")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    noted = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    words = ("native kernels: ", "no instructions for bf16")  # some processor has no use for a compiler
    assert len([line for line in noted if any(word in line for word in words)]) == 1, done.stderr
    trace = files.out / "s/error.txt"
    assert f"\nerror: ValueError: a screen (all of it in {trace})\n" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "TuneError" not in done.stdout + done.stderr
    assert "in breaks" in trace.read_text()
    assert json.loads((files.out / "s/summary.json").read_text())["status"] == "failed"


# -- its parts -------------------------------------------------------------------------------------


class Listening:
    """A listener that takes in reports and breaks where it is told to."""

    stopping = stop_now = False

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks
        self.reports: list[Any] = []

    def trial_started(self, name: str, params: dict[str, Any]) -> None: ...

    def trial_reported(self, name: str, report: Any) -> bool:
        if self.breaks:
            raise ValueError("broken")
        self.reports.append(report)
        return True

    def trial_ended(self, name: str, deaths: int | None) -> None: ...


def test_notes_of_many_processes_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    listener = Listening()
    warden = Warden(listener)
    for notes in (["no compiler"], ["no compiler", "no decoder"], [], ["no decoder"]):
        warden.on_trial_result(None, "t00", {"report": json.dumps({"status": "running", "notes": notes})})  # type: ignore[arg-type]
    assert capsys.readouterr().err == "note: no compiler\nnote: no decoder\n"
    assert listener.reports == 4 * [{"status": "running"}]


def test_what_a_listener_raises_is_kept() -> None:
    heard = Heard(Listening(breaks=True))
    assert not heard.stopping
    with pytest.raises(ValueError, match="broken") as raised:
        heard.trial_reported("t00", {"status": "running"})
    assert heard.error is raised.value
    assert heard.stopping
    assert heard.stop_now


QUOTED = """\x1b[36mray::run_trial()\x1b[39m (pid=1, ip=127.0.0.1)
Traceback (most recent call last):
  File "a.py", line 1, in a
KeyError: 'x'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in b
    raise ValueError("no")
ValueError: no
and a second line
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError(), "ValueError"),
        (RaystarError("a: expected b\nc"), "a: expected b"),
        (RuntimeError(QUOTED), "ValueError: no"),
        (RuntimeError(QUOTED[QUOTED.index("Traceback") :]), "ValueError: no"),
        (RuntimeError("Traceback (most recent call last):"), "RuntimeError: Traceback (most recent call last):"),
        (OSError(28, os.strerror(28)), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_errors_in_a_line(error: Exception, line: str) -> None:
    assert in_short(error) == line


# -- dry runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["tune", "train"])
@pytest.mark.parametrize("domains", ["abc", "b"])
def test_pictures_that_look_all_the_same_are_found_by_a_dry_run(
    files: Files, capsys: pytest.CaptureFixture[str], command: str, domains: str
) -> None:
    """They end a sweep while its ruler is made, beside Ray's start."""
    for domain in domains:
        paths = sorted((files.latents / domain).iterdir())
        for path in paths:
            np.save(path, np.load(paths[0], allow_pickle=False))
    more = ["--dry-run", "--set", "loss.ds_decay_epochs=0.5"]
    arguments = ["--config", str(files.config), "--out", str(files.out), *more]
    main = train.main
    if command == "tune":
        main, arguments = tune.main, files.arguments(*more)
    error = refusal(main, arguments, capsys)
    words = f"the ruler has nothing to measure by: all latents of domain '{domains[0]}' give one and the same picture"
    assert words in error


def test_a_dry_run_tells_of_a_decoder_that_is_missing(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    folder = files.folder / "vae"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 8, 8]})
    )
    arguments = files.arguments("--dry-run", "--set", f"visualization.vae_model_name_or_path={folder}")
    assert tune.main(arguments) == 0
    assert f"note: {folder} cannot be loaded (" in capsys.readouterr().err


def test_a_storage_that_takes_nothing_is_found_by_a_dry_run(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(tune.main, files.arguments("--dry-run", "--storage", str(files.config / "below")), capsys)
    assert error.startswith(f"error: --storage {files.config}/below/")
    assert "(Not a directory); choose another folder" in error

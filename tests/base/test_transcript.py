"""The copy of what a command prints: whole lines, as they stood last, with what ended it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tqdm import tqdm

from raystar.base.errors import RaystarError
from raystar.base.transcript import Transcript
from tests.kit.support import ROOT

KEY = "training.console_log_path"


@pytest.fixture
def streams() -> Iterator[tuple[object, object]]:
    """stdout and stderr, which a transcript must leave as they were."""
    before = sys.stdout, sys.stderr
    yield before
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.usefixtures("streams")
def test_it_copies_what_is_printed_and_prints_it_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "not/yet/there/console.log"
    with Transcript() as transcript:
        logging.getLogger("raystar.somewhere").warning("before anybody knows the file")
        print("one", "two")
        transcript.write_to(str(path), KEY)
        assert path.read_text() == "note: before anybody knows the file\none two\n"
        print("half", end="", file=sys.stderr)
        print("stdout has its own line")
        print(" and half\n\nstars \N{BLACK STAR}", file=sys.stderr)
        assert path.read_text().endswith("stdout has its own line\nhalf and half\n\nstars \N{BLACK STAR}\n")
        print("no end", end="")
    assert path.read_text().endswith("\nno end\n")
    shown = capsys.readouterr()
    assert shown.out == "one two\nstdout has its own line\nno end"
    assert shown.err == "note: before anybody knows the file\nhalf and half\n\nstars \N{BLACK STAR}\n"
    print("afterwards")
    with Transcript() as transcript:
        transcript.write_to(str(path), KEY)
        print("another run")
    assert path.read_text().endswith("no end\nanother run\n")
    assert "afterwards" not in path.read_text()


@pytest.mark.usefixtures("streams")
def test_a_rewritten_line_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    with Transcript() as transcript:
        transcript.write_to(str(path), KEY)
        for percent in (10, 50, 100):
            print(f"\repoch 1 {percent:3d}%{' ' * 40}", end="", file=sys.stderr, flush=True)
        print(f"\repoch 1 done{' ' * 40}", file=sys.stderr)
        with tqdm(total=3, file=sys.stderr, leave=False, mininterval=0) as bar:
            for _ in range(3):
                bar.update()
        print("\repoch 2 done", file=sys.stderr)
        print("a file of another system\r")
        with tqdm(total=2, desc="kept", file=sys.stderr, mininterval=0) as bar:
            bar.update(2)
        print("\r 10%", end="", file=sys.stderr)
        print("\r 20%", end="", file=sys.stderr)
    lines = path.read_text().splitlines()
    assert lines[:3] == ["epoch 1 done", "epoch 2 done", "a file of another system"]
    assert lines[3].startswith("kept: 100%")
    assert lines[4:] == ["20%"]
    assert b"\r" not in path.read_bytes()


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize(
    ("error", "last"),
    [
        (RaystarError("loss.w_cyc: no; see https://me:secret@host"), "error: loss.w_cyc: no; see https://"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("a bug"), "ValueError: a bug"),
        (SystemExit(2), "begun"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_ends_the_command_is_there(tmp_path: Path, error: BaseException, last: str) -> None:
    path = tmp_path / "console.log"

    def command() -> None:
        with Transcript() as transcript:
            transcript.write_to(str(path), KEY)
            print("begun")
            raise error

    with pytest.raises(type(error)):
        command()
    lines = path.read_text().splitlines()
    assert lines[0] == "begun"
    assert lines[-1].startswith(last)
    assert "secret" not in path.read_text()
    assert ("Traceback (most recent call last):" in lines) == isinstance(error, ValueError)


@pytest.mark.usefixtures("streams")
def test_what_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path, "Is a directory"),
        (tmp_path / "file/console.log", f"File exists: '{tmp_path}/file'"),
    ):
        with pytest.raises(RaystarError) as caught, Transcript() as transcript:
            transcript.write_to(str(path), KEY)
        assert str(caught.value).startswith(f"{KEY}: {path} cannot be written: ")
        assert words in str(caught.value)
    for strange in ("~nobody-of-this-name/x", "a\0b"):
        with pytest.raises(RaystarError, match="cannot be written"), Transcript() as transcript:
            transcript.write_to(strange, KEY)


@pytest.mark.usefixtures("streams")
def test_a_full_disk_costs_lines_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Transcript() as transcript:
        transcript.write_to("/dev/full", KEY)
        print("shown all the same")
    assert capsys.readouterr().out == "shown all the same\n"


@pytest.mark.usefixtures("streams")
def test_without_a_path_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (None, ""):
        with Transcript() as transcript:
            transcript.write_to(path, KEY)
            print("x")
            assert not transcript._kept
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_what_it_printed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from raystar.base.transcript import Transcript\n"
        "with Transcript() as transcript:\n"
        "    transcript.write_to(sys.argv[1], 'key'); print('printed'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "console.log"
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, env=os.environ)
    assert done.returncode == -9
    assert path.read_text() == "printed\n"

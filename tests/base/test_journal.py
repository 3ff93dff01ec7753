"""The journal under what happens to files: killed writers, power cuts, full disks."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raystar.base import files
from raystar.base.files import wait_for_space
from raystar.base.journal import Journal
from tests.kit.support import ROOT


def test_a_torn_tail_is_not_read_and_is_cut_off_before_the_next_record(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "whole.jsonl")
    ends = [whole.append({"n": n, "text": "two\nlines, ü, \ud800", "nan": float("inf")}) for n in range(3)]
    content = whole.path.read_bytes()
    assert [record["n"] for record in whole] == [0, 1, 2]
    assert next(iter(whole))["text"] == "two\nlines, ü, \ud800"
    assert [(record["n"], end) for record, end in whole.read(ends[0])] == [(1, ends[1]), (2, ends[2])]
    for cut in range(len(content) + 1):
        torn = Journal(tmp_path / f"{cut}.jsonl")
        torn.path.write_bytes(content[:cut])
        left = [n for n, end in enumerate(ends) if end <= cut]
        assert [record["n"] for record in torn] == left
        torn.append({"n": 9})
        torn.close()
        assert [record["n"] for record in torn] == [*left, 9]
    assert list(Journal(tmp_path / "none.jsonl")) == []


def test_a_long_torn_line_and_damage_between_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Journal(tmp_path / "a" / "b.jsonl")
    broken.append({"n": 0})
    with broken.path.open("ab") as file:
        file.write(b"\0" * 200_000)
    broken.close()
    broken.append({"n": 1})
    with broken.path.open("ab") as file:
        file.write(b"\0\xff\n[1]\n")
    broken.append({"n": 2})
    broken.sync()
    assert [record["n"] for record in broken] == [0, 1, 2]
    assert broken.path.stat().st_size < 100
    assert capsys.readouterr().err.count("is damaged and left out") == 2


WRITER = """
import sys
from pathlib import Path
from raystar.base.journal import Journal
journal = Journal(Path(sys.argv[1]))
for n in range(10**9):
    journal.append({"n": n, "text": "x" * (n % 9000)})
    print(n, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_append_returned(tmp_path: Path) -> None:
    for wait in random.Random(0).choices(range(1, 60), k=3):
        path = tmp_path / f"{wait}.jsonl"
        command = [sys.executable, "-c", WRITER, str(path)]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(wait / 1000)
        writer.send_signal(signal.SIGKILL)
        returned = writer.communicate()[0].count("\n")
        numbers = [record["n"] for record in Journal(path)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) > returned


def test_threads_share_a_journal(tmp_path: Path) -> None:
    shared = Journal(tmp_path / "j.jsonl")
    many = [
        threading.Thread(target=lambda t=t: [shared.append({"t": t, "n": n}) for n in range(200)]) for t in range(4)
    ]
    for thread in many:
        thread.start()
    for thread in many:
        thread.join()
    found = [(record["t"], record["n"]) for record in shared]
    assert [n for t, n in found if t == 2] == list(range(200))
    assert len(found) == 800


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_waited_for_and_told_once(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "_FULL_S", 0.05)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 40_000)
    threading.Timer(0.4, ballast.unlink).start()
    written = Journal(small_disk / "j.jsonl")
    began = time.monotonic()
    for n in range(12):
        written.append({"n": n, "text": "x" * 3000})
    written.sync()
    assert time.monotonic() - began > 0.3
    assert [record["n"] for record in written] == list(range(12))
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"note: the disk that holds {written.path} is full; waiting: free some space and it continues",
        f"note: the disk that holds {written.path} has space again; continuing",
    ]


def test_a_line_that_was_written_in_part_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.write, [3]

    def write(file: int, data: bytes) -> int:
        """Takes half of what comes, then fails: full, over quota, then interrupted."""
        if len(data) > 8:
            return real(file, data[: len(data) // 2])
        left[0] -= 1
        if left[0] >= 1:
            raise OSError((0, errno.EDQUOT, errno.ENOSPC)[left[0]], "no space")
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(file, data)

    monkeypatch.setattr(files, "_FULL_S", 0.01)
    monkeypatch.setattr(os, "write", write)
    written = Journal(tmp_path / "j.jsonl")
    with pytest.raises(KeyboardInterrupt):
        written.append({"n": 0, "text": "interrupted"})
    assert written.path.stat().st_size == 0
    written.append({"n": 1, "text": "written in pieces"})
    assert [record["n"] for record in written] == [1]


def test_other_errors_are_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        wait_for_space(tmp_path, lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))

"""Folders that take files, and those that do not, are told apart by trying; nothing is left there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from raystar.base import scratch
from raystar.base.errors import RaystarError
from raystar.base.files import cache_dir
from raystar.base.scratch import check_scratch, refuses
from tests.kit.mounts import full, needs_mounts, read_only, run_within
from tests.kit.support import ROOT


def test_a_folder_takes_files_and_keeps_none(tmp_path: Path) -> None:
    assert refuses(tmp_path, 1 << 20) is None
    assert refuses(tmp_path / "not/yet/there") is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder_takes_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refuses(tmp_path / "file") == "Not a directory"
    assert refuses(Path("/proc/nobody/.ray")) is not None


ASK = """
import sys; from pathlib import Path; from raystar.base.scratch import refuses
print(refuses(Path(sys.argv[1]), int(sys.argv[2])))
"""


@needs_mounts
@pytest.mark.parametrize(("mount", "words"), [(full, "No space left on device"), (read_only, "Read-only file system")])
def test_full_disks_and_mounts_that_may_only_be_read(tmp_path: Path, mount, words: str) -> None:  # type: ignore[no-untyped-def]
    for folder in (tmp_path, tmp_path / "below"):
        asked = run_within([mount(tmp_path)], [sys.executable, "-c", ASK, str(folder), "100000"], ROOT)
        assert asked.stdout == f"{words}\n", asked.stderr


def test_temporary_files_without_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the folder is found and takes nothing, nor where there is none at all."""
    monkeypatch.setattr(scratch.tempfile, "tempdir", "/proc/nobody")
    with pytest.raises(RaystarError, match=r"^/proc/nobody: takes no temporary files \(.*TMPDIR$"):
        check_scratch()
    monkeypatch.setattr(scratch.tempfile, "tempdir", None)
    monkeypatch.setattr(scratch.tempfile, "_candidate_tempdir_list", lambda: ["/proc/nobody"])
    with pytest.raises(RaystarError, match=r"^no folder takes temporary files.*TMPDIR$"):
        check_scratch()
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    check_scratch()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number alone, as containers have it."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "RAYSTAR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RaystarError, match="HOME: is not set"):
        cache_dir()

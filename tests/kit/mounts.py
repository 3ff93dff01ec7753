"""Commands in a mount namespace of their own: with file systems that are full, or may only be read."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]


@functools.cache
def _possible() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not _possible(), reason="this machine lets nobody mount anything")
"""For tests that run commands in mounts: not everywhere does the system allow it."""


def read_only(folder: Path) -> str:
    """Makes a folder a file system that may only be read."""
    place = shlex.quote(str(folder))
    return f"mount --bind {place} {place}; mount -o remount,ro,bind {place}"


def full(folder: Path) -> str:
    """Puts a file system of 1 MB, all of it used, over a folder."""
    place = shlex.quote(str(folder))
    return f"mount -t tmpfs -o size=1m none {place}; head -c 2M /dev/zero > {place}/full 2>/dev/null || true"


def run_within(
    mounts: Sequence[str], command: Sequence[str], cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command after `mounts`, which are gone with it."""
    script = "; ".join([*mounts, f"cd {shlex.quote(str(cwd))}", f"exec {shlex.join(command)}"])
    surroundings: Mapping[str, str] = {**os.environ, **environment}
    return subprocess.run(
        [*_UNSHARE, "sh", "-ec", script], capture_output=True, text=True, timeout=120, env=surroundings
    )

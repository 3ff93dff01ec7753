"""What a place to record runs must be able to do."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import raystar
from raystar import __version__

DEFAULT_EXPERIMENT = "raystar"
SPOOL = "spool.jsonl"
"""Name of a tracker's file in the folder of its sweep or run."""

PARENT = ""
"""Name of the parent run, or of the only run, in calls that take a trial's name."""

CHECKPOINT = "raystar.checkpoint"
"""Tag: where a trial's best checkpoint lies, a path or an fsspec URI."""


class Tracker(Protocol):
    """Records runs. `trial` is a trial's name, or `PARENT`."""

    @property
    def registered(self) -> str | None:
        """What was done with the last model that was registered, in a line."""

    @property
    def waiting(self) -> int:
        """How many records the store has not taken yet."""

    def begin(self) -> None:
        """Starts to write; what was recorded before that has waited."""

    def wait_until_connected(self) -> None:
        """Returns once the store is there, or is known to be held up by another process for now.

        Raises:
            RaystarError: it cannot be reached or opened, or does not know the runs that are to be continued.
        """

    def hurry(self) -> None:
        """Has `close` wait no longer for a store that is away."""

    def grids_address(self) -> str | None:
        """Where the featured runs' pictures can be looked at; None where no run is featured."""

    def how_to_compare(self) -> tuple[str, str]:
        """The command that starts what shows the runs, empty where it is running, and the address of the trials."""

    def start(
        self,
        trial: str,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        text: Mapping[str, str],
        name: str | None = None,
    ) -> None:
        """Opens a run, shown as `name` or `trial`; `text` holds artifacts by name (`{"config.yaml": "..."}`).

        A trial that has a run already, from a process before this one, continues in it as it is.
        """

    def log(self, trial: str, epoch: int, metrics: Mapping[str, float], images: Mapping[str, str | Path]) -> None:
        """Records one epoch, once: what comes again is dropped. Epochs come in order, but for 0.

        `images` are files, or fsspec URIs, that stay where they are until `close`.
        """

    def attach(
        self, trial: str, files: Mapping[str, str | Path], tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        """Adds files (paths or fsspec URIs by artifact name), tags and final metrics to a run."""

    def end(self, trial: str, status: str, reason: str | None) -> None:
        """Closes a run with raystar's status and reason."""

    def log_model(
        self, trial: str, epoch: int, export: Path, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """Adds the model of an epoch to a run, once. `export` is an export folder that stays there until `close`."""

    def register(self, trial: str, epoch: int, score: float, description: str, comparable: str) -> None:
        """Registers a run's model, once; it becomes the champion if no better one is known.

        Args:
            score: by the primary metric.
            comparable: the same for scores that can be compared: of the same data, by the same ruler.
        """

    def feature(self, trials: Sequence[str]) -> None:
        """Shows the pictures of up to ten runs beside each other, in this order."""

    def model_epoch(self, trial: str) -> int:
        """The epoch whose model was added last; 0 if there is none."""

    def run_id(self, trial: str) -> str | None:
        """The run's id in the store, once it has one."""

    def final(self, trial: str) -> Mapping[str, float]:
        """The final metrics recorded, by this process or those before it."""

    def last_epoch(self, trial: str) -> int:
        """The highest epoch recorded, by this process or those before it; 0 if there is none."""

    def sync(self) -> None:
        """Returns once everything recorded so far survives a power cut."""

    def close(self) -> None:
        """Closes every run that is still open and writes what is left."""


def provenance() -> dict[str, str]:
    """Tags that say what ran: raystar's version, the command line's program and the commit of raystar's clone."""
    tags = {"raystar.version": __version__, "mlflow.source.name": "raystar", "mlflow.source.type": "LOCAL"}
    if (commit := commit_of(Path(raystar.__file__).resolve().parent)) is not None:
        tags["mlflow.source.git.commit"] = commit
    return tags


def commit_of(package: Path) -> str | None:
    """The commit of the clone whose package this is; None where it is installed, or lies in another repository."""
    clone = package.parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if 'name = "raystar"' not in (clone / "pyproject.toml").read_text(encoding="utf-8", errors="replace"):
            return None
        if Path(_git(clone, "rev-parse", "--show-toplevel")).resolve() != clone:
            return None
        _git(clone, "ls-files", "--error-unmatch", f"{package.name}/__init__.py")  # fails where it is not part of it
        return _git(clone, "rev-parse", "HEAD")
    return None


def _git(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10, check=True, env=environment
    )
    return done.stdout.strip()


def user() -> str:
    """Who runs this."""
    import getpass

    with contextlib.suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return "unknown"

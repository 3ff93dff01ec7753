"""What a trial leaves in the storage, epoch by epoch, and how it is found again after any end.

`trials/t03/epoch_0007.pt` is a checkpoint, `epoch_0007.json` beside it what was reported, `pictures/t03/` the grids,
`losses.csv` all epochs in a table. The checkpoint is written last: one that is there always has its report and its row,
however the process ended.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from raystar.base.errors import RaystarError
from raystar.base.files import wait_for_space
from raystar.base.storage import Storage
from raystar.model import checkpoint as checkpoints
from raystar.record.events import TrialReport
from raystar.training.loss_table import LOSSES, LossTable, epoch_row

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"epoch_(\d+)\.pt")
_PICTURE = re.compile(r"(\w+)_(\d+)\.png")


def checkpoint_name(trial: str, epoch: int) -> str:
    """Where the checkpoint of `epoch` lies in the storage."""
    return f"trials/{trial}/epoch_{epoch:04d}.pt"


def picture_name(trial: str, key: str, epoch: int) -> str:
    """Where a grid lies in the storage."""
    return f"pictures/{trial}/{key}_{epoch:04d}.png"


def saved_pictures(storage: Storage, trial: str) -> dict[str, list[int]]:
    """Epochs of which there are grids, in order, by the grid's key; 0 is the untrained model's."""
    pictures: dict[str, list[int]] = {}
    for name in storage.list(f"pictures/{trial}"):
        if match := _PICTURE.fullmatch(name):
            pictures.setdefault(match[1], []).append(int(match[2]))
    return {key: sorted(epochs) for key, epochs in pictures.items()}


def saved_epochs(storage: Storage, trial: str) -> list[int]:
    """Epochs whose checkpoints are there, in order."""
    matches = (_CHECKPOINT.fullmatch(name) for name in storage.list(f"trials/{trial}"))
    return sorted(int(match[1]) for match in matches if match)


@dataclass(frozen=True)
class Restored:
    """Where a trial is resumed."""

    checkpoint: dict[str, Any] | None
    epoch: int
    """The last that is done; 0 where it begins."""
    note: str | None
    """Checkpoints that were passed over, since they are damaged."""


class TrialFiles:
    """One trial's files, for the process that trains it. A full disk makes it wait."""

    def __init__(self, storage: Storage, trial: str) -> None:
        self.storage = storage
        self.trial = trial
        self._losses = LossTable()

    def save_config(self, text: str) -> None:
        """Keeps the trial's whole configuration."""
        self._write(f"trials/{self.trial}/config.yaml", text.encode())

    def save(self, epoch: int, report: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
        """Keeps one epoch: its report (plain values), its row in the table of losses, then its checkpoint."""
        text = json.dumps(report).encode()
        self._write(f"trials/{self.trial}/epoch_{epoch:04d}.json", text)
        self._losses.add(_row(epoch, report))
        self._write(f"trials/{self.trial}/{LOSSES}", self._losses.text().encode())
        name = checkpoint_name(self.trial, epoch)
        wait_for_space(
            self.storage.at(name), lambda: self.storage.fill(name, lambda path: checkpoints.write(path, checkpoint))
        )

    def save_picture(self, key: str, image: Image.Image, epoch: int) -> str:
        """Keeps a grid; returns its path or URI."""
        png = io.BytesIO()
        image.save(png, "PNG", compress_level=1)  # MLflow writes it again; time matters here, not bytes
        name = picture_name(self.trial, key, epoch)
        self._write(name, png.getvalue())
        return self.storage.at(name)

    def save_error(self, text: str) -> None:
        """Keeps the trace of what ended the trial."""
        self._write(f"trials/{self.trial}/error.txt", text.encode())

    def restore(self) -> Restored:
        """The newest checkpoint that can be read."""
        self.storage.tidy(f"trials/{self.trial}")
        checkpoint: dict[str, Any] | None = None
        damaged: list[str] = []
        for epoch in reversed(saved_epochs(self.storage, self.trial)):
            name = checkpoint_name(self.trial, epoch)
            try:
                with self.storage.fetched(name) as path:
                    checkpoint = checkpoints.load(path)
                break
            except (RaystarError, FileNotFoundError) as error:
                logger.warning(error)
                damaged.append(name.rpartition("/")[2])
        done = int(checkpoint["epoch"]) if checkpoint else 0
        self._losses = self._saved_losses(done)
        note = f"{' and '.join(damaged)} cannot be read; resumed after epoch {done}" if damaged else None
        return Restored(checkpoint, done, note)

    def _saved_losses(self, until: int) -> LossTable:
        """The rows of the epochs that are not trained again; from reports where the table lacks them."""
        table, folder = LossTable(), f"trials/{self.trial}"
        there = set(self.storage.list(folder)) if until else set()
        if LOSSES in there:
            table.read(self.storage.read(f"{folder}/{LOSSES}").decode(errors="replace"), until)
        for epoch in range(1, until + 1):
            if epoch not in table.epochs and f"epoch_{epoch:04d}.json" in there:
                (report,) = self.reports(epoch - 1, epoch)
                table.add(_row(epoch, report))
        return table

    def reports(self, after: int, until: int) -> list[TrialReport]:
        """What was reported for the epochs in (after, until]."""
        names = (f"trials/{self.trial}/epoch_{epoch:04d}.json" for epoch in range(after + 1, until + 1))
        return [json.loads(self.storage.read(name)) for name in names]

    def _write(self, name: str, data: bytes) -> None:
        wait_for_space(self.storage.at(name), lambda: self.storage.write(name, data))


def _row(epoch: int, report: Mapping[str, Any]) -> dict[str, float]:
    return epoch_row(epoch, report.get("step"), report.get("metrics", {}))

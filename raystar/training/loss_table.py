"""An epoch in a row: what the log's summary line says of it, and the table `losses.csv` of a run."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Mapping
from typing import Any

from raystar.training.step import LOGGED

LOSSES = "losses.csv"
"""The table's name, in a run's folder."""

_METRICS = {
    **{name: f"train/{name}" for name in (*LOGGED, "lambda_ds", "lr_g", "lr_d", "lr_mapping")},
    "seconds": "perf/train_s",
    "samples_per_s": "perf/samples_per_s",
    "score": "eval/score",
}
COLUMNS = ("epoch", "global_step", *_METRICS)


def epoch_row(epoch: int, step: int | None, metrics: Mapping[str, float]) -> dict[str, float]:
    """An epoch's losses (means over its steps), weights and rates as they stand at its end, seconds, speed and score.

    Args:
        step: optimiser steps of the whole run until the epoch's end; None where nobody has counted them.
        metrics: of the epoch; the row leaves out what it lacks, such as the score of an epoch that was not measured.
    """
    row: dict[str, float] = {"epoch": epoch} if step is None else {"epoch": epoch, "global_step": step}
    return row | {column: metrics[name] for column, name in _METRICS.items() if name in metrics}


class LossTable:
    """The rows of `losses.csv`, by epoch: of one that is trained again, the last."""

    def __init__(self) -> None:
        self._rows: dict[int, Mapping[str, Any]] = {}

    @property
    def epochs(self) -> set[int]:
        """Those that have a row."""
        return set(self._rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in what `epoch_row` gives."""
        self._rows[int(row["epoch"])] = row

    def read(self, text: str, until: int) -> None:
        """Takes in the rows of a file up to the epoch `until`; what is no row is left out."""
        with contextlib.suppress(csv.Error):
            for row in csv.DictReader(io.StringIO(text)):
                epoch = row.get("epoch") or ""
                if epoch.isdecimal() and int(epoch) <= until:
                    self.add(row)

    def text(self) -> str:
        """The file: a header, and a row an epoch, in order; a cell is empty where there is nothing."""
        file = io.StringIO()
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows[epoch] for epoch in sorted(self._rows))
        return file.getvalue()

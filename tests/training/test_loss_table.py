"""An epoch in a row, and `losses.csv`: read back exactly, without rows of epochs that are trained again."""

from __future__ import annotations

import csv
import io

import pytest

from raystar.training.loss_table import COLUMNS, LossTable, epoch_row
from raystar.training.step import LOGGED

METRICS = {
    **{f"train/{name}": 0.1 + number / 3 for number, name in enumerate(LOGGED)},
    "train/lambda_ds": 0.95, "train/lr_g": 1e-4, "train/lr_d": 2e-4, "train/lr_mapping": 1e-6,
    "perf/train_s": 12.5, "perf/samples_per_s": 80.25, "perf/eval_s": 3.0, "eval/score": 0.7, "eval/style": 0.2,
}  # fmt: skip


def table(*epochs: int) -> LossTable:
    made = LossTable()
    for epoch in epochs:
        made.add(epoch_row(epoch, 40 * epoch, METRICS | {"train/d_loss": epoch / 7}))
    return made


def test_a_row_has_the_losses_by_their_names() -> None:
    row = epoch_row(3, 120, METRICS)
    assert tuple(row) == COLUMNS
    assert (row["epoch"], row["global_step"], row["seconds"], row["samples_per_s"]) == (3, 120, 12.5, 80.25)
    assert (row["score"], row["lambda_ds"], row["lr_mapping"]) == (0.7, 0.95, 1e-6)
    assert [row[name] for name in LOGGED] == [METRICS[f"train/{name}"] for name in LOGGED]
    unmeasured = {name: value for name, value in METRICS.items() if not name.startswith("eval/")}
    assert "score" not in epoch_row(3, None, unmeasured)
    assert "global_step" not in epoch_row(3, None, unmeasured)


def test_the_file_reads_back_exactly() -> None:
    text = table(2, 1, 3).text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["d_loss"]) for row in rows] == [1 / 7, 2 / 7, 3 / 7]
    again = LossTable()
    again.read(text, 3)
    assert again.text() == text


def test_epochs_that_are_trained_again_have_one_row() -> None:
    """A run that is resumed after epoch 2 of 4, and told epoch 3 anew."""
    resumed = LossTable()
    resumed.read(table(1, 2, 3, 4).text(), until=2)
    assert resumed.epochs == {1, 2}
    resumed.add(epoch_row(3, 120, METRICS | {"train/d_loss": 9.0}))
    rows = list(csv.DictReader(io.StringIO(resumed.text())))
    assert [(row["epoch"], float(row["d_loss"])) for row in rows] == [("1", 1 / 7), ("2", 2 / 7), ("3", 9.0)]


@pytest.mark.parametrize(
    "text", ["", "nothing of that kind\n1,2,3\n", "epoch\nnan\n-1\n1.5\n", "epoch,x\n" + "9" * 150_000]
)
def test_what_is_no_table_gives_no_rows(text: str) -> None:
    read = LossTable()
    read.read(text, until=99)
    assert read.epochs == set()


def test_columns_of_another_version_are_matched_by_name() -> None:
    read = LossTable()
    read.read("tone,epoch,d_loss\n5,1,0.5\n6,2\n", until=2)
    first, second = csv.DictReader(io.StringIO(read.text()))
    assert (first["epoch"], first["d_loss"], first["score"]) == ("1", "0.5", "")
    assert (second["epoch"], second["d_loss"]) == ("2", "")
    assert "tone" not in first

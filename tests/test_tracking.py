"""The MLflow tracker on a real store: order, interruptions, and what it refuses."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raystar import tracking
from raystar.errors import RaystarError
from raystar.tracking import PARENT, MlflowTracker, check_uri


class Flaky:
    """A client whose server is away for its next `missing` calls."""

    def __init__(self, client: Any, missing: int) -> None:
        self.client = client
        self.missing = missing

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.missing:
                self.missing -= 1
                raise ConnectionError("nobody there")
            return real(*args, **kwargs)

        return call


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowTracker:
    monkeypatch.setattr(tracking, "_RETRY_S", (0.01,))
    monkeypatch.setattr(tracking, "_LAST_S", 0.1)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    dataset = {"name": "d", "digest": "abc", "source": "here"}
    common = {"raystar.sweep": "s"}
    made = MlflowTracker(
        uri, tmp_path / "artifacts", dataset, common, "eval/score", True, spool=tmp_path / "spool.jsonl"
    )
    made.begin()
    made.wait_until_connected()
    return made


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    return sqlite3.connect(folder / "mlflow.db").execute(query).fetchall()


def record(tracker: MlflowTracker, folder: Path) -> None:
    """A parent, a trial with two epochs and a picture, and a trial that nobody ends."""
    picture = folder / "grid.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture)
    tracker.start(PARENT, params={}, tags={}, text={}, name="s")
    for trial in ("t00", "t01"):
        tracker.start(trial, params={"loss.w_cyc": 1.5}, tags={"raystar.trial": trial}, text={"config.yaml": "a: 1"})
    tracker.log("t00", 1, {"train/g_loss": 3.0, "eval/score": 2.0}, {"grid_ref": picture})
    tracker.log("t00", 2, {"train/g_loss": 2.0, "eval/score": 1.5}, {})
    tracker.end("t00", "diverged", "a loss became NaN")


def test_a_server_that_is_away_for_a_while_loses_nothing(tracker: MlflowTracker, tmp_path: Path) -> None:
    tracker._client = Flaky(tracker._client, missing=6)
    record(tracker, tmp_path)
    tracker.close()
    assert rows(tmp_path, "select step, value from metrics where key = 'eval/score' order by step") == [
        (1, 2.0),
        (2, 1.5),
    ]
    names = dict(rows(tmp_path, "select name, status from runs"))
    assert names == {"s": "KILLED", "t00": "FAILED", "t01": "KILLED"}  # nothing is left RUNNING
    assert ("raystar.reason", "a loss became NaN") in rows(tmp_path, "select key, value from tags")
    pictures = list((tmp_path / "artifacts").rglob("grid_ref*.png"))
    assert len(pictures) == 1
    assert {value for (value,) in rows(tmp_path, "select value from tags where key = 'mlflow.parentRunId'")} == {
        tracker.run_id(PARENT)
    }


def test_a_record_that_mlflow_refuses_is_told_and_holds_up_nothing(
    tracker: MlflowTracker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker.start(PARENT, params={}, tags={}, text={}, name="s")
    tracker.log(PARENT, 1, {"not a key!": 1.0}, {"grid_ref": tmp_path / "gone.png"})
    tracker.log(PARENT, 2, {"eval/score": 1.0}, {})
    tracker.close()
    assert rows(tmp_path, "select step, value from metrics") == [(2, 1.0)]
    assert capsys.readouterr().err.count("error: MLflow refuses a record") == 2


def test_a_server_that_stays_away_is_given_up_with_a_count(
    tracker: MlflowTracker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker._client = Flaky(tracker._client, missing=10**9)
    record(tracker, tmp_path)
    tracker.close()
    assert "MLflow is away" in capsys.readouterr().err
    assert rows(tmp_path, "select * from runs") == []


def test_the_experiment_opens_on_the_metric_that_is_searched(tracker: MlflowTracker, tmp_path: Path) -> None:
    tracker.close()
    tags = dict(rows(tmp_path, "select key, value from experiment_tags"))
    assert tags["mlflow.experiment.primaryMetric.name"] == "eval/score"
    assert "best/score" in tags["mlflow.sharedViewState.raystar"]
    command, address = tracker.how_to_compare()
    assert command == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    assert f"#/experiments/{tracker.experiment_id}/runs?" in address


def test_stores_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database")
    for uri, words in {
        f"sqlite:///{tmp_path}/text.db": "another kind of file",
        f"sqlite:///{tmp_path}": "found a folder",
        f"sqlite:///{tmp_path}/text.db/deeper/mlflow.db": "cannot be made",
        str(tmp_path): "expected sqlite",
        "http://user:secret@127.0.0.1:9": "nothing answers",
    }.items():
        with pytest.raises(RaystarError, match=words) as caught:
            check_uri(uri)
        assert "secret" not in str(caught.value)

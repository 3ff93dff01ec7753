"""ASHA's rungs against Ray's own, and the ledger: told its journal again, it knows the same again."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raystar.base.journal import Journal
from raystar.record import events as events_module
from raystar.record.state import Ledger
from raystar.record.statuses import COMPARABLE
from raystar.record.summary import Summary
from raystar.search.asha import Rungs
from raystar.search.space import Collapse


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(("grace", "factor", "epochs"), [(1, 2, 8), (1, 3, 27), (2, 4, 10), (3, 2.5, 20), (1, 2, 1)])
def test_rungs_decide_as_rays(mode: str, grace: int, factor: float, epochs: int) -> None:
    schedulers = pytest.importorskip("ray.tune.schedulers")
    theirs = schedulers.ASHAScheduler(
        time_attr="epoch", metric="m", mode=mode, max_t=epochs, grace_period=grace, reduction_factor=factor
    )
    ours = Rungs(mode, grace, factor, epochs)
    rng = np.random.default_rng(7)
    trials = {f"t{n}": SimpleNamespace(trial_id=f"t{n}", is_finished=lambda: False) for n in range(40)}
    for trial in trials.values():
        theirs.on_trial_add(None, trial)
    running = dict.fromkeys(trials, 0)
    stopped = 0
    while running:
        name = str(rng.choice(list(running)))
        running[name] += 1
        value = float(rng.normal(running[name], 3.0))
        continues = ours.take(name, running[name], value)
        decision = theirs.on_trial_result(None, trials[name], {"epoch": running[name], "m": value})
        if running[name] < epochs:  # at the end Ray stops everyone; there is nothing to decide
            assert continues == (decision == "CONTINUE"), (name, running[name])
        if not continues or running[name] >= epochs:
            stopped += not continues
            running.pop(name)
    assert stopped > 5 or epochs == 1


def test_rungs_told_again_decide_alike_and_heed_nothing_twice() -> None:
    rungs = Rungs("min", 1, 2, 8, exempt="base")
    assert rungs.take("a", 1, 1.0)
    assert not rungs.take("b", 1, 2.0)
    assert rungs.take("b", 1, 2.0)  # decided before
    assert rungs.take("base", 1, 9.0)  # never stopped, but counts
    assert rungs.take("c", 1, 1.9)  # the median of 1, 2 and 9 is 2
    assert not rungs.take("d", 1, math.nan)
    assert not rungs.take("e", 1, math.inf)
    assert rungs.take("f", 1, 0.5)
    assert rungs.take("a", 2, 5.0)
    assert not rungs.take("c", 2, 6.0)


def test_who_has_not_moved_is_last_at_a_rung() -> None:
    rungs = Rungs("min", 1, 2, 8, exempt="base")
    assert rungs.take("a", 1, 0.1, unmoved=True)  # whatever its value, and nobody else is there
    assert rungs.take("b", 1, 0.2, unmoved=True)  # nor has anybody moved
    assert rungs.take("c", 1, 9.0)  # better than both
    assert not rungs.take("d", 1, 0.0, unmoved=True)  # c has moved
    assert rungs.take("e", 1, 9.5)  # in the better half of five, four of which are no better
    assert rungs.take("f", 1, 9.5)
    assert rungs.take("base", 1, 0.0, unmoved=True)  # never stopped
    assert not rungs.take("g", 1, math.nan)
    assert rungs.take("c", 2, 5.0)
    assert not rungs.take("a", 2, 0.1, unmoved=True)
    assert rungs.rungs[-1].values == [-math.inf] * 4 + [-9.5, -9.5, -9.0]


def test_a_rung_whose_better_half_has_moved_ranks_as_ever() -> None:
    rungs = Rungs("max", 1, 2, 8)
    for name, value in (("a", 1.0), ("b", 3.0), ("c", 5.0)):
        rungs.take(name, 1, value)
    assert not rungs.take("d", 1, 0.0, unmoved=True)
    assert not rungs.take("e", 1, 1.9)  # the median of -inf, 1, 3 and 5 is 2
    assert Rungs("max", 2, 3, 20).places == [2, 6, 18]


def ledger(**changed: Any) -> Ledger:
    summary = Summary("s", "eval/score", "min", 4, "t00")
    for number in range(4):
        summary.add(f"t{number:02d}", {"loss.w_cyc": float(number)})
    settings: dict[str, Any] = {"rungs": Rungs("min", 1, 2, 4, "t00"), "epochs": 4, "collapse": Collapse()} | changed
    return Ledger(summary, **settings)


def story() -> list[dict[str, Any]]:
    """What happens to four trials, the journal of which is cut at every place."""

    def epoch(trial: str, number: int, score: float) -> dict[str, Any]:
        return {"event": events_module.EPOCH, "trial": trial, "epoch": number, "metrics": {"eval/score": score}}

    def ended(trial: str, status: str, reason: str | None = None) -> dict[str, Any]:
        return {"event": events_module.ENDED, "trial": trial, "status": status, "reason": reason}

    def started(trial: str) -> dict[str, Any]:
        return {"event": events_module.STARTED, "trial": trial, "params": {"loss.w_cyc": float(trial[1:])}}

    told = [
        {"event": events_module.SESSION},
        started("t00"),
        started("t01"),
        epoch("t00", 1, 2.0),
        epoch("t01", 1, 1.5),
        epoch("t01", 2, 1.25),
        {"event": events_module.ALONE, "trial": "t01", "reason": "out of memory"},
        started("t02"),
        epoch("t02", 1, 3.0),
        ended("t02", "stopped", "stopped early after epoch 1"),
        epoch("t00", 2, 1.75),
        {"event": events_module.SESSION},
        started("t03"),
        started("t00"),
        epoch("t00", 2, 1.75),
        epoch("t03", 1, 0.5),
        ended("t03", "diverged", "NaN"),
        started("t01"),
        epoch("t01", 3, 1.0),
        {"event": events_module.NOTE, "trial": "t01", "note": "went back"},
        epoch("t01", 4, 1.125),
        ended("t01", "finished"),
        ended("t00", "killed", "its process died"),
    ]
    return [{**event, "at": 100.0 + number} for number, event in enumerate(told)]


def state(found: Ledger) -> dict[str, Any]:
    assert found.rungs is not None
    summary = found.summary
    return {
        "trials": {name: asdict(record) for name, record in summary.trials.items()},
        "rungs": found.rungs.rungs,
        "best": summary.best and summary.best.trial,
        "counts": summary.counts(),
        "ended": asdict(summary.ended),
        "running": sorted(summary.running),
        "epochs": summary.epochs_done,
        "started": summary.started,
        "alone": found.alone,
        "due": found.due,
    }


def test_what_it_knows_in_the_end() -> None:
    found = ledger()
    for event in story():
        found.apply(event)
    summary = found.summary
    assert {name: r.status for name, r in summary.trials.items()} == {
        "t00": "killed", "t01": "finished", "t02": "stopped", "t03": "diverged",
    }  # fmt: skip
    assert summary.best is summary.trials["t01"]  # t03 had less, and diverged
    assert (summary.best.score, summary.best.score_epoch, summary.best.epochs) == (1.125, 4, 4)  # the last, not 1.0
    assert summary.best.note == "went back"
    assert summary.trials["t01"].wall_s == 4 + 4  # while it ran, not while it waited
    assert found.broken_in_a_row == ["t00"]
    assert found.unfinished() == ["t00"]
    assert summary.counts() == {"killed": 1, "finished": 1, "stopped": 1, "diverged": 1}
    assert summary.started == 111.0 - 10  # ten seconds before, eleven since


@pytest.mark.parametrize("cut", range(1, len(story()) + 1))
def test_a_sweep_that_broke_off_anywhere_knows_the_same_again(cut: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    lived, told = ledger(), ledger()
    for event in story()[:cut]:
        journal.append(event)
        lived.apply(event)
    running = sorted(lived.summary.running)
    told.replay(journal)
    assert not told.summary.running
    for name in running:
        assert told.summary.trials[name].status == "interrupted"
        lived.summary.settle(name, "interrupted", "its sweep ended")
    ours, theirs = state(lived), state(told)
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert theirs[key] == value, key


def test_a_stop_that_was_not_carried_out_is_due() -> None:
    told = story()[:9]
    assert told[-1]["trial"] == "t02"
    found = ledger()
    found.replay(told)
    assert {name: verdict.ends for name, verdict in found.due.items()} == {"t02": "stopped"}


def told(found: Ledger, epoch: int, **metrics: float) -> events_module.Verdict:
    values = {f"eval/{key}": value for key, value in metrics.items()}
    return found.apply({"event": events_module.EPOCH, "trial": "t01", "epoch": epoch, "metrics": values, "at": 0.0})


def started(found: Ledger, *names: str) -> Ledger:
    found.apply({"event": events_module.SESSION, "at": 0.0})
    for name in names:
        found.apply({"event": events_module.STARTED, "trial": name, "params": {}, "at": 0.0})
    return found


def test_a_score_is_the_last_that_was_measured() -> None:
    found = started(ledger(rungs=None), "t01")
    record = found.summary.trials["t01"]
    told(found, 1, score=1.0, movement=0.9)
    told(found, 2)
    assert (record.score, record.score_epoch, record.epochs) == (1.0, 1, 2)
    told(found, 3, score=2.0, movement=0.001)
    assert (record.score, record.score_epoch, record.unmoved) == (2.0, 3, True)
    assert record.metrics == {"eval/score": 2.0, "eval/movement": 0.001}
    told(found, 4, score=1.5, movement=0.9)
    assert (record.score, record.unmoved) == (1.5, False)  # it has moved since
    told(found, 5, score=math.nan, movement=0.9)
    assert (record.score, record.score_epoch, found.summary.best) == (None, None, None)


def test_rungs_rank_by_their_own_metric_and_say_why() -> None:
    first = {"eval/score": 9.0, "eval/style": 0.5, "eval/movement": 0.9}

    def second(**metrics: float) -> tuple[events_module.Verdict, bool]:
        """What becomes of a trial that comes to the first rung after another."""
        found = started(ledger(ranking="eval/style", rungs=Rungs("min", 1, 2, 4)), "t00", "t01")
        found.apply({"event": events_module.EPOCH, "trial": "t00", "epoch": 1, "metrics": first, "at": 0.0})
        return told(found, 1, score=1.0, **metrics), found.summary.trials["t01"].unmoved

    stopped = "stopped early after epoch 1"
    assert second() == (events_module.Verdict(), False)  # nothing to rank by
    assert second(style=0.4, movement=0.9) == (events_module.Verdict(), False)
    assert second(style=0.6, movement=0.9) == (events_module.Verdict("stopped", stopped), False)
    reason = f"{stopped}: its translations cannot be distinguished from their sources"
    assert second(style=0.1, movement=0.001) == (events_module.Verdict("stopped", reason), True)


def test_another_ruler_sets_aside_what_was_measured() -> None:
    """No score of the first one ranks a trial at the end or at a rung; time between the sessions does not count."""
    state = started(ledger(), "t00", "t01")
    first = {"eval/score": 1.0, "eval/movement": 0.001}
    state.apply({"event": events_module.REFERENCES, "values": {"nothing": first}, "at": 5.0})
    state.apply({"event": events_module.EPOCH, "trial": "t00", "epoch": 1, "metrics": first, "at": 10.0})
    state.apply({"event": events_module.RULER, "ruler": "new", "at": 5000.0})
    t00, t01, t02 = (state.summary.trials[name] for name in ("t00", "t01", "t02"))
    assert (t00.score, t00.score_epoch, t00.metrics, t00.unmoved, t00.epochs) == (None, None, {}, False, 1)
    assert t00.note == "another ruler measured it up to epoch 1, score 1.0000"
    assert (t01.note, t02.note) == (None, None)
    assert (state.ruler, state.aside, state.summary.best, state.summary.references) == ("new", {"t00"}, None, {})
    state.apply({"event": events_module.SESSION, "at": 5001.0})
    assert state.summary.started == 5001.0 - 10.0
    state.apply({"event": events_module.STARTED, "trial": "t01", "params": {}, "at": 5001.0})
    worse = {"eval/score": 9.0, "eval/movement": 0.9}
    event = {"event": events_module.EPOCH, "trial": "t01", "epoch": 1, "metrics": worse, "at": 5002.0}
    assert state.apply(event).ends is None  # nothing that counts came to this rung before it
    assert state.summary.best is t01


def test_doing_nothing_is_no_collapse() -> None:
    found = started(ledger(rungs=None), "t01")
    ends = [told(found, epoch, diversity=0.0, movement=0.001).ends for epoch in range(1, 7)]
    ends += [told(found, epoch, diversity=0.0, movement=0.5).ends for epoch in range(7, 10)]
    assert ends == [None] * 8 + ["collapsed"]


def test_collapse_is_seen_in_a_row_of_measurements() -> None:
    found = ledger(collapse=Collapse(0.1, 3), rungs=None)
    found.apply({"event": events_module.SESSION, "at": 0.0})
    found.apply({"event": events_module.STARTED, "trial": "t01", "params": {}, "at": 0.0})
    ends = []
    for epoch, diversity in enumerate([0.05, 0.05, 0.2, 0.05, None, 0.0, 0.09], start=1):
        metrics = {"eval/score": 2.0} | ({"eval/diversity": diversity} if diversity is not None else {})
        event = {"event": events_module.EPOCH, "trial": "t01", "epoch": epoch, "metrics": metrics, "at": 0.0}
        ends.append(found.apply(event).ends)
    assert ends == [None] * 6 + ["collapsed"]
    assert ledger(collapse=Collapse(0.1, 0)).apply(event | {"epoch": 1}).ends is None


def test_the_best_is_kept_in_mind_whatever_happens() -> None:
    """Against a search through all trials, after every one of many random changes."""
    rng = np.random.default_rng(3)
    summary = Summary("s", "eval/score", "min", 12, None)
    names = [f"t{n:02d}" for n in range(12)]
    for name in names:
        summary.add(name, {})
    statuses = ["running", "finished", "stopped", "interrupted", "diverged", "failed", "pending"]
    for step in itertools.count(1):
        name = str(rng.choice(names))
        if rng.random() < 0.5:
            summary.settle(name, str(rng.choice(statuses)))
        else:
            value = float(rng.integers(20)) if rng.random() < 0.95 else math.nan
            summary.report(name, step, {"eval/score": value} if rng.random() < 0.9 else {"train/g_loss": 1.0})
        able = [r for r in summary.trials.values() if r.status in COMPARABLE and r.score is not None]
        wanted = min(able, key=lambda r: (r.score, r.trial), default=None)
        assert summary.best is wanted
        counted = {s: sum(r.status == s for r in summary.trials.values()) for s in statuses}
        assert summary.counts() == {s: n for s, n in counted.items() if n}
        assert set(summary.running) == {r.trial for r in summary.trials.values() if r.status == "running"}
        if step == 2000:
            return


def test_the_journal_of_a_sweep_is_plain_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for event in story():
        journal.append(event)
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == story()

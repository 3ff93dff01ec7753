"""The finals: who is chosen, what their means say, and that a sweep that broke off in them resumes with the same."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from raystar.base.errors import RaystarError
from raystar.base.storage import Storage
from raystar.config.schema import Config
from raystar.record import events as events_module
from raystar.record import finals
from raystar.record.retention import Janitor
from raystar.record.state import Ledger
from raystar.record.statuses import FINISHED, STOPPED
from raystar.record.summary import Summary, TrialRecord
from raystar.record.trial_files import checkpoint_name, saved_epochs
from raystar.search.asha import Rungs
from raystar.search.space import Collapse, Finalists, from_mapping


def record(trial: str, score: float | None, status: str = FINISHED, **facts: Any) -> TrialRecord:
    return TrialRecord(trial, {}, status, epochs=4, score=score, score_epoch=4, **facts)


def test_who_is_chosen() -> None:
    there = [
        record("t00", 1.5),
        record("t01", 0.7, STOPPED),
        record("t02", 0.9),
        record("t03", 0.5, unmoved=True),
        record("t04", 0.8),
        record("t05", 0.6, STOPPED),
        record("t06", 0.1, "diverged"),
        record("t02-s1", 0.2, parent="t02"),
        record("t07", None),
    ]
    assert finals.choose(there, "min", 2, "t00") == ["t04", "t02", "t00"]
    assert finals.choose(there, "min", 2, None) == ["t04", "t02"]
    assert finals.choose(there, "min", 3, "t00") == ["t04", "t02", "t00"]  # the baseline is one of the best
    assert finals.choose(there, "min", 5, "t00") == ["t04", "t02", "t00", "t05", "t01"]
    assert finals.choose(there, "min", 9, "t00") == ["t04", "t02", "t00", "t05", "t01"]
    assert finals.choose(there, "max", 1, "t00") == ["t00"]
    assert finals.choose(
        [record("t00", 1.1, unmoved=True), record("t01", 1.2, STOPPED, unmoved=True)], "min", 2, None
    ) == [
        "t00",
        "t01",
    ]
    assert finals.choose([record("t06", 0.1, "diverged")], "min", 3, "t00") == []


def ledger(seeds: int = 2, mode: str = "min") -> Ledger:
    summary = Summary("s", "eval/score", mode, 4, "t00")
    for number in range(4):
        summary.add(f"t{number:02d}", {"loss.w_cyc": float(number)})
    return Ledger(summary, Rungs(mode, 1, 2, 2, "t00"), 2, Collapse())


class Story:
    """Events of a sweep, told to a ledger as they happen."""

    def __init__(self, found: Ledger) -> None:
        self.found = found
        self.told: list[dict[str, Any]] = []
        self(events_module.SESSION)

    def __call__(self, event: str, **facts: Any) -> events_module.Verdict:
        self.told.append({"event": event, "at": 100.0 + len(self.told), **facts})
        return self.found.apply(self.told[-1])

    def trial(self, name: str, *scores: float, status: str = FINISHED) -> None:
        known = self.found.summary.trials[name]
        self(events_module.STARTED, trial=name, params=known.params)
        for epoch, score in enumerate(scores, start=1):
            self(events_module.EPOCH, trial=name, epoch=epoch, metrics={"eval/score": score})
        self(events_module.ENDED, trial=name, status=status, reason=None)

    def search(self) -> None:
        self.trial("t00", 3.0, 1.1)
        self.trial("t01", 2.0, 0.9)
        self.trial("t02", 9.0, status=STOPPED)
        self.trial("t03", 1.0, 0.7)


def test_the_finals_decide() -> None:
    tell = Story(ledger())
    summary = tell.found.summary
    tell.search()
    assert summary.best is summary.trials["t03"]
    assert (summary.expected, summary.finals) == (4, None)
    tell(events_module.FINALS, finalists=["t03", "t01", "t00"], seeds=[1, 2])
    assert summary.expected == 10
    assert summary.repeats == ["t03-s1", "t03-s2", "t01-s1", "t01-s2", "t00-s1", "t00-s2"]
    assert summary.trials["t01-s2"].params == {"loss.w_cyc": 1.0, "training.seed": 2}
    assert summary.trials["t01-s2"].parent == "t01"
    assert tell.found.unfinished() == sorted(summary.repeats)
    tell.trial("t03-s1", 5.0, 1.3)  # the best of the search was lucky
    tell.trial("t03-s2", 5.0, 1.2)
    tell.trial("t01-s1", 5.0, 0.8)
    tell.trial("t01-s2", 5.0, 1.0)
    tell.trial("t00-s1", 5.0, 1.2)
    assert summary.finals is None
    assert summary.best is summary.trials["t03"]
    tell.trial("t00-s2", 5.0, 1.0)
    found = summary.finals
    assert found is not None
    assert [f.trial for f in found.ranked] == ["t01", "t03", "t00"]
    assert found.winner == "t01"
    assert summary.winner is summary.trials["t01"]
    assert summary.best is summary.trials["t01-s1"]  # of its runs the one that is exported
    first, second, third = found.ranked
    assert (first.runs, first.scores) == (["t01", "t01-s1", "t01-s2"], [0.9, 0.8, 1.0])
    rows = np.array([f.scores for f in found.ranked])
    spread = math.sqrt(rows.var(axis=1, ddof=1).mean())
    assert found.spread == pytest.approx(spread)
    half = stats.t(6).ppf(0.95) * spread / math.sqrt(3)
    assert [f.error for f in found.ranked] == pytest.approx([half] * 3)
    assert found.gain == summary.gain == pytest.approx((1.1 - 0.9) / 1.1)
    off = spread * math.sqrt(2 / 3)
    assert found.chance == pytest.approx(stats.t(6).cdf((third.mean - first.mean) / off))
    assert found.over_next == pytest.approx(stats.t(6).cdf((second.mean - first.mean) / off))
    assert found.gain_error == pytest.approx(
        stats.t(6).ppf(0.95) * spread * math.sqrt((1 + (0.9 / 1.1) ** 2) / 3) / 1.1
    )
    assert finals.line(summary, found) == (
        "winner t01: score 0.9000 +- 0.23 (mean of 3 seeds, 90%); baseline 1.1000 +- 0.23, 18.2% +- 26.7% better; "
        "chance that the order is real 86%, against the runner-up t03 82%"
    )
    summary.over = 2e9
    assert Summary.from_mapping(summary.to_mapping(), 4).to_mapping() == summary.to_mapping()


def test_repeats_enter_no_rung_and_are_never_stopped() -> None:
    tell = Story(ledger())
    tell.search()
    assert tell.found.rungs is not None
    before = asdict(tell.found.rungs)
    tell(events_module.FINALS, finalists=["t03"], seeds=[1])
    tell(events_module.STARTED, trial="t03-s1", params={})
    assert tell(events_module.EPOCH, trial="t03-s1", epoch=1, metrics={"eval/score": 99.0}).ends is None
    assert asdict(tell.found.rungs) == before


def test_what_went_wrong_is_left_out_of_a_mean() -> None:
    tell = Story(ledger())
    summary = tell.found.summary
    tell.search()
    tell(events_module.FINALS, finalists=["t03", "t02", "t00"], seeds=[1, 2])
    tell.trial("t03-s1", 1.0, status="diverged")
    tell.trial("t03-s2", 1.0, status="killed")
    tell.trial("t02-s1", 1.0, 2.0)
    tell.trial("t02-s2", 1.0, 3.0)
    tell.trial("t00-s1", 1.0, status="failed")
    tell.trial("t00-s2", 1.0, 1.3)
    found = summary.finals
    assert found is not None
    # t03's one score was chosen for being good; t02's was that of a trial that was stopped after one epoch.
    assert {f.trial: f.scores for f in found.ranked} == {"t00": [1.1, 1.3], "t02": [2.0, 3.0]}
    assert (found.winner, found.gain, found.chance) == ("t00", 0.0, None)
    assert found.over_next is not None
    assert summary.best is summary.trials["t00"]
    assert "it is the baseline: no other finalist beats it" in finals.line(summary, found)


def test_one_run_each_says_nothing_of_how_far_seeds_differ() -> None:
    tell = Story(ledger())
    tell.search()
    tell(events_module.FINALS, finalists=["t02", "t00"], seeds=[1])
    tell.trial("t02-s1", 1.0, 0.5)
    tell.trial("t00-s1", 1.0, status="failed")
    assert tell.found.summary.finals is None or tell.found.summary.finals.spread is None
    found = tell.found.summary.finals
    assert found is not None
    assert [(f.trial, f.error) for f in found.ranked] == [("t02", None)]
    assert (found.gain, found.chance, found.over_next) == (None, None, None)
    assert finals.line(tell.found.summary, found).startswith("winner t02: score 0.5000 (one seed")


def test_every_score_alike() -> None:
    tell = Story(ledger(mode="max"))
    tell.search()
    tell(events_module.FINALS, finalists=["t03", "t00"], seeds=[1])
    tell.trial("t03-s1", 1.0, 0.7)
    tell.trial("t00-s1", 1.0, 1.1)
    found = tell.found.summary.finals
    assert found is not None
    assert found.winner == "t00"  # more is better here
    # By chance they agree; seeds are known to differ more.
    assert found.spread == finals.SEEDS_DIFFER
    off = found.spread * math.sqrt(2 / 2)
    assert found.over_next == pytest.approx(stats.t(2).cdf((1.1 - 0.7) / off))
    tell.found.summary.metric = "eval/style"  # of which nothing is known
    again = finals.decide(tell.found.summary)
    assert again is not None
    assert (again.spread, again.over_next) == (0.0, 1.0)


def finale() -> list[dict[str, Any]]:
    """What happens in a sweep with finals, and once more after it has been made longer."""
    tell = Story(ledger())
    tell.search()
    tell(events_module.REFERENCES, values={"nothing": {"eval/score": 1.1}, "transfer": {"eval/score": 0.8}})
    tell(events_module.FINALS, finalists=["t03", "t00"], seeds=[1])
    tell.trial("t03-s1", 1.0, 0.9)
    tell.trial("t00-s1", 1.0, 1.2)
    tell(events_module.SESSION)
    tell.found.summary.add("t04", {"loss.w_cyc": 4.0})
    tell.trial("t04", 0.5, 0.6)
    tell(events_module.FINALS, finalists=["t04", "t00"], seeds=[1])
    tell.trial("t04-s1", 1.0, 0.5)
    return tell.told


@pytest.mark.parametrize("cut", range(1, len(finale()) + 1))
def test_a_sweep_that_broke_off_in_its_finals_knows_the_same_again(cut: int) -> None:
    lived, told = ledger(), ledger()
    for event in finale()[:cut]:
        lived.apply(event)
    told.replay(finale()[:cut])
    for name in list(lived.summary.running):
        lived.summary.settle(name, "interrupted", "its sweep ended")
    lived.summary.finals = finals.decide(lived.summary)
    ours, theirs = (found.summary.to_mapping() for found in (lived, told))
    assert {**ours, "wall_s": 0} == {**theirs, "wall_s": 0}
    assert (lived.summary.repeats, lived.summary.finalists) == (told.summary.repeats, told.summary.finalists)
    assert lived.unfinished() == told.unfinished()


def test_a_longer_search_chooses_again_and_keeps_what_was_trained() -> None:
    found = ledger()
    found.replay(finale())
    summary = found.summary
    assert summary.repeats == ["t03-s1", "t00-s1", "t04-s1"]
    assert found.unfinished() == []
    assert summary.finals is not None
    assert {f.trial: f.scores for f in summary.finals.ranked} == {"t04": [0.6, 0.5], "t00": [1.1, 1.2]}
    assert summary.standing == "t04 beats doing nothing (1.1000) and the channel transfer (0.8000)"
    assert summary.good(summary.trials["t04"])
    assert summary.good(summary.trials["t00"]) is False


def test_a_choice_that_changes_before_its_trials_begin_leaves_none_behind() -> None:
    tell = Story(ledger())
    summary = tell.found.summary
    tell.search()
    tell(events_module.FINALS, finalists=["t03", "t00"], seeds=[1, 2])
    tell(events_module.STARTED, trial="t03-s1", params={})
    tell(events_module.ENDED, trial="t03-s1", status=STOPPED, reason="t03 is no finalist any more")
    tell(events_module.FINALS, finalists=["t01", "t00"], seeds=[1])
    assert summary.repeats == ["t03-s1", "t00-s1", "t01-s1"]
    assert summary.counts()["pending"] == 2
    tell(events_module.FINALS, finalists=["t03"], seeds=[1])
    assert summary.trials["t03-s1"].status == "pending"  # wanted again


@pytest.mark.parametrize(
    ("score", "transfer", "said"),
    [
        (1.2, 0.9, "no trial beats doing nothing (1.1000)"),
        (1.0, 0.9, "t00 beats doing nothing (1.1000) but not the channel transfer (0.9000)"),
        (0.8, 0.9, "t00 beats doing nothing (1.1000) and the channel transfer (0.9000)"),
        (1.1, 1.2, "no trial beats doing nothing (1.1000)"),
    ],
)
def test_what_a_model_has_to_beat(score: float, transfer: float, said: str) -> None:
    tell = Story(ledger())
    tell.trial("t00", 3.0, score)
    assert tell.found.summary.standing is None
    tell(events_module.REFERENCES, values={"nothing": {"eval/score": 1.1}, "transfer": {"eval/score": transfer}})
    summary = tell.found.summary
    assert summary.standing == said
    assert summary.good(summary.trials["t00"]) == ("and the" in said)
    assert Summary.from_mapping(summary.to_mapping(), 4).standing == said


def test_who_has_not_moved_beats_nothing_by_rounding_alone() -> None:
    tell = Story(ledger())
    summary = tell.found.summary
    tell(events_module.REFERENCES, values={"nothing": {"eval/score": 1.1}, "transfer": {"eval/score": 1.2}})
    tell(events_module.STARTED, trial="t00", params={})
    metrics = {"eval/score": 1.0999999, "eval/movement": 0.0001}
    tell(events_module.EPOCH, trial="t00", epoch=2, metrics=metrics)
    tell(events_module.ENDED, trial="t00", status=FINISHED, reason=None)
    assert summary.standing == "no trial beats doing nothing (1.1000)"
    assert summary.good(summary.trials["t00"]) is False


GOOD: dict[str, Any] = {"space": {"loss.w_cyc": {"loguniform": [0.1, 10.0]}}}


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, (3, 2)),
        ({"finalists": 4}, (4, 0)),
        ({"finalists": 0}, (0, 0)),
        ({"finalists": {"seeds": 3}}, (3, 3)),
        ({"finalists": {"top": 1, "seeds": 0}}, (1, 0)),
        ({"space": {"training.seed": {"randint": [0, 9]}}}, (3, 0)),
        ({"space": {"training.seed": {"randint": [0, 9]}}, "finalists": {"top": 2, "seeds": 0}}, (2, 0)),
        ({"purpose": "speed", "space": {"training.use_amp": {"choice": [True, False]}}}, (0, 0)),
    ],
)
def test_the_space_file(changed: dict[str, Any], wanted: tuple[int, int]) -> None:
    assert from_mapping(GOOD | changed, Config(), "s.yaml").finalists == Finalists(*wanted)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"finalists": -1}, "finalists: expected at least 0"),
        ({"finalists": {"top": 1.5}}, "finalists.top: expected a whole number"),
        ({"finalists": {"seeds": -1}}, "finalists.seeds: expected at least 0"),
        ({"finalists": {"tops": 1}}, "finalists: unknown key 'tops'"),
        ({"finalists": "three"}, "finalists: expected a whole number"),
        (
            {"finalists": {"seeds": 1}, "space": {"training.seed": {"randint": [0, 9]}}},
            "finalists.seeds: .* the space searches training.seed itself",
        ),
        (
            {"finalists": 3, "purpose": "speed", "space": {"training.use_amp": {"choice": [True, False]}}},
            "finalists: purpose speed has none",
        ),
    ],
)
def test_refusals(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(RaystarError, match=words):
        from_mapping(GOOD | changed, Config(), "s.yaml")


def test_the_janitor_keeps_what_the_finals_may_export(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    janitor = Janitor(storage, keep=1, mode="min", top=2, baseline="t00")

    def ends(found: TrialRecord) -> None:
        for epoch in (1, 2, 3, 4):
            path = Path(storage.at(checkpoint_name(found.trial, epoch)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            janitor.epoch(found, epoch)
        janitor.ended(found)

    search = [
        record("t00", 1.5),
        record("t01", 0.3, STOPPED),  # the best score, after fewer epochs
        record("t02", 0.9),
        record("t03", 0.8),
        record("t04", 1.0),
        record("t05", 0.2, STOPPED, unmoved=True),
    ]
    for found in search:
        ends(found)
    names = [found.trial for found in search]
    assert [name for name in names if janitor.checkpoint(janitor_record(search, name))] == ["t00", "t02", "t03", "t05"]
    repeats = [
        record("t03-s1", 0.7, parent="t03"),
        record("t03-s2", 0.75, parent="t03"),
        record("t02-s1", 1.3, parent="t02"),
    ]
    for found in repeats:
        ends(found)
    everyone = [*search, *repeats]
    kept = [found.trial for found in everyone if janitor.checkpoint(found)]
    assert kept == ["t00", "t02", "t05", "t03-s1"]  # of each finalist its best run
    janitor.close()
    assert {found.trial: saved_epochs(storage, found.trial) for found in everyone} == {
        found.trial: [4] if found.trial in kept else [] for found in everyone
    }


def janitor_record(records: list[TrialRecord], name: str) -> TrialRecord:
    return next(found for found in records if found.trial == name)


def test_rank_correlation() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        a, b = rng.integers(0, 6, (2, 9))
        assert finals.rank_correlation(a.tolist(), b.tolist()) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(finals.rank_correlation([1.0, 1.0], [1.0, 2.0]))

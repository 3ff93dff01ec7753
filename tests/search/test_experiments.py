"""Named experiments of a space file: what forms they have, what is refused, and which trials they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raystar.base.errors import RaystarError
from raystar.config.load import load_config, override
from raystar.config.schema import Config
from raystar.search.space import Space, from_mapping, load_space
from tests.kit.support import ROOT

CPU = torch.device("cpu")
DRAWN: dict[str, Any] = {"loss.w_cyc": {"choice": [1.0, 3.0]}, "loss.w_id": {"choice": [1.0, 0.5]}}


def space_of(experiments: Any, config: Config | None = None, **more: Any) -> Space:
    return from_mapping({"experiments": experiments, **more}, config or Config(), "s.yaml")


def overrides_of(overrides: Any) -> dict[str, Any]:
    (experiment,) = space_of([{"name": "x", "overrides": overrides}]).experiments
    return dict(experiment.overrides)


def names_of(space: Space, config: Config | None = None) -> list[str | None]:
    return [trial.name for trial in space.known(config or Config(), CPU)]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ({"loss.w_cyc": 10, "training.seed": 3}, {"loss.w_cyc": 10.0, "training.seed": 3}),
        ({"loss": {"w_cyc": 10}, "training": {"seed": 3}}, {"loss.w_cyc": 10.0, "training.seed": 3}),
        ({"loss": {"w_cyc": 10}, "loss.w_id": 0, "training.seed": 3}, {
            "loss.w_cyc": 10.0, "loss.w_id": 0.0, "training.seed": 3,
        }),
        ({"training.lr_g": "1e-3"}, {"training.lr_g": 1e-3}),
        ({"loss.ds_margin": None}, {"loss.ds_margin": None}),
        # As users spell it: renamed keys, a name that means nothing here, networks that are raystar's own.
        ({"training": {"allow_tf32": False}, "data.epoch_size": 640}, {
            "training.tf32": False, "training.epoch_size": 640,
        }),
        ({"experiment.name": "x", "loss.w_cyc": 2}, {"loss.w_cyc": 2.0}),
        ({"model.exp_branch": "baseline_AdaIN"}, {"model.norm": "adain", "model.discriminator_norm": "spectral"}),
        # What must be alike and is.
        ({"data": {"domains": list(Config().data.domains)}, "loss.w_cyc": 2}, {"loss.w_cyc": 2.0}),
        ({"ruler.sources": Config().ruler.sources}, {}),
        ({}, {}),
        (None, {}),
    ],
    ids=str,
)  # fmt: skip
def test_forms_of_overrides(overrides: Any, wanted: dict[str, Any]) -> None:
    assert overrides_of(overrides) == wanted


def test_a_mapping_of_names_does_as_well() -> None:
    listed = space_of([{"name": "a", "overrides": {"loss.w_cyc": 2}}, {"name": "b", "overrides": {"loss.w_id": 0}}])
    assert space_of({"a": {"loss.w_cyc": 2}, "b": {"loss": {"w_id": 0}}}).experiments == listed.experiments


def test_a_set_of_overrides_may_name_the_experiment_itself() -> None:
    named = [
        {"overrides": {"experiment": {"name": "a"}, "loss": {"w_cyc": 2}}},
        {"overrides": {"experiment.name": "b", "experiment.outputs_dir": "outputs/b", "loss.w_id": 0}},
    ]
    space = space_of(named)
    assert names_of(space) == ["a", "b"]
    assert space.keys == ["loss.w_cyc", "loss.w_id"]


def test_alone_they_are_all_the_trials_and_run_to_their_ends() -> None:
    space = space_of({"b": {"loss.w_cyc": 2}, "a": {"loss": {"w_id": 0}}})
    assert (space.baseline, space.scheduler.type, space.finalists.seeds) == (False, "none", 0)
    assert space.keys == ["loss.w_cyc", "loss.w_id"]
    assert names_of(space) == ["b", "a"]
    assert space.points(Config(), CPU) == [
        {"loss.w_cyc": 2.0, "loss.w_id": 1.0},
        {"loss.w_cyc": 1.0, "loss.w_id": 0.0},
    ]


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({}, ("none", 0)),
        ({"scheduler": {"max_epochs": 9}}, ("none", 0)),
        ({"scheduler": {"type": "asha"}}, ("asha", 0)),
        ({"scheduler": {"grace_epochs": 2}}, ("asha", 0)),
        ({"finalists": {"top": 2}}, ("none", 2)),
        ({"space": DRAWN}, ("asha", 2)),
    ],
    ids=str,
)
def test_what_is_said_counts_alone_as_well(more: dict[str, Any], found: tuple[str, int]) -> None:
    space = space_of({"a": {"loss.w_cyc": 2}}, **more)
    assert (space.scheduler.type, space.finalists.seeds) == found


def test_beside_a_drawn_space_they_come_after_the_baseline_and_on_top() -> None:
    space = space_of({"a": {"loss.w_cyc": 3}, "b": {"training.seed": 7}}, space=DRAWN, trials=3)
    points = space.points(Config(), CPU)
    assert points is not None
    assert names_of(space) == [None, "a", "b"]
    assert space.keys == ["loss.w_cyc", "loss.w_id", "training.seed"]
    assert points[:3] == [
        {"loss.w_cyc": 1.0, "loss.w_id": 1.0, "training.seed": 0},
        {"loss.w_cyc": 3.0, "loss.w_id": 1.0, "training.seed": 0},
        {"loss.w_cyc": 1.0, "loss.w_id": 1.0, "training.seed": 7},
    ]
    # Of four combinations one is the baseline and one an experiment.
    assert [tuple(point.values()) for point in sorted(points[3:], key=str)] == [(1.0, 0.5, 0), (3.0, 0.5, 0)]
    whole = space_of({"a": {"loss.w_cyc": 3}}, space=DRAWN, search="grid").points(Config(), CPU)
    assert whole is not None
    assert len(whole) == 4


def test_one_that_changes_nothing_is_the_baseline() -> None:
    entries = {"a": {"loss.w_cyc": 3}, "baseline": {}}
    for space in (space_of(entries), space_of(entries, space=DRAWN), space_of(entries, baseline=True)):
        assert names_of(space) == ["a", "baseline"]
        assert [trial.baseline for trial in space.known(Config(), CPU)] == [False, True]
    spelt = space_of({"a": {"loss.w_cyc": 3}, "b": {"loss.w_cyc": 1}}, baseline=True)
    assert names_of(spelt) == ["a", "b"]
    assert names_of(space_of({"a": {"loss.w_cyc": 3}}, baseline=True)) == [None, "a"]


def test_the_same_twice_runs_twice() -> None:
    points = space_of({"a": {"loss.w_cyc": 3}, "b": {"loss": {"w_cyc": 3}}}).points(Config(), CPU)
    assert points == [{"loss.w_cyc": 3.0}] * 2


def test_seeds_that_experiments_set_are_not_the_finals() -> None:
    seeds = {"a": {"training.seed": 1}, "b": {"training.seed": 2}}
    assert space_of(seeds, space=DRAWN).finalists.seeds == 0
    with pytest.raises(RaystarError, match=r"finalists\.seeds: .* but an experiment sets training\.seed itself"):
        space_of(seeds, finalists={"top": 1, "seeds": 1})


def test_a_search_that_learns_knows_what_lies_in_its_space() -> None:
    pytest.importorskip("optuna")
    space = space_of({"a": {"loss.w_cyc": 2}, "b": {"training.seed": 7}}, space=DRAWN, search="tpe")
    assert space.points(Config(), CPU) is None
    assert names_of(space) == [None, "a", "b"]
    held = [space.holds(trial.values, Config()) for trial in space.known(Config(), CPU)]
    assert held == [True, False, False]  # 2 is no choice, and seeds are not drawn
    ranges = {"loss.w_cyc": {"uniform": [1, 3]}, "loss.r1_interval": {"randint": [1, 17]}}
    space = space_of({"a": {"loss.w_cyc": 4}, "b": {"loss.ds_margin": None}}, space=ranges, search="tpe")
    point = {"loss.w_cyc": 2.0, "loss.r1_interval": 16, "loss.ds_margin": Config().loss.ds_margin}
    assert space.holds(point, Config())
    for key, value in (("loss.w_cyc", 4.0), ("loss.w_cyc", None), ("loss.r1_interval", 17), ("loss.ds_margin", None)):
        assert not space.holds(point | {key: value}, Config()), key


def test_a_speed_sweep_compares_named_settings() -> None:
    space = space_of({"eager": {}, "compiled": {"training.use_compile": True}}, purpose="speed")
    assert space.points(Config(), CPU) == [{"training.use_compile": False}, {"training.use_compile": True}]
    with pytest.raises(RaystarError, match=r"experiments: w: loss\.w_cyc: purpose speed compares only what leaves"):
        space_of({"w": {"loss.w_cyc": 2}}, purpose="speed")


REFUSED: list[tuple[Any, list[str]]] = [
    ([], ["expected a list of experiments such as {name: cyc10, overrides: {loss.w_cyc: 10}}, found []"]),
    ("cyc10", ["expected a list of experiments", "'cyc10'"]),
    ([3], ["entry 1: expected {name: cyc10", "found 3"]),
    ([{"overrides": {}}], ["entry 1: name: expected text, found null"]),
    ([{"name": 10}], ["entry 1: name: expected text, found 10"]),
    ([{"name": "a"}, {"name": "b", "override": {}}], ["entry 2 (b)", "'override' (did you mean 'overrides'?)"]),
    ([{"name": "a/b"}], ["entry 1: name 'a/b': expected up to 64 letters", "no path"]),
    ([{"name": ".."}], ["entry 1: name '..'"]),
    ([{"name": "a"}, {"name": "a"}], ["entry 2: name a: another entry has it"]),
    ([{"name": "a"}, {"name": "A"}], ["entry 2: name A: it differs from a in case alone"]),
    ([{"name": "t07"}], ["entry 1: name t07: drawn trials"]),
    ([{"name": "T7-s1"}], ["entry 1: name T7-s1: drawn trials and their repeats"]),
    ([{"name": "a-s1"}, {"name": "a"}], ["a-s1: the finals train a again under such names"]),
    (
        [{"name": "baseline", "overrides": {"loss.w_cyc": 2}}],
        ["baseline: the baseline is the configuration as it stands, but this one sets loss.w_cyc"],
    ),
    ({"a": 3}, ["experiments: a: overrides: expected keys and values, found 3"]),
    ({"a": {"loss": 3}}, ["a: loss: expected a section of keys, found 3"]),
    ({"a": {"loss.w_cyc": -1}}, ["a: loss.w_cyc: expected at least 0, found -1"]),
    ({"a": {"loss.w_cyc": {"uniform": [1, 2]}}}, ["a: loss.w_cyc: expected a number, found {'uniform'"]),
    ({"a": {"loss.w_cyc": 1, "loss": {"w_cyc": 2}}}, ["a: loss.w_cyc is written twice"]),
    (
        {"a": {"loss.w_cycl": 1, "w_id": 2, "los": {"w_id": 1}}},
        ["a: unknown keys 'loss.w_cycl' (did you mean 'loss.w_cyc'?)", "'los.w_id'", "'w_id' (did you mean"],
    ),
    (
        {"a": {"loss.w_cycl": 1}, "b": {"loss.w_cyc": "x"}, "c": {}},
        ["2 faults:\n  a: unknown key 'loss.w_cycl'", "\n  b: loss.w_cyc: expected a number, found 'x'"],
    ),
    ({"a": {"training.epoch_size": 4}}, ["a: training.epoch_size 4 is below training.batch_size 16"]),
    ({"a": {"model.exp_branch": "other"}}, ["experiments: a: model.exp_branch: expected one of baseline_AdaIN"]),
    ({"a": {"training.num_epochs": 9}}, ["a: training.epochs: cannot differ", "found 9", "--epochs"]),
    ({"a": {"data.domains": ["photo", "monet"]}}, ["a: data.domains: cannot differ", "one sweep for each set"]),
    (
        {"a": {"data.domains": list(Config().data.domains)[::-1]}},
        ["a: data.domains: cannot differ", "one sweep for each set"],
    ),
    ({"a": {"checkpoint": {"save_dir": "x"}}}, ["a: checkpoint.save_dir: cannot differ", "trials/<name>"]),
]


@pytest.mark.parametrize(("experiments", "words"), REFUSED, ids=lambda case: str(case)[:50])
def test_refusals(experiments: Any, words: list[str]) -> None:
    with pytest.raises(RaystarError) as caught:
        space_of(experiments)
    assert str(caught.value).startswith("s.yaml: experiments")
    for word in words:
        assert word in str(caught.value)


def test_of_very_many_faults_the_first_are_listed() -> None:
    with pytest.raises(RaystarError) as caught:
        space_of({f"a{n}": {"loss.w_cycl": n} for n in range(250)})
    message = str(caught.value)
    assert "250 faults:\n  a0: unknown key" in message
    assert message.endswith(f"and {250 - message.count('unknown key')} more")
    assert len(message) < 2000


def test_an_experiment_that_a_key_of_the_configuration_contradicts() -> None:
    base = override(Config(), {"training.epoch_size": 32})
    with pytest.raises(RaystarError, match=r"experiments: big: training\.epoch_size 32 .*batch_size 64"):
        space_of({"big": {"training.batch_size": 64}}, base)


def test_the_shipped_file() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    space = load_space(ROOT / "search_spaces/experiments.yaml", config)
    known = space.known(config, CPU)
    assert [trial.name for trial in known if trial.baseline] == ["as_it_is"]
    assert len({tuple(trial.values.items()) for trial in known}) == len(known) == 4


def test_a_file_as_users_write_it(tmp_path: Path) -> None:
    """Of their sweep script's form, against a configuration of theirs."""
    config = load_config(ROOT / "tests/config/users/baseline.yaml")
    listed = [
        {"name": "cyc10", "overrides": {"loss.w_cyc": 10, "training.allow_tf32": False}},
        {"name": "seed3", "overrides": {"training": {"seed": 3}, "data.epoch_size": 640}},
    ]
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"experiments": listed}))
    points = load_space(path, config).points(config, CPU)
    assert points is not None
    assert points[0]["loss.w_cyc"] == 10.0
    assert points[0]["training.epoch_size"] == 6144
    assert points[1]["training.seed"] == 3
    assert points[1]["training.tf32"] == config.training.tf32

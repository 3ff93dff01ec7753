"""Space files: every sampled value is a value that the configuration accepts, or the file is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from raystar.base.errors import RaystarError
from raystar.config.load import load_config, override
from raystar.config.schema import Config
from raystar.search.distributions import Choice, LogUniform
from raystar.search.space import from_mapping, load_space
from raystar.training import compile as compile_module
from raystar.training.compile import canonical
from tests.kit.support import ROOT

CPU = torch.device("cpu")
GOOD: dict[str, Any] = {
    "trials": 40,
    "space": {
        "loss.w_cyc": {"loguniform": [0.1, 10.0]},
        "loss.w_id": {"choice": [0, 0.5]},
        "loss.r1_interval": {"randint": [1, 17]},
        "training.lr_g": {"uniform": ["1e-4", "5e-4"]},
    },
}


def space_of(**changed: Any) -> Any:
    return from_mapping(GOOD | changed, Config(), "s.yaml")


def test_the_shipped_spaces() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    for name, sections in (("loss", {"loss"}), ("architecture", {"model", "training"})):
        space = load_space(ROOT / f"search_spaces/{name}.yaml", config)
        assert space.metric == "eval/score"
        assert space.ranking == ("eval/outlook", "min")
        assert space.finalists.seeds > 0
        points = space.points(config, CPU)
        assert points is not None
        assert len(points) == space.trials
        assert {key.partition(".")[0] for key in points[0]} == sections


def test_a_trial_is_first_stopped_at_a_fifth_of_its_run() -> None:
    open_to_it, said = (
        space_of(scheduler=s).scheduler for s in ({"type": "asha"}, {"type": "asha", "grace_epochs": 3})
    )
    assert [open_to_it.grace(epochs) for epochs in (1, 5, 8, 38, 100)] == [1, 1, 2, 8, 20]
    assert said.grace(100) == 3


def test_points_are_inside_distinct_and_reproducible() -> None:
    points = space_of().points(Config(), CPU)
    assert points == space_of().points(Config(), CPU) != space_of(seed=1).points(Config(), CPU)
    assert len(points) == 40
    assert points[0] == {"loss.w_cyc": 1.0, "loss.w_id": 1.0, "loss.r1_interval": 16, "training.lr_g": 1e-4}
    drawn = points[1:]
    assert all(0.1 <= p["loss.w_cyc"] <= 10 for p in drawn)
    assert {p["loss.w_id"] for p in drawn} == {0.0, 0.5}
    intervals = {p["loss.r1_interval"] for p in drawn}
    assert intervals <= set(range(1, 17))
    assert len(intervals) > 5
    assert len({p["loss.w_cyc"] for p in drawn}) == 39
    for point in points:
        override(Config(), point)


def test_loguniform_is_uniform_in_the_logarithm() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    logs = [math.log10(LogUniform((0.01, 100.0)).draw(rng)) for _ in range(4000)]
    assert np.mean(logs) == pytest.approx(0.0, abs=0.08)
    assert np.mean([x < -1 for x in logs]) == pytest.approx(0.25, abs=0.03)


def test_grid_runs_every_combination_once() -> None:
    space = space_of(search="grid", space={"loss.w_id": {"choice": [0.0, 1.0]}, "loss.w_cyc": {"choice": [1, 2, 3]}})
    points = space.points(Config(), CPU)
    assert len(points) == 6  # the baseline is one of them
    assert points[0] == {"loss.w_id": 1.0, "loss.w_cyc": 1.0}
    assert len({tuple(p.items()) for p in points}) == 6


def test_tpe_needs_a_baseline_that_it_can_name() -> None:
    pytest.importorskip("optuna")
    with pytest.raises(RaystarError, match=r"loss\.w_id.*value 1\.0 is not among the choices"):
        space_of(search="tpe").points(Config(), CPU)
    assert space_of(search="tpe", baseline=False).points(Config(), CPU) is None


@pytest.mark.parametrize(
    ("draws", "possible"),
    [
        ({"uniform": [0.2, 0.8]}, lambda value: isinstance(value, float) and 0.2 <= value <= 0.8),
        ({"loguniform": [0.05, 0.9]}, lambda value: isinstance(value, float) and 0.05 <= value <= 0.9),
        ({"choice": [0.5, 20]}, lambda value: value in (0.5, 20) and isinstance(value, float) == (value < 1)),
        ({"randint": [1, 9]}, lambda value: value in range(1, 9) and isinstance(value, int)),
    ],
    ids=["uniform", "loguniform", "choice", "randint"],
)
def test_a_schedule_can_be_searched_by_shares_or_epochs(draws: dict[str, Any], possible: Any) -> None:
    points = space_of(trials=8, space={"loss.ds_decay_epochs": draws}).points(Config(), CPU)
    assert points[0] == {"loss.ds_decay_epochs": 20}
    drawn = [point["loss.ds_decay_epochs"] for point in points[1:]]
    assert drawn
    assert all(map(possible, drawn))


def test_few_latents_can_be_searched_by_one_number_or_one_for_each_domain() -> None:
    how = {"data.max_samples": {"choice": [10, [10, 20, 30, 40, 50], 200, None]}}
    space = space_of(space=how, trials=20)
    points = space.points(Config(), CPU)
    assert points[0] == {"data.max_samples": None}
    assert sorted(map(str, (p["data.max_samples"] for p in points))) == ["10", "200", "None", "[10, 20, 30, 40, 50]"]
    assert json.loads(json.dumps(points)) == points  # the record of a sweep that is resumed
    assert Choice.describe(how["data.max_samples"]["choice"]) == "10, [10, 20, 30, 40, 50], 200, \N{EN DASH}"
    space = space_of(space={"data.max_samples": {"randint": [5, 9]}}, baseline=False)
    assert sorted(p["data.max_samples"] for p in space.points(Config(), CPU)) == [5, 6, 7, 8]
    with pytest.raises(RaystarError, match=r"data\.max_samples: expected at least 1, found 0"):
        space_of(space={"data.max_samples": {"randint": [0, 9]}})
    with pytest.raises(RaystarError, match=r"data\.holdout: cannot be searched"):
        space_of(space={"data.holdout": {"choice": [0, 0.1]}})
    with pytest.raises(RaystarError, match=r"data\.max_samples: expected one number, or one for each of the 5"):
        space_of(space={"data.max_samples": {"choice": [[1, 2]]}}).points(Config(), CPU)


def test_no_baseline() -> None:
    points = space_of(baseline=False).points(Config(), CPU)
    assert points[0]["loss.w_id"] in (0.0, 0.5)
    assert len(points) == 40


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"spase": {}}, ["unknown key 'spase'", "'space'"]),
        ({"space": {}}, ["expected the keys to search"]),
        ({"space": {"loss.w_cycl": {"uniform": [1, 2]}}}, ["loss.w_cycl", "'loss.w_cyc'"]),
        ({"space": {"loss.w_cyc": {"unifrom": [1, 2]}}}, ["'unifrom'", "'uniform'"]),
        ({"space": {"loss.w_cyc": {"uniform": [2, 1]}}}, ["loss.w_cyc", "low < high", "[2, 1]"]),
        ({"space": {"loss.w_cyc": {"uniform": [1]}}}, ["[low, high]"]),
        ({"space": {"loss.w_cyc": {"uniform": [-1, 1]}}}, ["loss.w_cyc", "at least 0"]),
        ({"space": {"loss.w_cyc": {"loguniform": [0, 1]}}}, ["above 0"]),
        ({"space": {"loss.w_cyc": [1, 2]}}, ["expected one of uniform"]),
        ({"space": {"loss.w_cyc": {"choice": []}}}, ["expected a list"]),
        ({"space": {"loss.w_cyc": {"choice": ["high"]}}}, ["a number", "'high'"]),
        ({"space": {"loss.r1_interval": {"uniform": [1, 5]}}}, ["use randint or choice"]),
        ({"space": {"loss.r1_interval": {"randint": [0, 5]}}}, ["at least 1"]),
        ({"space": {"loss.r1_interval": {"randint": [1.5, 5]}}}, ["whole number"]),
        (
            {"space": {"loss.ds_decay_epochs": {"uniform": [0.2, 1]}}},
            ["loss.ds_decay_epochs: uniform", "shares of the run, both ends below 1", "[0.2, 1]", "randint or choice"],
        ),
        ({"space": {"loss.ds_decay_epochs": {"uniform": [1.5, 4.5]}}}, ["whole number of epochs, or a share", "1.5"]),
        ({"space": {"ruler.sources": {"choice": [4]}}}, ["cannot be searched"]),
        ({"space": {"training.epochs": {"choice": [4]}}}, ["cannot be searched"]),
        ({"space": {"training.log_json": {"choice": [True]}}}, ["cannot be searched"]),
        ({"metric": "scor"}, ["metric", "'score'"]),
        ({"mode": "lowest"}, ["min, max"]),
        ({"trials": 10**9}, ["trials", "at most 10000"]),
        ({"space": {"loss.r1_interval": {"randint": [1, 10**30]}}}, ["at most 2147483647"]),
        ({"trials": 0}, ["trials", "at least 1"]),
        ({"trials": "many"}, ["whole number"]),
        ({"baseline": 1}, ["true or false"]),
        ({"search": "magic"}, ["random, grid, tpe"]),
        ({"search": "grid"}, ["grid needs choices"]),
        ({"scheduler": {"metric": "stile"}}, ["scheduler.metric", "'style'"]),
        ({"scheduler": {"metric": "train/cyc"}}, ["scheduler.metric", "train/cyc", "eval/score"]),
        ({"scheduler": {"grace": 1}}, ["unknown key 'grace'"]),
        ({"scheduler": {"reduction_factor": 1}}, ["more than 1"]),
        ({"scheduler": {"reduction_factor": 10**400}}, ["a number", "1329 bits"]),
        ({"scheduler": {"grace_epochs": 9, "max_epochs": 8}}, ["at most max_epochs 8"]),
        ({"resources": {"gpus": 2}}, ["one device"]),
        ({"resources": {"cpu": 1}}, ["unknown key 'cpu'"]),
        ({"resources": {"workers": 0}}, ["workers", "at least 1"]),
        ({"resources": {"workers": 2, "gpus": 0.5}}, ["gpus", "2 workers take a whole GPU each", "0.5"]),
        ({"purpose": "sped"}, ["quality, speed"]),
        ({"purpose": "speed"}, ["loss.w_cyc", "purpose speed searches only", "training.use_compile"]),
        (
            {"purpose": "speed", "search": "tpe", "space": {"training.use_amp": {"choice": [True]}}},
            ["random or grid", "tpe"],
        ),
        (
            {"purpose": "speed", "resources": {"workers": 2}, "space": {"training.use_amp": {"choice": [True]}}},
            ["resources.workers", "one worker", "2"],
        ),
    ],
)
def test_refusals(changed: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RaystarError) as caught:
        space_of(**changed).points(Config(), CPU)
    assert "s.yaml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, ("eval/outlook", "min")),
        ({"scheduler": {"metric": "score"}}, ("eval/score", "min")),
        ({"scheduler": {"metric": "diversity"}}, ("eval/diversity", "max")),
        ({"scheduler": {"metric": "eval/style"}}, ("eval/style", "min")),
        ({"metric": "style"}, ("eval/style", "min")),
        ({"metric": "accuracy", "mode": "max"}, ("eval/accuracy", "max")),
        ({"metric": "train/cyc", "scheduler": {"metric": "train/cyc"}}, ("train/cyc", "min")),
        ({"metric": "train/cyc", "scheduler": {"metric": "content"}}, ("eval/content", "min")),
    ],
)
def test_what_ranks_at_rungs(changed: dict[str, Any], wanted: tuple[str, str]) -> None:
    assert space_of(**changed).ranking == wanted


def test_workers() -> None:
    assert space_of().resources.workers == 1
    assert space_of(resources={"workers": 4, "gpus": 1}).resources.workers == 4


def test_combinations_that_no_configuration_may_have() -> None:
    space = space_of(space={"training.batch_size": {"choice": [64]}}, baseline=False)
    with pytest.raises(RaystarError, match=r"epoch_size 32.*batch_size 64"):
        space.points(override(Config(), {"training.epoch_size": 32}), CPU)


def test_the_shipped_compile_space_tries_every_code_path_once() -> None:
    space = load_space(ROOT / "search_spaces/compile.yaml", Config())
    assert (space.purpose.name, space.metric, space.mode) == ("speed", "perf/speedup", "max")
    points = space.points(Config(), CPU)
    assert points is not None
    assert len(points) == 12
    seen = set()
    for point in points:
        assert point["training.compile_cudagraphs"] is False  # there is no GPU
        seen.add(canonical(override(Config(), point), CPU))
    assert len(seen) == 12
    assert len({point["training.compile_cudagraphs"] for point in space.points(Config(), torch.device("cuda"))}) == 2


@pytest.mark.parametrize(
    ("device", "settings", "same"),
    [
        ("cpu", {"compile_mode": "max-autotune", "compile_dynamic": True}, {}),  # nothing is compiled
        ("cpu", {"use_compile": True, "compile_cudagraphs": True}, {"use_compile": True}),
        ("cuda", {"use_compile": True, "compile_mode": "reduce-overhead"}, {"use_compile": True}),
        ("cpu", {"tf32": False, "cudnn_benchmark": False}, {}),
        (
            "cpu",
            {"use_compile": True, "compile_generator": False, "compile_mapping_network": False,
             "compile_style_encoder": False, "compile_discriminator": False},
            {},
        ),
    ],
)  # fmt: skip
def test_settings_that_run_the_same_code(device: str, settings: dict[str, Any], same: dict[str, Any]) -> None:
    left, right = (
        canonical(override(Config(), {f"training.{key}": value for key, value in values.items()}), torch.device(device))
        for values in (settings, same)
    )
    assert left == right


@pytest.mark.parametrize("settings", [{"use_compile": True}, {"channels_last": True}, {"use_amp": False}], ids=str)
def test_settings_that_run_other_code(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "fast_bf16", lambda device: True)  # as on a processor that has bf16
    changed = override(Config(), {f"training.{key}": value for key, value in settings.items()})
    assert canonical(changed, CPU) != canonical(Config(), CPU)


def test_a_small_space_runs_out_of_combinations() -> None:
    space = space_of(space={"loss.w_id": {"choice": [0.0, 1.0]}}, trials=40)
    assert space.points(Config(), CPU) == [{"loss.w_id": 1.0}, {"loss.w_id": 0.0}]

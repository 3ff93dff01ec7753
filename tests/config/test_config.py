"""The configuration: what it accepts, what it refuses, and with which words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from raystar.base.errors import RaystarError
from raystar.config.assignment import parse_assignment
from raystar.config.load import (
    from_mapping,
    load_config,
    overlay_yaml,
    override,
    request_config,
    signature,
    to_mapping,
    to_yaml,
)
from raystar.config.schema import Config, known_keys
from tests.kit.support import ROOT


def test_the_shipped_defaults_are_the_defaults() -> None:
    shipped = load_config(ROOT / "configs/stargan_v2_latent.yaml")
    defaults = Config()
    assert shipped.model == defaults.model
    assert shipped.loss == defaults.loss
    assert shipped.training == defaults.training
    assert shipped.data == defaults.data


def test_the_demo_carries_the_default_loss_weights() -> None:
    found = load_config(ROOT / "configs/demo.yaml").loss
    assert dataclasses.replace(found, ds_decay_epochs=20) == Config().loss
    assert found.ds_decay_epochs == 0.5  # of a run's length; 20 epochs would outlast a short one


def test_yaml_and_json_round_trip(tmp_path: Path) -> None:
    config = override(Config(), {"loss.ds_margin": None, "training.lr_g": 3e-4, "data.domains": ["x", "y"]})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    (tmp_path / "c.json").write_text(json.dumps(to_mapping(config)))
    assert load_config(tmp_path / "c.yaml") == config == load_config(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("key", "written", "found"),
    [
        ("training.lr_g", "1e-4", 1e-4),  # YAML 1.1 reads this as text
        ("training.batch_size", "1e1", 10),
        ("training.progress_style", "off", "off"),  # and this as false
        ("loss.ds_margin", "null", None),
        ("data.domains", "[photo, monet]", ("photo", "monet")),
        ("data.max_samples", "50", 50),
        ("data.max_samples", "1e1", 10),
        ("data.max_samples", "[10, 20, '30', 4e1, 50.0]", (10, 20, 30, 40, 50)),
        ("data.max_samples", "null", None),
        ("training.use_amp", "no", False),
    ],
)
def test_values_as_people_write_them(key: str, written: str, found: object) -> None:
    name, value = parse_assignment(f"{key}={written}")
    section, _, field = name.partition(".")
    assert getattr(getattr(override(Config(), {name: value}), section), field) == found


@pytest.mark.parametrize(
    ("written", "found"),
    [("20", 20), ("20.0", 20), ("2e1", 20), ("1", 1), ("0.5", 0.5), ("'0.25'", 0.25), ("1e-2", 0.01)],
)
def test_a_schedule_is_in_epochs_or_a_share_of_the_run(written: str, found: float) -> None:
    """Whole numbers stay whole, and sign as they always did."""
    config = override(Config(), dict([parse_assignment(f"loss.ds_decay_epochs={written}")]))
    value = config.loss.ds_decay_epochs
    assert (value, type(value)) == (found, type(found))
    assert (signature(config) == signature(Config())) == (value == 20)
    assert from_mapping(json.loads(json.dumps(to_mapping(config))), "again") == config


@pytest.mark.parametrize(("share", "epochs", "resolved"), [(20, 8, 20), (1, 8, 1), (0.5, 8, 4.0), (0.5, 5, 2.5)])
def test_a_share_follows_the_length_of_the_run(share: float, epochs: int, resolved: float) -> None:
    assert override(Config(), {"loss.ds_decay_epochs": share, "training.epochs": epochs}).ds_decay == resolved


@pytest.mark.parametrize("limits", [7, [7, 8], None])
def test_few_latents_are_part_of_the_result_and_are_written_as_they_were_read(limits: object, tmp_path: Path) -> None:
    config = override(Config(), {"data.domains": ["x", "y"], "data.max_samples": limits})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert to_mapping(config)["data"]["max_samples"] == limits
    assert from_mapping(json.loads(json.dumps(to_mapping(config))), "again") == config
    assert hash(config) == hash(load_config(tmp_path / "c.yaml"))
    assert (signature(config) == signature(override(config, {"data.max_samples": None}))) == (limits is None)


def test_legacy_keys() -> None:
    assert from_mapping({"training": {"progress_bar": False}}, "old").progress == "off"
    old = from_mapping({"training": {"eval_interval": 3}}, "old")
    assert old.grid_every == 3
    assert override(old, {"visualization.every_epochs": 7}).grid_every == 7


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"loss.w_cycl": 1}, ["loss.w_cycl", "did you mean 'loss.w_cyc'"]),
        ({"w_cyc": 1}, ["w_cyc", "loss.w_cyc"]),
        ({"training.batch_size": 0}, ["training.batch_size", "at least 1", "found 0"]),
        ({"training.batch_size": 2.5}, ["whole number", "2.5"]),
        ({"training.batch_size": True}, ["whole number", "True"]),
        (
            {"loss.ds_decay_epochs": 2.5},
            ["loss.ds_decay_epochs", "whole number of epochs, or a share of the run", "2.5"],
        ),
        ({"loss.ds_decay_epochs": 0}, ["loss.ds_decay_epochs", "more than 0"]),
        ({"loss.ds_decay_epochs": -0.5}, ["loss.ds_decay_epochs", "more than 0"]),
        ({"loss.ds_decay_epochs": None}, ["loss.ds_decay_epochs", "a number", "null"]),
        ({"loss.ds_decay_epochs": True}, ["loss.ds_decay_epochs", "a number", "True"]),
        ({"loss.ds_decay_epochs": 1e12}, ["loss.ds_decay_epochs", "a whole number up to"]),
        ({"training.lr_g": "fast"}, ["training.lr_g", "a number", "'fast'"]),
        ({"training.lr_g": float("nan")}, ["a number"]),
        ({"training.lr_g": 0}, ["more than 0"]),
        ({"training.amp_dtype": "bf15"}, ["bf16, fp16"]),
        ({"data.domains": ["photo"]}, ["at least two"]),
        ({"data.domains": ["photo", "photo"]}, ["once"]),
        ({"data.domains": ["photo", "../monet"]}, ["folders directly below"]),
        ({"data.domains": "photo"}, ["a list of names"]),
        ({"data.holdout": 0.9}, ["at most 0.5"]),
        ({"data.max_samples": 0}, ["data.max_samples", "at least 1", "found 0"]),
        ({"data.max_samples": [1, 2, 0, 4, 5]}, ["data.max_samples", "at least 1", "[1, 2, 0, 4, 5]"]),
        ({"data.max_samples": [1, 2.5, 3, 4, 5]}, ["data.max_samples", "whole number"]),
        ({"data.max_samples": "few"}, ["data.max_samples", "whole number", "'few'"]),
        ({"data.max_samples": [1, True, 3, 4, 5]}, ["data.max_samples", "whole number"]),
        (
            {"data.max_samples": [10, 20]},
            ["data.max_samples", "one number, or one for each of the 5 domains", "found 2"],
        ),
        ({"data.max_samples": []}, ["data.max_samples", "one for each of the 5 domains", "found 0"]),
        ({"training.batch_size": [1]}, ["training.batch_size", "whole number", "[1]"]),
        ({"model.discriminator_dim": [1]}, ["model.discriminator_dim", "whole number", "[1]"]),
        ({"data.domains": "photo"}, ["data.domains", "a list of names"]),
        ({"model.num_domains": 3}, ["model.num_domains is 3", "names 5"]),
        ({"training.epoch_size": 4}, ["epoch_size 4", "batch_size", "drop_last"]),
    ],
)
def test_refusals_say_what_and_why(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RaystarError) as caught:
        override(Config(), values, "my.yaml")
    assert "my.yaml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loss: {w_cyc: 1, w_cyc: 2}", ["twice", "w_cyc"]),
        (
            "losses: {w_cyc: 1}\nloss: {w_cycl: 1, w_idd: 2}\nevils: {}\ntraining: {lrg: 3}",
            [
                "unknown sections 'losses' (did you mean 'loss'?), 'evils'; unknown keys ",
                "'loss.w_cycl' (did you mean 'loss.w_cyc'?), 'loss.w_idd' (did you mean 'loss.w_id'?), 'training.lrg'",
            ],
        ),
        ("losses: {w_cyc: 1}", ["unknown section 'losses'", "'loss'"]),
        ("loss: 3", ["a section of keys"]),
        ("- 1", ["a mapping at the top"]),
        ("loss: {w_cyc: [}", ["not readable as YAML"]),
        ("loss: !!python/object/apply:os.system [ls]", ["not readable as YAML"]),
        ("[a]: 1\n? {b: 1}\n: 2", ["not readable as YAML"]),
        ("loss: &a {w_cyc: 2}\nmodel: *a", ["*a: aliases are not read; write the value out", "line 2"]),
        ("loss: {<<: {w_cyc: 2}}", ["<<: merges are not read; write the keys out"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(RaystarError) as caught:
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"loss": {"w_cyc": 1, "w_cyc": 2}}', ["'w_cyc' is written twice"]),
        ('{"loss": {"w_cyc": NaN}}', ["loss.w_cyc", "a number", "nan"]),
        ('{"loss": {"w_cyc": 1e999}}', ["a number"]),
        ("{loss: {w_cyc: 1}}", ["not readable as JSON"]),
        ('{"data": {"domains": ["a", "\\ud83d"]}}', ["a list of names"]),
    ],
)
def test_bad_json_files(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(RaystarError) as caught:
        load_config(tmp_path / "c.json")
    for word in [str(tmp_path / "c.json"), *words]:
        assert word in str(caught.value)


def test_json_keeps_letters_beyond_16_bits(tmp_path: Path) -> None:
    """json.dumps writes them as two halves, which YAML takes for two characters."""
    config = override(Config(), {"data.domains": ["\U0001f600", "x"]})
    (tmp_path / "c.json").write_text(json.dumps(to_mapping(config), indent="\t"))
    assert load_config(tmp_path / "c.json") == config


def test_equal_configurations_have_one_signature() -> None:
    assert signature(override(Config(), {"loss.w_cyc": -0.0})) == signature(override(Config(), {"loss.w_cyc": 0}))


def test_missing_binary_and_huge_files(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(RaystarError, match=r"demoo\.yaml.*found nothing.*did you mean 'demo\.yaml'"):
        load_config(tmp_path / "demoo.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RaystarError, match="not readable"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "huge.yaml").write_text("#" * 1_000_001)
    with pytest.raises(RaystarError, match="no configuration"):
        load_config(tmp_path / "huge.yaml")


def test_overlays_come_after_the_configuration_and_before_set(tmp_path: Path) -> None:
    for name, text in {
        "base.yaml": "loss: {w_cyc: 2, w_id: 2, w_adv: 2}",
        "first.yaml": "loss: {w_id: 3, w_adv: 3}",
        "second.yaml": overlay_yaml({"loss.w_adv": 4, "training.use_amp": False}),
    }.items():
        (tmp_path / name).write_text(text)
    overlays = [str(tmp_path / "first.yaml"), str(tmp_path / "second.yaml")]
    config = request_config(tmp_path / "base.yaml", overlays, ["training.seed=5"])
    assert (config.loss.w_cyc, config.loss.w_id, config.loss.w_adv) == (2, 3, 4)
    assert (config.training.use_amp, config.training.seed) == (False, 5)
    assert request_config(tmp_path / "base.yaml", overlays, ["loss.w_adv=5"]).loss.w_adv == 5
    (tmp_path / "second.yaml").write_text("loss: {w_advv: 4}")
    with pytest.raises(RaystarError, match=r"second\.yaml: unknown key 'loss\.w_advv' \(did you mean 'loss\.w_adv'"):
        request_config(tmp_path / "base.yaml", overlays, [])


def test_the_signature_follows_results_only() -> None:
    base = signature(Config())
    assert signature(override(Config(), {"loss.w_cyc": 1.0})) == base
    for silent in ({"training.log_json": True}, {"data.data_root": "elsewhere"}, {"training.num_workers": 0}):
        assert signature(override(Config(), silent)) == base
    for telling in ({"loss.w_cyc": 2.0}, {"training.seed": 1}, {"model.base_dim": 128}):
        assert signature(override(Config(), telling)) != base


def test_every_key_says_what_it_means() -> None:
    from raystar.config.schema import key_field

    for key in known_keys():
        assert len(key_field(key, "").metadata["meaning"]) > 5, key

"""What trials of a sweep may differ in: scores stay comparable, or the key is refused with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.config.schema import Config, known_keys
from raystar.data.bank import open_bank
from raystar.ruler.ruler import Ruler
from raystar.ruler.samples import measured_by
from raystar.search.comparable import why_alike
from raystar.search.space import from_mapping
from tests.kit.support import tiny_config, write_latents


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("data.domains", [["a", "b"]], ["other pairs of domains", "one sweep for each set of domains"]),
        ("data.data_root", ["x"], ["different pictures", "--set data.data_root"]),
        ("data.eval_data_root", ["x"], ["the ruler measures on these latents"]),
        ("data.holdout", [0.2], ["held out", "--set data.holdout"]),
        ("data.cache_dir", ["x"], ["one cache"]),
        ("ruler.sources", [4], ["the ruler must be one and the same"]),
        ("ruler.features", ["x.pth"], ["the ruler must be one and the same"]),
        ("checkpoint.save_dir", ["x"], ["trials/<name>"]),
        ("visualization.save_dir", ["x"], ["pictures/<name>"]),
        ("visualization.every_epochs", [2], ["changes no result"]),
        ("training.epochs", [9], ["different lengths", "--epochs"]),
        ("training.device", ["cpu"], ["resources.gpus"]),
        ("training.log_json", [True], ["changes no result"]),
    ],
)
def test_a_space_may_not_search_what_makes_scores_incomparable(key: str, values: list[Any], words: list[str]) -> None:
    with pytest.raises(RaystarError) as caught:
        from_mapping({"space": {key: {"choice": values}}}, Config(), "s.yaml")
    with pytest.raises(RaystarError) as named:
        from_mapping({"experiments": {"x": {key: values[0]}}}, override(Config(), {"data.holdout": 0.3}), "s.yaml")
    for word in words:
        assert word in str(caught.value)
        assert word in str(named.value)
    assert f"s.yaml: space: {key}: cannot be searched: " in str(caught.value)
    assert f"s.yaml: experiments: x: {key}: cannot differ between trials, found " in str(named.value)


def test_keys_may_be_spelt_as_users_spell_them() -> None:
    content = {"space": {"data.epoch_size": {"choice": [64, 128]}, "training.allow_tf32": {"choice": [True, False]}}}
    assert list(from_mapping(content, Config(), "s.yaml").space) == ["training.epoch_size", "training.tf32"]
    content["space"]["training.tf32"] = {"choice": [True]}
    with pytest.raises(RaystarError, match=r"s\.yaml: space: a key is there twice, once in another spelling"):
        from_mapping(content, Config(), "s.yaml")
    branches = {"space": {"model.exp_branch": {"choice": ["AdaGN_no_SN", "AdaGN_with_SN"]}}}
    with pytest.raises(RaystarError, match=r"s\.yaml: space: model\.exp_branch: is model\.norm and .* as experiments"):
        from_mapping(branches, Config(), "s.yaml")


def test_every_key_of_a_loss_may_be_searched_and_none_of_the_ruler() -> None:
    found = {key: why_alike(key, "s.yaml") for key in known_keys()}
    assert all(
        (reason is None) == key.startswith("loss.") for key, reason in found.items() if key[:4] in ("loss", "rule")
    )
    for key in ("training.batch_size", "training.seed", "training.lr_schedule", "model.base_dim", "model.residual"):
        assert found[key] is None, key


@pytest.mark.parametrize("changed", [{"model.latent_dim": 9}, {"training.latent_scale": 1.0}], ids=str)
def test_what_networks_get_is_measured_on_the_same_pictures(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Its key is another, but trials of one sweep may differ in it: all that is measured of pictures is the same."""
    config = tiny_config(write_latents(tmp_path / "latents"))
    other = override(config, changed)
    bank = open_bank(config, tmp_path)
    ours, theirs = Ruler.build(bank, config), Ruler.build(bank, other)
    assert measured_by(bank, config) != measured_by(bank, other)
    assert torch.equal(ours.reference, theirs.reference)
    for one, two in ((ours.sources, theirs.sources), *zip(ours.targets, theirs.targets, strict=True)):
        torch.testing.assert_close(one / ours.scale, two / theirs.scale, rtol=1e-5, atol=1e-5)
    for name, metrics in ours.references.items():
        assert metrics == pytest.approx(theirs.references[name], rel=1e-3, abs=1e-4), name
    assert ours.noise.shape[:-1] == theirs.noise.shape[:-1]
    for ruler in (ours, theirs):
        assert float(ruler.noise.std()) == pytest.approx(1, abs=0.1)

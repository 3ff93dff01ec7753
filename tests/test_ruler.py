"""The ruler's fixed points: doing nothing, real target samples, and what a good translation looks like."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from raystar.config import Config, override
from raystar.dataset import Bank, open_bank
from raystar.errors import RaystarError
from raystar.ruler import METRICS, Ruler, content_distance, energy_distance
from raystar.step import TrainState
from tests.support import SHARED, needs_shared, tiny_config, write_latents


class Nothing:
    """Hands every content back."""

    def encode(self, x_ref: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(x_ref), 2)

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(z), 2)

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        return x.repeat(len(s) // len(x), 1, 1, 1)


class Copycat(Nothing):
    """Ignores the content and hands out real training latents of the target domain: style without content."""

    def __init__(self, bank: Bank, config: Config) -> None:
        self.pool = [bank.rows(rows) * config.training.latent_scale for rows in bank.train]
        self.rng = np.random.default_rng(0)

    def encode(self, x_ref: Tensor, y: Tensor) -> Tensor:
        return y[:, None].float()

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        return y[:, None].float()

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.stack([self.pool[int(y)][self.rng.integers(len(self.pool[int(y)]))] for y in s[:, 0]])


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, Config, Ruler]:
    config = override(Config(), {
        "data.data_root": "raystar:demo", "data.holdout": 0.15, "ruler.sources": 8, "training.use_amp": False,
        "data.domains": ["photo", "pointillism", "woodcut", "watercolour", "stained_glass"],
    })  # fmt: skip
    bank = open_bank(config, tmp_path_factory.mktemp("cache"))
    return bank, config, Ruler.build(bank, config)


def test_doing_nothing(painted: tuple[Bank, Config, Ruler]) -> None:
    found = painted[2].measure_subject(Nothing())
    assert set(found) == set(METRICS)
    assert found["style"] == pytest.approx(1.0, abs=1e-6)
    assert found["content"] == pytest.approx(0.0, abs=1e-6)
    assert found["diversity"] == pytest.approx(0.0, abs=1e-6)
    assert found["score"] == pytest.approx(2.25, abs=1e-6)


def test_copying_targets_is_no_better_than_its_lost_content(painted: tuple[Bank, Config, Ruler]) -> None:
    bank, config, ruler = painted
    found = ruler.measure_subject(Copycat(bank, config))
    assert found["style"] < 0.2
    assert found["content"] == pytest.approx(0.95, abs=0.15)
    assert found["score"] == pytest.approx(2.0, abs=0.25)
    assert found["accuracy"] > 0.9


def test_building_twice_gives_the_same_bits(painted: tuple[Bank, Config, Ruler]) -> None:
    bank, config, ruler = painted
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)  # the number of cores must not matter either
    try:
        again = Ruler.build(bank, config)
    finally:
        torch.set_num_threads(threads)
    for name, value in ruler.features.state_dict().items():
        assert torch.equal(value, again.features.state_dict()[name]), name
    assert torch.equal(ruler.noise, again.noise)
    assert torch.equal(ruler.do_nothing, again.do_nothing)


def test_the_cache_gives_the_same_ruler_and_heals(painted: tuple[Bank, Config, Ruler], tmp_path: Path) -> None:
    bank, config, ruler = painted
    Ruler.build(bank, config, tmp_path)
    (file,) = tmp_path.glob("ruler-*.safetensors")
    cached = Ruler.build(bank, config, tmp_path)
    assert torch.equal(cached.features.discriminants, ruler.features.discriminants)
    # Equal numbers in another order of memory would be added in another order: scores of one process and another.
    assert [b.stride() for b in cached.features.buffers()] == [b.stride() for b in ruler.features.buffers()]
    small = override(config, {"model.base_dim": 8, "model.n_res_blocks": 1})
    nets = TrainState.create(small, "cpu").nets
    assert cached.measure(nets, small) == ruler.measure(nets, small)
    file.write_bytes(file.read_bytes()[:1000])
    healed = Ruler.build(bank, config, tmp_path)
    assert torch.equal(healed.features.discriminants, ruler.features.discriminants)
    assert not list(tmp_path.glob(".*"))


def test_measuring_is_a_pure_function_that_changes_nothing(painted: tuple[Bank, Config, Ruler]) -> None:
    _, config, ruler = painted
    config = override(config, {"model.base_dim": 8, "model.n_res_blocks": 1})
    state = TrainState.create(config, "cpu")
    before = copy.deepcopy(state.nets.state_dict())
    first, second = ruler.measure(state.nets, config), ruler.measure(state.nets, config)
    assert first == second
    for net, values in state.nets.state_dict().items():
        assert all(torch.equal(value, before[net][name]) for name, value in values.items())


def test_loss_weights_do_not_enter(painted: tuple[Bank, Config, Ruler]) -> None:
    _, config, ruler = painted
    small = override(config, {"model.base_dim": 8, "model.n_res_blocks": 1})
    nets = TrainState.create(small, "cpu").nets
    other = override(small, {"loss.w_adv": 9.0, "loss.w_cyc": 0.0, "loss.w_id": 0.0, "loss.w_ds": 7.0})
    assert ruler.measure(nets, small) == ruler.measure(nets, other)


def test_energy_distance_by_hand() -> None:
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0], [4.0]])
    cross = (1 + 1 + 4 + 1 + 1 + 2) / 6
    assert energy_distance(a, b).item() == pytest.approx(2 * cross - 2 - (0 + 3 + 3) / 3)


def test_energy_distance_is_unbiased() -> None:
    g = torch.Generator().manual_seed(0)
    found = [
        energy_distance(torch.randn(6, 5, generator=g), torch.randn(9, 5, generator=g)).item() for _ in range(2000)
    ]
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 4 * error


def test_content_distance_ignores_colour_and_contrast() -> None:
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert content_distance(x * 3 + 5, x).abs().max() < 1e-5
    assert content_distance(-x, x).mean() == pytest.approx(2.0, abs=1e-4)
    assert content_distance(x.roll(1, 0), x).mean() == pytest.approx(1.0, abs=0.2)


def test_too_few_held_out_latents(tmp_path: Path) -> None:
    config = tiny_config(write_latents(tmp_path / "data"), data__holdout=0.05)
    bank = open_bank(config, tmp_path / "cache")
    with pytest.raises(RaystarError, match=r"held-out latents of every domain.*'a' has 1.*raise data\.holdout"):
        Ruler.build(bank, config)


# -- on real latents -------------------------------------------------------------------------------

REAL = ("photo", "monet", "vangogh", "hayao")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, Config, Ruler]:
    config = override(Config(), {"data.data_root": str(SHARED / "data/latents"), "data.domains": REAL})
    bank = open_bank(config, tmp_path_factory.mktemp("cache"))
    return bank, config, Ruler.build(bank, config)


@pytest.mark.shared
@needs_shared("data/latents")
def test_real_latents_doing_nothing(real: tuple[Bank, Config, Ruler]) -> None:
    found = real[2].measure_subject(Nothing())
    assert found["style"] == pytest.approx(1.0, abs=1e-6)
    assert found["content"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.shared
@needs_shared("data/latents")
def test_disjoint_halves_of_real_targets(real: tuple[Bank, Config, Ruler]) -> None:
    """Real samples of the target domain, measured against other real samples of it, have no style left to gain."""
    ruler = real[2]
    pairs = [(i, j) for i in range(len(REAL)) for j in range(len(REAL)) if i != j]
    for p, (_, j) in enumerate(pairs):
        held = ruler.target_features[j]
        s = energy_distance(held[0::2], held[1::2]) / ruler.do_nothing[p]
        assert abs(s.item()) < 0.15, pairs[p]


@pytest.mark.shared
@needs_shared("data/pairs")
def test_content_of_a_published_networks_translations(real: tuple[Bank, Config, Ruler]) -> None:
    photo, hayao = (torch.from_numpy(np.load(SHARED / f"data/pairs/{name}.npy")).float() for name in ("photo", "hayao"))
    assert content_distance(hayao, photo).mean().item() == pytest.approx(0.09, abs=0.01)
    assert content_distance(photo.roll(-1, 0), photo).mean().item() == pytest.approx(0.92, abs=0.02)
    # The ruler's style agrees that they moved towards Hayao.
    _, config, ruler = real
    scale = config.training.latent_scale
    moved = ruler.style(hayao * scale, REAL.index("photo"), REAL.index("hayao"))
    assert moved < 0.8 * ruler.style(photo * scale, REAL.index("photo"), REAL.index("hayao"))

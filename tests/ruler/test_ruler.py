"""The ruler's fixed points, what damage does to a score, and what an independent judge says of the same models."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from raystar.base.errors import RaystarError
from raystar.base.metrics import RULER
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.model.networks import Nets
from raystar.ruler.distances import channel_transfer, energy_distance
from raystar.ruler.picture_stats import content_lost, sketch, statistics
from raystar.ruler.ruler import NOTHING, TRANSFER, UNMOVED, Ruler, ruler_file
from raystar.ruler.samples import caution, labels, measured, measured_by
from raystar.training.state import TrainState
from tests.kit.repainted import open_small_demo, source_numbers
from tests.kit.repainted import read as read_repainted
from tests.kit.support import SHARED, tiny_config, write_latents


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

    def __init__(self, bank: Bank, config: Config, kinds: int | None = None) -> None:
        self.pool = [bank.rows(rows)[:kinds] * config.training.latent_scale for rows in bank.train]
        self.rng = np.random.default_rng(0)

    def encode(self, x_ref: Tensor, y: Tensor) -> Tensor:
        return y[:, None].float()

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        return y[:, None].float()

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.stack([self.pool[int(y)][self.rng.integers(len(self.pool[int(y)]))] for y in s[:, 0]])


class Jumpy(Nothing):
    """Adds a colour of its own to each translation: far more diverse than any domain."""

    def encode(self, x_ref: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(x_ref), 4)

    def sample(self, z: Tensor, y: Tensor) -> Tensor:
        return 4 * z[:, :4]

    def translate(self, x: Tensor, s: Tensor) -> Tensor:
        return x.repeat(len(s) // len(x), 1, 1, 1) + s[:, :, None, None]


Built = tuple[Bank, Config, Ruler]


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Built:
    config = override(Config(), {
        "data.data_root": "raystar:demo", "data.holdout": 0.15, "training.use_amp": False,
        "data.domains": ["photo", "pointillism", "woodcut", "watercolour", "stained_glass"],
    })  # fmt: skip
    bank = open_bank(config, tmp_path_factory.mktemp("cache"))
    return bank, config, Ruler.build(bank, config)


REAL = ("photo", "monet", "vangogh", "hayao")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Built:
    config = override(
        Config(), {"data.data_root": str(SHARED / "data/latents"), "data.domains": REAL, "data.holdout": 0.2}
    )
    bank = open_bank(config, tmp_path_factory.mktemp("cache"))
    return bank, config, Ruler.build(bank, config)


@pytest.fixture(params=["painted", pytest.param("real", marks=pytest.mark.shared("data/latents"))])
def built(request: pytest.FixtureRequest) -> Built:
    """Painted pictures and, where they are at hand, real ones."""
    found: Built = request.getfixturevalue(request.param)
    return found


# -- fixed points ----------------------------------------------------------------------------------


def test_doing_nothing(built: Built) -> None:
    found = built[2].measure_subject(Nothing())
    assert set(found) == set(RULER)
    assert found["style"] == pytest.approx(1.0, abs=1e-5)
    assert found["content"] == pytest.approx(0.0, abs=1e-6)
    assert found["diversity"] == 0.0
    assert found["movement"] == 0.0 < UNMOVED
    assert found["score"] == pytest.approx(1.1, abs=1e-5)
    assert found["worst_pair"] == pytest.approx(1.1, abs=1e-5)
    assert found["outlook"] == pytest.approx(1.0, abs=1e-6)
    reference = built[2].references[NOTHING]
    assert reference["eval/outlook"] == pytest.approx(1.0, abs=1e-6)
    assert reference["eval/score"] == pytest.approx(1.1, abs=1e-5)
    assert "eval/diversity" not in reference


def test_the_channel_transfer_is_what_it_says(built: Built) -> None:
    ruler = built[2]
    reference = ruler.references[TRANSFER]
    assert 0.3 < reference["eval/style"] < 1  # it moves colours and contrasts, nothing else
    assert 0 < reference["eval/content"] < 0.6
    assert reference["eval/movement"] > UNMOVED
    x, other = ruler.sources[0], ruler.targets[1][: len(ruler.sources[0])]
    moved = channel_transfer(x, other)
    torch.testing.assert_close(moved.mean(dim=(2, 3)), other.mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.std(dim=(2, 3)), other.std(dim=(2, 3)), atol=1e-4, rtol=1e-3)


def test_handing_out_pictures_of_the_target_is_worse_than_doing_nothing(built: Built) -> None:
    """Style without content: what the form (0.1 + S)(1 + C) alone would call nearly perfect."""
    bank, config, ruler = built
    found = ruler.measure_subject(Copycat(bank, config))
    assert found["style"] < 0.3
    assert 0.65 < found["content"] < 1.1  # landscapes are alike in where their sky is
    assert found["accuracy"] > 0.6
    assert found["score"] > 1.1
    one_for_all = ruler.measure_subject(Copycat(bank, config, kinds=1))
    assert one_for_all["score"] > 1.5 * found["score"]


def test_too_much_diversity_counts_against(built: Built) -> None:
    found = built[2].measure_subject(Jumpy())
    assert found["diversity"] > 1
    without = built[2].measure_subject(Nothing())["score"]
    assert found["score"] > without + found["diversity"] - 1


def test_what_diversity_lacks_counts_where_style_is_reached(painted: Built) -> None:
    ruler = painted[2]
    assert ruler.measure_subject(Nothing())["score"] == pytest.approx(
        1.1, abs=1e-5
    )  # nothing is reached, nothing lacks
    seen = ruler._look(torch.cat([ruler.targets[j][: ruler.sources.shape[1]] for _, j in ruler.pairs]))
    scores = [ruler._judge(seen, torch.tensor(v))["score"].item() for v in (0.0, 0.1, 0.2, 0.5, 1.0, 1.5)]
    style = ruler._judge(seen, torch.tensor(0.0))["style"].item()
    assert scores[0] - scores[2] == pytest.approx(0.2 * (1 - style), abs=1e-5)
    assert scores[1] - scores[2] == pytest.approx(0.1 * (1 - style), abs=1e-5)
    assert scores[2] == scores[3] == scores[4]
    assert scores[5] - scores[4] == pytest.approx(0.5, abs=1e-5)


def test_the_outlook_is_how_far_there_is_still_to_go(built: Built) -> None:
    """Moving a share of the way towards the reference, in the channels' means and deviations, is seen as about that."""
    ruler = built[2]

    def outlook(share: float) -> float:
        fakes = []
        for p, (i, j) in enumerate(ruler.pairs):
            x = ruler.sources[i]
            fakes.append(x.lerp(channel_transfer(x, ruler.targets[j][ruler.reference[p]]), share))
        return ruler._outlook(fakes).item()

    found = [outlook(share) for share in (0.0, 0.1, 0.5, 1.0)]
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found[0] > found[1] + 0.01 > found[2] + 0.05 > found[3] + 0.1
    assert ruler.references[TRANSFER]["eval/outlook"] == pytest.approx(found[3], abs=1e-6)


def test_disjoint_halves_of_real_targets(built: Built) -> None:
    """Real samples of the target domain, measured against other real samples of it, have little style left to gain."""
    ruler = built[2]
    found = []
    for p, (_, j) in enumerate(ruler.pairs):
        held = ruler.target_features[j]
        found.append(abs(energy_distance(held[0::2], held[1::2]) / ruler.do_nothing[p]).item())
    assert np.mean(found) < 0.08
    assert max(found) < 0.3  # monet and vangogh lie close together


# -- damage: each makes it worse, and more of it worse still ----------------------------------------------


def _blur(x: Tensor, pixels: int) -> Tensor:
    return functional.avg_pool2d(functional.pad(x, (pixels // 2,) * 4, mode="reflect"), pixels, 1)


def _fade(x: Tensor, to: float) -> Tensor:
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * to


def _expose(x: Tensor, deviation: float) -> Tensor:
    drawn = np.random.default_rng(0).normal(0, deviation, (len(x), 1, 1, 1))
    return (x * torch.from_numpy(np.exp(drawn)).float()).clamp(0, 1)


def _checkerboard(x: Tensor, strength: float, cell: int = 4) -> Tensor:
    rows, columns = (torch.arange(size) // cell for size in x.shape[2:])
    board = (rows[:, None] + columns) % 2 * 2.0 - 1
    return (x + strength * board).clamp(0, 1)


DAMAGE: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "blur": (lambda x, pixels: _blur(x, int(pixels)), (3, 5, 9)),
    "fading": (_fade, (0.8, 0.6, 0.3)),
    "exposure": (_expose, (0.2, 0.4, 0.8)),
    "posterising": (lambda x, levels: (x * (levels - 1)).round() / (levels - 1), (8, 4, 2)),
    "checkerboard": (_checkerboard, (0.03, 0.06, 0.12)),
    "fine checkerboard": (lambda x, strength: _checkerboard(x, strength, 2), (0.03, 0.06, 0.12)),
    "towards black": (lambda x, kept: x * kept, (0.7, 0.3, 0.0)),
    "towards white": (lambda x, kept: 1 - (1 - x) * kept, (0.7, 0.3, 0.0)),
    "towards blank": (_fade, (0.5, 0.2, 0.0)),
    "grain": (
        lambda x, strength: (x + strength * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(
            0, 1
        ),
        (0.03, 0.08, 0.2),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_makes_it_worse(built: Built, kind: str) -> None:
    """Done to untouched sources, which score 1.1."""
    ruler = built[2]
    damage, strengths = DAMAGE[kind]
    sources = ruler.source_pictures()
    scores = [ruler.measure_pictures(damage(sources, strength))["score"] for strength in strengths]
    assert 1.1 < scores[0] < scores[1] < scores[2], scores


@pytest.mark.parametrize("kind", ["blur", "fading", "exposure", "posterising", "checkerboard", "grain"])
def test_damage_makes_good_translations_worse(painted: Built, kind: str) -> None:
    """Done to the channel transfer, the best that can be had without a model."""
    ruler = painted[2]
    damage, strengths = DAMAGE[kind]
    fakes = [
        channel_transfer(ruler.sources[i], ruler.targets[j][ruler.reference[p]]) for p, (i, j) in enumerate(ruler.pairs)
    ]
    pictures = torch.cat([p for f in fakes for p in ruler.eye.pictures(f / ruler.scale)])
    before = ruler.measure_pictures(pictures)["score"]
    assert before == pytest.approx(ruler.references[TRANSFER]["eval/score"], abs=1e-4)
    scores = [ruler.measure_pictures(damage(pictures, strength))["score"] for strength in strengths]
    assert before < scores[1] < scores[2], scores


# -- a judge that looks at the decoded pictures with an ImageNet network -------------------------------------


def _ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


@pytest.mark.slow
@pytest.mark.shared("score/real", "data/latents")
def test_it_agrees_with_an_independent_judge(real: Built) -> None:
    _, config, ruler = real
    judged = json.loads((SHARED / "score/real/judged.json").read_text())
    sizes = {"base_dim": 32, "n_res_blocks": 2, "style_dim": 32, "latent_dim": 16}  # of version 0.1's demo
    sizes |= {"mapping_hidden_dim": 128, "mapping_shared_layers": 2}
    config = override(config, {f"model.{key}": value for key, value in sizes.items()})
    ours = {"nothing": ruler.references[NOTHING]["eval/score"], "adain": ruler.references[TRANSFER]["eval/score"]}
    for name in judged:
        if name in ours:
            continue
        nets = Nets(config.model, len(REAL))
        weights = load_file(SHARED / f"score/real/{name}.safetensors")
        for net in ("G", "F", "E"):
            state = {k[2:]: v.float() for k, v in weights.items() if k.startswith(f"{net}.")}
            getattr(nets, net).load_state_dict(state)
        ours[name] = ruler.measure(nets, config)["score"]
    names = sorted(judged, key=lambda name: judged[name]["judge"])
    theirs = _ranks([judged[name]["judge"] for name in names])
    found = _ranks([ours[name] for name in names])
    assert np.corrcoef(theirs, found)[0, 1] >= 0.9
    better = [ours[name] for name in names[:7]]
    assert np.corrcoef(np.arange(7), _ranks(better))[0, 1] >= 0.75
    for name in ("nothing", "adain"):
        assert abs(theirs[names.index(name)] - found[names.index(name)]) <= 2
    # Not the order alone: their sizes, too.
    logs = np.log([[judged[name]["judge"], ours[name]] for name in names])
    assert np.corrcoef(logs.T)[0, 1] >= 0.93


# -- landscapes painted in another style: the truth about a translation --------------------------------------


Repainted = tuple[Ruler, dict[tuple[str, str], Tensor]]


@pytest.fixture(scope="module")
def repainted(tmp_path_factory: pytest.TempPathFactory) -> Repainted:
    """A ruler over some of the demo's pictures, and its sources as their painter paints them in the other styles."""
    bank, config = open_small_demo(tmp_path_factory.mktemp("small demo"))
    latents, numbers = read_repainted()
    assert numbers == source_numbers(bank, config), "other sources than were repainted: tests/kit/repainted.py"
    return Ruler.build(bank, config), latents


def _pictures(ruler: Ruler, unscaled: Tensor) -> Tensor:
    return torch.cat(list(ruler.eye.pictures(unscaled)))


def _every(pictures: Tensor, others: Tensor, step: int) -> Tensor:
    """Pictures of which every so many are replaced by others."""
    chosen = torch.arange(len(pictures)) % step == 0
    return torch.where(chosen[:, None, None, None], others, pictures)


def _on_the_way(ruler: Ruler, latents: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Translations from far off to perfect, by name; the perfect ones are the repaintings."""
    domains, n = ruler.domains, ruler.sources.shape[1]
    perfect = torch.cat([latents[domains[i], domains[j]] for i, j in ruler.pairs])
    third = torch.cat([latents[domains[i], domains[3 - i - j]] for i, j in ruler.pairs])
    untouched = torch.cat([ruler.sources[i] for i, _ in ruler.pairs]) / ruler.scale
    moved = [
        channel_transfer(ruler.sources[i], ruler.targets[j][ruler.reference[p]]) for p, (i, j) in enumerate(ruler.pairs)
    ]
    truth, source, wrong = (_pictures(ruler, x) for x in (perfect, untouched, third))
    ways = {
        f"pictures {share:g}": source.lerp(truth, share).clamp(0, 1)
        for share in (-1, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1)
    }
    ways |= {f"latents {share:g}": _pictures(ruler, untouched.lerp(perfect, share)) for share in (0.25, 0.5, 0.75)}
    return ways | {
        "a quarter of them": _every(source, truth, 4),
        "half of them": _every(source, truth, 2),
        "half in another style": _every(truth, wrong, 2),
        "all in another style": wrong,
        "of another landscape": torch.cat([each.roll(1, 0) for each in truth.split(n)]),
        "channel transfer": _pictures(ruler, torch.cat(moved) / ruler.scale),
    }


def _distance(pictures: Tensor, others: Tensor) -> Tensor:
    """[6] by size of detail, from two pixels on: how far pictures are from others."""
    left, found = pictures - others, []
    for _ in range(5):
        coarse = functional.avg_pool2d(left, 2)
        found.append(left - functional.interpolate(coarse, scale_factor=2))
        left = coarse
    return torch.stack([detail.square().mean(dim=(1, 2, 3)).sqrt().mean() for detail in [*found, left]])


def test_it_ranks_by_how_far_from_the_truth(repainted: Repainted) -> None:
    """The judge compares each translation with the repainting of its source, which the ruler never sees."""
    ruler, latents = repainted
    ways = _on_the_way(ruler, latents)
    truth, source = ways["pictures 1"], ways["pictures 0"]
    judged = {name: (_distance(x, truth) / _distance(source, truth)).mean().item() for name, x in ways.items()}
    measured = {name: ruler.measure_pictures(x) for name, x in ways.items()}
    scores = {name: found["score"] for name, found in measured.items()}
    theirs, ours = list(judged.values()), list(scores.values())
    assert np.corrcoef(_ranks(theirs), _ranks(ours))[0, 1] >= 0.85
    assert np.corrcoef(theirs, ours)[0, 1] >= 0.85  # not the order alone: their sizes, too
    for kind, shares in (("pictures", (1, 0.75, 0.5, 0.25, 0, -0.25, -0.5, -1)), ("latents", (0.75, 0.5, 0.25))):
        way = [scores[f"{kind} {share:g}"] for share in shares]
        assert all(better + 0.05 < worse for better, worse in itertools.pairwise(way)), way
    assert scores["pictures 0"] == pytest.approx(1.1, abs=1e-4)
    assert measured["pictures 1"]["style"] < 0.1
    assert measured["pictures 1"]["accuracy"] > 0.9
    assert scores["pictures 1"] < 0.3
    assert min(scores["all in another style"], scores["of another landscape"]) > 1.15


@pytest.mark.parametrize(("source", "target"), [("photo", "watercolour"), ("watercolour", "photo")])
def test_repaintings_are_good_translations(repainted: Repainted, source: str, target: str) -> None:
    ruler, latents = repainted
    pair = ruler.domains.index(source), ruler.domains.index(target)
    x, y = ruler.sources[pair[0]] / ruler.scale, latents[source, target]
    before, after = (sketch(_pictures(ruler, z)) for z in (x, y))
    assert content_lost(after, before) < 0.4
    assert content_lost(after.roll(1, 0), before) > 0.55
    assert ruler.style(y * ruler.scale, *pair) < 0.1
    assert ruler.style(x * ruler.scale, *pair) == pytest.approx(1, abs=1e-4)


@pytest.mark.shared("data/pairs", "data/latents")
def test_a_published_networks_translations(real: Built) -> None:
    _, config, ruler = real
    photo, hayao = (torch.from_numpy(np.load(SHARED / f"data/pairs/{name}.npy")).float() for name in ("photo", "hayao"))
    before, after = (torch.cat([sketch(p) for p in ruler.eye.pictures(x)]) for x in (photo, hayao))
    assert content_lost(after, before) < 0.03
    assert content_lost(before.roll(-1, 0), before) > 0.7
    scale = config.training.latent_scale
    moved = ruler.style(hayao * scale, REAL.index("photo"), REAL.index("hayao"))
    assert moved < 0.8 * ruler.style(photo * scale, REAL.index("photo"), REAL.index("hayao"))


@pytest.mark.slow
def test_content_forgives_strokes() -> None:
    """The same landscapes, painted in every style: outlines, dots and lead lines are no lost layout."""
    from raystar.demo import DOMAINS
    from raystar.demo.painter import RENDERINGS
    from raystar.demo.scene import make_scene

    seen = []
    for domain in DOMAINS:
        pictures = []
        for number in range(6):
            scene = make_scene(np.random.default_rng([5, number]), 128)
            rgb = RENDERINGS[domain](scene, np.random.default_rng([6, number]))
            pictures.append(torch.from_numpy(np.clip(rgb, 0, 1)).float().permute(2, 0, 1))
        seen.append(sketch(torch.stack(pictures)))
    others = [i for i in range(len(DOMAINS)) if i]
    same = [content_lost(seen[i], seen[0]).item() for i in others]
    another = [content_lost(seen[i].roll(1, 0), seen[0]).item() for i in others]
    assert max(same) < 0.4
    assert min(another) > 1.5 * max(same)


# -- how it is made ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_building_twice_gives_the_same_bits(painted: Built) -> None:
    bank, config, ruler = painted
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)  # the number of cores must not matter either
    try:
        again = Ruler.build(bank, config)
    finally:
        torch.set_num_threads(threads)
    for name, value in ruler.features.state_dict().items():
        assert torch.equal(value, again.features.state_dict()[name]), name
    for name in ("noise", "do_nothing", "source_features", "source_sketches", "target_spread", "unrelated"):
        assert torch.equal(getattr(ruler, name), getattr(again, name)), name
    assert ruler.references == again.references


@pytest.mark.slow
def test_the_cache_gives_the_same_ruler_and_heals(painted: Built, tmp_path: Path) -> None:
    bank, config, ruler = painted
    Ruler.build(bank, config, tmp_path)
    (file,) = tmp_path.glob("ruler-*.safetensors")
    cached = Ruler.build(bank, config, tmp_path)
    assert cached.references == ruler.references
    small = override(config, {"model.base_dim": 8, "model.n_res_blocks": 1})
    nets = TrainState.create(small, "cpu").nets
    assert cached.measure(nets, small) == ruler.measure(nets, small)
    file.write_bytes(file.read_bytes()[:1000])
    healed = Ruler.build(bank, config, tmp_path)
    assert healed.measure(nets, small) == ruler.measure(nets, small)
    changed = load_file(file)
    changed["do_nothing"][0] += 1
    save_file(changed, file, metadata={"digest": "not its digest", "references": "{}"})
    assert Ruler.build(bank, config, tmp_path).measure(nets, small) == ruler.measure(nets, small)
    assert not list(tmp_path.glob(".*"))


def test_measuring_is_a_pure_function_that_changes_nothing(painted: Built) -> None:
    _, config, ruler = painted
    config = override(config, {"model.base_dim": 8, "model.n_res_blocks": 1})
    state = TrainState.create(config, "cpu")
    before = copy.deepcopy(state.nets.state_dict())
    first, second = ruler.measure(state.nets, config), ruler.measure(state.nets, config)
    assert first == second
    for net, values in state.nets.state_dict().items():
        assert all(torch.equal(value, before[net][name]) for name, value in values.items())


def test_loss_weights_do_not_enter(painted: Built) -> None:
    _, config, ruler = painted
    small = override(config, {"model.base_dim": 8, "model.n_res_blocks": 1})
    nets = TrainState.create(small, "cpu").nets
    other = override(small, {"loss.w_adv": 9.0, "loss.w_cyc": 0.0, "loss.w_id": 0.0, "loss.w_ds": 7.0})
    assert ruler.measure(nets, small) == ruler.measure(nets, other)


def test_scores_that_can_be_compared_have_one_key(painted: Built, tmp_path: Path) -> None:
    bank, config, _ = painted
    key = measured_by(bank, config)
    assert key == measured_by(bank, override(config, {"loss.w_adv": 3.0, "model.base_dim": 8}))
    assert key != measured_by(bank, override(config, {"ruler.sources": 5}))
    assert key in ruler_file(bank, config, tmp_path).name


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


def test_content_by_hand() -> None:
    x = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(1)) + torch.arange(4)[:, None, None]
    assert content_lost(x, x).item() == pytest.approx(0, abs=1e-6)
    assert content_lost(0.3 * x + 0.2, x).item() == pytest.approx(0, abs=1e-3)  # one tone curve for all is no loss
    assert content_lost(-x, x).item() == pytest.approx(2, abs=1e-2)
    # Blank pictures have no correlation with anything.
    assert content_lost(torch.full_like(x, 0.5), x).item() == pytest.approx(1, abs=0.01)


def test_statistics_are_finite_whatever_the_picture() -> None:
    for size in (16, 32, 128):
        for picture in (torch.zeros, torch.ones, torch.rand):
            found = statistics(picture(2, 3, size, size))
            assert found.isfinite().all()
            assert found.shape == statistics(torch.rand(1, 3, size, size)).repeat(2, 1).shape


def test_a_half_sized_picture_is_the_mean_of_the_whole_one(painted: Built) -> None:
    ruler = painted[2]
    scaled = ruler.sources[0][:2] / ruler.scale * 0.18215
    whole = functional.avg_pool2d(ruler.eye.decoder(scaled), 2)
    torch.testing.assert_close(ruler.eye.decoder.half_size(scaled), whole, atol=1e-5, rtol=1e-5)


# -- a file of stronger features ----------------------------------------------------------------------


def _vgg(path: Path, **changed: Tensor) -> Path:
    """A small network named as torchvision names VGG11's trunk."""
    g = torch.Generator().manual_seed(0)
    state, channels = {}, 3
    for number, width in ((0, 8), (3, 12), (6, 16), (8, 16)):  # pooled after the first, the second and not after
        state[f"features.{number}.weight"] = torch.randn(width, channels, 3, 3, generator=g) / (3 * channels**0.5)
        state[f"features.{number}.bias"] = torch.zeros(width)
        channels = width
    state["classifier.0.weight"] = torch.zeros(4, 4)
    state |= changed
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_features_of_a_file_join_the_rulers_own(painted: Built, tmp_path: Path, suffix: str) -> None:
    bank, config, ruler = painted
    file = _vgg(tmp_path / f"vgg{suffix}")
    settings = override(config, {"ruler.features": str(file), "ruler.sources": 6})
    stronger = Ruler.build(bank, settings, tmp_path)
    built_in = ruler.features.built_in
    assert stronger.features.built_in == built_in
    assert stronger.source_features.shape[2] == built_in + 2 * (8 + 12 + 16)
    found = stronger.measure_subject(Nothing())
    assert found["score"] == pytest.approx(1.1, abs=1e-5)
    # Both halves weigh alike: the same squared length on average over real pictures.
    features = torch.cat(stronger.target_features)
    spread = (features - features.mean(dim=0)).square().sum(dim=0)
    assert 0.2 < spread[:built_in].sum() / spread[built_in:].sum() < 5
    again = Ruler.build(bank, settings, tmp_path)
    assert again.measure_subject(Nothing()) == found
    assert measured_by(bank, settings) != measured_by(bank, override(settings, {"ruler.features": None}))
    _vgg(file, **{"features.0.bias": torch.ones(8)})
    assert len(list(tmp_path.glob("ruler-*.safetensors"))) == 1
    Ruler.build(bank, settings, tmp_path)
    assert len(list(tmp_path.glob("ruler-*.safetensors"))) == 2  # the file's content counts, not its name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features.3.weight": torch.zeros(12, 9, 3, 3)}, r"features\.3.*3x3 convolution of 8 channels"),
        ({"features.6.bias": torch.full((16,), torch.nan)}, r"features\.6.*finite"),
        ({"features.30.weight": torch.zeros(4, 16, 3, 3), "features.30.bias": torch.zeros(4)}, "VGG under features"),
    ],
)
def test_a_feature_file_that_is_none(painted: Built, tmp_path: Path, changed: dict[str, Tensor], message: str) -> None:
    bank, config, _ = painted
    file = _vgg(tmp_path / "vgg.pth", **changed)
    with pytest.raises(RaystarError, match=rf"ruler\.features: .*vgg\.pth.*{message}"):
        Ruler.build(bank, override(config, {"ruler.features": str(file)}))


def test_a_feature_file_that_is_missing_or_damaged(painted: Built, tmp_path: Path) -> None:
    bank, config, _ = painted
    with pytest.raises(RaystarError, match=r"ruler\.features: .*none\.pth: expected a VGG.*found no file"):
        Ruler.build(bank, override(config, {"ruler.features": str(tmp_path / "none.pth")}))
    for name in ("cut.pth", "cut.safetensors"):
        file = _vgg(tmp_path / name)
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(RaystarError, match=rf"ruler\.features: .*{name}: truncated or damaged"):
            Ruler.build(bank, override(config, {"ruler.features": str(file)}))


# -- every size that the dataset accepts -------------------------------------------------------------

SIZES = [(8, 8), (8, 12), (12, 8), (12, 12), (36, 20), (20, 36), (28, 28), (8, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_fixed_points_at_every_size(tmp_path: Path, size: tuple[int, int]) -> None:
    domains = ("a", "b")
    config = tiny_config(write_latents(tmp_path / "data", domains, 56, size), domains, ruler__sources=14)
    bank = open_bank(config, tmp_path / "cache")
    ruler = Ruler.build(bank, config, tmp_path / "cache")
    nothing = ruler.measure_subject(Nothing())
    assert nothing["score"] == pytest.approx(1.1, abs=1e-4)
    assert nothing["content"] == pytest.approx(0, abs=1e-5)
    assert nothing["movement"] == nothing["diversity"] == 0
    copied = ruler.measure_subject(Copycat(bank, config))
    assert copied["style"] < 0.3  # real pictures of the target, of which there are few
    assert copied["content"] > 0.6
    assert copied["score"] > 1.1
    assert copied["accuracy"] > 0.9
    assert 0.1 <= ruler.references[TRANSFER]["eval/score"] < 1.1
    assert all(np.isfinite(list(found.values())).all() for found in (nothing, copied, *ruler.references.values()))
    again = Ruler.build(bank, config, tmp_path / "cache")  # from its file
    assert again.measure_subject(Nothing()) == nothing
    assert len(list((tmp_path / "cache").glob("ruler-*.safetensors"))) == 1


def test_latents_that_lie_and_stand_have_rulers_of_their_own(tmp_path: Path) -> None:
    """Of the same numbers, in one cache: once, the second was measured with what was seen of the first."""
    rulers = []
    for name, size in (("lying", (8, 12)), ("standing", (12, 8))):
        config = tiny_config(write_latents(tmp_path / name, size=size))
        bank = open_bank(config, tmp_path / "cache")
        kept = Ruler.build(bank, config, tmp_path / "cache")
        assert torch.equal(kept.source_features, Ruler.build(bank, config).source_features)
        rulers.append(kept)
    assert not torch.equal(rulers[0].source_features, rulers[1].source_features)


@pytest.mark.parametrize("seed", range(12))
def test_pictures_of_any_size_have_finite_statistics_and_a_layout(seed: int) -> None:
    """Noise, flat colours, stripes and black and white, of random sides; what lies and what stands are seen alike."""
    rng = np.random.default_rng(seed)
    h, w = (16 * int(side) for side in rng.integers(2, 18, size=2))
    rgb = torch.from_numpy(rng.random((6, 3, h, w), dtype=np.float32))
    rgb[1], rgb[2], rgb[3], rgb[4] = 0.0, 1.0, rgb[3].round(), rgb[4, :, :1, :1]
    rgb[5] = (torch.arange(w) // 4 % 2).float()
    raw, turned = statistics(rgb), statistics(rgb.mT.contiguous())
    assert raw.shape == turned.shape
    assert raw.shape[1] == 19 * min(5, min(h, w).bit_length() - 3) + 14  # the shorter side says how many bands
    assert raw.isfinite().all()
    assert turned.isfinite().all()
    assert sketch(rgb).shape == (6, 16, 16)
    other = rgb.roll(1, 0)
    lost, lost_turned = (content_lost(sketch(b), sketch(a)) for a, b in ((rgb, other), (rgb.mT, other.mT)))
    torch.testing.assert_close(lost, lost_turned, atol=5e-3, rtol=0)  # flat pictures' variances are rounding
    assert content_lost(sketch(rgb), sketch(rgb)).item() == pytest.approx(0, abs=5e-3)
    assert lost > 0.1


# -- what nothing was held out for -------------------------------------------------------------------


def test_a_holdout_of_nothing_measures_on_training_latents(tmp_path: Path) -> None:
    config = tiny_config(write_latents(tmp_path / "data", count=12), data__holdout=0)
    bank = open_bank(config, tmp_path / "cache")
    assert [len(rows) for rows in bank.held] == [0, 0, 0]
    ruler = Ruler.build(bank, config, tmp_path / "cache")
    assert ruler.measure_subject(Nothing())["score"] == pytest.approx(1.1, abs=1e-4)
    for rows, targets in zip(bank.train, ruler.targets, strict=True):
        there = {row.numpy().tobytes() for row in bank.rows(rows) * config.training.latent_scale}
        assert {row.numpy().tobytes() for row in targets} == there
    found = caution(config)
    assert found is not None
    assert "the score is of pictures that training saw" in found
    assert labels(config) == {"raystar.measured_on": "training latents"}
    few = override(config, {"data.max_samples": 5})
    assert measured_by(open_bank(few, tmp_path / "cache"), few) == measured_by(bank, config)


def test_nothing_is_said_where_something_is_held_out(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", count=12)
    config = tiny_config(root, data__holdout=0, data__eval_data_root=str(write_latents(tmp_path / "eval", count=6)))
    for settings in (config, tiny_config(root)):
        assert caution(settings) is None
        assert labels(settings) == {}
    bank = open_bank(config, tmp_path / "cache")
    assert [rows.tolist() for rows in measured(bank, config)] == [rows.tolist() for rows in bank.held]
    # Were the same rows held out by chance, the key would still tell what they are.
    unheld = override(config, {"data.eval_data_root": None})
    assert measured_by(bank, config) != measured_by(bank, unheld)


def test_too_few_training_latents_to_measure_on(tmp_path: Path) -> None:
    root = write_latents(tmp_path / "data", ("a", "b"), count=4)
    config = tiny_config(root, ("a", "b"), data__holdout=0)
    Ruler.build(open_bank(config, tmp_path / "cache"), config)
    (root / "b" / "picture00x.npy").unlink()
    with pytest.raises(RaystarError, match=r"data: the ruler needs 4 latents of every domain, 'b' has 3$"):
        Ruler.build(open_bank(config, tmp_path / "cache"), config)


def test_the_ruler_knows_nothing_of_how_many_latents_are_drawn_from(tmp_path: Path) -> None:
    config = tiny_config(write_latents(tmp_path / "data"))
    few = override(config, {"data.max_samples": [1, 2, 3]})
    banks = [open_bank(settings, tmp_path / "cache") for settings in (config, few)]
    assert measured_by(banks[0], config) == measured_by(banks[1], few)
    one, other = (Ruler.build(bank, settings) for bank, settings in zip(banks, (config, few), strict=True))
    assert torch.equal(one.features.mean, other.features.mean)
    assert torch.equal(one.source_features, other.source_features)


def test_too_few_held_out_latents(tmp_path: Path) -> None:
    config = tiny_config(write_latents(tmp_path / "data"), data__holdout=0.05)
    bank = open_bank(config, tmp_path / "cache")
    with pytest.raises(RaystarError, match=r"held-out latents.*'a' has 1; raise data\.holdout, .*data\.holdout=0"):
        Ruler.build(bank, config)

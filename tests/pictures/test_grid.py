"""Grids: the same pictures every time, each in its place, with labels that fit."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.exported.model import Translator
from raystar.model.networks import Nets
from raystar.pictures import grid
from raystar.pictures.codec import PreviewCodec
from tests.kit.support import tiny_config, write_latents

# The layout of labelled(): pictures of 128 pixels start below and right of the labels and the real pictures.
LABEL, CELL, PITCH, LEFT = 22, 128, 132, 22 + 128 + 12
TOP = {"grid_ref": LEFT, "grid_noise": 2 * LABEL}


def drawn(nets: Nets, config: Config, chosen: grid.GridSet) -> dict[str, Image.Image]:
    """Both grids of a model, decoded with the preview."""
    return grid.draw(nets, config, chosen, PreviewCodec())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "latents", count=8, size=32)


@pytest.fixture
def config(root: Path) -> Config:
    return tiny_config(root)


@pytest.fixture
def bank(config: Config, root: Path) -> Bank:
    return open_bank(config, root.parent / "cache")


@pytest.fixture
def nets(config: Config) -> Nets:
    """Networks whose translations depend on the style; fresh ones ignore it."""
    nets = Nets.create(config.model, config.num_domains, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in nets.G.res_blocks:
            for layer in (block.adain1, block.adain2):
                layer.fc.weight.copy_(torch.randn(layer.fc.weight.shape, generator=generator))
        for net in (nets.F, nets.E):
            for head in net.unshared:
                head.weight.mul_(10)
    return nets


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def cell(image: Image.Image, key: str, row: int, column: int) -> NDArray[np.uint8]:
    """The picture in a grid's row and column; -1 is the margin of real pictures."""
    y = TOP[key] + PITCH * row if row >= 0 else LABEL
    x = LEFT + PITCH * column if column >= 0 else LABEL
    return pixels(image)[y : y + CELL, x : x + CELL]


def test_the_choice_is_the_same_every_time(config: Config, bank: Bank) -> None:
    first = grid.choose(bank, config, PreviewCodec())
    torch.manual_seed(5)
    np.random.seed(5)
    again = grid.choose(bank, override(config, {"training.seed": 3, "loss.w_cyc": 9.0}), PreviewCodec())
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)
    assert first.noise.shape == (3, config.model.latent_dim)


def test_the_choice_is_held_out_pictures_of_each_domain(config: Config, bank: Bank) -> None:
    chosen = grid.choose(bank, config, PreviewCodec())
    for domain, held in enumerate(bank.held):
        rows = bank.rows(held)
        source = [torch.equal(chosen.sources[domain], row) for row in rows]
        reference = [torch.equal(chosen.references[domain], row) for row in rows]
        assert (sum(source), sum(reference)) == (1, 1)
        assert source != reference
    assert np.array_equal(chosen.source_pictures, PreviewCodec().decode(chosen.sources))
    assert np.array_equal(chosen.reference_pictures, PreviewCodec().decode(chosen.references))


def test_without_held_out_pictures_training_ones_are_shown(root: Path, config: Config) -> None:
    config = override(config, {"data.holdout": 0.0})
    bank = open_bank(config, root.parent / "cache")
    chosen = grid.choose(bank, config, PreviewCodec())
    assert chosen.sources.shape == chosen.references.shape == (3, 4, 32, 32)
    assert not any(torch.equal(s, r) for s, r in zip(chosen.sources, chosen.references, strict=True))


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (12, 8), (36, 20)], ids=str)
def test_pictures_that_are_not_square_keep_their_proportions(tmp_path: Path, size: tuple[int, int]) -> None:
    config = tiny_config(write_latents(tmp_path / "data", count=8, size=size))
    bank = open_bank(config, tmp_path / "cache")
    chosen = grid.choose(bank, config, PreviewCodec())
    images = drawn(Nets.create(config.model, config.num_domains, seed=1), config, chosen)
    for key, image in images.items():
        assert image.size == (LEFT + 3 * PITCH, TOP[key] + 3 * PITCH)
        shown = cell(image, key, 0, 1)
        rows, columns = (np.flatnonzero((shown != 255).any(axis=(2, axis))) for axis in (1, 0))
        height, width = (round(CELL * side / max(size)) for side in size)
        assert (len(rows), len(columns)) == (height, width)
        assert (rows[0], columns[0]) == ((CELL - height) // 2, (CELL - width) // 2)


def test_both_grids_and_their_sizes(config: Config, bank: Bank, nets: Nets) -> None:
    images = drawn(nets, config, grid.choose(bank, config, PreviewCodec()))
    assert set(images) == {"grid_ref", "grid_noise"}
    for key, image in images.items():
        assert image.mode == "RGB"
        assert image.size == (LEFT + 3 * PITCH, TOP[key] + 3 * PITCH)


def test_every_translation_stands_in_its_place(config: Config, bank: Bank, nets: Nets) -> None:
    """Rows are sources, columns target domains: each cell against a translation made alone."""
    chosen = grid.choose(bank, config, PreviewCodec())
    images = drawn(nets, config, chosen)
    scale, seen = config.training.latent_scale, set()
    for i in range(3):
        for j in range(3):
            y = torch.tensor([j])
            with torch.no_grad():
                styles = {
                    "grid_ref": nets.E(chosen.references[j : j + 1] * scale, y),
                    "grid_noise": nets.F(chosen.noise[j : j + 1], y),
                }
                for key, style in styles.items():
                    alone = PreviewCodec().decode(nets.G(chosen.sources[i : i + 1] * scale, style) / scale)[0]
                    shown = cell(images[key], key, i, j)
                    assert np.abs(shown.astype(int) - alone).max() <= 1, (key, i, j)
                    seen.add(shown.tobytes())
    assert len(seen) == 18
    for i in range(3):
        for key in images:
            assert np.array_equal(cell(images[key], key, i, -1), chosen.source_pictures[i])
        assert np.array_equal(cell(images["grid_ref"], "grid_ref", -1, i), chosen.reference_pictures[i])


def test_drawing_repeats_and_changes_nothing(config: Config, bank: Bank, nets: Nets) -> None:
    chosen = grid.choose(bank, config, PreviewCodec())
    before = copy.deepcopy(nets.state_dict())
    random_state = torch.random.get_rng_state()
    first, second = (drawn(nets, config, chosen) for _ in range(2))
    for key in first:
        assert np.array_equal(pixels(first[key]), pixels(second[key]))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for name, state in nets.state_dict().items():
        assert all(torch.equal(value, before[name][key]) for key, value in state.items())
    assert all(p.requires_grad and p.grad is None for p in nets.G.parameters())


def test_the_noise_columns_are_those_of_translate(config: Config, bank: Bank, nets: Nets) -> None:
    chosen = grid.choose(bank, config, PreviewCodec())
    image = drawn(nets, config, chosen)["grid_noise"]
    translator = Translator(copy.deepcopy(nets), config, torch.device("cpu"))
    for column, domain in enumerate(config.data.domains):
        alone = PreviewCodec().decode(translator.translate(chosen.sources[:1], domain, seed=column))[0]
        assert np.abs(cell(image, "grid_noise", 0, column).astype(int) - alone).max() <= 1


def test_the_interpolation_goes_from_one_seed_to_the_other(config: Config, bank: Bank, nets: Nets) -> None:
    chosen = grid.choose(bank, config, PreviewCodec())
    image = grid.interpolation(nets, config, chosen, PreviewCodec(), seeds=(3, 8), steps=5)
    assert image.size == (LEFT + 5 * PITCH, LABEL + 3 * PITCH)
    translator = Translator(copy.deepcopy(nets), config, torch.device("cpu"))
    shown = pixels(image).astype(int)
    for row, domain in enumerate(config.data.domains):
        source = chosen.sources[1:2] if row == 0 else chosen.sources[:1]
        strip = [shown[LABEL + PITCH * row :, LEFT + PITCH * k :][:CELL, :CELL] for k in range(5)]
        for seed, end in ((3, strip[0]), (8, strip[-1])):
            alone = PreviewCodec().decode(translator.translate(source, domain, seed=seed))[0]
            assert np.abs(end - alone).max() <= 1
        ways = [np.abs(picture - strip[0]).mean() for picture in strip]
        assert ways == sorted(ways)
        assert ways[1] > 0


def test_a_number_of_samples_shows_the_first_domains(config: Config, bank: Bank, nets: Nets) -> None:
    """The same pictures in the same places as in the whole grid, whose corner they are."""
    whole = drawn(nets, config, grid.choose(bank, config, PreviewCodec()))
    key = "visualization.num_samples"
    for asked, N in ((1, 1), (2, 2), (3, 3), (99, 3)):
        fewer = override(config, {key: asked})
        chosen = grid.choose(bank, fewer, PreviewCodec())
        assert len(chosen.sources) == len(chosen.references) == len(chosen.noise) == N
        images = drawn(nets, fewer, chosen)
        for name, image in images.items():
            assert image.size == (LEFT + N * PITCH, TOP[name] + N * PITCH)
            corner = pixels(whole[name])[: image.height, : image.width]
            assert np.abs(pixels(image).astype(int) - corner).max() <= 1
            if N == 3:
                assert image.tobytes() == whole[name].tobytes()
        strips = grid.interpolation(nets, fewer, chosen, PreviewCodec(), steps=3)
        assert strips.size == (LEFT + 3 * PITCH, LABEL + N * PITCH)


def test_the_noise_columns_follow_a_seed(config: Config, bank: Bank, nets: Nets) -> None:
    chosen = grid.choose(bank, config, PreviewCodec())
    before = drawn(nets, config, chosen)
    seeded = override(config, {"visualization.random_noise_seed": 42})
    other = grid.choose(bank, seeded, PreviewCodec())
    images = drawn(nets, seeded, other)
    assert images["grid_ref"].tobytes() == before["grid_ref"].tobytes()
    translator = Translator(copy.deepcopy(nets), config, torch.device("cpu"))
    for column, domain in enumerate(config.data.domains):
        alone = PreviewCodec().decode(translator.translate(other.sources[:1], domain, seed=42 + column))[0]
        assert np.abs(cell(images["grid_noise"], "grid_noise", 0, column).astype(int) - alone).max() <= 1
    heads = [pixels(image)[LABEL : 2 * LABEL - 4, LEFT:] for image in (before["grid_noise"], images["grid_noise"])]
    assert (heads[0] != heads[1]).any()  # each column says its seed


# -- labels ----------------------------------------------------------------------------------------


def blank(names: tuple[str, ...], path: str = "reference") -> NDArray[np.uint8]:
    """A grid of black pictures under the names."""
    N = len(names)
    black = np.zeros((N, 16, 16, 3), np.uint8)
    columns = black if path == "reference" else None
    return pixels(grid.labelled(np.zeros((N, N, 16, 16, 3), np.uint8), names, black, columns, path))


def inked(area: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (area < 200).any(-1)


def test_labels_name_the_domains_and_only_labels_change(config: Config, bank: Bank, nets: Nets) -> None:
    chosen = grid.choose(bank, config, PreviewCodec())
    images = drawn(nets, config, chosen)
    renamed = drawn(nets, override(config, {"data.domains": ["a", "b", "ukiyo-e"]}), chosen)
    for key in images:
        before, after = pixels(images[key]), pixels(renamed[key])
        changed = (before != after).any(-1)
        y, x = TOP[key] + 2 * PITCH, LEFT + 2 * PITCH
        assert changed[:LABEL, x : x + CELL].any()  # across
        assert changed[y : y + CELL, :LABEL].any()  # down
        changed[:LABEL, x : x + CELL] = False
        changed[y : y + CELL, :LABEL] = False
        assert not changed.any()


def test_every_row_and_column_has_its_label() -> None:
    sheet = blank(("photo", "Hayao", "monet"))
    across = [sheet[:LABEL, LEFT + PITCH * j : LEFT + PITCH * j + CELL] for j in range(3)]
    down = [sheet[LEFT + PITCH * i : LEFT + PITCH * i + CELL, :LABEL] for i in range(3)]
    for labels in (across, down):
        assert all(inked(label).sum() > 30 for label in labels)
        assert len({label.tobytes() for label in labels}) == 3
    # A label down is the label across, turned upwards.
    for one, other in zip(across, down, strict=True):
        assert np.array_equal(inked(np.rot90(one)), inked(other))


@pytest.mark.parametrize("path", ["reference", "noise"])
@pytest.mark.parametrize("letter", ["i", "m", "W", "字"])
def test_long_names_are_cut_to_fit(path: str, letter: str) -> None:
    names = tuple(f"{letter * 80}{i}" for i in range(3))
    sheet = blank(names, path)
    assert sheet.shape == blank(("a", "b", "c"), path).shape
    for j in range(3):
        x = LEFT + PITCH * j
        assert inked(sheet[:LABEL, x : x + CELL]).any()
        # The gap to the next picture's label stays free, so that names do not run into each other.
        assert not inked(sheet[: LABEL - 1, x + CELL : x + PITCH]).any()
    assert not inked(sheet[: LABEL - 1, LEFT - 12 : LEFT - 7]).any()
    # Both ends were cut off at the same place: the differing last digits are gone.
    across = [sheet[:LABEL, LEFT + PITCH * j : LEFT + PITCH * j + CELL] for j in range(3)]
    assert np.array_equal(across[0], across[1])


def test_a_longer_name_takes_a_smaller_size_before_it_is_cut() -> None:
    name = "stained glass window"
    sheets = [blank((name + tail, "b")) for tail in ("1", "2")]
    labels = [inked(sheet[:LABEL, LEFT : LEFT + CELL]) for sheet in sheets]
    assert not np.array_equal(*labels)  # the last letter is still there


def test_pictures_of_another_size_fill_their_cells() -> None:
    cells = np.full((2, 2, 40, 40, 3), 90, np.uint8)
    rows = np.full((2, 300, 300, 3), 30, np.uint8)
    sheet = pixels(grid.labelled(cells, ("a", "b"), rows, None, "noise", cell=64))
    assert sheet.shape == (2 * 22 + 2 * 68, 22 + 64 + 12 + 2 * 68, 3)
    assert (sheet[44 : 44 + 64, 98 : 98 + 64] == 90).all()
    assert (sheet[44 : 44 + 64, 22 : 22 + 64] == 30).all()

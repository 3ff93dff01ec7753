"""The built-in decoder: what ships, what its pictures look like beside the preview's, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.demo import DOMAINS, latents_path
from raystar.demo.painter import paint
from raystar.pictures import decoder as decoders
from raystar.pictures.autoencoders import VaeCodec
from raystar.pictures.codec import BuiltInCodec, Codec, PreviewCodec, open_codec
from raystar.pictures.decoder import PACKAGED, Decoder
from raystar.pictures.distilling import Lesson, psnr
from tests.kit.support import SHARED
from tests.kit.teacher import middle, painted_latents, teachers_pictures
from tests.pictures.test_codec import assert_same_pictures, config_of

PAINTINGS = ("photo", "monet", "vangogh", "hayao")


@pytest.fixture(scope="module")
def codec() -> Codec:
    found, note = open_codec(config_of(None))
    assert note is None
    return found


def bank_of(root: str, domains: tuple[str, ...], cache: Path) -> Bank:
    return open_bank(override(Config(), {"data.data_root": root, "data.domains": list(domains)}), cache)


def held_out(bank: Bank, each: int) -> torch.Tensor:
    """[N*each,4,32,32] latents that the decoder was not trained on: the split depends on names alone."""
    return bank.rows(np.concatenate([rows[:each] for rows in bank.held]))


# -- what ships ------------------------------------------------------------------------------------


def test_the_shipped_file_is_small_and_half_precision() -> None:
    assert PACKAGED.stat().st_size < 400_000
    with safe_open(PACKAGED, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
        assert file.metadata()["teacher"] == "taesd"


def test_it_is_the_default(codec: Codec) -> None:
    assert isinstance(codec, BuiltInCodec)
    assert codec.name == "raystar"
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in codec.model.parameters())


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (5, 3), (16, 24), (64, 64)])
def test_any_size(codec: Codec, size: tuple[int, int]) -> None:
    pictures = codec.decode(5 * torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1)))
    assert pictures.shape == (2, 8 * size[0], 8 * size[1], 3)
    assert pictures.dtype == np.uint8


def test_a_picture_depends_on_its_latent_alone(codec: Codec) -> None:
    """Not on the batch, the layout in memory, or the caller's autocast."""
    latents = 5 * torch.randn(11, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    together = codec.decode(latents)
    assert_same_pictures(together, np.concatenate([codec.decode(one[None]) for one in latents]))
    assert_same_pictures(together, codec.decode(latents.contiguous(memory_format=torch.channels_last)))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_pictures(together, codec.decode(latents))
    assert np.array_equal(together, codec.decode(latents))


def test_latents_far_off_stay_pictures(codec: Codec) -> None:
    """A generator that has just begun makes such: a million times too large is no worse than a hundred times."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).sign()
    assert_same_pictures(codec.decode(1e2 * latents / 0.18215), codec.decode(1e6 * latents / 0.18215))


def test_closer_to_the_painted_pictures_than_the_preview(codec: Codec, tmp_path: Path) -> None:
    """Held-out pictures of the demo, beside the pictures that the painter painted.

    The autoencoder itself comes no closer to a picture than about 20 dB, so the gain is smaller than beside it.
    """
    bank = bank_of("raystar:demo", DOMAINS, tmp_path)
    rows = np.concatenate([held[:1] for held in bank.held])
    names = [bank.names[row].split("/") for row in rows]
    painted = np.stack([np.asarray(paint(domain, int(index))) for domain, index in names])
    lesson = Lesson(bank.rows(rows), painted)
    assert psnr(codec, lesson) > psnr(PreviewCodec(), lesson) + 1.5


def _lesson(kind: str, cache: Path) -> Lesson:
    """Latents that the decoder was not trained on, with the pictures of its teacher, TAESD."""
    if kind == "shipped":
        return Lesson(middle(painted_latents(cache)), teachers_pictures())
    latents = painted_latents(cache)
    if kind == "real":
        latents = held_out(bank_of(str(SHARED / "data/latents"), PAINTINGS, cache), 1)
    teacher, note = open_codec(config_of(SHARED / "data/taesd"))
    assert note is None
    assert isinstance(teacher, VaeCodec)
    teacher.batch_size = 1
    if kind == "painted":  # and the pictures that ship are its own
        assert_same_pictures(teacher.decode(middle(latents)), teachers_pictures())
    return Lesson(latents, teacher.decode(latents))


LESSONS = [
    "shipped",
    pytest.param("painted", marks=pytest.mark.shared("data/taesd")),
    pytest.param("real", marks=pytest.mark.shared("data/taesd", "data/latents")),
]


@pytest.mark.parametrize("kind", LESSONS)
def test_six_decibels_closer_to_the_teacher_than_the_preview(codec: Codec, tmp_path: Path, kind: str) -> None:
    lesson = _lesson(kind, tmp_path)
    assert psnr(codec, lesson) > psnr(PreviewCodec(), lesson) + 6


def test_psnr_by_hand() -> None:
    """A codec that is 10 and 20 grey levels off: 28.13 and 22.11 dB; smaller pictures are enlarged."""

    class Grey:
        name = "grey"

        def __init__(self, pixels: int) -> None:
            self.pixels = pixels

        def decode(self, latents: torch.Tensor) -> Any:
            levels = 100 + latents[:, 0, 0, 0].byte().numpy()
            return np.broadcast_to(levels[:, None, None, None], (len(latents), self.pixels, self.pixels, 3)).copy()

    latents = torch.tensor([10.0, 20.0]).reshape(2, 1, 1, 1).expand(2, 4, 2, 2)
    wanted = np.full((2, 16, 16, 3), 100, np.uint8)
    for pixels in (16, 8):
        assert psnr(Grey(pixels), Lesson(latents, wanted)) == pytest.approx((28.1308 + 22.1102) / 2, abs=1e-3)


# -- files -----------------------------------------------------------------------------------------


SMALL = Decoder((4, 4, 4), (1, 0, 1))


def test_a_decoder_of_ones_own(tmp_path: Path) -> None:
    """It is named by its file, and loads as it was saved, rounded to fp16."""
    path = tmp_path / "mine.safetensors"
    decoders.save(SMALL, path, {"teacher": "mine"})
    codec, note = open_codec(config_of(path))
    assert note is None
    assert codec.name == "mine"
    latents = 5 * torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(4))
    rounded = Decoder(SMALL.widths, SMALL.blocks)
    rounded.load_state_dict({name: value.half().float() for name, value in SMALL.state_dict().items()})
    assert_same_pictures(codec.decode(latents), BuiltInCodec(rounded, "rounded").decode(latents))
    assert path.stat().st_mode & 0o044 == 0o044
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def _rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **facts: str) -> None:
    with safe_open(path, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | facts
    save_file(kept | (tensors or {}), path, metadata=metadata)


def _damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif how == "latents":
        path.write_bytes(latents_path().read_bytes())
    elif how == "NaN":
        _rewrite(path, {"leave.bias": torch.full((12,), torch.nan, dtype=torch.float16)})
    elif how == "whole numbers":
        _rewrite(path, {"leave.bias": torch.zeros(12, dtype=torch.int32)})
    elif how == "another shape":
        _rewrite(path, shape=json.dumps({"widths": [4, 4, 8], "blocks": [1, 0, 1]}))
    elif how == "a newer format":
        _rewrite(path, format="raystar-decoder-9")
    else:
        _rewrite(path, shape=how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "truncated or damaged"),
        ("empty", "truncated or damaged"),
        ("gone", "found no file"),
        ("latents", "found raystar-latents-1"),
        ("NaN", "finite weights"),
        ("whole numbers", "finite weights"),
        ("another shape", "do not fit"),
        ("a newer format", "found raystar-decoder-9"),
        ("{nothing", "does not say the decoder's shape"),
        ("[]", "does not say the decoder's shape"),
        ('{"widths": [4, 4, 1000000000], "blocks": [1, 0, 1]}', "does not say the decoder's shape"),
        ('{"widths": [4, 4, true], "blocks": [1, 0, 1]}', "does not say the decoder's shape"),
        ('{"widths": [4, 4], "blocks": [1, 0, 1]}', "does not say the decoder's shape"),
    ],
)
def test_files_that_are_no_decoder_are_refused(tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "mine.safetensors"
    decoders.save(SMALL, path, {})
    _damage(path, how)
    with pytest.raises(RaystarError, match=r"^visualization\.vae_model_name_or_path: ") as refused:
        open_codec(config_of(path))
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "decoder.pt"
    torch.save({}, path)
    with pytest.raises(RaystarError, match=r"a model's folder, or a decoder's \.safetensors file"):
        open_codec(config_of(path))

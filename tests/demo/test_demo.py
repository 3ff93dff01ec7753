"""The demo pictures: the painter reproduces what is shipped, and the shipped latents are what they claim."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from raystar.config.schema import Config
from raystar.demo import DOMAINS, latents_path, thumbnails_path
from raystar.demo import __main__ as demo_command
from raystar.demo.__main__ import encode, main
from raystar.demo.painter import SEED, paint
from raystar.pictures.codec import open_codec
from tests.kit.autoencoder import latents_of, save_block_averages
from tests.kit.support import SHARED

COUNT = 96


def _small(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.int16)


def test_a_picture_is_a_pure_function_of_domain_and_index() -> None:
    first = paint("woodcut", 5, 64)
    np.random.seed(0)  # the global generator must not matter
    paint("photo", 0, 64)
    assert first.tobytes() == paint("woodcut", 5, 64).tobytes()
    assert first.mode == "RGB"
    assert first.size == (64, 64)
    assert first.tobytes() != paint("woodcut", 6, 64).tobytes()


@pytest.mark.parametrize(("domain", "index", "size"), [("fresco", 0, 256), ("photo", -1, 256), ("photo", 0, 31)])
def test_bad_arguments_are_refused(domain: str, index: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"domain|index|size"):
        paint(domain, index, size)


def _decoded(domain: str, *indices: int) -> np.ndarray:
    """The pictures [n,256,256,3] that the built-in decoder makes of stored latents."""
    codec, note = open_codec(Config())
    assert note is None
    with safe_open(latents_path(), framework="pt") as stored:
        return codec.decode(stored.get_tensor(domain)[list(indices)].float())


def _assert_matches_thumbnail(picture: Image.Image, domain: str, index: int) -> None:
    sheet = np.asarray(Image.open(thumbnails_path()), np.int16)
    assert sheet.shape == (8 * len(DOMAINS), 8 * COUNT, 3)
    row = 8 * DOMAINS.index(domain)
    stored = sheet[row : row + 8, 8 * index : 8 * index + 8]
    # A couple of grey levels leave room for another processor's rounding.
    assert np.abs(_small(picture) - stored).max() <= 3, f"{domain} {index}"


@pytest.mark.parametrize("domain", DOMAINS)
def test_painter_reproduces_what_ships(domain: str) -> None:
    """The thumbnail, and what the latent shows: as much as the two codecs on the way leave of it."""
    picture = paint(domain, 41)
    _assert_matches_thumbnail(picture, domain, 41)  # the command line's test adds picture 0
    error = ((_decoded(domain, 41)[0].astype(float) - np.asarray(picture)) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 18


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_latent_is_of_the_picture_in_its_place(domain: str) -> None:
    """Of all thumbnails its picture looks most like its own, by far."""
    sheet = np.asarray(Image.open(thumbnails_path()), np.float64)
    tiles = sheet.reshape(len(DOMAINS), 8, COUNT, 8, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 8, 8, 3)
    indices = range(0, COUNT, 16)
    for index, picture in zip(indices, _decoded(domain, *indices), strict=True):
        differences = ((tiles - _small(Image.fromarray(picture))) ** 2).mean((1, 2, 3))
        nearest, second = np.argsort(differences)[:2]
        assert nearest == COUNT * DOMAINS.index(domain) + index
        assert differences[nearest] < 0.3 * differences[second]


def _noise(domain: str, index: int, size: int) -> Image.Image:
    rng = np.random.default_rng([DOMAINS.index(domain), index])
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))


def test_a_file_of_latents_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a codec that averages blocks, and noise for pictures: what goes where, colours, range and scale."""
    monkeypatch.setattr(demo_command, "SIZE", 32)
    monkeypatch.setattr(demo_command, "paint", _noise)
    vae, out = save_block_averages(tmp_path / "vae"), tmp_path / "latents.safetensors"
    assert main(["--encode", str(vae), "--out", str(out), "--count", "5"]) == 0  # a whole batch and part of one
    sheet = np.asarray(Image.open(tmp_path / "thumbnails.png"))
    with safe_open(out, framework="pt") as stored, safe_open(latents_path(), framework="pt") as shipped:
        assert set(stored.keys()) == set(DOMAINS)
        assert set(stored.metadata()) == set(shipped.metadata())
        for row, domain in enumerate(DOMAINS):
            pictures = [_noise(domain, index, 32) for index in range(5)]
            wanted = latents_of(np.stack([np.asarray(picture) for picture in pictures])).half()
            torch.testing.assert_close(stored.get_tensor(domain), wanted, rtol=2e-3, atol=2e-3)
            assert (sheet[8 * row : 8 * row + 8] == np.concatenate([_small(p) for p in pictures], axis=1)).all()


def test_shipped_pictures_are_all_different() -> None:
    sheet = np.asarray(Image.open(thumbnails_path()), np.float32)
    tiles = sheet.reshape(len(DOMAINS), 8, COUNT, 8, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 192)
    gaps = ((tiles[:, None] - tiles[None]) ** 2).mean(-1) ** 0.5
    np.fill_diagonal(gaps, np.inf)
    assert gaps.min() > 3.0


def test_shipped_latents_are_well_formed() -> None:
    assert latents_path().stat().st_size < 5_000_000
    with safe_open(latents_path(), framework="np") as stored:
        assert set(stored.keys()) == set(DOMAINS)
        metadata = stored.metadata()
        for domain in DOMAINS:
            latents = stored.get_tensor(domain)
            assert latents.shape == (COUNT, 4, 32, 32)
            assert latents.dtype == np.float16
            values = latents.astype(np.float32)
            assert np.isfinite(values).all()
            # Unscaled latents have a deviation of several units; scaled ones would be below 2.
            assert 2.5 < values.std() < 9.0
    expected = {
        "format": "raystar-latents-1",
        "space": "unscaled SD1.5 VAE latents",
        "codec": "madebyollin/taesd (AutoencoderTiny, MIT)",
        "scale": "0.18215",
        "painter": "raystar.demo.painter",
        "seed": str(SEED),
        "command": "python -m raystar.demo --encode <taesd folder>",
        "licence": "Apache-2.0",
    }
    assert expected.items() <= metadata.items()
    assert {"numpy", "pillow"} <= metadata.keys()


def test_styles_can_be_told_apart() -> None:
    """Nearest class mean on texture and colour statistics, learned on one half, tested on the other."""
    features = []
    with safe_open(latents_path(), framework="np") as stored:
        for domain in DOMAINS:
            x = stored.get_tensor(domain).astype(np.float32)
            across = np.abs(np.diff(x, axis=3)).mean((2, 3))
            down = np.abs(np.diff(x, axis=2)).mean((2, 3))
            spread = x.std((2, 3))
            features.append(np.concatenate([x.mean((2, 3)), np.log(spread), np.log(across), np.log(down)], 1))
    table = np.stack(features)  # [domain, picture, feature]
    scale = table[:, ::2].reshape(-1, table.shape[2]).std(0)
    means = table[:, ::2].mean(1)
    distance = (((table[:, 1::2, None] - means) / scale) ** 2).sum(-1)
    right = distance.argmin(-1) == np.arange(len(DOMAINS))[:, None]
    assert right.mean() > 0.95


@pytest.fixture(scope="module")
def codec() -> Any:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.AutoencoderTiny.from_pretrained(SHARED / "data/taesd", local_files_only=True).eval()


@pytest.mark.shared("data/taesd")
@pytest.mark.parametrize("domain", DOMAINS)
def test_encoding_a_picture_gives_the_stored_latent(codec: Any, domain: str) -> None:
    index = 17
    fresh = encode(codec, [paint(domain, index)])[0].numpy()
    with safe_open(latents_path(), framework="np") as stored:
        kept = stored.get_tensor(domain)[index].astype(np.float32)
    assert np.corrcoef(fresh.ravel(), kept.ravel())[0, 1] > 0.995
    assert np.abs(fresh - kept).mean() < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}/a", "--count", "0"], "--count must be 1 or more"),
        (["--encode", "{tmp}/missing", "--out", "{tmp}/x.safetensors"], "no codec in"),
        (["--encode", "{tmp}/missing"], "exists already"),
        (["--out", "{tmp}/file"], "is not a folder"),
        (["--count", "1"], "--out DIR"),
    ],
)
def test_command_line_refuses_bad_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main([a.replace("{tmp}", str(tmp_path)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_bad_arguments_end_the_process_with_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raystar.demo", "--encode", str(tmp_path), "--out", str(tmp_path / "x")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_command_line_paints_and_never_overwrites_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "pictures"), "--count", "1"]
    assert main(arguments) == 0
    for domain in DOMAINS:
        with Image.open(tmp_path / "pictures" / domain / "000.png") as picture:
            assert picture.size == (256, 256)
            assert picture.mode == "RGB"
            _assert_matches_thumbnail(picture, domain, 0)
    capsys.readouterr()
    assert main(arguments) == 2
    assert "--force overwrites" in capsys.readouterr().err


def test_importing_the_package_does_not_load_torch() -> None:
    check = "import sys, raystar.demo; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0

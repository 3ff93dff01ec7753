"""Pictures in, pictures out: size, transparency and tiles, and a command line that never overwrites."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from raystar.base.errors import RaystarError
from raystar.config.load import load_config, override, to_yaml
from raystar.exported import model as model_module
from raystar.exported.model import Translator
from raystar.exported.picture_translator import PictureTranslator
from raystar.exported.tiles import blended
from raystar.pictures.autoencoders import VaeCodec, open_vae
from raystar.pictures.codec import PreviewCodec
from raystar.pictures.grid import side_by_side
from raystar.translate import main
from tests.exported.test_export import FACTS, make_checkpoint, make_nets
from tests.pictures.test_codec import build
from tests.pictures.test_encode import noise


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    build("AutoencoderTiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "best"
    model_module.write(folder, make_checkpoint(make_nets()), FACTS, {})
    return folder


@pytest.fixture(scope="module")
def codec(vae: Path) -> VaeCodec:
    return open_vae(str(vae))


@pytest.fixture(scope="module")
def translator(model: Path) -> Translator:
    return model_module.load(model, "cpu")


@pytest.fixture(scope="module")
def pictures(translator: Translator, codec: VaeCodec) -> PictureTranslator:
    return PictureTranslator(translator, codec)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


# -- the class -------------------------------------------------------------------------------------


def test_a_picture_through_codec_and_generator(
    pictures: PictureTranslator, translator: Translator, codec: VaeCodec
) -> None:
    """By hand: encode, mirror a rim, translate, cut the rim, decode."""
    picture, reference = noise(1, 96, 64), noise(2, 256, 256)
    for kind in ({"seed": 3}, {"reference": reference}):
        z = functional.pad(codec.encode(np.asarray(picture)[None]), (4, 4, 4, 4), "reflect")
        style = {"reference": codec.encode(np.asarray(reference)[None])} if "reference" in kind else kind
        made = translator.translate(z, "vangogh", **style)[:, :, 4:-4, 4:-4]  # type: ignore[arg-type]
        wanted = codec.decode(made)[0].astype(int)
        found = pictures.translate([picture], "vangogh", **kind)[0]  # type: ignore[arg-type]
        assert found.mode == "RGB"
        assert np.abs(pixels(found) - wanted).max() <= 1
    plain = pictures.translate([picture], "vangogh")[0]
    assert (pixels(plain) == pixels(pictures.translate([picture], "vangogh", seed=0)[0])).all()
    for other in (
        pictures.translate([picture], "vangogh", seed=1)[0],
        pictures.translate([picture], "monet")[0],
        pictures.translate([picture], "vangogh", reference=reference)[0],
    ):
        assert np.abs(pixels(plain) - pixels(other)).mean() > 1


@pytest.mark.parametrize("size", [(64, 64), (101, 67), (67, 101), (300, 65)])
def test_size_is_kept_and_pictures_stand_alone(pictures: PictureTranslator, size: tuple[int, int]) -> None:
    both = pictures.translate([noise(1, *size), noise(2, 72, 72)], "monet", seed=1)
    assert [picture.size for picture in both] == [size, (72, 72)]
    alone = pictures.translate([noise(1, *size)], "monet", seed=1)[0]
    assert np.abs(pixels(alone) - pixels(both[0])).max() <= 1


def test_transparency_is_kept(pictures: PictureTranslator) -> None:
    picture = noise(1, 80, 64)
    alpha = Image.linear_gradient("L").resize(picture.size)
    picture.putalpha(alpha)
    made = pictures.translate([picture], "monet")[0]
    assert made.mode == "RGBA"
    assert (pixels(made.getchannel("A")) == pixels(alpha)).all()


def test_any_mode_and_any_turn(pictures: PictureTranslator) -> None:
    grey = noise(1, 80, 64).convert("L")
    found = pictures.translate([grey, grey.convert("RGB")], "monet")
    assert (pixels(found[0]) == pixels(found[1])).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = noise(1, 80, 64)
    turned.info["exif"] = exif.tobytes()
    turned._exif = None  # type: ignore[attr-defined]
    assert pictures.translate([turned], "monet")[0].size == (64, 80)


def test_what_the_class_refuses(pictures: PictureTranslator, translator: Translator, codec: VaeCodec) -> None:
    with pytest.raises(ValueError, match="100x63 pixels are too few: 64 or more"):
        pictures.translate([noise(1, 100, 63)], "monet")
    with pytest.raises(RaystarError, match="domain 'Monet' is not one of the model's"):
        pictures.translate([noise(1)], "Monet")
    with pytest.raises(RaystarError, match="a reference or a seed"):
        pictures.translate([noise(1)], "monet", noise(2), 3)
    with pytest.raises(RaystarError, match="tile: expected 64 pixels or more, found 32"):
        PictureTranslator(translator, codec, tile=32)
    with pytest.raises(RaystarError, match="codec 'preview' decodes alone"):
        PictureTranslator(translator, PreviewCodec()).translate([noise(1)], "monet")


# -- tiles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(7, 9), (10, 10), (11, 25), (40, 10)])
@pytest.mark.parametrize("unit", [1, 3])
def test_tiles_of_what_knows_its_place_make_the_whole(rows: int, columns: int, unit: int) -> None:
    whole = torch.randn(1, 2, rows * unit, columns * unit, generator=torch.Generator().manual_seed(1))
    sizes = []

    def piece(y: slice, x: slice) -> Tensor:
        sizes.append((y.stop - y.start, x.stop - x.start))
        return whole[:, :, y.start * unit : y.stop * unit, x.start * unit : x.stop * unit]

    assert (blended(piece, (rows, columns), 10, 4, unit) - whole).abs().max() < 1e-5
    assert set(sizes) == {(min(rows, 10), min(columns, 10))}


def test_tiles_fade_into_each_other() -> None:
    """Two tiles that disagree, 0 and 1: a ramp over what they share, and no step beyond the ramp's own."""
    made = blended(lambda y, x: torch.full((1, 1, 4, 10), float(x.start > 0)), (4, 16), 10, 4)[0, 0]
    assert made[:, :6].eq(0).all()
    assert made[:, 10:].eq(1).all()
    assert made[0, 6:10].tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875])


def test_large_pictures_are_coded_in_tiles(
    pictures: PictureTranslator, codec: VaeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions see as far as their kernels: tiles differ from the whole at their rims alone."""
    seen: list[tuple[int, ...]] = []
    original = VaeCodec.encode

    def watched(self: VaeCodec, batch: Any) -> Tensor:
        seen.append(batch.shape[1:3])
        return original(self, batch)

    monkeypatch.setattr(VaeCodec, "encode", watched)
    picture = noise(1, 1030, 260)
    z = pictures.encode(picture)
    assert z.shape == (1, 4, 33, 129)
    assert seen == [(264, 768)] * 2
    padded = np.pad(np.asarray(picture), ((0, 4), (0, 2), (0, 0)), "edge")
    whole = original(codec, padded[None])
    assert (z - whole).abs().mean() < 1e-3 * whole.std()
    made = pictures.decode(z, picture)
    assert made.size == (1030, 260)
    assert np.abs(pixels(made) - codec.decode(z)[0][:260, :1030]).mean() < 0.1


def test_the_generator_sees_pictures_whole_unless_told(
    translator: Translator, codec: VaeCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    original = Translator.translate

    def watched(self: Translator, latents: Tensor, *more: Any) -> Tensor:
        seen.append(tuple(latents.shape[2:]))
        return original(self, latents, *more)

    monkeypatch.setattr(Translator, "translate", watched)
    picture = noise(1, 1024, 768)
    whole = PictureTranslator(translator, codec)
    whole.restyle(whole.encode(picture), "monet", None, 1)
    assert seen == [(104, 136)]
    seen.clear()
    tiled = PictureTranslator(translator, codec, tile=256)
    assert tiled.translate([picture], "monet", seed=1)[0].size == (1024, 768)
    assert set(seen) == {(40, 40)}
    assert len(seen) == 12


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in/deep").mkdir(parents=True)
    noise(1, 80, 64).save("in/a.png")
    noise(2, 64, 90).save("in/deep/b.png")
    noise(3, 128, 128).save("style.png")
    return tmp_path


@pytest.fixture
def call(place: Path, model: Path, vae: Path) -> Any:
    def run(*words: str, **changed: str | None) -> int:
        values = {"model": str(model), "input": "in", "domain": "monet", "out": "out", "vae": str(vae)} | changed
        named = [word for key, value in values.items() if value is not None for word in (f"--{key}", value)]
        return main([*named, "--device", "cpu", *words])

    return run


def made(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in (place / "out").rglob("*") if path.is_file())


def same(path: Path | str, picture: Image.Image) -> None:
    found = Image.open(path)
    assert found.size == picture.size
    assert np.abs(pixels(found) - pixels(picture)).max() <= 1


def test_a_folder(call: Any, place: Path, pictures: PictureTranslator, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--seed", "2") == 0
    assert "2 results in out" in capsys.readouterr().out
    assert made(place) == ["out/a.png", "out/deep/b.png"]
    wanted = pictures.translate([noise(1, 80, 64), noise(2, 64, 90)], "monet", seed=2)
    same("out/a.png", wanted[0])
    same("out/deep/b.png", wanted[1])


def test_the_vae_of_the_models_configuration(
    call: Any, place: Path, model: Path, vae: Path, pictures: PictureTranslator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its `vae_subfolder` says, unless `--vae` names another."""
    shutil.copytree(vae, place / "whole/decoding")
    shutil.copytree(model, place / "model")
    config = load_config(model / "config.yaml")
    keys = {"visualization.vae_model_name_or_path": "whole", "visualization.vae_subfolder": "decoding"}
    (place / "model/config.yaml").write_text(to_yaml(override(config, keys)))
    assert call(model="model", vae=None, input="in/a.png", out="out.png") == 0
    same("out.png", pictures.translate([noise(1, 80, 64)], "monet", seed=0)[0])
    with pytest.raises(
        RaystarError, match=r"--vae: whole: expected config\.json in it or in its vae/ folder; looked for"
    ):
        call(model="model", vae="whole", input="in/a.png", out="again.png")


def test_a_reference_and_a_strip(call: Any, place: Path, pictures: PictureTranslator) -> None:
    assert call("--compare", input="in/a.png", reference="style.png", out="out/x.png") == 0
    assert made(place) == ["out/x.png", "out/x_compare.png"]
    wanted = pictures.translate([noise(1, 80, 64)], "monet", reference=noise(3, 128, 128))[0]
    same("out/x.png", wanted)
    strip = Image.open("out/x_compare.png")
    assert strip.size == (320 + 4 + 256 + 4 + 12 + 320, 22 + 256)
    enlarged = wanted.resize((320, 256), Image.Resampling.LANCZOS)
    assert np.abs(pixels(strip.crop((596, 22, 916, 278))) - pixels(enlarged)).max() <= 2


def test_samples(call: Any, place: Path, pictures: PictureTranslator) -> None:
    assert call("--samples", "3", "--seed", "5", "--compare", input="in/a.png") == 0
    assert made(place) == ["out/a_compare.png", *(f"out/a_seed{seed}.png" for seed in (5, 6, 7))]
    same("out/a_seed6.png", pictures.translate([noise(1, 80, 64)], "monet", seed=6)[0])
    assert Image.open("out/a_compare.png").width == 4 * 320 + 3 * 4 + 12


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif", ".png"])
def test_the_suffix_chooses_the_format(call: Any, place: Path, suffix: str) -> None:
    picture = noise(1, 80, 64)
    picture.putalpha(200)
    picture.save("clear.png")
    assert call(input="clear.png", out=f"out{suffix}") == 0
    found = Image.open(f"out{suffix}")
    assert found.format == {".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".png": "PNG"}[suffix]
    assert found.mode == ("RGB" if suffix == ".jpg" else "RGBA")


def test_resizing_first(call: Any, place: Path) -> None:
    noise(1, 40, 30).save("small.png")
    assert call("--resize", "96", input="small.png", out="large.png") == 0
    assert Image.open("large.png").size == (128, 96)


def test_latents_in_and_out(
    call: Any, place: Path, translator: Translator, codec: VaeCodec, capsys: pytest.CaptureFixture[str]
) -> None:
    z = codec.encode(np.asarray(noise(1, 64, 64))[None])
    np.save("z.npy", z.numpy())
    rim = functional.pad(z, (4, 4, 4, 4), "reflect")
    wanted = translator.translate(rim, "monet", seed=0)[:, :, 4:-4, 4:-4]
    assert call(input="z.npy", out="y.npy") == 0
    assert np.allclose(np.load("y.npy", allow_pickle=False), wanted[0].numpy(), atol=1e-4)
    assert call(input="z.npy", out="y.png") == 0
    same("y.png", Image.fromarray(codec.decode(wanted)[0]))
    assert call("--latents", input="in/a.png") == 0
    assert np.load("out/a.npy", allow_pickle=False).shape == (4, 8, 10)
    assert call("--compare", input="z.npy", reference="z.npy", out="r.png") == 0
    assert Image.open("r_compare.png").width == 3 * 256 + 2 * 4 + 12
    # Without a VAE, what the model's configuration decodes with.
    capsys.readouterr()
    assert call(input="z.npy", out="preview.png", vae=None) == 0
    assert Image.open("preview.png").width in (32, 64)


def test_same_names_do_not_collide(call: Any, place: Path) -> None:
    noise(3, 64, 64).save("in/a.jpg")
    assert call() == 0
    assert made(place) == ["out/a.jpg.png", "out/a.png.png", "out/deep/b.png"]


@pytest.mark.parametrize(
    ("names", "words", "wanted"),
    [
        (["x.png", "x_compare.png"], ["--compare"],
         ["x.png", "x_compare.png", "x_compare.png.png", "x_compare.png_compare.png"]),
        (["a.jpg", "a.png", "a.png.webp"], [], ["a.jpg.png", "a.png.png", "a.png.webp.png"]),
        (["a.png", "a_seed1.png"], ["--samples", "2"],
         ["a_seed0.png", "a_seed1.png", "a_seed1_seed0.png", "a_seed1_seed1.png"]),
        (["A.png", "a.jpg"], [], ["A.png.png", "a.jpg.png"]),
        (["a.png", "a.png.jpg/b.png", "a.jpg"], [], ["a.jpg.png", "a.png.jpg/b.png", "a.png.png"]),
        (["a.jpg", "a.png/b.png"], [], ["a.jpg.png", "a.png/b.png"]),  # no file where a folder has to be
        (["e\u0301.png", "é.jpg"], [], ["e\u0301.png.png", "é.jpg.png"]),
    ],
)  # fmt: skip
def test_as_many_results_as_it_says(
    call: Any, place: Path, capsys: pytest.CaptureFixture[str], names: list[str], words: list[str], wanted: list[str]
) -> None:
    shutil.rmtree("in")
    for number, name in enumerate(names):
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        noise(number, 64, 64).save(Path("in", name))
    assert call(*words) == 0
    assert made(place) == sorted(f"out/{name}" for name in wanted)
    strips = len(names) if "--compare" in words else 0
    assert f"{len(wanted) - strips} results in out" in capsys.readouterr().out
    read = [(place / name).read_bytes() for name in made(place)]
    assert len(set(read)) == len(read)  # every one another's


def test_a_name_as_long_as_names_may_be(call: Any, place: Path) -> None:
    for number, name in enumerate(
        [f"{'x' * 251}.png", f"{'x' * 250}y.png", f"{'ü' * 124}.jpg", "n\n\x1b[31m\udce9.png"]
    ):
        noise(number, 64, 64).save(Path("in", name), format="PNG")
    assert call("--compare", "--samples", "2") == 0
    assert len(made(place)) == 6 * 3
    assert all(len(os.fsencode(Path(path).name)) <= 255 for path in made(place))
    assert "out/" + "n\n\x1b[31m\udce9_seed1.png" in made(place)


def test_places_that_cannot_be_written_are_found_beforehand(call: Any, place: Path, tmp_path: Path) -> None:
    Path("taken").touch()
    for out in ("taken/out", "taken/deep/out", "taken"):
        with pytest.raises(RaystarError, match=r"taken is no folder|expected a folder or a picture's name"):
            call(out=out)
    Path("out/a.png").mkdir(parents=True)
    with pytest.raises(RaystarError, match=r"out/a\.png would be a result, and is a folder"):
        call("--force")
    Path("out/a.png").rmdir()
    Path("out/deep").touch()
    with pytest.raises(RaystarError, match=r"out/deep is no folder, and results would be in it"):
        call("--force")
    Path("out/deep").unlink()
    long = "/".join(["y" * 250] * 17)
    with pytest.raises(RaystarError, match="longer path than the system takes"):
        call(out=long)
    with pytest.raises(RaystarError, match=r"longer path than|expected a picture, a latent or a folder"):
        call(input="z" * 300)
    assert made(place) == []
    assert not Path("y" * 250).exists()


def test_a_folder_that_is_called_like_a_picture(call: Any, place: Path) -> None:
    for name in ("my.gif", "my.png"):
        Path(name).mkdir()
        assert call(out=name) == 0
        assert Path(name, "a.png").is_file()


def test_a_domain_is_found_however_its_accents_are_composed(
    call: Any, model: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, "model")
    config = load_config(model / "config.yaml")
    domains = [f"e\u0301{number}" for number in range(config.num_domains)]
    Path("model/config.yaml").write_text(to_yaml(override(config, {"data.domains": domains})))
    assert call(model="model", domain="e\u03011") == 0
    assert call("--force", model="model", domain="é1") == 0


def test_nothing_is_overwritten(call: Any, place: Path) -> None:
    assert call() == 0
    before = (place / "out/a.png").stat().st_mtime_ns
    with pytest.raises(RaystarError, match=r"2 of 2 results are there already, out/a\.png for one; .* --force"):
        call("--seed", "4")
    assert (place / "out/a.png").stat().st_mtime_ns == before
    assert call("--seed", "4", "--force") == 0
    assert (place / "out/a.png").stat().st_mtime_ns != before
    for name in ("in/a.png", "in/../in/a.png"):
        with pytest.raises(RaystarError, match="is the input itself"):
            call("--force", input="in/a.png", out=name)
    with pytest.raises(RaystarError, match="is the input itself"):
        call("--force", input="in/a.png", reference="style.png", out="style.png")
    same("in/a.png", noise(1, 80, 64))
    assert not list(place.rglob(".*"))  # nothing half-written stays


def test_bad_files_of_a_folder_are_listed(call: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "in/text.png").write_text("words")
    (place / "in/loop").symlink_to(place / "in")
    noise(1, 20, 20).save("in/dot.png")
    assert call() == 1
    shown = capsys.readouterr()
    assert "2 results in out" in shown.out
    assert "3 could not be used" in shown.err
    assert "  in/text.png: not a picture" in shown.err
    assert "  in/loop: a link to a folder that holds it" in shown.err
    assert "  in/dot.png: 20x20 pixels are too few" in shown.err
    assert made(place) == ["out/a.png", "out/deep/b.png"]


@pytest.mark.parametrize(
    ("changed", "words", "message"),
    [
        ({"domain": "monett"}, [], r"--domain monett: not one of the model's \(did you mean 'monet'\?\): photo, monet"),
        ({"model": "in"}, [], r"in: expected an exported model"),
        ({"input": "gone.png"}, [], r"--input gone\.png: expected a picture, a latent or a folder .* found nothing"),
        ({"input": "hollow"}, [], r"--input hollow: expected pictures or latents in it, found none"),
        ({"input": "words.png"}, [], r"--input words\.png: not a picture"),
        ({"input": "words.npy"}, [], r"--input words\.npy: not an \.npy file"),
        ({"reference": "words.png"}, [], r"--reference words\.png: not a picture"),
        ({"reference": "gone.png"}, [], r"--reference gone\.png: No such file"),
        ({"reference": "style.png"}, ["--seed", "1"], r"--reference: its style is one"),
        ({"reference": "style.png"}, ["--samples", "1"], r"--reference: its style is one"),
        ({}, ["--seed", "-1"], r"--seed -1: expected 0 or more"),
        ({}, ["--samples", "0"], r"--samples 0: expected 1 or more"),
        ({}, ["--resize", "63"], r"--resize 63: expected 64"),
        ({}, ["--tile", "63"], r"tile: expected 64 pixels or more, found 63"),
        ({"input": "z.npy"}, ["--resize", "64"], r"--resize: latents are not scaled"),
        ({"out": "in/out"}, [], r"--out in/out: lies inside of --input in"),
        ({"out": "x.png"}, [], r"--out x\.png: one file, but there will be 2; name a folder"),
        ({"out": "x.gif", "input": "style.png"}, [], r"--out x\.gif: \.gif files are not written; take \.avif"),
        ({"out": "words.txt"}, [], r"--out words\.txt: expected a folder or a picture's name, found another file"),
        ({"out": "x.png", "input": "style.png"}, ["--latents"], r"--out x\.png: --latents writes \.npy"),
        ({"vae": "./gone"}, [], r"--vae: \./gone: expected a hub name"),
    ],
)
def test_wrong_requests(call: Any, place: Path, changed: dict[str, str], words: list[str], message: str) -> None:
    (place / "hollow").mkdir()
    for name in ("words.png", "words.npy", "words.txt"):
        (place / name).write_text("words")
    np.save("z.npy", np.zeros((4, 8, 8), np.float32))
    with pytest.raises(RaystarError, match=message):
        call(*words, **changed)
    assert not (place / "out").exists()


def test_without_a_hub_one_line_says_what_to_pass(call: Any, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RaystarError) as error:
        call(vae=None)
    assert len(str(error.value).splitlines()) == 1
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5: cannot be loaded" in str(error.value)
    assert "give the folder of an AutoencoderKL or AutoencoderTiny" in str(error.value)


def test_strips_are_labelled() -> None:
    blue = Image.new("RGB", (100, 50), (0, 0, 200))
    clear = Image.new("RGBA", (50, 100), (0, 0, 0, 0))
    strip = side_by_side([("a very long name of a picture " * 5, blue), ("b", clear), ("c", blue)], 2, 64)
    assert strip.size == (128 + 4 + 32 + 4 + 12 + 128, 86)
    found = pixels(strip)
    assert (found[22:, :128] == (0, 0, 200)).all()
    assert (found[22:, 132:164] == 255).all()  # paper shows through
    assert (found[22:, -128:] == (0, 0, 200)).all()
    assert (found[:22, :128] < 100).any()  # each has its label
    assert (found[:22, 132:164] < 100).any()
    assert (found[:22, 128:132] == 255).all()  # which does not run into the next

"""Pictures as people have them: every format and oddity, one by one, and folders of any shape."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from raystar.pictures import reading as pictures
from raystar.pictures.reading import find, flat, read, scaled, square


def gradient(width: int = 96, height: int = 64) -> Image.Image:
    """Red to the right, green downwards: its orientation shows."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 40)], -1)
    return Image.fromarray(rgb.astype(np.uint8))


def near(found: Image.Image, wanted: Image.Image, most: float) -> None:
    assert found.mode == wanted.mode
    assert found.size == wanted.size
    assert np.abs(np.asarray(found, int) - np.asarray(wanted, int)).mean() <= most


def why(path: Path) -> str:
    with pytest.raises(ValueError, match=r".+") as error:
        read(path)
    assert len(str(error.value).splitlines()) == 1
    assert str(path) not in str(error.value)  # whoever lists it names it
    return str(error.value)


# -- one picture -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "most"),
    [(".png", 0), (".bmp", 0), (".tif", 0), (".ppm", 0), (".tga", 0), (".qoi", 0), (".webp", 6), (".jpg", 3),
     (".avif", 6), (".jp2", 2)],
)  # fmt: skip
def test_common_formats(tmp_path: Path, suffix: str, most: float) -> None:
    path = tmp_path / f"a{suffix}"
    gradient().save(path)
    near(read(path), gradient(), most)
    (tmp_path / "b.jpg").write_bytes(path.read_bytes())  # the content counts, not the name
    near(read(tmp_path / "b.jpg"), gradient(), most)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_pictures_upright(tmp_path: Path, orientation: int) -> None:
    back = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    stored = gradient()
    for step in back:  # how a camera that is held so stores what is upright
        stored = stored.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    near(read(tmp_path / "a.png"), gradient(), 0)


def test_grey_palette_and_bits(tmp_path: Path) -> None:
    for mode in ("L", "P", "1"):
        image = gradient().convert(mode)
        image.save(tmp_path / "a.png")
        near(read(tmp_path / "a.png"), image.convert("RGB"), 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_kept_and_shows_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (64, 64), (200, 30, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 64))
    image.convert(mode).save(tmp_path / "a.png")
    found = read(tmp_path / "a.png")
    assert found.mode == "RGBA"
    assert np.asarray(found.getchannel("A"))[:, [5, 60]].tolist() == [[0, 255]] * 64
    on_white = np.asarray(flat(found))
    assert (on_white[:, :32] == 255).all()
    assert (on_white[:, 32:] == np.asarray(Image.new("RGB", (1, 1), (200, 30, 30)).convert(
        "L" if mode == "LA" else "RGB").convert("RGB"))).all()  # fmt: skip
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "b.png")
    assert read(tmp_path / "b.png").mode == "RGB"  # nothing of it is transparent
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    assert flat(half).getpixel((0, 0)) == (204, 204, 204)


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file as its specification writes it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).round().astype(">u2")
    wanted = (values / 257).round().astype(np.uint8)
    grey = b"".join(b"\0" + values.tobytes() for _ in range(64))
    (tmp_path / "grey.png").write_bytes(png(64, 64, 16, 0, grey))
    assert (np.asarray(read(tmp_path / "grey.png")) == wanted[None, :, None]).all()
    colour = b"".join(b"\0" + np.stack([values, values[::-1], values], -1).astype(">u2").tobytes() for _ in range(64))
    (tmp_path / "colour.png").write_bytes(png(64, 64, 16, 2, colour))
    found = np.asarray(read(tmp_path / "colour.png"), int)
    assert np.abs(found - np.stack([wanted, wanted[::-1], wanted], -1)).max() <= 1
    Image.fromarray(np.tile(values.astype(np.uint16), (64, 1))).save(tmp_path / "grey.tif")
    assert (np.asarray(read(tmp_path / "grey.tif")) == wanted[None, :, None]).all()


def test_floating_point_pictures(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64), 0.5, np.float32)).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif").getpixel((3, 3)) == (128, 128, 128)
    Image.fromarray(np.full((64, 64), 700.0, np.float32)).save(tmp_path / "a.tif")
    assert "floating-point" in why(tmp_path / "a.tif")


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    image.save(tmp_path / "a.jpg", quality=95)
    found = np.asarray(read(tmp_path / "a.jpg"), int)
    assert np.abs(found - [255, 0, 0]).max() < 8


def swapped_profile() -> bytes:
    """A profile whose red is sRGB's green and the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))
    assert profile.count(b"rXYZ") == profile.count(b"gXYZ") == 1
    return profile.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def test_colours_are_what_the_profile_means(tmp_path: Path) -> None:
    red = Image.new("RGB", (64, 64), (250, 0, 0))
    red.save(tmp_path / "a.png", icc_profile=swapped_profile())
    found = read(tmp_path / "a.png")
    r, g, b = found.getpixel((0, 0))
    assert g > 245
    assert r < 10
    assert pictures.upright(found).getpixel((0, 0)) == (r, g, b)  # once is enough
    clear = red.convert("RGBA")
    clear.putalpha(9)
    clear.save(tmp_path / "a.png", icc_profile=swapped_profile())
    assert read(tmp_path / "a.png").getpixel((0, 0)) == (r, g, b, 9)
    for profile in (b"no profile", swapped_profile()[:200]):  # as viewers do: without it
        red.save(tmp_path / "a.png", icc_profile=profile)
        assert read(tmp_path / "a.png").getpixel((0, 0)) == (250, 0, 0)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_the_first_of_several_frames(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ((200, 10, 10), (10, 200, 10))]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    assert Image.open(tmp_path / f"a{suffix}").n_frames == 2  # type: ignore[attr-defined]
    found = read(tmp_path / f"a{suffix}")
    assert np.abs(np.asarray(found, int)[..., :3] - [200, 10, 10]).max() < 8


def test_what_is_no_picture(tmp_path: Path) -> None:
    gradient(300, 200).save(tmp_path / "a.jpg", quality=95)
    gradient(300, 200).save(tmp_path / "a.png")
    for name in ("a.jpg", "a.png"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert "truncated" in why(tmp_path / name)
    (tmp_path / "text.png").write_text("these are words\n")
    assert "not a picture" in why(tmp_path / "text.png")
    (tmp_path / "empty.png").touch()
    assert why(tmp_path / "empty.png") == "an empty file"
    assert why(tmp_path / "gone.png") == "No such file or directory"
    os.mkfifo(tmp_path / "pipe.png")
    assert why(tmp_path / "pipe.png") == "not a file"
    assert why(tmp_path) == "not a file"
    (tmp_path / "bomb.png").write_bytes(png(30000, 30000, 8, 2, b""))
    assert "million pixels" in why(tmp_path / "bomb.png")
    (tmp_path / "other.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")  # would start a program
    assert "not a picture" in why(tmp_path / "other.eps")


def test_sizes(tmp_path: Path) -> None:
    assert scaled(gradient(300, 200), 64).size == (96, 64)
    assert scaled(gradient(200, 300), 64).size == (64, 96)
    assert scaled(gradient(1000, 10), 64).size == (6400, 64)
    near(square(gradient(96, 64), 64), gradient().crop((16, 0, 80, 64)), 0)
    near(square(gradient(192, 128), 64), gradient().crop((16, 0, 80, 64)), 2)
    same = square(gradient(64, 64), 64)
    near(same, gradient(64, 64), 0)
    gradient(2000, 1000).save(tmp_path / "large.jpg", quality=95)
    quick = read(tmp_path / "large.jpg", 100)
    assert quick.size == (500, 250)
    near(square(quick, 100), square(gradient(2000, 1000), 100), 2)
    assert read(tmp_path / "large.jpg", 700).size == (2000, 1000)


@pytest.mark.parametrize("kind", ["iTXt", "zTXt", "tEXt", "iCCP"])
def test_a_png_with_much_beside_its_pixels(tmp_path: Path, kind: str) -> None:
    """More than Pillow takes by itself, 1 MiB; a profile of that size is still applied."""
    path, picture, told = tmp_path / "a.png", gradient(80, 64), PngImagePlugin.PngInfo()
    long = "a camera's notes " * 100_000
    if kind == "iCCP":
        swapped = swapped_profile()
        size = len(swapped) + 2**21  # at its end, as editors pad them
        padded = size.to_bytes(4, "big") + swapped[4:] + bytes(size - len(swapped))
        picture.save(path, icc_profile=padded)
        plain = tmp_path / "b.png"
        picture.save(plain, icc_profile=swapped)
        near(read(path), read(plain), 0)
        assert np.abs(np.asarray(read(path), int) - np.asarray(picture, int)).max() > 20
        return
    if kind == "iTXt":
        told.add_itxt("XML:com.adobe.xmp", long, zip=True)
    else:
        told.add_text("notes", long, zip=kind == "zTXt")
    picture.save(path, pnginfo=told)
    assert kind.encode() in path.read_bytes()
    near(read(path), picture, 0)


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_of_any_shape(tmp_path: Path) -> None:
    shown, hidden = ("b.JPG", "a.png", "in/deep/c.webp"), (".hidden.png", ".cache/d.png")
    for name in (*shown, *hidden, "in/notes.txt", "in/raw.NEF", "Thumbs.db"):
        (tmp_path / "pics" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pics" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/e.gif").touch()
    root = tmp_path / "pics"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "again").symlink_to(root / "in")
    (root / "in/up").symlink_to(root)
    (root / "in/outside").symlink_to(tmp_path)
    (root / "itself").symlink_to("itself")
    (root / "lost.png").symlink_to("nowhere")
    found = find(root, tmp_path)
    assert found.pictures == ["a.png", "b.JPG", "in/deep/c.webp", "linked/e.gif"]  # once, though again/ is in/
    bad = dict(found.bad)
    assert sorted(bad) == ["in/outside", "in/raw.NEF", "in/up", "itself", "lost.png"]
    assert "holds it" in bad["in/up"]
    assert "holds it" in bad["in/outside"]
    assert "NEF files are not read" in bad["in/raw.NEF"]
    assert bad["itself"] == "Too many levels of symbolic links"
    assert found.ignored == {".txt": 1}

"""Pictures as people have them: folders of any shape, any common format, upright, 8 bits, in sRGB; and what is wrong.

A picture that cannot be used is a `ValueError` with its reason, so that reading a thousand of them can
continue and list the bad ones at the end.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections import Counter, deque
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from raystar.base.names import is_systems

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""What is opened, by content. Not all that Pillow knows: some of its readers start other programs."""

SUFFIXES = frozenset([
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
])  # fmt: skip
"""What counts as a picture in a folder."""

_FOREIGN = frozenset([
    ".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".psd", ".raf", ".rw2", ".svg", ".xcf",
])  # fmt: skip
"""Pictures that are not read; saying nothing of them would look like having done them."""

PAPER = (255, 255, 255)
"""What shows through transparent pictures."""

# Pillow warns at 89 million pixels, which cameras have, and refuses at twice as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# And it refuses a PNG with a text or a colour profile of over 1 MiB; cameras and editors write such. All of a file's
# texts together still take no more than this.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class Found(NamedTuple):
    """What `find` found below a folder; names are relative to it, with `/` between their parts, sorted."""

    pictures: list[str]
    bad: list[tuple[str, str]]
    """Names that cannot be followed or read, each with its reason."""
    ignored: Counter[str]
    """How many files of each suffix are no pictures."""


def find(folder: Path, within: Path | None = None, suffixes: Collection[str] = SUFFIXES) -> Found:
    """All pictures below a folder, by their suffixes; hidden files and folders are left out, and those of
    systems (`base.names.is_systems`).

    Links to folders are followed. One that leads back to a folder that holds it is bad, and not walked; a folder
    that is reached in several ways is walked once, under its own name if it has one here.

    Args:
        within: a folder that holds `folder`; links to it are bad, too.
    """
    listing = Found([], [], Counter())
    seen: set[tuple[int, int]] = set()
    pending = deque([("", () if within is None else (_place(within.stat()),))])
    while pending:
        name, above = pending.popleft()
        path = folder / name
        try:
            place = _place(path.stat())
            if place in above:
                listing.bad.append((name, "a link to a folder that holds it: not walked again"))
                continue
            if place in seen:
                continue
            seen.add(place)
            entries = sorted(entry.name for entry in os.scandir(path))
        except OSError as error:
            listing.bad.append((name or ".", _why(error)))
            continue
        for entry in entries:
            if entry.startswith(".") or is_systems(entry):
                continue
            inner = f"{name}/{entry}" if name else entry
            suffix = Path(entry).suffix.lower()
            try:
                is_folder = stat.S_ISDIR((folder / inner).stat().st_mode)
            except OSError as error:  # a link to nothing or to itself
                listing.bad.append((inner, _why(error)))
                continue
            if is_folder:
                # Links last, so that what is reached in two ways keeps its own name.
                (pending.append if (folder / inner).is_symlink() else pending.appendleft)((inner, (*above, place)))
            elif suffix in suffixes:
                listing.pictures.append(inner)
            elif suffix in _FOREIGN:
                listing.bad.append((inner, f"{suffix[1:].upper()} files are not read; convert it to JPEG or PNG"))
            else:
                listing.ignored[suffix or "no suffix"] += 1
    listing.pictures.sort()
    listing.bad.sort()
    return listing


def read(path: Path, enough: int | None = None) -> Image.Image:
    """Opens one picture: the first frame of several, upright, 8 bits a channel, sRGB.

    Args:
        enough: a shorter side, in pixels, beyond which no detail is needed; a large JPEG is then read faster, at a
            fraction of its size that is still at least twice that.

    Returns:
        A picture of mode RGB, or RGBA if a part of it is transparent.

    Raises:
        ValueError: why the file cannot be used.
    """
    try:
        status = path.stat()  # follows links; a pipe would be waited for
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")
        if not status.st_size:
            raise ValueError("an empty file")
        with Image.open(path, formats=FORMATS) as image:
            if enough is not None:
                image.draft(None, _at_least(image.size, 2 * enough))
            return upright(image)
    except ValueError:
        raise
    except UnidentifiedImageError:
        raise ValueError("not a picture, or damaged at its beginning") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels") from None
    except OSError as error:
        raise ValueError(_why(error)) from None
    except MemoryError:
        raise ValueError("does not fit into memory") from None
    # A damaged file can make a decoder raise nearly anything, and all of it means the same.
    except Exception as error:
        raise ValueError(f"damaged ({_first_line(error)})") from None


def upright(image: Image.Image) -> Image.Image:
    """A picture as `read` returns it, from one that was opened already.

    Raises:
        ValueError: numbers that are no brightness.
        OSError: its file is truncated or damaged.
    """
    profile = image.info.get("icc_profile")
    image.load()
    image = _eight_bits(ImageOps.exif_transpose(image))
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() == (255, 255):
            alpha = None
        image = image.convert("RGB")
    image = _srgb(image, profile)
    if alpha is not None:
        image.putalpha(alpha)
    image.info = {}  # none of it holds any more
    return image


def flat(image: Image.Image) -> Image.Image:
    """An RGB or RGBA picture on white paper: RGB."""
    if image.mode != "RGBA":
        return image
    paper = Image.new("RGBA", image.size, PAPER)
    return Image.alpha_composite(paper, image).convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle of an RGB picture: its shorter side scaled to `size` (Lanczos), the longer one cut to it."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def scaled(image: Image.Image, side: int) -> Image.Image:
    """A picture whose shorter side is `side` pixels, of the same proportions (Lanczos)."""
    size = _at_least(image.size, side)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _at_least(size: tuple[int, int], side: int) -> tuple[int, int]:
    factor = side / min(size)
    return max(side, round(size[0] * factor)), max(side, round(size[1] * factor))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips what has more than 8 bits to its lowest 8; here it is scaled."""
    if image.mode == "F":
        values = np.asarray(image)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("floating-point numbers, and not all of them from 0 to 1")
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("numbers that do not fit into 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8))
    return image


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """In RGB; colours as the picture's own profile means them."""
    if profile is not None and image.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
                return image
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return converted if converted is not None else image
        # A profile that is damaged, or of another kind of picture: shown without it, as viewers do.
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def _place(status: os.stat_result) -> tuple[int, int]:
    """What a folder is known by, whatever it is called."""
    return status.st_dev, status.st_ino


def _why(error: OSError) -> str:
    """A system's error without the path, which its reader names already; a decoder's own words as they are."""
    return error.strerror or _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__

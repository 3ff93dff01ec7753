"""Many trials' pictures beside each other: read from the storage, fitted into a page, laid out on a sheet."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from raystar.base.storage import Storage
from raystar.pictures.grid import FAINT, INK, PAPER
from raystar.record.trial_files import picture_name, saved_pictures

logger = logging.getLogger(__name__)

FIRST_CHOICE = "grid_ref"
_WIDTHS = (1024, 820, 640, 512, 420, 340, 280, 220, 160, 112, 80)  # of an embedded picture, largest first
_QUALITY = 72  # WebP's: at 64 bytes more a picture looks no better, at 50 the decoded grain goes
_SAMPLE = 6  # pictures that tell how many bytes a width takes
_LABEL = 96  # pixels of a sheet's left margin


class Embedded(NamedTuple):
    """A picture inside a page."""

    uri: str
    """`data:` with all of it."""
    width: int
    height: int


def epochs_to_show(storage: Storage, trials: Sequence[str], wanted: Sequence[int], most: int) -> list[int]:
    """Up to `most` epochs of which there are pictures: the first, the last, those `wanted`, and others in between."""
    epochs = sorted({epoch for trial in trials for epoch in saved_pictures(storage, trial).get(FIRST_CHOICE, [])})
    if len(epochs) <= most:
        return epochs
    chosen = {epochs[0], epochs[-1]}
    chosen |= set([epoch for epoch in wanted if epoch in epochs and epoch not in chosen][: most - 2])
    while len(chosen) < most:  # the one that is furthest from all that are shown
        chosen.add(max(epochs, key=lambda epoch: min(abs(epoch - other) for other in chosen)))
    return sorted(chosen)


def nearest_epoch(storage: Storage, trial: str, key: str, epoch: int) -> int | None:
    """The last epoch up to `epoch` of which there is a picture, else the first; None where there is no picture."""
    epochs = saved_pictures(storage, trial).get(key, [])
    return max((e for e in epochs if e <= epoch), default=min(epochs, default=None))


def read_picture(storage: Storage, trial: str, key: str, epoch: int, widest: int) -> Image.Image | None:
    """A grid, at most `widest` pixels wide; None where there is none, or, with a note, none that can be read."""
    name = picture_name(trial, key, epoch)
    try:
        with Image.open(io.BytesIO(storage.read(name))) as opened:
            picture = opened.convert("RGB")
    except FileNotFoundError:
        return None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        logger.warning(f"{storage.at(name)} cannot be read and is left out: {error}")
        return None
    return _fitted(picture, widest)


def embed(pictures: Sequence[Image.Image], budget: int) -> list[Embedded]:
    """Pictures as `data:` URIs that take at most `budget` characters together, as large as they can then be.

    Raises:
        ValueError: not even the smallest fit.
    """
    widest = max((picture.width for picture in pictures), default=0)
    sample = pictures[:: max(1, len(pictures) // _SAMPLE)]
    for width in [w for w in _WIDTHS if w <= widest] or [_WIDTHS[-1]]:
        if sum(len(_embedded(p, width).uri) for p in sample) * len(pictures) > 1.1 * budget * len(sample):
            continue
        embedded = [_embedded(picture, width) for picture in pictures]
        if sum(len(picture.uri) for picture in embedded) <= budget:
            return embedded
    raise ValueError(f"{len(pictures)} pictures do not fit into {budget} characters")


def _embedded(picture: Image.Image, width: int) -> Embedded:
    picture = _fitted(picture, width)
    webp = io.BytesIO()
    picture.save(webp, "WEBP", quality=_QUALITY, method=1)
    return Embedded("data:image/webp;base64," + base64.b64encode(webp.getvalue()).decode(), *picture.size)


def _fitted(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    height = max(1, round(picture.height * width / picture.width))
    return picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)


def contact_sheet(
    rows: Sequence[tuple[str, Mapping[int, Image.Image]]], epochs: Sequence[int], cell: int = 176
) -> Image.Image:
    """Trials down, epochs across.

    Args:
        rows: of each trial its label, in lines, and its pictures by epoch; there may be gaps.
        epochs: the columns.
        cell: pixels of a picture's longer side.

    Returns:
        RGB, `96 + len(epochs) * (cell + 6)` pixels wide.
    """
    gap, top = 6, 26
    sheet = Image.new("RGB", (_LABEL + len(epochs) * (cell + gap), top + len(rows) * (cell + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for column, epoch in enumerate(epochs):
        x = _LABEL + column * (cell + gap)
        draw.text((x + cell // 2, top // 2), f"epoch {epoch}", fill=INK, font=font, anchor="mm")
        for row, (_, pictures) in enumerate(rows):
            y = top + row * (cell + gap)
            if epoch in pictures:
                small = pictures[epoch].copy()
                small.thumbnail((cell, cell), Image.Resampling.LANCZOS, reducing_gap=2.0)
                sheet.paste(small, (x, y))
            else:
                draw.text((x + cell // 2, y + cell // 2), "-", fill=FAINT, font=font, anchor="mm")
    for row, (label, _) in enumerate(rows):
        y = top + row * (cell + gap) + cell // 2
        lines = [_cut(draw, line, font) for line in label.splitlines()]
        draw.multiline_text((8, y), "\n".join(lines), fill=INK, font=font, anchor="lm", spacing=5)
    return sheet


def _cut(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """`text` as far as it fits into the margin."""
    if draw.textlength(text, font) <= _LABEL - 12:
        return text
    while text and draw.textlength(text + "\N{HORIZONTAL ELLIPSIS}", font) > _LABEL - 12:
        text = text[:-1]
    return text + "\N{HORIZONTAL ELLIPSIS}"

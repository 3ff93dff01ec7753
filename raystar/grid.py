"""Labelled picture grids: source domains down, target domains across, real pictures in the margins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raystar.codec import Codec
from raystar.config import Config
from raystar.dataset import Bank
from raystar.model import Nets
from raystar.step import autocast

PAPER, INK, FAINT = (255, 255, 255), (28, 30, 33), (120, 124, 130)
_LANCZOS = Image.Resampling.LANCZOS
_SEED = 7
_CELL = 128  # pixels of a picture in a grid


class GridSet(NamedTuple):
    """What every grid of a dataset shows, the same in every trial and epoch. N domains."""

    sources: Tensor
    """[N,C,H,W] unscaled held-out contents, one a domain."""
    references: Tensor
    """[N,C,H,W] unscaled held-out references, one a domain, other pictures than the sources."""
    noise: Tensor
    """[N,Z], one noise a target domain."""
    source_pictures: NDArray[np.uint8]
    reference_pictures: NDArray[np.uint8]


def choose(bank: Bank, config: Config, codec: Codec) -> GridSet:
    """Picks and decodes the grid's real pictures; held-out ones where there are any."""
    rng = np.random.default_rng(_SEED)
    sources, references = [], []
    for train, held in zip(bank.train, bank.held, strict=True):
        rows = held if len(held) > 1 else train
        picked = rng.permutation(rows)[:2]
        sources.append(picked[0])
        references.append(picked[-1])
    shown = bank.rows(np.array([*sources, *references]))
    pictures = codec.decode(shown)
    N = len(bank.domains)
    noise = torch.from_numpy(rng.standard_normal((N, config.model.latent_dim), dtype=np.float32))
    return GridSet(shown[:N], shown[N:], noise, pictures[:N], pictures[N:])


def draw(nets: Nets, config: Config, chosen: GridSet, codec: Codec) -> dict[str, Image.Image]:
    """`grid_ref` and `grid_noise` of a model: N x N translations, rows source domains, columns target domains."""
    device = next(nets.G.parameters()).device
    scale = config.training.latent_scale
    N = len(chosen.sources)
    y = torch.arange(N, device=device)
    x = chosen.sources.to(device) * scale
    with torch.inference_mode(), autocast(config, device):
        by_reference = nets.E(chosen.references.to(device) * scale, y)
        by_noise = nets.F(chosen.noise.to(device), y)
        styles = torch.cat([by_reference.float(), by_noise.float()])  # [2N,S]
        # Every content in every style: content i and style k stand in row k * N + i.
        fakes = nets.G(x, styles.repeat_interleave(N, dim=0)).float() / scale
    pictures = codec.decode(fakes)
    cells = pictures.reshape(2, N, N, *pictures.shape[1:]).swapaxes(1, 2)  # [path, source, target, ...]
    domains = config.data.domains
    return {
        "grid_ref": labelled(cells[0], domains, chosen.source_pictures, chosen.reference_pictures, "reference"),
        "grid_noise": labelled(cells[1], domains, chosen.source_pictures, None, "noise"),
    }


def labelled(
    cells: NDArray[np.uint8],
    domains: Sequence[str],
    rows: NDArray[np.uint8],
    columns: NDArray[np.uint8] | None,
    path: str,
    cell: int = _CELL,
) -> Image.Image:
    """A labelled grid.

    Args:
        cells: [N,N,h,w,3], source domains down, target domains across.
        rows: [N,h,w,3] the sources, shown at the left.
        columns: [N,h,w,3] the references, shown at the top; None if there are none (noise).
        path: `reference` or `noise`, named in the corner.
        cell: pixels of one picture.
    """
    N, gap, label, margin = len(domains), 4, 22, 12
    top = label + (cell + margin if columns is not None else 0)
    left = label + cell + margin
    size = (left + N * (cell + gap), top + N * (cell + gap))
    sheet = Image.new("RGB", size, PAPER)
    write = ImageDraw.Draw(sheet)
    for i, domain in enumerate(domains):
        x, y = left + i * (cell + gap), top + i * (cell + gap)
        _centred(write, domain, (x + cell // 2, label // 2), cell)
        sheet.paste(_sideways(domain, cell, label), (0, y))
        sheet.paste(_picture(rows[i], cell), (label, y))
        if columns is not None:
            sheet.paste(_picture(columns[i], cell), (x, label))
        for j in range(N):
            sheet.paste(_picture(cells[i, j], cell), (left + j * (cell + gap), y))
    # The corner says how to read it; across the rules, real pictures stand outside.
    if columns is not None:
        for line, text in enumerate(("source, down", f"{path}, across")):
            _centred(write, text, (label + cell // 2, label + cell // 2 - 9 + 18 * line), cell, FAINT)
        write.line([(left, top - margin // 2), (size[0], top - margin // 2)], fill=FAINT)
    else:
        _centred(write, "source", (label + cell // 2, label // 2), cell, FAINT)
    write.line([(left - margin // 2, top), (left - margin // 2, size[1])], fill=FAINT)
    return sheet


def _picture(pixels: NDArray[np.uint8], cell: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture if picture.size == (cell, cell) else picture.resize((cell, cell), _LANCZOS)


def _centred(
    write: ImageDraw.ImageDraw, text: str, at: tuple[int, int], width: int, ink: tuple[int, int, int] = INK
) -> None:
    """Writes `text` around `at`, in the largest size that fits `width`; what is too long even then is cut."""
    for size in (15, 13, 11, 9):
        font = ImageFont.load_default(size)
        if write.textlength(text, font) <= width:
            break
    while write.textlength(text, font) > width and len(text) > 2:
        text = text[:-2] + "\N{HORIZONTAL ELLIPSIS}"
    write.text(at, text, fill=ink, font=font, anchor="mm")


def _sideways(text: str, length: int, thickness: int) -> Image.Image:
    strip = Image.new("RGB", (length, thickness), PAPER)
    _centred(ImageDraw.Draw(strip), text, (length // 2, thickness // 2), length)
    return strip.rotate(90, expand=True)


def side_by_side(pictures: Sequence[tuple[str, Image.Image]], margin: int, height: int = 256) -> Image.Image:
    """Labelled pictures in a row, all of one height, in their own proportions.

    Args:
        pictures: (label, picture), left to right.
        margin: how many of them, at the left, are real; a rule parts them from the others.
        height: pixels.
    """
    gap, label, between = 4, 22, 12
    shown = [
        (
            text,
            picture.convert("RGBA").resize((max(1, round(picture.width * height / picture.height)), height), _LANCZOS),
        )
        for text, picture in pictures
    ]
    width = sum(picture.width + gap for _, picture in shown) - gap + between * (0 < margin < len(shown))
    sheet = Image.new("RGB", (width, label + height), PAPER)
    write = ImageDraw.Draw(sheet)
    x = 0
    for number, (text, picture) in enumerate(shown):
        if number == margin and number:
            x += between
            at = x - (between + gap) // 2
            write.line([(at, label), (at, label + height)], fill=FAINT)
        _centred(write, text, (x + picture.width // 2, label // 2), picture.width)
        sheet.paste(picture, (x, label), picture)
        x += picture.width + gap
    return sheet

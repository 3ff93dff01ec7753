"""Labelled picture grids: source domains down, target domains across, real pictures in the margins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from raystar.base.names import shown
from raystar.config.schema import Config
from raystar.data.bank import Bank
from raystar.model.device import autocast
from raystar.model.networks import Nets, noise
from raystar.pictures.codec import Codec

PAPER, INK, FAINT = (255, 255, 255), (28, 30, 33), (120, 124, 130)
_LANCZOS = Image.Resampling.LANCZOS
_SEED = 7
_CELL, _LABEL, _GAP, _MARGIN = 128, 22, 4, 12  # pixels of a picture, of a label, and between them
_PITCH = _CELL + _GAP


class GridSet(NamedTuple):
    """What every grid of a dataset shows, the same in every trial and epoch.

    N domains: all of them, or the first `visualization.num_samples`.
    """

    sources: Tensor
    """[N,C,H,W] unscaled held-out contents, one a domain."""
    references: Tensor
    """[N,C,H,W] unscaled held-out references, one a domain, other pictures than the sources."""
    noise: Tensor
    """[N,Z], one noise a target domain: that of `visualization.random_noise_seed` for the first, that of the next seed
    for the second, and so on."""
    source_pictures: NDArray[np.uint8]
    reference_pictures: NDArray[np.uint8]


def choose(bank: Bank, config: Config, codec: Codec) -> GridSet:
    """Picks and decodes the grid's real pictures; held-out ones where there are any."""
    rng = np.random.default_rng(_SEED)
    shown = config.visualization
    N = min(len(bank.domains), shown.num_samples or len(bank.domains))
    sources, references = [], []
    for train, held in zip(bank.train[:N], bank.held[:N], strict=True):
        rows = held if len(held) > 1 else train
        picked = rng.permutation(rows)[:2]
        sources.append(picked[0])
        references.append(picked[-1])
    latents = bank.rows(np.array([*sources, *references]))
    pictures = codec.decode(latents)
    seeds = torch.cat([noise(shown.random_noise_seed + k, config.model.latent_dim) for k in range(N)])
    return GridSet(latents[:N], latents[N:], seeds, pictures[:N], pictures[N:])


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
    domains, seed = config.data.domains[:N], config.visualization.random_noise_seed
    return {
        "grid_ref": labelled(cells[0], domains, chosen.source_pictures, chosen.reference_pictures, "reference"),
        "grid_noise": labelled(cells[1], domains, chosen.source_pictures, None, "noise", seed=seed),
    }


def interpolation(
    nets: Nets, config: Config, chosen: GridSet, codec: Codec, seeds: tuple[int, int] = (0, 1), steps: int = 7
) -> Image.Image:
    """One source a row, on its way through a domain's styles: from one noise's style code to another's.

    Rows are target domains; their source is the first domain's, the second's, if it is shown, in the first row.
    """
    device = next(nets.G.parameters()).device
    scale = config.training.latent_scale
    N = len(chosen.sources)
    of = [min(1, N - 1), *[0] * (N - 1)]
    with torch.inference_mode(), autocast(config, device):
        y = torch.arange(N, device=device)
        a, b = (nets.F(noise(seed, config.model.latent_dim).expand(N, -1).to(device), y).float() for seed in seeds)
        styles = torch.lerp(a[:, None], b[:, None], torch.linspace(0, 1, steps, device=device)[:, None])  # [N,steps,S]
        x = (chosen.sources[of].to(device) * scale).repeat_interleave(steps, dim=0)
        fakes = nets.G(x, styles.flatten(0, 1)).float() / scale
    pictures = codec.decode(fakes)
    cells = pictures.reshape(N, steps, *pictures.shape[1:])
    top, left = _LABEL, _LABEL + _CELL + _MARGIN
    sheet = Image.new("RGB", (left + steps * _PITCH, top + N * _PITCH), PAPER)
    write = ImageDraw.Draw(sheet)
    _centred(write, "source", (_LABEL + _CELL // 2, _LABEL // 2), _CELL, FAINT)
    for column, text in enumerate([f"seed {seeds[0]}", *[""] * (steps - 2), f"seed {seeds[1]}"]):
        _centred(write, text, (left + column * _PITCH + _CELL // 2, _LABEL // 2), _CELL, FAINT)
    for row, domain in enumerate(config.data.domains[:N]):
        y_at = top + row * _PITCH
        sheet.paste(_sideways(domain, _CELL, _LABEL), (0, y_at))
        sheet.paste(_picture(chosen.source_pictures[of[row]], _CELL), (_LABEL, y_at))
        for column in range(steps):
            sheet.paste(_picture(cells[row, column], _CELL), (left + column * _PITCH, y_at))
    write.line([(left - _MARGIN // 2, top), (left - _MARGIN // 2, sheet.height)], fill=FAINT)
    return sheet


def labelled(
    cells: NDArray[np.uint8],
    domains: Sequence[str],
    rows: NDArray[np.uint8],
    columns: NDArray[np.uint8] | None,
    path: str,
    cell: int = _CELL,
    seed: int = 0,
) -> Image.Image:
    """A labelled grid.

    Args:
        cells: [N,N,h,w,3], source domains down, target domains across.
        rows: [N,h,w,3] the sources, shown at the left.
        columns: [N,h,w,3] the references, shown at the top; None for noise, whose seeds stand there.
        path: `reference` or `noise`, named in the corner.
        cell: pixels of one picture.
        seed: the first column's; the others' follow.
    """
    N, gap, label, margin = len(domains), _GAP, _LABEL, _MARGIN
    top = label + (cell + margin if columns is not None else label)
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
        else:
            _centred(write, f"seed {seed + i}", (x + cell // 2, label + label // 2 - 4), cell, FAINT)
        for j in range(N):
            sheet.paste(_picture(cells[i, j], cell), (left + j * (cell + gap), y))
    # The corner says how to read it; across the rules, real pictures stand outside.
    if columns is not None:
        for line, text in enumerate(("source, down", f"{path}, across")):
            _centred(write, text, (label + cell // 2, label + cell // 2 - 9 + 18 * line), cell, FAINT)
        write.line([(left, top - margin // 2), (size[0], top - margin // 2)], fill=FAINT)
    else:
        _centred(write, "source", (label + cell // 2, top - label // 2 - 4), cell, FAINT)
    write.line([(left - margin // 2, top), (left - margin // 2, size[1])], fill=FAINT)
    return sheet


def _picture(pixels: NDArray[np.uint8], cell: int) -> Image.Image:
    """A picture in the middle of a square cell, in its own proportions."""
    picture = Image.fromarray(pixels)
    if picture.width == picture.height:
        return picture if picture.width == cell else picture.resize((cell, cell), _LANCZOS)
    shrunk = cell / max(picture.size)
    width, height = (max(1, round(side * shrunk)) for side in picture.size)
    framed = Image.new("RGB", (cell, cell), PAPER)
    framed.paste(picture.resize((width, height), _LANCZOS), ((cell - width) // 2, (cell - height) // 2))
    return framed


def _centred(
    write: ImageDraw.ImageDraw, text: str, at: tuple[int, int], width: int, ink: tuple[int, int, int] = INK
) -> None:
    """Writes `text` around `at`, in the largest size that fits `width`; what is too long even then is cut."""
    text = shown(text).replace("\n", " ")
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
    resized = [
        (
            text,
            picture.convert("RGBA").resize((max(1, round(picture.width * height / picture.height)), height), _LANCZOS),
        )
        for text, picture in pictures
    ]
    width = sum(picture.width + gap for _, picture in resized) - gap + between * (0 < margin < len(resized))
    sheet = Image.new("RGB", (width, label + height), PAPER)
    write = ImageDraw.Draw(sheet)
    x = 0
    for number, (text, picture) in enumerate(resized):
        if number == margin and number:
            x += between
            at = x - (between + gap) // 2
            write.line([(at, label), (at, label + height)], fill=FAINT)
        _centred(write, text, (x + picture.width // 2, label // 2), picture.width)
        sheet.paste(picture, (x, label), picture)
        x += picture.width + gap
    return sheet

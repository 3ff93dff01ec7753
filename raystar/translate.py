"""Pictures in, pictures out: a trained model with its VAE around it; `python -m raystar.translate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from raystar.codec import VaeCodec
from raystar.errors import RaystarError
from raystar.export import Translator
from raystar.pictures import flat, square, upright

CELL = 8
"""Pixels along one side of a latent cell."""

REFERENCE = 256
"""Pixels along a reference's side: styles were learnt from pictures of this size."""

SMALLEST = 64
"""Pixels along the shorter side, below which a picture has too few cells to be normalised."""

_VAE_TILE, _VAE_OVERLAP = 96, 16  # cells: 768 pixels in one piece take a few GiB in a full-sized VAE
_NET_TILE, _NET_OVERLAP = 512, 32  # cells: as much of a picture as memory allows shares its statistics


class PictureTranslator:
    """A model that translates pictures of any size, which keep their size and what is transparent in them.

    The generator sees a picture whole: its normalisation then knows the whole picture, as in training. Only pictures
    beyond 4096 pixels go through it in overlapping tiles. The VAE, whose memory is the narrow place, works in
    overlapping tiles of 768 pixels where a picture is larger.

    Args:
        translator: what `export.load` gives.
        codec: encodes and decodes.
        tile: pixels along the side of the generator's tiles, instead of 4096; 256 is the usual size in training.
    """

    def __init__(self, translator: Translator, codec: VaeCodec, tile: int | None = None) -> None:
        if tile is not None and tile < SMALLEST:
            raise RaystarError(f"tile: expected {SMALLEST} pixels or more, found {tile}")
        self.translator = translator
        self.codec = codec
        self.tile, self.overlap = _NET_TILE, _NET_OVERLAP
        if tile is not None:
            self.tile, self.overlap = tile // CELL, max(1, tile // CELL // 4)

    def translate(
        self,
        pictures: Sequence[Image.Image],
        domain: str,
        reference: Image.Image | None = None,
        seed: int | None = None,
    ) -> list[Image.Image]:
        """Translates pictures into `domain`, in the style of a reference or of a noise.

        Args:
            pictures: of any mode and of any size from 64 pixels on.
            domain: one of the model's.
            reference: a picture of that domain, of which the middle is taken at 256 pixels.
            seed: of the noise that is taken where there is no reference; 0 by default.

        Returns:
            A picture for each, of its (upright) size: RGB, or RGBA where the picture is transparent.

        Raises:
            RaystarError: an unknown domain, a picture that is too small, or both a reference and a seed.
        """
        style = None if reference is None else self.encode_reference(reference)
        made = []
        for picture in pictures:
            picture = upright(picture)
            made.append(self.decode(self.restyle(self.encode(picture), domain, style, seed), picture))
        return made

    def encode(self, picture: Image.Image) -> Tensor:
        """An upright picture -> unscaled latents [1,4,H,W] that cover it, with its edges repeated to whole cells."""
        width, height = picture.size
        if min(width, height) < SMALLEST:
            raise RaystarError(
                f"a picture of {width}x{height} pixels: expected {SMALLEST} or more along each side; enlarge it first"
            )
        pixels = np.asarray(flat(picture))
        pixels = np.pad(pixels, ((0, -height % CELL), (0, -width % CELL), (0, 0)), "edge")

        def piece(y: slice, x: slice) -> Tensor:
            return self.codec.encode(np.ascontiguousarray(pixels[None, _pixels(y), _pixels(x)]))

        return blended(piece, (pixels.shape[0] // CELL, pixels.shape[1] // CELL), _VAE_TILE, _VAE_OVERLAP)

    def encode_reference(self, picture: Image.Image) -> Tensor:
        """A reference of any size -> its unscaled latents [1,4,32,32]."""
        return self.codec.encode(np.asarray(square(flat(upright(picture)), REFERENCE))[None])

    def restyle(self, latents: Tensor, domain: str, reference: Tensor | None, seed: int | None) -> Tensor:
        """`export.Translator.translate` of unscaled latents [1,4,H,W] of any size."""

        def piece(y: slice, x: slice) -> Tensor:
            return self.translator.translate(latents[:, :, y, x], domain, reference, seed)

        return blended(piece, (latents.shape[2], latents.shape[3]), self.tile, self.overlap)

    def decode(self, latents: Tensor, like: Image.Image) -> Image.Image:
        """Unscaled latents [1,4,H,W] -> a picture of the size of `like`, as transparent as that."""

        def piece(y: slice, x: slice) -> Tensor:
            return torch.from_numpy(self.codec.decode(latents[:, :, y, x])).permute(0, 3, 1, 2)

        rgb = blended(piece, (latents.shape[2], latents.shape[3]), _VAE_TILE, _VAE_OVERLAP, CELL)
        pixels: NDArray[np.uint8] = rgb[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
        picture = Image.fromarray(np.ascontiguousarray(pixels[: like.height, : like.width]))
        if like.mode == "RGBA":
            picture.putalpha(like.getchannel("A"))
        return picture


def _pixels(cells: slice) -> slice:
    return slice(cells.start * CELL, cells.stop * CELL)


def blended(
    piece: Callable[[slice, slice], Tensor], cells: tuple[int, int], tile: int, overlap: int, unit: int = 1
) -> Tensor:
    """Has `piece` make something large tile by tile, and fades the tiles into each other where they overlap.

    Args:
        piece: given rows and columns of cells, makes [1,C,rows * unit,columns * unit].
        cells: (rows, columns) of the whole.
        tile: cells along a tile's side; what is not larger is made in one piece.
        overlap: the least that neighbours share.
        unit: what `piece` makes of a cell, along one side.
    """
    rows, columns = _spans(cells[0], tile, overlap), _spans(cells[1], tile, overlap)
    if len(rows) == len(columns) == 1:
        return piece(rows[0], columns[0])
    total, weights = None, torch.zeros(cells[0] * unit, cells[1] * unit)
    down = [_fade(span, cells[0], rows, unit) for span in rows]
    across = [_fade(span, cells[1], columns, unit) for span in columns]
    for y, fade_y in zip(rows, down, strict=True):
        for x, fade_x in zip(columns, across, strict=True):
            made = piece(y, x)
            if total is None:
                total = torch.zeros(1, made.shape[1], *weights.shape)
            weight = fade_y[:, None] * fade_x
            here = (slice(y.start * unit, y.stop * unit), slice(x.start * unit, x.stop * unit))
            total[:, :, *here] += made * weight
            weights[here] += weight
    assert total is not None
    return total.div_(weights)


def _spans(length: int, tile: int, overlap: int) -> list[slice]:
    """Spans of `tile` cells that cover `length`, spread evenly, with at least `overlap` in common."""
    if length <= tile:
        return [slice(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [slice(start, start + tile) for start in starts]


def _fade(span: slice, length: int, spans: list[slice], unit: int) -> Tensor:
    """The weight of a span's places: falling towards its neighbours, over what is shared with them."""
    n = (span.stop - span.start) * unit
    at = torch.arange(n) + 0.5
    weight = torch.ones(n)
    number = spans.index(span)
    if number > 0:
        weight = torch.minimum(weight, at / ((spans[number - 1].stop - span.start) * unit))
    if number + 1 < len(spans):
        weight = torch.minimum(weight, (n - at) / ((span.stop - spans[number + 1].start) * unit))
    return weight

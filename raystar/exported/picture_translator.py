"""Pictures of any size through an exported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from raystar.base.errors import RaystarError
from raystar.exported.model import Translator
from raystar.exported.tiles import blended
from raystar.pictures.autoencoders import VaeCodec
from raystar.pictures.codec import Codec
from raystar.pictures.reading import flat, square, upright

CELL = 8
"""Pixels along one side of a latent cell."""

REFERENCE = 256
"""Pixels along a reference's side: styles were learnt from pictures of this size."""

SMALLEST = 64
"""Pixels along the shorter side, below which a picture has too few cells to be normalised."""

_RIM = 4  # cells

_VAE_TILE, _VAE_OVERLAP = 96, 16  # cells: 768 pixels in one piece take a few GiB in a full-sized VAE
_NET_TILE, _NET_OVERLAP = 512, 32  # cells: as much of a picture as memory allows shares its statistics


class PictureTranslator:
    """A model that translates pictures of any size, which keep their size and what is transparent in them.

    The generator sees a picture whole, since it normalises by the whole picture: in tiles, each of them gets the
    colours and contrasts of a picture of its own, and a calm sky becomes patches. Only pictures beyond 4096 pixels go
    through it in overlapping tiles. The VAE, whose memory is the narrow place, works in overlapping tiles of 768
    pixels where a picture is larger.

    Args:
        translator: what `exported.model.load` gives.
        codec: a `VaeCodec` encodes and decodes; another one serves who has latents alone.
        tile: pixels along the side of the generator's tiles, instead of 4096; 256 is the usual size in training.
    """

    def __init__(self, translator: Translator, codec: Codec, tile: int | None = None) -> None:
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
            RaystarError: an unknown domain, both a reference and a seed, or a codec that does not encode.
            ValueError: a picture that is too small, or cannot be read.
        """
        style = None if reference is None else self.encode_reference(reference)
        translations = []
        for picture in pictures:
            picture = upright(picture)
            translations.append(self.decode(self.restyle(self.encode(picture), domain, style, seed), picture))
        return translations

    def encode(self, picture: Image.Image) -> Tensor:
        """An upright picture -> unscaled latents [1,4,H,W] that cover it, with its edges repeated to whole cells."""
        encode = self._encoder()
        width, height = picture.size
        if min(width, height) < SMALLEST:
            raise ValueError(f"{width}x{height} pixels are too few: {SMALLEST} or more are needed along each side")
        pixels = np.asarray(flat(picture))
        pixels = np.pad(pixels, ((0, -height % CELL), (0, -width % CELL), (0, 0)), "edge")

        def piece(y: slice, x: slice) -> Tensor:
            return encode(np.ascontiguousarray(pixels[None, _pixels(y), _pixels(x)]))

        return blended(piece, (pixels.shape[0] // CELL, pixels.shape[1] // CELL), _VAE_TILE, _VAE_OVERLAP)

    def encode_reference(self, picture: Image.Image) -> Tensor:
        """A reference of any size -> its unscaled latents [1,4,32,32]."""
        return self._encoder()(np.asarray(square(flat(upright(picture)), REFERENCE))[None])

    def _encoder(self) -> Callable[[NDArray[np.uint8]], Tensor]:
        if not isinstance(self.codec, VaeCodec):
            raise RaystarError(f"codec '{self.codec.name}' decodes alone; pictures need an autoencoder (--vae)")
        return self.codec.encode

    def restyle(self, latents: Tensor, domain: str, reference: Tensor | None, seed: int | None) -> Tensor:
        """`exported.model.Translator.translate` of unscaled latents [1,4,H,W] of any size from 8 cells on.

        They go in with a mirrored rim, which is cut off again: the generator pads with zeros, and each of its
        convolutions draws them further into the picture, as a dull frame.
        """
        padded = functional.pad(latents, (_RIM,) * 4, "reflect")

        def piece(y: slice, x: slice) -> Tensor:
            return self.translator.translate(padded[:, :, y, x], domain, reference, seed)

        restyled = blended(piece, (padded.shape[2], padded.shape[3]), self.tile + 2 * _RIM, self.overlap)
        return restyled[:, :, _RIM:-_RIM, _RIM:-_RIM].contiguous()

    def decode(self, latents: Tensor, like: Image.Image | None = None) -> Image.Image:
        """Unscaled latents [1,4,H,W] -> a picture; of the size of `like`, and as transparent, where that is given."""

        def piece(y: slice, x: slice) -> Tensor:
            return torch.from_numpy(self.codec.decode(latents[:, :, y, x])).permute(0, 3, 1, 2)

        cells = (latents.shape[2], latents.shape[3])
        # Only an autoencoder's memory is narrow, and only its cells are known to be 8 pixels wide.
        tile = _VAE_TILE if isinstance(self.codec, VaeCodec) else max(cells)
        rgb = blended(piece, cells, tile, _VAE_OVERLAP, CELL)
        pixels: NDArray[np.uint8] = rgb[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        if like is not None:
            picture = picture.crop((0, 0, *like.size))
            if like.mode == "RGBA":
                picture.putalpha(like.getchannel("A"))
        return picture


def _pixels(cells: slice) -> slice:
    return slice(cells.start * CELL, cells.stop * CELL)

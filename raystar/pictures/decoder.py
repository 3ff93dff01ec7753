"""The built-in decoder: a small convolutional network that turns SD1.5 latents into pictures, with no download.

Most of its work is done at the latents' own size and twice that; pixel shuffles make the rest of the way. It is
distilled from an autoencoder's decoder by `raystar.distill`, and ships as `decoder.safetensors` (fp16).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from raystar.base import torch_file as pt
from raystar.base.errors import RaystarError
from raystar.base.files import is_file

PACKAGED = Path(__file__).with_name("decoder.safetensors")
"""The decoder that ships with the package, distilled from TAESD (MIT)."""

FORMAT = "raystar-decoder-1"
WIDTHS, BLOCKS = (64, 32, 16), (2, 1, 1)
_LARGEST = 512
_LIMIT = 3.0


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(functional.relu(self.first(x))))


class Decoder(nn.Module):
    """Scaled latents to pictures.

    Args:
        widths: channels at the latent's size, at twice and at four times that.
        blocks: residual blocks of each.
    """

    def __init__(self, widths: tuple[int, int, int] = WIDTHS, blocks: tuple[int, int, int] = BLOCKS) -> None:
        super().__init__()
        self.widths, self.blocks = widths, blocks
        self.enter = nn.Conv2d(4, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(_Block(width) for _ in range(count))) for width, count in zip(widths, blocks, strict=True)
        )
        self.grow = nn.ModuleList(
            [nn.Conv2d(widths[0], 4 * widths[1], 1), nn.Conv2d(widths[1], 4 * widths[2], 1)]
        )  # fmt: skip
        self.leave = nn.Conv2d(widths[2], 12, 3, padding=1)

    def forward(self, scaled: Tensor) -> Tensor:
        """[B,4,H,W] scaled latents -> [B,3,8H,8W], a picture in [-1,1] but for overshoots."""
        return functional.pixel_shuffle(self.leave(self._inner(scaled)), 2)

    def half_size(self, scaled: Tensor) -> Tensor:
        """[B,4,H,W] scaled latents -> [B,3,4H,4W]: each pixel the mean of 2x2 of `forward`'s, at two thirds the cost.

        The last convolution's four outputs for a pixel are averaged in its weights, which comes to the same.
        """
        weight, bias = (value.unflatten(0, (3, 4)).mean(dim=1) for value in (self.leave.weight, self._leave_bias))
        return functional.conv2d(self._inner(scaled), weight, bias, padding=1)

    @property
    def _leave_bias(self) -> Tensor:
        assert self.leave.bias is not None
        return self.leave.bias

    def _inner(self, scaled: Tensor) -> Tensor:
        """All but the last convolution: [B,4,H,W] -> [B,widths[2],4H,4W]."""
        # As TAESD does: a latent far off, from a generator that has just begun, is no reason for glaring colours.
        x = functional.relu(self.enter(torch.tanh(scaled / _LIMIT) * _LIMIT))
        x = self.levels[0](x)
        for grow, level in zip(self.grow, self.levels[1:], strict=True):
            x = level(functional.pixel_shuffle(grow(x), 2))
        return x


def save(decoder: Decoder, path: Path, facts: Mapping[str, str]) -> None:
    """Writes a decoder as fp16 safetensors, whole or not at all.

    Args:
        path: a `.safetensors` file; one that is there is replaced.
        facts: what else its header says, for example of its teacher.
    """
    shape = json.dumps({"widths": decoder.widths, "blocks": decoder.blocks})
    tensors = {name: value.half().contiguous() for name, value in decoder.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={**facts, "format": FORMAT, "shape": shape})
    part.chmod(0o644)  # save_file makes files that only their owner can read
    part.replace(path)


def load(path: Path = PACKAGED) -> Decoder:
    """Reads what `save` wrote; float32, gradients off.

    Raises:
        RaystarError: the file is missing or damaged, or holds something else.
    """
    if not is_file(path):
        raise RaystarError(f"{path}: expected a decoder (.safetensors, by python -m raystar.distill), found no file")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
    # A damaged file can make the reader raise nearly anything, and all of it means the same.
    except Exception as error:
        raise RaystarError(f"{path}: truncated or damaged ({pt.reason(error)})") from None
    if facts.get("format") != FORMAT:
        raise RaystarError(
            f"{path}: expected a decoder that python -m raystar.distill wrote (format {FORMAT}), "
            f"found {facts.get('format', 'another kind of file')}"
        )
    try:
        shape = json.loads(facts["shape"])
        widths, blocks = _three(shape["widths"], 1, _LARGEST), _three(shape["blocks"], 0, 64)
    except (KeyError, TypeError, ValueError) as error:
        raise RaystarError(f"{path}: its header does not say the decoder's shape ({pt.reason(error)})") from None
    with torch.device("meta"):
        decoder = Decoder(widths, blocks)
    shapes = {name: value.shape for name, value in decoder.state_dict().items()}
    if {name: value.shape for name, value in tensors.items()} != shapes:
        raise RaystarError(f"{path}: its weights do not fit the shape in its header; is it whole?")
    if not all(value.is_floating_point() and bool(value.isfinite().all()) for value in tensors.values()):
        raise RaystarError(f"{path}: expected finite weights, found NaN or infinite ones")
    decoder.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return decoder.eval().requires_grad_(False)


def _three(values: object, least: int, most: int) -> tuple[int, int, int]:
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(type(value) is int and least <= value <= most for value in values)
    ):
        raise ValueError(f"expected three whole numbers from {least} to {most}")
    return values[0], values[1], values[2]

"""An autoencoder whose latents and pictures are known by hand, in place of a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GAIN = 3.0
"""Of a colour around middle grey to a scaled latent: about as wide as those of Stable Diffusion 1.5's VAE."""

SCALE = 0.18215


def block_averages() -> Any:
    """A diffusers AutoencoderTiny that keeps the mean colour of every 8x8 pixels, one colour a channel.

    A trained autoencoder keeps what a picture shows; so does this one, if less sharply, and what it makes of a picture
    can be calculated (`latents_of`, `pictures_of`). Its fourth channel is always zero.
    """
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # every block adds nothing to what it is given
        inward, outward = (
            [layer for layer in half.layers if isinstance(layer, torch.nn.Conv2d)]
            for half in (model.encoder, model.decoder)
        )
        for layer in inward + outward:
            for colour in range(3):
                if layer.stride == (2, 2):
                    layer.weight[colour, colour, 1:, 1:] = 0.25
                else:
                    layer.weight[colour, colour, 1, 1] = 1
        leave, enter = inward[-1], outward[0]
        leave.weight.mul_(GAIN)
        leave.bias[:3] = -GAIN / 2
        enter.weight.div_(GAIN)
        enter.bias[:3] = 0.5
    return model.eval()


def save_block_averages(folder: Path) -> Path:
    """The same as a folder that raystar, or diffusers, loads; returns `folder`."""
    block_averages().save_pretrained(folder)
    return folder


def latents_of(pictures: NDArray[np.uint8]) -> Tensor:
    """By hand, the unscaled latents [B,4,h/8,w/8] of pictures [B,h,w,3]."""
    B, h, w, _ = pictures.shape
    means = pictures.reshape(B, h // 8, 8, w // 8, 8, 3).astype(np.float64).mean((2, 4)) / 255
    latents = np.zeros((B, 4, h // 8, w // 8))
    latents[:, :3] = GAIN * (means - 0.5).transpose(0, 3, 1, 2) / SCALE
    return torch.from_numpy(latents).float()


def pictures_of(latents: Tensor) -> NDArray[np.float64]:
    """By hand, the pictures [B,h,w,3] in [0,255] of unscaled latents [B,4,h/8,w/8]."""
    held = 3 * np.tanh(latents[:, :3].double().numpy() * SCALE / 3)  # an AutoencoderTiny keeps its latents within 3
    colours = np.clip(held / GAIN + 0.5, 0, 1) * 255
    return colours.transpose(0, 2, 3, 1).repeat(8, 1).repeat(8, 2)

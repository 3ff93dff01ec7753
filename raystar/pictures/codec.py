"""Latents to pictures: AutoencoderKL, AutoencoderTiny, or a built-in decoder that needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from raystar.base.errors import RaystarError
from raystar.base.files import is_file
from raystar.config.schema import Config
from raystar.pictures import decoder as decoders
from raystar.pictures.autoencoders import (
    CHANNELS,
    SCALE,
    VAE_KEY,
    VaeCodec,
    check_vae,
    load_autoencoder,
    no_folder,
    quiet,
    to_bytes,
)
from raystar.pictures.decoder import Decoder

BUILT_IN = "raystar"
"""`Codec.name` of the decoder that ships with the package."""

# RGB in [-1, 1] of a scaled latent's four channels: a least-squares fit over pictures and their SD1.5 latents.
_PREVIEW_RGB = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
)


class Codec(Protocol):
    """Decodes unscaled latents."""

    name: str
    """What the pictures were decoded with, for labels and tags."""

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Unscaled latents [B,4,H,W] -> RGB pictures [B,h,w,3], uint8; an autoencoder's have h = 8H, w = 8W."""


class PreviewCodec:
    """A linear map from the four channels to RGB, enlarged: what every decoder must be better than."""

    name = "preview"
    pixels = 4
    """Along one side of a latent cell; there is nothing to see in more."""

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """See `Codec.decode`."""
        matrix = torch.tensor(_PREVIEW_RGB, device=latents.device)
        rgb = torch.einsum("bchw,cr->brhw", latents.float() * SCALE, matrix)
        rgb = functional.interpolate(rgb, scale_factor=self.pixels, mode="bicubic", align_corners=False)
        return to_bytes(rgb)


class BuiltInCodec:
    """The decoder that ships with raystar, or another one that `raystar.distill` made: crisp, and needs no download."""

    def __init__(self, model: Decoder, name: str, device: torch.device | str = "cpu", batch_size: int = 8) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs forget it
        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """See `Codec.decode`."""
        pictures = []
        for chunk in latents.to(self.device, torch.float32).split(self.batch_size):
            # In the caller's autocast, pictures would be bf16's.
            with torch.autocast(self.device.type, enabled=False):
                rgb = self.model((chunk * SCALE).contiguous(memory_format=torch.channels_last))
            pictures.append(to_bytes(rgb))
        return np.concatenate(pictures)


def check_codec(config: Config) -> None:
    """Refuses a folder, file or hub name that holds no codec for the configuration's latents, before anything starts.

    A hub that is away is left to `open_codec`.

    Raises:
        RaystarError: there is no model, or one of another kind or for other latents; the file is no decoder.
    """
    name = config.visualization.vae_model_name_or_path
    if name is None:
        return
    path = Path(name).expanduser()
    if is_file(path) or path.suffix == ".safetensors":
        _decoder_file(path, config)
    else:
        check_vae(name, VAE_KEY, config.visualization.vae_subfolder, config.model.latent_channels)


def _decoder_file(path: Path, config: Config) -> Decoder:
    if path.suffix != ".safetensors":
        raise RaystarError(
            f"{VAE_KEY}: {path}: expected a model's folder, or a decoder's .safetensors "
            "file (python -m raystar.distill makes one)"
        )
    if config.model.latent_channels != CHANNELS:
        raise RaystarError(
            f"{VAE_KEY}: {path}: expected an AutoencoderKL of {config.model.latent_channels} channels "
            f"(model.latent_channels), found a decoder's file, which takes {CHANNELS}"
        )
    try:
        return decoders.load(path)
    except RaystarError as error:
        raise RaystarError(f"{VAE_KEY}: {error}") from None


def open_codec(config: Config, device: torch.device | str = "cpu") -> tuple[Codec | None, str | None]:
    """The codec of `config.visualization`.

    Returns:
        The codec and, where the one asked for cannot be had (no network, no diffusers, not in the cache), the
        one line that says so: the built-in decoder takes its place, as it does where none is asked for. Latents of
        another number of channels than 4 it cannot take: then there is no codec, and the line says that.

    Raises:
        RaystarError: see `check_codec`.
    """
    check_codec(config)
    name, channels = config.visualization.vae_model_name_or_path, config.model.latent_channels
    if name is None:
        return _built_in(channels, device, None)
    path = Path(name).expanduser()
    if is_file(path):
        return BuiltInCodec(_decoder_file(path, config), path.stem, device), None
    with quiet(config.visualization.suppress_hf_warnings):
        try:
            model = load_autoencoder(name, config.visualization.vae_subfolder, channels)
            return VaeCodec(model, path.name, torch.device(device)), None
        except RaystarError:
            raise
        # Everything a hub, a cache and a model file can raise; none of it may cost a trial, only its pictures.
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return _built_in(channels, device, f"{name} cannot be loaded ({reason[:160]}{no_folder(name)})")


def need_codec(config: Config, device: torch.device | str = "cpu") -> tuple[Codec, str | None]:
    """As `open_codec`, for who cannot go without.

    Raises:
        RaystarError: see `check_codec`; or there is no codec for the configuration's latents.
    """
    codec, note = open_codec(config, device)
    if codec is None:
        raise RaystarError(str(note))
    return codec, note


def _built_in(channels: int, device: torch.device | str, note: str | None) -> tuple[Codec | None, str | None]:
    """The built-in decoder where it takes the latents, and what is to be said of it after `note`."""
    if channels == CHANNELS:
        return (
            BuiltInCodec(decoders.load(), BUILT_IN, device),
            f"{note}; pictures use the built-in decoder" if note is not None else None,
        )
    remark = (
        f"no pictures: model.latent_channels is {channels}, and the built-in decoder takes {CHANNELS}; {VAE_KEY} names "
        f"an AutoencoderKL of {channels}"
    )
    return None, f"{note}; {remark}" if note is not None else remark

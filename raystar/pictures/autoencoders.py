"""Diffusers' autoencoders, from a folder or the hub."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base.errors import RaystarError, show
from raystar.base.files import is_file, looked_for
from raystar.config.strict_yaml import read_mapping
from raystar.model.device import out_of_memory

SCALE = 0.18215
"""SD1.5's scaling factor: scaled latent = unscaled latent * SCALE. Fixed, unlike `training.latent_scale`."""

DEFAULT_VAE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Hub name of the model whose VAE the latents are meant for."""

VAE_KEY = "visualization.vae_model_name_or_path"
SUBFOLDER = "vae"
"""Where the VAE lies in a whole model, as diffusers lays it out."""
KINDS = ("AutoencoderKL", "AutoencoderTiny")
CHANNELS = 4
"""Of SD1.5's latents, the only ones whose pictures raystar's own decoder and ruler know."""
_ENLARGES = 8
_HUB_TIMEOUT_S = 10
_VARIANTS = (None, "fp16", "bf16")
"""Of a model's weights, in the order in which they are taken: the plain ones, else such as are stored in half."""


class VaeCodec:
    """A diffusers autoencoder. AutoencoderTiny speaks scaled latents, AutoencoderKL unscaled ones."""

    def __init__(
        self,
        model: Any,
        name: str,
        device: torch.device,
        batch_size: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model.eval().requires_grad_(False).to(device)
        if dtype != torch.float32:
            with quiet(True):  # diffusers warns of networks that must stay in float32, and these need not
                self.model.to(dtype)
        self.name = name
        self.device = device
        self.batch_size = batch_size
        self.dtype = dtype
        self.takes_scaled = type(model).__name__ == "AutoencoderTiny"

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """See `Codec.decode`."""
        latents, pictures, done = latents.to(self.device, torch.float32), [], 0
        while done < len(latents):
            chunk = latents[done : done + self.batch_size]
            try:
                rgb = self.model.decode((chunk * SCALE if self.takes_scaled else chunk).to(self.dtype)).sample
            except RuntimeError as error:
                if len(chunk) == 1 or not out_of_memory(error):
                    raise
                self.batch_size = len(chunk) // 2  # beside a training there may be room for fewer
                continue
            pictures.append(to_bytes(rgb))
            done += len(chunk)
        return np.concatenate(pictures)

    @torch.no_grad()
    def encode(self, pictures: NDArray[np.uint8]) -> Tensor:
        """The way back: RGB pictures [B,h,w,3], uint8 -> unscaled latents [B,4,h/8,w/8], float32, on the CPU.

        h and w are divisible by 8. An AutoencoderKL's latent is the mean of its posterior.
        """
        latents = []
        for chunk in torch.tensor(pictures).split(self.batch_size):
            rgb = chunk.to(self.device).permute(0, 3, 1, 2).float() / 255 * 2 - 1
            encoded = self.model.encode(rgb.to(self.dtype))
            latents.append(encoded.latents.float() / SCALE if self.takes_scaled else encoded.latent_dist.mean.float())
        return torch.cat(latents).cpu()


def to_bytes(rgb: Tensor) -> NDArray[np.uint8]:
    """[B,3,h,w] in [-1,1] -> [B,h,w,3] uint8."""
    grey_levels = ((rgb.float().clamp(-1, 1) + 1) * 127.5).round()
    return grey_levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def check_vae(name: str, key: str, subfolder: str | None = SUBFOLDER, channels: int = CHANNELS) -> None:
    """Refuses a model that is not there or does not fit, as far as that can be known before it is loaded.

    Of a hub name the model's `config.json` is looked at, in the cache or on the hub; a hub that is away is left to
    `load_autoencoder`.

    Args:
        key: what an error calls the name.
        subfolder: where in the folder the model may lie, if not in the folder itself; None for nowhere else.
        channels: of the latents that it is for.

    Raises:
        RaystarError: the folder is not there or holds no autoencoder; or it is a file; or its latents are others.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _model_folder(path, key, subfolder, channels)
    elif is_file(path):
        raise RaystarError(f"{key}: {path}: expected a hub name (owner/model) or a model's folder, found a file")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise RaystarError(
            f"{key}: {name}: expected a hub name (owner/model) or a model's folder; the folder is not there"
            f"{looked_for(path)}"
        )
    else:
        with contextlib.suppress(OSError, ValueError, ImportError), quiet(True):
            cached = _cached_folder(name, subfolder)
            folder = cached if cached is not None else _on_the_hub(name, subfolder)[1]
            _check_fit(read_mapping(folder / "config.json"), f"{key}: {name}", channels)


def _check_fit(config: Mapping[str, Any], where: str, channels: int) -> None:
    """Refuses an autoencoder of other latents than those of `channels`, by its `config.json`.

    Of four channels these are SD1.5's: with another VAE's factor or shift, what the networks see has another size, and
    neither the built-in decoder nor the ruler makes pictures of it. Of another number only an AutoencoderKL is known to
    take them as they are: an AutoencoderTiny takes scaled ones, and does not say by what.

    Raises:
        RaystarError: what was found.
    """
    kind, has = config.get("_class_name"), config.get("latent_channels", CHANNELS)
    # Each level but one halves; what the file leaves out is diffusers' default.
    key, default = ("block_out_channels", 1) if kind == "AutoencoderKL" else ("encoder_block_out_channels", 4)
    enlarges = 2 ** (len(config[key]) - 1 if isinstance(config.get(key), list) else default - 1)
    found = [f"{show(has)} channels"] if has != channels else []
    found += [f"pictures {show(enlarges)} times as large"] if enlarges != _ENLARGES else []
    if channels != CHANNELS:
        found += [f"an {kind}"] if kind != "AutoencoderKL" else []
        wanted = f"an AutoencoderKL of {channels} channels (model.latent_channels)"
        take = "take the one that the latents are of"
    else:
        factor, shift = config.get("scaling_factor", SCALE), config.get("shift_factor")
        fits = isinstance(factor, int | float) and math.isclose(factor, SCALE, rel_tol=1e-3)
        if kind == "AutoencoderKL" and not fits:
            found.append(f"scaling_factor {show(factor)}")
        found += [f"shift_factor {show(shift)}"] if shift else []
        wanted = f"an autoencoder of Stable Diffusion 1.5's latents, of {CHANNELS} channels and scaling_factor {SCALE}"
        take = "take Stable Diffusion 1.5's or another for its latents"
    if found:
        raise RaystarError(
            f"{where}: expected {wanted}, whose pictures are {_ENLARGES} times as large, found {', '.join(found)}; "
            f"{take}"
        )


def _places(subfolder: str | None) -> list[str]:
    """Folders of a model in which its autoencoder may lie, `""` for the model's own."""
    return list(dict.fromkeys(["", (subfolder or "").strip("/")]))


def _model_folder(folder: Path, key: str, subfolder: str | None, channels: int) -> Path:
    """The folder itself or its subfolder (of a whole Stable Diffusion model); checked to hold an autoencoder that fits.

    Raises:
        RaystarError: see `check_vae`.
    """
    for candidate in (folder / place for place in _places(subfolder)):
        if (candidate / "config.json").is_file():
            config = read_mapping(candidate / "config.json")
            if config.get("_class_name") not in KINDS:
                found = config.get("_class_name")
                raise RaystarError(f"{candidate}/config.json: expected {' or '.join(KINDS)}, found {found!r}")
            _check_fit(config, f"{key}: {candidate}/config.json", channels)
            return candidate
    where = "".join(f" or in its {place}/ folder" for place in _places(subfolder) if place)
    raise RaystarError(f"{key}: {folder}: expected config.json in it{where}{looked_for(folder)}")


def open_vae(
    name: str,
    device: torch.device | str = "cpu",
    key: str = "--vae",
    subfolder: str | None = SUBFOLDER,
    channels: int = CHANNELS,
) -> VaeCodec:
    """An autoencoder that must be had, since nothing else can encode pictures.

    Args:
        name: hub name or folder of an AutoencoderKL or AutoencoderTiny.
        key: what an error calls the name.
        subfolder: where it lies there, if not at the top.
        channels: of the latents that it is for.

    Raises:
        RaystarError: it is not there, of another kind or for other latents, damaged, or the hub does not answer.
    """
    check_vae(name, key, subfolder, channels)
    with quiet(True):
        try:
            return VaeCodec(load_autoencoder(name, subfolder, channels, key), Path(name).name, torch.device(device))
        except RaystarError:
            raise
        # As in open_codec: everything a hub, a cache and a model file can raise.
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise RaystarError(
        f"{key} {name}: cannot be loaded ({reason[:160]}{no_folder(name)}); pictures need the VAE of Stable Diffusion "
        "1.5: give the folder of an AutoencoderKL or AutoencoderTiny, of a whole model with vae/ in it, or a hub name "
        "(owner/model)"
    )


def no_folder(name: str) -> str:
    """For a message about a name that could not be had from the hub: that it is no folder either; else nothing."""
    return "" if Path(name).expanduser().is_dir() else f"; there is no folder {os.path.abspath(name)} either"


def load_autoencoder(name: str, subfolder: str | None = SUBFOLDER, channels: int = CHANNELS, key: str = VAE_KEY) -> Any:
    """An AutoencoderKL or AutoencoderTiny of a folder, the hub's local cache or the hub; raises what diffusers raises.

    Only for what the cache does not have is the hub asked, and one that is away is asked once. Weights that are stored
    in half precision alone (`*.fp16.safetensors`) are taken as well, and computed with in float32.

    Raises:
        RaystarError: see `check_vae`.
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(_HUB_TIMEOUT_S))
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(_HUB_TIMEOUT_S))
    import diffusers

    path = Path(name).expanduser()
    if path.is_dir():
        folder = _model_folder(path, key, subfolder, channels)
    else:
        folder = _cached_folder(name, subfolder) or _fetched(name, subfolder, f"{key}: {name}", channels)
    config = read_mapping(folder / "config.json")
    _check_fit(config, f"{key}: {name}", channels)
    variant = next((v for v in _VARIANTS if any((folder / file).is_file() for file in _weights(v))), None)
    # low_cpu_mem_usage needs another package and warns without it.
    options: dict[str, Any] = {"low_cpu_mem_usage": False, "torch_dtype": torch.float32, "variant": variant}
    return getattr(diffusers, str(config["_class_name"])).from_pretrained(str(folder), local_files_only=True, **options)


def _weights(variant: str | None) -> list[str]:
    """Files of a model's weights, either of which will do."""
    inserted = f".{variant}" if variant is not None else ""
    return [f"diffusion_pytorch_model{inserted}.{suffix}" for suffix in ("safetensors", "bin")]


def _cached_folder(name: str, subfolder: str | None) -> Path | None:
    """Where the hub's local cache holds an autoencoder of the repository with its weights; None if it does not."""
    from huggingface_hub import try_to_load_from_cache

    for place in _places(subfolder):
        config = try_to_load_from_cache(name, f"{place}/config.json".lstrip("/"))
        if isinstance(config, str) and read_mapping(config).get("_class_name") in KINDS:
            folder = Path(config).parent
            if any((folder / file).is_file() for variant in _VARIANTS for file in _weights(variant)):
                return folder
    return None


def _fetched(name: str, subfolder: str | None, where: str, channels: int) -> Path:
    """Where the hub's local cache holds an autoencoder that the hub has just given; raises as `_on_the_hub`."""
    place, folder = _on_the_hub(name, subfolder)
    _check_fit(read_mapping(folder / "config.json"), where, channels)  # before its weights are waited for
    for variant in _VARIANTS:
        for file in _weights(variant):
            if _hub_file(name, f"{place}/{file}".lstrip("/")) is not None:
                return folder
    raise ValueError(f"no weights in it: {' or '.join(_weights(None))}")


def _on_the_hub(name: str, subfolder: str | None) -> tuple[str, Path]:
    """Where in the hub's repository the autoencoder lies (`""` or `subfolder`), and where its `config.json` is now.

    Raises:
        OSError: the hub does not answer, refuses, or may not be asked.
        ValueError: the repository holds none.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("not in the cache, and HF_HUB_OFFLINE is set")
    for place in _places(subfolder):
        file = _hub_file(name, f"{place}/config.json".lstrip("/"))
        if file is not None and read_mapping(file).get("_class_name") in KINDS:
            return place, Path(file).parent
    raise ValueError(f"no {' or '.join(KINDS)} in it")


def _hub_file(name: str, file: str) -> str | None:
    """A file of a hub repository; None if the repository has no such file.

    Raises:
        OSError: the hub does not answer, or refuses.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        # Asked once: a download would try a hub that cannot be reached for most of a minute.
        get_hf_file_metadata(hf_hub_url(name, file), timeout=_HUB_TIMEOUT_S)
        return str(hf_hub_download(name, file, etag_timeout=_HUB_TIMEOUT_S))
    except LocalEntryNotFoundError as error:
        raise OSError(str(error)) from None
    except EntryNotFoundError:
        return None
    except OSError:
        raise
    # The HTTP library's own kinds, which change with it.
    except Exception as error:
        raise OSError(f"not in the cache, and the hub cannot be reached: {error}") from None


@contextlib.contextmanager
def quiet(suppress: bool) -> Iterator[None]:
    """Silences what model libraries print while they load; errors still come as exceptions."""
    if not suppress:
        yield
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    loggers = [logging.getLogger(name) for name in ("diffusers", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(open(os.devnull, "w")):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

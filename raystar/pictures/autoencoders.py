"""Diffusers' autoencoders, from a folder or the hub."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base.errors import RaystarError
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
_HUB_TIMEOUT_S = 10
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


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


def check_vae(name: str, key: str, subfolder: str | None = SUBFOLDER) -> None:
    """Refuses a folder without a model; a hub name is left to `load_autoencoder`.

    Args:
        key: what an error calls the name.
        subfolder: where in the folder the model may lie, if not in the folder itself; None for nowhere else.

    Raises:
        RaystarError: the folder is not there or holds no autoencoder; or it is a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _model_folder(path, key, subfolder)
    elif is_file(path):
        raise RaystarError(f"{key}: {path}: expected a hub name (owner/model) or a model's folder, found a file")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise RaystarError(
            f"{key}: {name}: expected a hub name (owner/model) or a model's folder; the folder is not there"
            f"{looked_for(path)}"
        )


def _places(subfolder: str | None) -> list[str]:
    """Folders of a model in which its autoencoder may lie, `""` for the model's own."""
    return list(dict.fromkeys(["", (subfolder or "").strip("/")]))


def _model_folder(folder: Path, key: str, subfolder: str | None) -> Path:
    """The folder itself or its subfolder (of a whole Stable Diffusion model); checked to hold a known autoencoder."""
    for candidate in (folder / place for place in _places(subfolder)):
        if (candidate / "config.json").is_file():
            kind = read_mapping(candidate / "config.json").get("_class_name")
            if kind not in KINDS:
                raise RaystarError(f"{candidate}/config.json: expected {' or '.join(KINDS)}, found {kind!r}")
            return candidate
    where = "".join(f" or in its {place}/ folder" for place in _places(subfolder) if place)
    raise RaystarError(f"{key}: {folder}: expected config.json in it{where}{looked_for(folder)}")


def open_vae(
    name: str, device: torch.device | str = "cpu", key: str = "--vae", subfolder: str | None = SUBFOLDER
) -> VaeCodec:
    """An autoencoder that must be had, since nothing else can encode pictures.

    Args:
        name: hub name or folder of an AutoencoderKL or AutoencoderTiny.
        key: what an error calls the name.
        subfolder: where it lies there, if not at the top.

    Raises:
        RaystarError: it is not there, of another kind, damaged, or the hub does not answer.
    """
    check_vae(name, key, subfolder)
    with quiet(True):
        try:
            return VaeCodec(load_autoencoder(name, subfolder), Path(name).name, torch.device(device))
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


def load_autoencoder(name: str, subfolder: str | None = SUBFOLDER) -> Any:
    """An AutoencoderKL or AutoencoderTiny of a folder, the hub's local cache or the hub; raises what diffusers raises.

    Only for what the cache does not have is the hub asked, and one that is away is asked once.
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(_HUB_TIMEOUT_S))
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(_HUB_TIMEOUT_S))
    import diffusers

    # low_cpu_mem_usage needs another package and warns without it.
    options: dict[str, Any] = {"low_cpu_mem_usage": False, "torch_dtype": torch.float32}
    path = Path(name).expanduser()
    folder = _model_folder(path, VAE_KEY, subfolder) if path.is_dir() else _cached_folder(name, subfolder)
    if folder is not None:
        kind = _kind(folder / "config.json")
        return getattr(diffusers, kind).from_pretrained(str(folder), local_files_only=True, **options)
    place, kind = _hub_kind(name, subfolder)
    return getattr(diffusers, kind).from_pretrained(name, subfolder=place, **options)


def _kind(config: str | Path) -> str:
    return str(read_mapping(config).get("_class_name"))


def _cached_folder(name: str, subfolder: str | None) -> Path | None:
    """Where the hub's local cache holds an autoencoder of the repository with its weights; None if it does not."""
    from huggingface_hub import try_to_load_from_cache

    for place in _places(subfolder):
        config = try_to_load_from_cache(name, f"{place}/config.json".lstrip("/"))
        if isinstance(config, str) and _kind(config) in KINDS:
            folder = Path(config).parent
            if any((folder / weights).is_file() for weights in _WEIGHTS):
                return folder
    return None


def _hub_kind(name: str, subfolder: str | None) -> tuple[str, str]:
    """Where in the hub's repository the autoencoder lies (`""` or `subfolder`) and of which kind it is.

    Raises:
        OSError: the hub does not answer, refuses, or may not be asked.
        ValueError: the repository holds none.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("not in the cache, and HF_HUB_OFFLINE is set")
    for place in _places(subfolder):
        file = _hub_file(name, f"{place}/config.json".lstrip("/"))
        if file is not None and (kind := _kind(file)) in KINDS:
            return place, kind
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

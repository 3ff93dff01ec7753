"""An exported model: its folder, written and loaded again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from raystar.base import torch_file as pt
from raystar.base.errors import RaystarError, nearest
from raystar.base.files import is_file
from raystar.base.names import as_text, composed
from raystar.config.load import load_config, to_yaml
from raystar.config.schema import Config
from raystar.config.strict_yaml import read_mapping
from raystar.exported import onnx as graphs
from raystar.exported.model_card import card
from raystar.model import checkpoint as checkpoints
from raystar.model.networks import NAMES, Nets, noise
from raystar.model.users import config_of

WEIGHTS, CONFIG, METRICS, README = "model.safetensors", "config.yaml", "metrics.json", "README.md"
GRID, INTERPOLATION = "grid.png", "interpolation.png"


class Translator:
    """A trained model, ready to translate; float32, gradients off."""

    def __init__(self, nets: Nets, config: Config, device: torch.device) -> None:
        self.nets = nets.to(device)
        self.config = config
        self.device = device
        self.domains = config.data.domains
        for _, net in self.nets.items():
            net.eval().requires_grad_(False)

    def translate(
        self, latents: Tensor, domain: str, reference: Tensor | None = None, seed: int | None = None
    ) -> Tensor:
        """Translates latents into `domain`, in the style of a reference or of a noise.

        Args:
            latents: [B,4,H,W], unscaled.
            domain: one of `domains`.
            reference: [4,H,W], [1,4,H,W] or [B,4,H,W] unscaled latents of that domain, whose style is taken.
            seed: of the noise that is taken where there is no reference; 0 by default. The same noise serves
                the whole batch, so a set of pictures comes out in one style.

        Returns:
            [B,4,H,W], unscaled, on the latents' device.

        Raises:
            RaystarError: an unknown domain, a wrong shape, or both a reference and a seed.
        """
        channels, domain = self.config.model.latent_channels, composed(domain)
        _check_latents(latents, channels, "latents")
        if domain not in self.domains:
            raise RaystarError(
                f"domain '{domain}' is not one of the model's{nearest(domain, self.domains)}: {', '.join(self.domains)}"
            )
        if reference is not None and seed is not None:
            raise RaystarError("give a reference or a seed, not both")
        scale = self.config.training.latent_scale
        B = len(latents)
        y = torch.full((B,), self.domains.index(domain), device=self.device)
        with torch.inference_mode():
            if reference is not None:
                reference = reference[None] if reference.ndim == 3 else reference
                _check_latents(reference, channels, "reference")
                if len(reference) not in (1, B):
                    raise RaystarError(f"reference: expected 1 or {B} latents, found {len(reference)}")
                x_ref = reference.to(self.device, torch.float32) * scale
                s = self.nets.E(x_ref, y[: len(x_ref)]).expand(B, -1)
            else:
                z = noise(0 if seed is None else seed, self.config.model.latent_dim).to(self.device)
                s = self.nets.F(z.expand(B, -1), y)
            x = latents.to(self.device, torch.float32) * scale
            return (self.nets.G(x, s) / scale).to(latents.device)


def _check_latents(latents: Tensor, channels: int, name: str) -> None:
    if latents.ndim != 4 or not len(latents) or latents.shape[1] != channels or not latents.is_floating_point():
        raise RaystarError(
            f"{name}: expected [B,{channels},H,W] floating point, found {list(latents.shape)} {latents.dtype}"
        )


def load(folder: str | Path, device: torch.device | str | None = None) -> Translator:
    """Opens an export, or a checkpoint with its configuration inside.

    Args:
        folder: what `write` or the command line wrote, for example `runs/<name>/best`; or a checkpoint's `.pt` file.
        device: a GPU if there is one by default.

    Raises:
        RaystarError: a file is missing, damaged or does not fit the others.
    """
    folder = Path(folder)
    if is_file(folder):
        return _of_checkpoint(folder, device)
    if not is_file(folder / WEIGHTS):
        raise RaystarError(f"{folder}: expected an exported model ({WEIGHTS}) or a checkpoint (.pt), found none")
    config = load_config(folder / CONFIG)
    try:
        # safetensors opens no path that is not UTF-8.
        plain = as_text(str(folder)) == composed(str(folder))
        tensors = load_file(folder / WEIGHTS) if plain else load_bytes((folder / WEIGHTS).read_bytes())
    # A damaged file can make the reader raise nearly anything, and all of it means the same.
    except Exception as error:
        raise RaystarError(f"{folder / WEIGHTS}: truncated or damaged ({pt.reason(error)})") from None
    states: dict[str, dict[str, Tensor]] = {name: {} for name in NAMES}
    for key, value in tensors.items():
        net, _, parameter = key.partition(".")
        states.setdefault(net, {})[parameter] = value
    nets = Nets.of(config.model, config.num_domains, states, str(folder / WEIGHTS))
    return Translator(nets, config, torch.device(device) if device is not None else _default_device())


def _of_checkpoint(path: Path, device: torch.device | str | None) -> Translator:
    checkpoint = checkpoints.load(path)
    config = config_of(checkpoint, str(path))
    nets = Nets.of(config.model, config.num_domains, checkpoints.shown_weights(checkpoint), str(path))
    return Translator(nets, config, torch.device(device) if device is not None else _default_device())


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write(folder: Path, checkpoint: Mapping[str, Any], facts: Mapping[str, Any], pictures: Mapping[str, Path]) -> None:
    """Writes an export; the folder appears whole or not at all, and an older export in its place is replaced.

    Args:
        folder: where to.
        checkpoint: as `model.checkpoint.load` returns it; of its averages where it has any.
        facts: goes into `metrics.json` and, in part, the README: trial, epoch, score, metrics, parameters.
        pictures: go with it, by name: `grid.png`, `interpolation.png`.
    """
    config = config_of(checkpoint, "checkpoint")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, weights in checkpoints.shown_weights(checkpoint).items()
        for key, value in weights.items()
    }
    try:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(to_yaml(config), encoding="utf-8")
        (temporary / METRICS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for name, picture in pictures.items():
            shutil.copyfile(picture, temporary / name)
        _write_card(temporary, config, facts)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_card(folder: Path, config: Config, facts: Mapping[str, Any]) -> None:
    names = {path.name for path in folder.iterdir()}
    (folder / README).write_text(card(config, facts, names), encoding="utf-8")


def add_onnx(folder: str | Path) -> float:
    """Adds ONNX graphs to an export, checked against PyTorch; its card and `metrics.json` tell of them.

    Returns:
        The largest difference, as a share of the largest value.

    Raises:
        RaystarError: ONNX's packages are missing, the export is broken, or a graph computes something else.
    """
    graphs.check_packages()
    folder = Path(folder)
    model = load(folder, "cpu")
    facts = dict(read_mapping(folder / METRICS))
    difference = graphs.write(folder, model.nets, model.config)
    facts["onnx"] = {"files": list(graphs.FILES), "difference": difference}
    (folder / METRICS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    _write_card(folder, model.config, facts)
    return difference

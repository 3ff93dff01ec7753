"""A trained model as ONNX graphs, which other programs and languages run without PyTorch and raystar.

Three files: `generator.onnx` (latents, style -> translation), `mapping.onnx` (noise, domain -> style) and
`style_encoder.onnx` (reference, domain -> style). Latents are unscaled [B,C,H,W] float32 with any B, H and W; a domain
is its number [B], int64; styles are [B,S]. Each file names the domains in its metadata.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raystar.base.errors import RaystarError
from raystar.config.schema import Config
from raystar.model.networks import Nets

FILES = ("generator.onnx", "mapping.onnx", "style_encoder.onnx")
TOLERANCE = 1e-4
"""Largest difference to PyTorch that is let through, as a share of the largest value."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_SIZES = ((2, 32, 32), (1, 32, 32), (3, 48, 40))
"""Batch, height and width with which graphs are checked; the first is the one that they are made from."""


class _Generator(nn.Module):
    def __init__(self, nets: Nets, scale: float) -> None:
        super().__init__()
        self.net, self.scale = nets.G, scale

    def forward(self, latents: Tensor, style: Tensor) -> Tensor:
        return self.net(latents * self.scale, style) / self.scale


class _Mapping(nn.Module):
    def __init__(self, nets: Nets) -> None:
        super().__init__()
        self.net = nets.F

    def forward(self, noise: Tensor, domain: Tensor) -> Tensor:
        return self.net(noise, domain)


class _StyleEncoder(nn.Module):
    def __init__(self, nets: Nets, scale: float) -> None:
        super().__init__()
        self.net, self.scale = nets.E, scale

    def forward(self, reference: Tensor, domain: Tensor) -> Tensor:
        return self.net(reference * self.scale, domain)


def check_packages() -> None:
    """Refuses to begin where ONNX's packages are not installed.

    Raises:
        RaystarError: the ones that are missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RaystarError(f"--onnx needs the packages {', '.join(missing)}; pip install 'raystar[onnx]'")


def write(folder: Path, nets: Nets, config: Config) -> float:
    """Writes `FILES` into `folder` and runs them beside PyTorch, in several sizes.

    Args:
        folder: one that is there.
        nets: on the CPU, float32, eval mode.

    Returns:
        The largest difference to PyTorch, as a share of the largest value of its output.

    Raises:
        RaystarError: a package is missing, or a graph differs by more than `TOLERANCE`.
    """
    check_packages()
    import onnx

    model, scale = config.model, config.training.latent_scale
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    latents, codes = {0: batch, 2: height, 3: width}, {0: batch}
    graphs = (
        (FILES[0], _Generator(nets, scale), ("latents", "style"), "translation", (latents, codes)),
        (FILES[1], _Mapping(nets), ("noise", "domain"), "style", (codes, codes)),
        (FILES[2], _StyleEncoder(nets, scale), ("reference", "domain"), "style", (latents, codes)),
    )
    facts = {
        "made_by": "raystar",
        "domains": json.dumps(list(config.data.domains)),
        "latents": f"unscaled, [batch,{model.latent_channels},height,width]",
        "style_dim": str(model.style_dim),
        "latent_dim": str(model.latent_dim),
    }
    worst = 0.0
    for name, graph, inputs, output, sizes in graphs:
        examples = [_inputs(inputs, config, size) for size in _SIZES]
        with _quiet():
            torch.onnx.export(
                graph.eval(),
                tuple(examples[0]),
                str(folder / name),
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=sizes,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        proto = onnx.load(str(folder / name))
        onnx.helper.set_model_props(proto, facts)
        onnx.save(proto, str(folder / name))
        worst = max(worst, _difference(folder / name, graph, inputs, examples))
    if not worst <= TOLERANCE:
        raise RaystarError(
            f"{folder}: the ONNX graphs differ from PyTorch by {worst:.1e} of the largest value, expected at most "
            f"{TOLERANCE:.0e}; export without --onnx"
        )
    return worst


def _inputs(names: tuple[str, ...], config: Config, size: tuple[int, int, int]) -> list[Tensor]:
    """Values for the inputs `names`, of the size that real ones have."""
    B, H, W = size
    model = config.model
    drawn = torch.Generator().manual_seed(B)
    latents = torch.randn(B, model.latent_channels, H, W, generator=drawn) * 5
    values = {
        "latents": latents,
        "reference": latents,
        "style": torch.randn(B, model.style_dim, generator=drawn),
        "noise": torch.randn(B, model.latent_dim, generator=drawn),
        "domain": torch.arange(B) % config.num_domains,
    }
    return [values[name] for name in names]


def _difference(path: Path, graph: nn.Module, names: tuple[str, ...], examples: list[list[Tensor]]) -> float:
    """How far a file's results are from PyTorch's, as a share of their largest value."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for values in examples:
        fed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        result = torch.from_numpy(session.run(None, fed)[0])
        with torch.inference_mode():
            expected: Tensor = graph(*values)
        if result.shape != expected.shape or not torch.isfinite(result).all():
            return float("inf")
        worst = max(worst, float((result - expected).abs().max() / expected.abs().max().clamp_min(1e-12)))
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Silences what the exporter tells of its progress; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

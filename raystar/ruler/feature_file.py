"""Stronger features for the ruler, from a file of one's own: the trunk of a VGG network (Simonyan and Zisserman 2014).

`ruler.features: vgg16.pth` adds the channel means and deviations of its layers (Gatys et al. 2016, Huang and Belongie
2017) to the statistics that the ruler has by itself. Nothing is downloaded: the file is torchvision's state dictionary
of VGG11 to VGG19 without batch normalisation, `.pth` or `.safetensors`, of which only `features.*` is read.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from raystar.base import torch_file as pt
from raystar.base.errors import RaystarError, show
from raystar.base.files import is_file

KEY = "ruler.features"
_PARAMETER = re.compile(r"features\.(\d+)\.(weight|bias)")
_NEXT, _POOLED = 2, 3  # between the numbers of two convolutions: a ReLU, or a ReLU and a pooling
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for which torchvision's were trained


class FeatureFile(nn.Module):
    """Channel means and deviations of the last layer before each pooling, and of the last."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], pooled_after: list[bool]) -> None:
        super().__init__()
        for number, (weight, bias) in enumerate(layers):
            self.register_buffer(f"weight{number}", weight)
            self.register_buffer(f"bias{number}", bias)
        self.pooled_after = pooled_after
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None])
        self.register_buffer("deviation", torch.tensor(_DEVIATION)[:, None, None])

    def forward(self, rgb: Tensor) -> Tensor:
        """[B,3,h,w] in [0,1], 32 pixels or more -> [B,e]."""
        x, stats = (rgb - self.mean) / self.deviation, []
        for number, pooled in enumerate(self.pooled_after):
            weight, bias = self.get_buffer(f"weight{number}"), self.get_buffer(f"bias{number}")
            x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
            if pooled or number + 1 == len(self.pooled_after):
                deviation, mean = torch.std_mean(x, dim=(2, 3), correction=0)
                stats += [mean, deviation]
                x = functional.max_pool2d(x, 2) if pooled else x
        return torch.cat(stats, dim=1)


def load(file: str) -> FeatureFile:
    """Reads the trunk of a VGG network; float32, gradients off.

    Raises:
        RaystarError: the file is missing or damaged, or is no such network.
    """
    path = Path(file).expanduser()
    if not is_file(path):
        raise RaystarError(f"{KEY}: {path}: expected a VGG state dictionary (.pth or .safetensors), found no file")
    tensors = _read(path)
    convolutions: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if match := _PARAMETER.fullmatch(name):
            convolutions.setdefault(int(match[1]), {})[match[2]] = value
    numbers = sorted(convolutions)
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    channels = 3
    for number in numbers:
        weight, bias = convolutions[number].get("weight"), convolutions[number].get("bias")
        fits = weight is not None and bias is not None and weight.shape[1:] == (channels, 3, 3)
        if not fits or not bool(weight.isfinite().all() and bias.isfinite().all()):  # type: ignore[union-attr]
            shape = None if weight is None else list(weight.shape)
            raise RaystarError(
                f"{KEY}: {path}: features.{number}: expected a finite 3x3 convolution of {channels} channels with a "
                f"bias, as in torchvision's VGG without batch normalisation; found {shape}"
            )
        channels = len(bias)  # type: ignore[arg-type]
    if not numbers or any(gap not in (_NEXT, _POOLED) for gap in gaps):
        raise RaystarError(
            f"{KEY}: {path}: expected the convolutions of torchvision's VGG under features.0, features.2, ...; "
            f"found {show(sorted(tensors)[:6])}"
        )
    layers = [(convolutions[number]["weight"].float(), convolutions[number]["bias"].float()) for number in numbers]
    return FeatureFile(layers, [*(gap == _POOLED for gap in gaps), False]).eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
        content = pt.read(path)
    # A damaged file can make its reader raise nearly anything, and all of it means the same.
    except Exception as error:
        raise RaystarError(f"{KEY}: {path}: truncated or damaged ({pt.reason(error)})") from None
    if not isinstance(content, dict):
        raise RaystarError(f"{KEY}: {path}: expected a state dictionary, found {type(content).__name__}")
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def file_digest(file: str) -> str:
    """Of the file's bytes: what scores are compared by."""
    with Path(file).expanduser().open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]

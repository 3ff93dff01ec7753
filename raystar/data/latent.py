"""One latent, read and checked."""

from __future__ import annotations

import os
import stat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base import torch_file as pt


def check_row(row: Tensor, channels: int) -> NDArray[Any]:
    """A row of a packed file, checked as a latent of `channels` channels: [C,H,W]."""
    return check_latent(_as_array(row), channels)


def read_latent(path: str, channels: int) -> NDArray[Any]:
    """Reads one latent file [C,H,W], unscaled, without ever running code from it.

    Raises:
        ValueError: why the file cannot be used.
    """
    value = _read_npy(path) if path.endswith(".npy") else pt.read(path)
    if isinstance(value, dict):
        value = next((value[k] for k in ("latent", "x") if k in value), None)
        if value is None:
            raise ValueError("expected a tensor, or a dictionary with 'latent' or 'x'; found neither key")
    if isinstance(value, Tensor):
        value = _as_array(value)
    return check_latent(value, channels)


def _read_npy(path: str) -> Any:
    try:
        # A pipe would be waited for, and some devices never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("not a file")
        return np.load(path, allow_pickle=False)
    # A damaged file can make the reader raise nearly anything, and all of it means the same.
    except Exception as error:
        if "Object arrays cannot be loaded" in str(error):
            raise ValueError("holds pickled objects; they were not opened, since they could run code") from None
        if "contains pickled" in str(error):  # what numpy says of anything that it does not know
            raise ValueError("not an .npy file; it was not opened as a pickle, since it could run code") from None
        raise ValueError(f"truncated or damaged ({pt.reason(error)})") from None


def _as_array(tensor: Tensor) -> NDArray[Any]:
    """A dense CPU tensor as an array, bf16 as fp32; ValueError for any other tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError("expected a dense tensor with data")
    if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"expected float16, bfloat16 or float32 numbers, found {tensor.dtype}")
        tensor = tensor.float()
    return tensor.detach().resolve_conj().resolve_neg().numpy()


def check_latent(value: Any, channels: int) -> NDArray[Any]:
    """`value` as a [C,H,W] fp16 or fp32 array; ValueError if its type, shape or numbers are wrong."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"expected an array of floating-point numbers, found {kind}")
    if value.ndim == 4 and value.shape[0] == 1:
        value = value[0]
    if value.ndim != 3 or value.shape[0] != channels or min(value.shape) < 1:
        raise ValueError(f"expected shape [{channels},H,W], found {list(value.shape)}")
    if min(value.shape[1:]) < 8 or value.shape[1] % 4 or value.shape[2] % 4:
        raise ValueError(f"expected H and W of at least 8 and divisible by 4, found {list(value.shape)}")
    if not np.isfinite(value).all():
        raise ValueError("holds NaN or infinite numbers")
    value = value if value.dtype == np.float16 else value.astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError("holds numbers beyond float32")
    return value

"""One latent, read and checked."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base import torch_file as pt
from raystar.base.errors import show

_NAMES = ("latent", "x")
"""Keys of a dictionary that are taken first."""
_MOST_NAMED = 6  # of a dictionary's other keys


def check_row(row: Tensor, channels: int) -> NDArray[Any]:
    """A row of a packed file, checked as a latent of `channels` channels: [C,H,W]."""
    return check_latent(_as_array(row), channels)


def read_latent(path: str, channels: int) -> NDArray[Any]:
    """Reads one latent file [C,H,W], unscaled, without ever running code from it.

    Raises:
        ValueError: why the file cannot be used.
    """
    value = _read_npy(path) if path.lower().endswith(".npy") else _only_tensor(pt.read(path))
    return check_latent(_as_array(value) if isinstance(value, Tensor) else value, channels)


def _only_tensor(value: Any) -> Any:
    """The latent of what a `.pt` file holds: a tensor alone, or beside plain values in a dictionary or a list.

    Of several tensors in a dictionary it is the one under `latent`, else under `x`. A list without tensors is taken for
    the numbers themselves. What is none of these is given back for `check_latent` to refuse.
    """
    if isinstance(value, Mapping):
        held = {key: item for key, item in value.items() if isinstance(item, Tensor | list | tuple)}
        for key in _NAMES:
            if key in held:
                return _only_tensor(held[key])
        tensors = {key: item for key, item in held.items() if isinstance(item, Tensor)}
        if len(tensors) != 1:
            found = ", ".join(map(show, list(tensors or value)[:_MOST_NAMED]))
            raise ValueError(
                "expected one tensor, or 'latent' or 'x' among several; "
                f"found {f'tensors {found}' if tensors else f'none under the keys {found}' if found else 'no keys'}"
            )
        (value,) = tensors.values()
    elif isinstance(value, list | tuple):
        listed = [item for item in value if isinstance(item, Tensor)]
        if len(listed) > 1:
            raise ValueError(f"expected one tensor, found a list of {len(listed)}")
        value = listed[0] if listed else _numbers(value)
    return value


def _numbers(value: list[Any] | tuple[Any, ...]) -> NDArray[Any]:
    """Lists of numbers within lists as an array; ValueError for anything else."""
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list | tuple):
            pending += item
        elif type(item) not in (int, float):
            raise ValueError(f"expected a tensor or lists of numbers, found a list that holds {type(item).__name__}")
    try:
        return np.array(value)
    except ValueError:
        raise ValueError("expected lists of numbers that make an array, found rows of different lengths") from None


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
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"expected an array of numbers, found {kind}")
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

"""`.pt` files, read without running code from them and without believing what they claim of their size.

`torch.load(weights_only=True)` runs no code of others, but a few bytes can still make it fill the memory: a
compressed archive, a tensor whose numbers all lie in one place, or one of the functions that it calls for
tensors that no latent and no checkpoint holds.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

MAX_LEAVES = 1_000_000
MAX_DEPTH = 32
_TIMES_ITS_SIZE = 8  # tensors may share numbers, and a little file holds little besides its names

_GLOBAL = re.compile(rb"c([\w.]+)\n([\w.]+)\n")
_ALLOWED = re.compile(
    r"collections\.OrderedDict|torch\.(Size|device|[a-z]+\d*|\w+Storage)|torch\.storage\.(Typed|Untyped)Storage"
    r"|torch\.float8_\w+|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|qtensor"
    r"|meta_tensor_no_storage)|torch\._tensor\._rebuild_from_type_v2|(builtins|__builtin__)\.set"
)
_LEGACY_PICKLES = 5  # of a file written before torch 1.6: magic number, version, system, content, storages
_ELSEWHERE = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")  # other ways to name code
_CODE = "a pickle that holds more than tensors and plain values; it was not opened, since it could run code"


def read(path: str | Path) -> Any:
    """What a `.pt` file holds, on the CPU.

    Raises:
        ValueError: why the file cannot be used, in one line.
    """
    try:
        status = os.stat(path)
        # A pipe would be waited for, and some devices never end.
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"expected a file, found {'a folder' if stat.S_ISDIR(status.st_mode) else 'a device'}")
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            _check_archive(file) if zipped else _check_pickles(file)
        with warnings.catch_warnings():  # of pickle protocols, just before it refuses them
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)
        check_size(value, status.st_size)
    except pickle.UnpicklingError:
        raise ValueError(_CODE) from None
    # A damaged file can make the readers raise nearly anything, and all of it means the same.
    except Exception as error:
        raise ValueError(f"truncated or damaged ({reason(error)})") from None
    return value


def reason(error: Exception) -> str:
    """The first line of an error, or its kind where it has no words."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def check_size(value: Any, file_bytes: int) -> None:
    """Raises ValueError where a file of so many bytes cannot hold `value`: endless, or larger than what was read."""
    leaves = held = 0
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        leaves += 1
        if leaves > MAX_LEAVES or depth > MAX_DEPTH:
            raise ValueError("it holds lists within lists without end")
        if isinstance(item, Mapping):
            pending += ((content, depth + 1) for content in item.values())
        elif isinstance(item, list | tuple):
            pending += ((content, depth + 1) for content in item)
        elif isinstance(item, Tensor) and item.layout == torch.strided and item.device.type != "meta":
            held += item.numel() * item.element_size()
    if held > _TIMES_ITS_SIZE * file_bytes:
        raise ValueError(f"{file_bytes} bytes claim to hold {held} bytes of numbers")


def _check_archive(file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("a compressed archive, which torch.save never writes")
            if entry.filename.endswith("data.pkl"):
                entry.CRC = None  # type: ignore[assignment]  # torch need not write any
                for module, name in _GLOBAL.findall(archive.read(entry)):
                    _check_global(f"{module.decode()}.{name.decode()}")


def _check_pickles(file: IO[bytes]) -> None:
    """The same of a file that is no archive; it stops where the pickles are not what torch would continue with."""
    for _ in range(_LEGACY_PICKLES):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                _check_global(str(argument).replace(" ", "."))
            elif opcode.name in _ELSEWHERE:
                raise pickle.UnpicklingError(opcode.name)


def _check_global(name: str) -> None:
    if not _ALLOWED.fullmatch(name):
        raise pickle.UnpicklingError(name)

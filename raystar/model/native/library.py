"""The kernels' library: compiled at first use, loaded once a process; or why there is none."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from raystar.base.console import note
from raystar.base.files import cache_dir
from raystar.base.locks import hold

logger = logging.getLogger(__name__)

SWITCH = "RAYSTAR_NATIVE_KERNELS"
"""Environment variable; `0` leaves the work to PyTorch."""

_SOURCE = Path(__file__).with_name("kernels.cpp")
_CPU_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma")
_COMPILE = (
    "-O3", "-std=c++17", "-fPIC", "-fopenmp", "-Wall", "-Wextra",
    *(f"-m{flag.replace('_', '')}" for flag in _CPU_FLAGS),
)  # fmt: skip

# Without -fopenmp: the OpenMP that PyTorch has loaded is found when the library is, and no second one comes in.
_LINK = ("-shared",)
_COMPILER_SECONDS = 120


class _NotHereError(Exception):
    """Why the kernels cannot be used."""


def build(folder: Path, compiler: str) -> Path:
    """The compiled kernels in `folder`, made there unless they are there already.

    The file's name carries a digest of everything it depends on. Processes that come at once build once.

    Raises:
        OSError: `folder` cannot be written, or `compiler` cannot be run.
        subprocess.SubprocessError: `compiler` fails or hangs.
    """
    version = _run(compiler, "--version")
    parts = (_SOURCE.read_text(encoding="utf-8"), version, *_COMPILE, *_LINK, torch.__version__)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = folder / f"kernels-{digest}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / "kernels.lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not library.exists():
            compiled, linked = (str(Path(scratch) / name) for name in ("kernels.o", "kernels.so"))
            _run(compiler, *_COMPILE, "-c", str(_SOURCE), "-o", compiled)
            _run(compiler, *_LINK, compiled, "-o", linked)
            os.replace(linked, library)
    return library


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILER_SECONDS)
    return done.stdout


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, by Linux's names; empty where nobody says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


def _find() -> ctypes.CDLL:
    if os.environ.get(SWITCH) == "0":
        raise _NotHereError(f"switched off by {SWITCH}=0")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise _NotHereError(f"they are for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    present = cpu_flags()
    if missing := [flag for flag in _CPU_FLAGS if flag not in present]:
        raise _NotHereError(f"this processor has no {' '.join(missing)}")
    names = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise _NotHereError("no C++ compiler (c++, g++, clang++ or CXX)")
    try:
        return ctypes.CDLL(str(build(cache_dir(), compiler)))
    except subprocess.CalledProcessError as error:
        line = next((line for line in error.stderr.splitlines() if "error" in line), "")
        raise _NotHereError(f"{compiler} failed: {line.strip()[:200]}") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise _NotHereError(
            f"{where}{error.strerror or error} (RAYSTAR_CACHE_DIR names the folder that they are kept in)"
        ) from None
    except subprocess.SubprocessError as error:
        raise _NotHereError(f"{type(error).__name__}: {error}") from None


@functools.cache
def loaded() -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    try:
        library = _find()
        _declare(library)
    except _NotHereError as reason:
        return str(reason)
    # The kernels only save time: nothing that goes wrong with them may stop a run.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Types of the functions at the end of kernels.cpp."""
    pointer, size, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    for name, result, arguments in (
        ("conv3x3_bytes", size, [size] * 3),
        ("conv3x3_weight_grad_bytes", size, [size] * 3),
        ("conv3x3", None, [pointer] * 5 + [size] * 5 + [flag, pointer, flag]),
        ("conv3x3_weight_grad", None, [pointer] * 4 + [size] * 5 + [pointer, flag]),
        ("norm_leaky", None, [pointer] * 6 + [size] * 4 + [number] * 2 + [flag]),
        ("norm_leaky_backward", None, [pointer] * 9 + [size] * 4 + [number, flag]),
    ):
        function = getattr(library, f"raystar_{name}")
        function.restype, function.argtypes = result, arguments


def unavailable() -> str | None:
    """Why the kernels cannot be used in this process; None where they can. Builds them if need be (seconds)."""
    outcome = loaded()
    return outcome if isinstance(outcome, str) else None


@functools.cache
def announced() -> bool:
    """Whether the kernels are there; says once why not, unless somebody wanted it so."""
    reason = unavailable()
    if reason is not None and os.environ.get(SWITCH) != "0":
        note(logger, f"bf16 on this CPU runs without raystar's native kernels: {reason}")
    return reason is None

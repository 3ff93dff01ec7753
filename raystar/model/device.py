"""The device a run is on, and how it computes there."""

from __future__ import annotations

import functools
import logging
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from raystar.base.console import note
from raystar.base.errors import RaystarError
from raystar.config.schema import Config
from raystar.model.native import kernels
from raystar.model.native.library import cpu_flags

logger = logging.getLogger(__name__)
_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_COMPUTES_BF16 = {"avx512_bf16", "amx_bf16"}  # of x86-64; without them a step takes 8 times as long as in float32
_as_asked = ContextVar("as_asked", default=False)


def resolve_device(config: Config) -> torch.device:
    """The device of `training.device`; `RaystarError` if it is not there."""
    name = config.training.device
    if name == "cuda" and not torch.cuda.is_available():
        raise RaystarError("training.device: cuda was asked for, but torch finds no GPU; take auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if fp16_on_cpu(config, device):
        note(logger, "training.amp_dtype: fp16 is for GPUs: float32 is used on this CPU (bf16 may be faster)")
    elif config.training.use_amp and not fast_bf16(device):
        note(logger, "this processor has no instructions for bf16: float32, which is faster here, is used instead")
    return device


@functools.cache
def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 saves time on `device`: not on an x86-64 processor that has no instructions for it."""
    flags = cpu_flags() if device.type == "cpu" and platform.machine() == "x86_64" else frozenset()
    return not flags or bool(flags & _COMPUTES_BF16)


def fp16_on_cpu(config: Config, device: torch.device) -> bool:
    """Whether fp16 is asked for where float32 takes its place."""
    return config.training.use_amp and config.training.amp_dtype == "fp16" and device.type == "cpu"


@contextmanager
def bf16_as_asked() -> Iterator[None]:
    """Within it bf16 is used also where it is slow: for who wants its rounding, not its speed."""
    token = _as_asked.set(True)
    try:
        yield
    finally:
        _as_asked.reset(token)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The precision in which `training` wants the networks run on `device`, or float32 where that is none or slow."""
    if not config.training.use_amp or fp16_on_cpu(config, device) or not (fast_bf16(device) or _as_asked.get()):
        return nullcontext()
    return torch.autocast(device.type, _AMP_DTYPES[config.training.amp_dtype])


def set_backends(config: Config, device: torch.device) -> None:
    """Torch's global switches as `training` wants them; all of them, since a process runs one trial after another."""
    if device.type != "cuda":
        return
    training = config.training
    torch.backends.cudnn.benchmark = training.cudnn_benchmark and not training.deterministic
    torch.backends.cudnn.deterministic = training.deterministic
    torch.backends.cudnn.allow_tf32 = training.tf32
    torch.set_float32_matmul_precision("high" if training.tf32 else "highest")


_NO_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")
_NO_ENGINE = ("unable to find an engine", "unable to find a valid cudnn algorithm")
_SHORT = 0.1  # share of a GPU's memory that is free, below which cuDNN finds none for want of workspace


def out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed for want of memory, whichever library says so in whichever words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    if any(words in text for words in _NO_MEMORY):
        return True
    if not any(words in text for words in _NO_ENGINE) or not torch.cuda.is_available():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < _SHORT * total


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on a GPU; a CPU has nothing queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layout(config: Config, latents: Tensor) -> torch.memory_format:
    """How latents [B,C,H,W] go into the networks: as the configuration says, or as the native kernels want them."""
    last = channels_last(config, latents.device) or native(config, latents)
    return torch.channels_last if last else torch.contiguous_format


def channels_last(config: Config, device: torch.device) -> bool:
    """Whether weights and activations are kept channels last: as asked, else on a GPU, whose convolutions want it."""
    asked = config.training.channels_last
    return device.type == "cuda" if asked is None else asked


def native(config: Config, latents: Tensor) -> bool:
    """Whether the native kernels serve the generator on latents [B,C,H,W]."""
    with autocast(config, latents.device):
        return kernels.serves(latents, config.model.base_dim)

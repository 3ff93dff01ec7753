"""What a trial's process opens once for many trials."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raystar.backend import loop
from raystar.config.load import override
from raystar.data.bank import open_bank
from raystar.record.statuses import FAILED, OUT_OF_MEMORY
from tests.kit.support import tiny_config, write_latents


def test_trials_that_draw_from_other_numbers_of_latents_share_bank_and_ruler(tmp_path: Path) -> None:
    config = tiny_config(write_latents(tmp_path / "data"))
    bank = open_bank(config, tmp_path / "cache")
    request: Any = SimpleNamespace(cache_dir=str(tmp_path / "cache"), bank_key=bank.key)
    settings = [config, *(override(config, {"data.max_samples": few}) for few in (2, [3, 4, 5], 9))]
    for opened in (loop._bank, loop._ruler):
        first: Any = opened(config, request)
        assert all(opened(other, request) is first for other in settings)
    assert loop._bank(config, request).digest == bank.digest
    assert loop._bank(override(config, {"data.holdout": 0.5}), request).digest != bank.digest


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OUT_OF_MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("GET was unable to find an engine to execute this computation"), FAILED),  # no GPU is short here
        (RuntimeError("shape '[2]' is invalid for input of size 3"), FAILED),
        (ValueError("out of memory"), FAILED),
    ],
    ids=str,
)
def test_want_of_memory_outside_of_a_step_is_no_other_failure(error: Exception, status: str) -> None:
    found, reason = loop.what_ended(error)
    assert found == status
    assert ("lower training.batch_size" in reason) == (status == OUT_OF_MEMORY)


def test_cudnn_finds_no_engine_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, status in ((2**20, OUT_OF_MEMORY), (2**33, FAILED)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2**34))
        assert loop.what_ended(error)[0] == status


def test_a_process_whose_gpu_is_of_no_use_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(loop.os, "_exit", left.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    loop._leave_if_poisoned()
    assert left == []

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    loop._leave_if_poisoned()
    assert left == [86]

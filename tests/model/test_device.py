"""In which precision networks run, by the processor."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.model import device as devices
from raystar.model.device import autocast, bf16_as_asked, fast_bf16, resolve_device
from raystar.training.compile import canonical
from raystar.training.state import TrainState

CPU = torch.device("cpu")
BF16 = override(Config(), {"training.device": "cpu", "training.use_amp": True, "training.amp_dtype": "bf16"})


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    devices.fast_bf16.cache_clear()
    yield
    devices.fast_bf16.cache_clear()


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor of x86-64 without instructions for bf16."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset({"avx2", "fma"}))


@pytest.mark.parametrize(
    ("machine", "flags", "fast"),
    [
        ("x86_64", {"avx2", "avx512f"}, False),
        ("x86_64", {"avx512f", "avx512_bf16"}, True),
        ("x86_64", {"amx_bf16"}, True),
        ("x86_64", set(), True),  # nobody says: as asked
        ("aarch64", {"asimd"}, True),
    ],
)
def test_where_bf16_is_fast(monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], fast: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset(flags))
    assert fast_bf16(CPU) is fast
    assert fast_bf16(torch.device("cuda"))


@pytest.mark.usefixtures("old")
def test_float32_takes_its_place_and_a_note_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        resolve_device(BF16)
    note = "note: this processor has no instructions for bf16: float32, which is faster here, is used instead\n"
    assert capsys.readouterr().err == note
    with autocast(BF16, CPU):
        assert not torch.is_autocast_enabled("cpu")
    with bf16_as_asked(), autocast(BF16, CPU):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    with autocast(BF16, CPU):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.usefixtures("old")
def test_who_does_not_ask_hears_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    resolve_device(override(BF16, {"training.use_amp": False}))
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("old")
def test_a_search_for_speed_does_not_try_what_makes_no_difference() -> None:
    exact = override(BF16, {"training.use_amp": False})
    assert canonical(BF16, CPU) == canonical(exact, CPU)


def test_fp16_without_a_gpu_is_float32(capsys: pytest.CaptureFixture[str]) -> None:
    fp16 = override(BF16, {"training.amp_dtype": "fp16"})
    for _ in range(2):
        assert resolve_device(fp16) == CPU
    note = "note: training.amp_dtype: fp16 is for GPUs: float32 is used on this CPU (bf16 may be faster)\n"
    assert capsys.readouterr().err == note
    with autocast(fp16, CPU):
        assert not torch.is_autocast_enabled("cpu")
    assert not TrainState.create(fp16, CPU).scaler.is_enabled()
    assert canonical(fp16, CPU) == canonical(override(BF16, {"training.use_amp": False}), CPU)


def test_channels_last_is_a_gpus_own_choice() -> None:
    gpu = torch.device("cuda")
    for asked, here, there in ((None, False, True), (False, False, False), (True, True, True)):
        config = override(BF16, {"training.channels_last": asked})
        assert (devices.channels_last(config, CPU), devices.channels_last(config, gpu)) == (here, there)
        assert canonical(config, CPU).training.channels_last is here
    state = TrainState.create(override(BF16, {"training.channels_last": True, "model.base_dim": 8}), CPU)
    assert state.nets.G.encoder[0].weight.is_contiguous(memory_format=torch.channels_last)

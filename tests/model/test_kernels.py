"""The native CPU kernels: against float64, under torch.compile, and built: by many at once, or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.model.native import kernels, library
from raystar.model.networks import Generator
from tests.kit.support import ROOT

pytestmark = pytest.mark.usefixtures("bf16")

REASON = library.unavailable()
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_kernels = pytest.mark.skipif(REASON is not None, reason=f"no native kernels here: {REASON}")
EPS, SLOPE = 1e-5, 0.2

# batch, inputs, outputs, height, width: the model's own, one tile, odd numbers of tiles, blocks left unfilled.
CONVOLUTIONS = [
    (2, 64, 64, 32, 32),
    (3, 64, 32, 16, 16),
    (1, 32, 64, 2, 2),
    (3, 32, 96, 6, 10),
    (1, 96, 160, 2, 18),
    (5, 128, 64, 16, 16),
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def activations(*shape: int, seed: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return x.contiguous(memory_format=torch.channels_last)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error over the whole tensor."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def results(function, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """What `function` gives for `inputs`, and their gradients for the output gradient `grad`."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@needs_kernels
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_convolution_and_its_gradients(shape: tuple[int, ...], threads: int) -> None:
    """At most 0.5 % off. PyTorch's own bfloat16 is 0.24 % off for y and x (measured here: 0.33, 0.45), and 0.17 %
    for weights (0.40: here both factors of the product are rounded after their transforms)."""
    B, C, channels, H, W = shape
    x, residual = activations(B, C, H, W, seed=0), activations(B, channels, H, W, seed=1)
    weight, bias = randn(channels, C, 3, 3, seed=2) / (3 * C**0.5), randn(channels, seed=3)
    grad = activations(B, channels, H, W, seed=4)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return functional.conv2d(x, weight, bias, padding=1) + residual

    exact = results(plain, grad, *(t.double() for t in (x, weight, bias, residual)))
    usual = results(plain, grad, *(t.bfloat16() for t in (x, weight, bias, residual)))
    found = results(kernels.conv3x3, grad, x, weight, bias, residual)
    for name, mine, theirs, wanted in zip(("y", "x", "weight", "bias", "residual"), found, usual, exact, strict=True):
        assert error(mine, wanted) <= 0.005, name
        assert error(mine, wanted) <= (3 if name == "weight" else 2.4) * error(theirs, wanted), name
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[2].dtype == found[3].dtype == torch.float32


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 32, 6, 10), (2, 64, 32, 32), (1, 96, 1, 3), (1, 32, 1, 1)])
@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_normalisation_and_its_gradients(shape: tuple[int, ...], width: int, threads: int) -> None:
    B, C = shape[:2]
    x, grad = activations(*shape, seed=0) * 2 + 30, activations(*shape, seed=1)
    scale, shift = 1 + 0.5 * randn(B, C, seed=2), randn(B, C, seed=3)

    def plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        groups = x.unflatten(1, (-1, width))
        centred = groups - groups.mean((2, 3, 4), keepdim=True)
        normal = (centred * (centred.square().mean((2, 3, 4), keepdim=True) + EPS).rsqrt()).flatten(1, 2)
        return functional.leaky_relu(scale[:, :, None, None] * normal + shift[:, :, None, None], SLOPE)

    exact = results(plain, grad, *(t.double() for t in (x, scale, shift)))
    found = results(lambda *inputs: kernels.norm_leaky(*inputs, EPS, SLOPE, width), grad, x, scale, shift)
    for name, mine, wanted in zip(("y", "x", "scale", "shift"), found, exact, strict=True):
        if wanted.norm() < 1e-6:  # a single pixel has no spread: its x and scale do not matter
            assert mine.abs().max() < 1e-5, name
        else:
            # Rounding to bfloat16 alone costs 0.0017; sums are float32.
            assert error(mine, wanted) <= (0.002 if name in ("y", "x") else 1e-4), name


@needs_kernels
def test_a_scale_for_all_samples_gets_the_sum_of_the_gradients() -> None:
    x, grad = activations(4, 32, 8, 8, seed=0), activations(4, 32, 8, 8, seed=1)
    scale, shift = randn(32, seed=2), randn(32, seed=3)
    found = results(lambda *inputs: kernels.norm_leaky(*inputs, EPS, SLOPE), grad, x, scale, shift)
    each = results(
        lambda *inputs: kernels.norm_leaky(*inputs, EPS, SLOPE), grad, x, scale.expand(4, 32), shift.expand(4, 32)
    )
    torch.testing.assert_close(found[2], each[2].sum(0))
    torch.testing.assert_close(found[3], each[3].sum(0))


@needs_kernels
def test_any_layout_of_the_arguments(threads: int) -> None:
    x, grad = activations(2, 32, 8, 8, seed=0), activations(2, 32, 8, 8, seed=1)
    weight = randn(32, 32, 3, 3, seed=2)
    last = results(kernels.conv3x3, grad, x, weight)
    first = results(kernels.conv3x3, grad.contiguous(), x.contiguous(), weight.to(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(last, first, strict=True))


def test_leaky_is_pytorchs_own_and_differentiable_twice() -> None:
    """The discriminator's: whoever penalises its gradient under autocast gets the right second derivative."""
    grad = activations(2, 8, 4, 4, seed=1).float()
    found = []
    for function in (kernels.leaky, functional.leaky_relu):
        x = activations(2, 8, 4, 4, seed=0).float().requires_grad_()
        y = function(x, SLOPE)
        (first,) = torch.autograd.grad((y * y * grad).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append((y, first, second))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted)
    torch.library.opcheck(kernels._leaky, (x, SLOPE))
    torch.library.opcheck(kernels._leaky_grad, (grad.requires_grad_(), x.detach(), SLOPE))


@needs_kernels
def test_the_same_bits_twice(threads: int) -> None:
    x, grad = activations(5, 64, 16, 16, seed=0), activations(5, 64, 16, 16, seed=1)
    weight, bias, scale = randn(64, 64, 3, 3, seed=2), randn(64, seed=3), randn(5, 64, seed=4)

    def block(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return kernels.norm_leaky(kernels.conv3x3(x, weight, bias, x), scale, scale, EPS, SLOPE)

    runs = [results(block, grad, x, weight, bias, scale) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@needs_kernels
def test_opcheck() -> None:
    x = activations(2, 32, 4, 6, seed=0).requires_grad_()
    weight, bias = randn(64, 32, 3, 3, seed=1).requires_grad_(), randn(64, seed=2).requires_grad_()
    grad, scale = activations(2, 64, 4, 6, seed=3), randn(2, 32, seed=4).requires_grad_()
    torch.library.opcheck(kernels._conv3x3, (x, weight, bias, None))
    torch.library.opcheck(kernels._conv3x3, (x, weight, None, grad))
    torch.library.opcheck(kernels._norm_leaky, (x, scale, scale.detach(), EPS, SLOPE, 4))
    plain = [t.detach() for t in (x, weight, scale)]
    torch.library.opcheck(kernels._conv3x3_input_grad, (grad, plain[1]))
    torch.library.opcheck(kernels._conv3x3_weight_grad, (plain[0], grad))
    torch.library.opcheck(kernels._norm_leaky_grads, (plain[0], plain[0], *([plain[2]] * 4), SLOPE, 4))


@needs_kernels
def test_second_derivatives_are_refused() -> None:
    x, weight = activations(1, 32, 4, 4, seed=0).requires_grad_(), randn(32, 32, 3, 3, seed=1)
    (grad,) = torch.autograd.grad(kernels.conv3x3(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"conv3x3_input_grad.* no autograd formula"):
        grad.sum().backward()


def generator(base: int = 32) -> Generator:
    torch.manual_seed(0)
    net = Generator(override(Config(), {"model.base_dim": base, "model.n_res_blocks": 1, "model.style_dim": 8}).model)
    for name, parameter in net.named_parameters():
        if ".fc." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def run(net, x: Tensor, s: Tensor, *, amp: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        return net(x, s).float()


@needs_kernels
@pytest.mark.parametrize("styles_each", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (6, 10)])
def test_the_generator_with_and_without(monkeypatch, size: tuple[int, int], styles_each: int) -> None:
    net, x, s = generator(), randn(2, 4, *size, seed=1), randn(2 * styles_each, 8, seed=2)
    wide = run(net, x, s, amp=False)
    native = run(net, x, s, amp=True)
    monkeypatch.setattr(kernels, "announced", lambda: False)
    usual = run(net, x, s, amp=True)
    assert not torch.equal(native, usual)  # otherwise nothing native has run
    assert error(native, wide) <= 1.5 * error(usual, wide) <= 0.03


@needs_kernels
@pytest.mark.parametrize(("base", "size"), [(32, (15, 16)), (48, (16, 16))], ids=["odd height", "48 channels"])
def test_what_does_not_fit_runs_as_before(monkeypatch, base: int, size: tuple[int, int]) -> None:
    net, x, s = generator(base), randn(2, 4, *size, seed=1), randn(2, 8, seed=2)
    found = run(net, x, s, amp=True)
    monkeypatch.setattr(kernels, "announced", lambda: False)
    assert torch.equal(found, run(net, x, s, amp=True))


@needs_kernels
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_graph_breaks(backend: str) -> None:
    """The whole generator is traced; generating code for one block of it takes long enough."""
    net, x, s = generator(), randn(4, 4, 8, 8, seed=1), randn(4, 8, seed=2)
    if backend == "inductor":
        net, x = net.res_blocks[0], activations(4, 32, 8, 8, seed=1)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    gradients = []
    for call in (net, compiled):
        net.zero_grad()
        run(call, x, s, amp=True).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert error(run(compiled, x, s, amp=True), run(net, x, s, amp=True).double()) < 0.005
    assert error(gradients[1], gradients[0].double()) < 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Building

REPORT = """
import torch
from raystar.model.native import kernels
with torch.autocast("cpu", torch.bfloat16):
    print(kernels.serves(torch.ones(1, 32, 4, 4), 32))
"""


@needs_kernels
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    settings = {**os.environ, "RAYSTAR_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REPORT]
    processes = [
        subprocess.Popen(command, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120) for process in processes] == [("True\n", "")] * 2
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


@needs_kernels
def test_another_compiler_or_source_is_another_file(tmp_path: Path, monkeypatch) -> None:
    first = library.build(tmp_path, str(COMPILER))
    assert library.build(tmp_path, str(COMPILER)) == first
    source = tmp_path / "kernels.cpp"
    source.write_text(library._SOURCE.read_text() + "\n// changed\n")
    monkeypatch.setattr(library, "_SOURCE", source)
    assert library.build(tmp_path, str(COMPILER)) != first


@pytest.fixture
def afresh(tmp_path: Path, monkeypatch):
    """Looks for the kernels as a new process would, with its cache in this folder."""

    def forget() -> None:
        library.loaded.cache_clear()
        library.announced.cache_clear()

    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYSTAR_CACHE_DIR", str(folder))
    monkeypatch.delenv(library.SWITCH, raising=False)
    forget()
    yield folder
    forget()


@needs_kernels
@pytest.mark.parametrize("trouble", ["broken compiler", "no compiler", "a file for a folder", "half a library"])
def test_troubles_are_one_line_of_note(afresh: Path, monkeypatch, capsys, trouble: str) -> None:
    if trouble == "broken compiler":
        broken = afresh.parent / "broken++"
        broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho kernels.cpp:1: error: no >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
    elif trouble == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(afresh.parent))
    elif trouble == "a file for a folder":
        afresh.write_text("")
    else:
        monkeypatch.setenv("CXX", str(COMPILER))
        library.build(afresh, str(COMPILER)).write_bytes(b"\x7fELF")
    with torch.autocast("cpu", torch.bfloat16):
        assert not any(kernels.serves(torch.ones(1, 32, 4, 4), 32) for _ in range(3))
    told = capsys.readouterr().err
    assert told.startswith("note: bf16 on this CPU runs without raystar's native kernels: "), told
    assert told.count("\n") == 1, told


def test_the_switch(afresh: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(library.SWITCH, "0")
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.serves(torch.ones(1, 32, 4, 4), 32)
    assert capsys.readouterr().err == ""
    assert not afresh.exists()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_no_warnings(tmp_path: Path) -> None:
    command = [str(COMPILER), *library._COMPILE, "-Werror", "-c", str(library._SOURCE), "-o", str(tmp_path / "k.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

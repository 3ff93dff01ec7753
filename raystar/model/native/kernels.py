"""Native CPU kernels of the generator in bfloat16: 3x3 convolution by Winograd, and normalisation with LeakyReLU.

`kernels.cpp` holds the kernels and explains them. It is compiled once, at first use, into `cache_dir()`; where that
cannot be (`unavailable` says why), or `RAYSTAR_NATIVE_KERNELS=0` is set, PyTorch's own kernels do the same work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raystar.model.native.library import announced, loaded

GROUP = 32
"""Channels come in multiples of this (`kGroup` in kernels.cpp)."""


# A compiled graph is for one process with one answer, and must not look into the building.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _available() -> bool:
    return announced()


def serves(x: Tensor, *channels: int) -> bool:
    """Whether the kernels do the work on activations like `x` [B,*,H,W] of so many `channels`.

    They do so for bfloat16 autocast on the CPU, even H and W, and channels in multiples of `GROUP`.
    """
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(number % GROUP == 0 for number in channels)
        and x.shape[0] > 0
        and x.shape[2] % 2 == 0
        and x.shape[3] % 2 == 0
        and _available()
    )


# ---------------------------------------------------------------------------------------------------------------------
# The operators. Activations are bfloat16; results are channels_last, and arguments are made so where they are not.


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`conv2d(x, weight, bias, padding=1) + residual`, rounded once at the end.

    Args:
        x: [B,C,H,W]; H and W are even, C and O multiples of `GROUP`.
        weight: [O,C,3,3] float32.
        bias: [O] float32.
        residual: [B,O,H,W].

    Returns:
        [B,O,H,W] bfloat16, differentiable once.
    """
    residual = residual.to(torch.bfloat16) if residual is not None else None
    return _conv3x3(x.to(torch.bfloat16), weight, bias, residual)


def serves_width(width: int) -> bool:
    """Whether `norm_leaky` has statistics over so many channels."""
    return width > 0 and GROUP % width == 0


def norm_leaky(x: Tensor, scale: Tensor, shift: Tensor, eps: float, slope: float, width: int = 1) -> Tensor:
    """`leaky_relu(scale * group_norm(x) + shift, slope)`, of groups of `width` channels; of one, an instance norm's.

    Args:
        x: [B,C,H,W]; C is a multiple of `GROUP`.
        scale: [B,C], or [C] for all samples.
        shift: as `scale`.
        eps: added to the variance.
        slope: of the leaky unit, at most 1.
        width: a divisor of `GROUP` (`serves_width`).

    Returns:
        [B,C,H,W] bfloat16, differentiable once.
    """
    size = x.shape[:2]
    scale, shift = scale.float().expand(size), shift.float().expand(size)
    return _norm_leaky(x.to(torch.bfloat16), scale, shift, eps, slope, width)[0]


def leaky(x: Tensor, slope: float) -> Tensor:
    """`leaky_relu(x, slope)`, PyTorch's own, but left whole by torch.compile.

    Inductor's code for bfloat16 on a CPU keeps a mask for the backward pass, one byte at a time: it takes seven
    times as long as PyTorch's kernel.
    """
    return _leaky(x, slope)


def _empty(x: Tensor, channels: int) -> Tensor:
    B, _, H, W = x.shape
    return torch.empty(
        B, channels, H, W, dtype=torch.bfloat16, device=x.device, memory_format=torch.channels_last
    )  # fmt: skip


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _at(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None else None


def _call(name: str) -> Any:
    library = loaded()
    assert not isinstance(library, str), library
    return getattr(library, f"raystar_{name}")


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, backward: bool) -> Tensor:
    x, weight = _last(x), weight.contiguous()
    bias = bias.contiguous() if bias is not None else None
    residual = _last(residual) if residual is not None else None
    outputs = weight.shape[1 if backward else 0]
    B, C, H, W = x.shape
    y, threads = _empty(x, outputs), torch.get_num_threads()
    work = torch.empty(_call("conv3x3_bytes")(C, outputs, threads), dtype=torch.uint8)
    _call("conv3x3")(
        _at(x), _at(weight), _at(bias), _at(residual), _at(y), B, H, W, C, outputs, backward, _at(work), threads
    )  # fmt: skip
    return y


@torch.library.custom_op("raystar::conv3x3", mutates_args=(), device_types="cpu")
def _conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return _convolve(x, weight, bias, residual, backward=False)


@_conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return _empty(x, weight.shape[0])


@torch.library.custom_op("raystar::conv3x3_input_grad", mutates_args=(), device_types="cpu")
def _conv3x3_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    return _convolve(grad, weight, None, None, backward=True)


@_conv3x3_input_grad.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return _empty(grad, weight.shape[1])


@torch.library.custom_op("raystar::conv3x3_weight_grad", mutates_args=(), device_types="cpu")
def _conv3x3_weight_grad(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, grad = _last(x), _last(grad)
    (B, C, H, W), outputs, threads = x.shape, grad.shape[1], torch.get_num_threads()
    weight_grad, bias_grad = torch.empty(outputs, C, 3, 3), torch.empty(outputs)
    work = torch.empty(_call("conv3x3_weight_grad_bytes")(C, outputs, threads), dtype=torch.uint8)
    _call("conv3x3_weight_grad")(
        _at(x), _at(grad), _at(weight_grad), _at(bias_grad), B, H, W, C, outputs, _at(work), threads
    )  # fmt: skip
    return weight_grad, bias_grad


@_conv3x3_weight_grad.register_fake
def _(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    outputs = grad.shape[1]
    return x.new_empty(outputs, x.shape[1], 3, 3, dtype=torch.float32), x.new_empty(outputs, dtype=torch.float32)


def _conv3x3_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None


def _conv3x3_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    x_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = _conv3x3_input_grad(grad, weight)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        weight_grad, bias_grad = _conv3x3_weight_grad(x, grad)
    return x_grad, weight_grad, bias_grad if ctx.has_bias else None, grad if ctx.has_residual else None


_conv3x3.register_autograd(_conv3x3_backward, setup_context=_conv3x3_save)


@torch.library.custom_op("raystar::norm_leaky", mutates_args=(), device_types="cpu")
def _norm_leaky(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, slope: float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, shift = _last(x), scale.contiguous(), shift.contiguous()
    B, C, H, W = x.shape
    y, mean, rstd = _empty(x, C), torch.empty(B, C), torch.empty(B, C)
    _call("norm_leaky")(
        _at(x), _at(scale), _at(shift), _at(y), _at(mean), _at(rstd), B, H * W, C, width, eps, slope,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, rstd


@_norm_leaky.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, slope: float, width: int) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return _empty(x, x.shape[1]), mean, rstd


@torch.library.custom_op("raystar::norm_leaky_backward", mutates_args=(), device_types="cpu")
def _norm_leaky_grads(
    x: Tensor, grad: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, slope: float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, grad, scale, shift = _last(x), _last(grad), scale.contiguous(), shift.contiguous()
    B, C, H, W = x.shape
    x_grad, scale_grad, shift_grad = _empty(x, C), torch.empty(B, C), torch.empty(B, C)
    _call("norm_leaky_backward")(
        _at(x), _at(grad), _at(scale), _at(shift), _at(mean), _at(rstd), _at(x_grad), _at(scale_grad), _at(shift_grad),
        B, H * W, C, width, slope, torch.get_num_threads(),
    )  # fmt: skip
    return x_grad, scale_grad, shift_grad


@_norm_leaky_grads.register_fake
def _(
    x: Tensor, grad: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, slope: float, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    scale_grad, shift_grad = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return _empty(x, x.shape[1]), scale_grad, shift_grad


def _norm_leaky_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, scale, shift, _, slope, width = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, shift, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.slope, ctx.width = slope, width


def _norm_leaky_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, mean, rstd = ctx.saved_tensors
    return *_norm_leaky_grads(x, grad, scale, shift, mean, rstd, ctx.slope, ctx.width), None, None, None


_norm_leaky.register_autograd(_norm_leaky_backward, setup_context=_norm_leaky_save)


@torch.library.custom_op("raystar::leaky", mutates_args=(), device_types="cpu")
def _leaky(x: Tensor, slope: float) -> Tensor:
    return torch.nn.functional.leaky_relu(x, slope)


@_leaky.register_fake
def _(x: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("raystar::leaky_backward", mutates_args=(), device_types="cpu")
def _leaky_grad(grad: Tensor, y: Tensor, slope: float) -> Tensor:
    return torch.ops.aten.leaky_relu_backward(grad, y, slope, True)


@_leaky_grad.register_fake
def _(grad: Tensor, y: Tensor, slope: float) -> Tensor:
    return torch.empty_like(y)


def _leaky_grad_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.slope = inputs[2]


def _leaky_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return _leaky_grad(grad, y, ctx.slope), None, None  # linear in its gradient, piecewise constant in y


_leaky_grad.register_autograd(_leaky_grad_backward, setup_context=_leaky_grad_save)


def _leaky_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The sign of y is that of x, and the next layer keeps y anyway.
    ctx.save_for_backward(output)
    ctx.slope = inputs[1]


def _leaky_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (y,) = ctx.saved_tensors
    return _leaky_grad(grad, y, ctx.slope), None


_leaky.register_autograd(_leaky_backward, setup_context=_leaky_save)

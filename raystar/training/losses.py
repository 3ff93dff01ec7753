"""The losses of docs/losses.md: tensors in, 0-d float32 (or wider) tensors out, no network is run here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from raystar.config.schema import Config


def _wide(x: Tensor) -> Tensor:
    """bf16 and fp16 inputs are averaged in float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def d_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """`mean(relu(1 - real)) + mean(relu(1 + fake))`; logits of any shape."""
    return functional.relu(1 - _wide(real_logits)).mean() + functional.relu(1 + _wide(fake_logits)).mean()


def g_adversarial_loss(fake_logits: Tensor) -> Tensor:
    """`-mean(fake)`; logits of any shape."""
    return -_wide(fake_logits).mean()


def style_reconstruction_loss(pred_style: Tensor, target_style: Tensor) -> Tensor:
    """Mean absolute difference of two style codes [B, style_dim]."""
    return functional.l1_loss(_wide(pred_style), _wide(target_style))


def diversity_sensitive_loss(
    fake_1: Tensor, fake_2: Tensor, margin: float | None = None, mean: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Mean absolute difference of two translations [B, C, H, W], at most `margin`. Training maximises it.

    `mean` turns the difference over these B, a worker's share, into that over the whole batch, which the margin is for.
    """
    distance = functional.l1_loss(_wide(fake_1), _wide(fake_2))
    if margin is None:
        return distance
    if mean is None:
        return distance.clamp(max=margin)
    # Clamped by themselves, some shares would be cut off and others not. NaN is above nothing and stays NaN.
    return torch.where(mean(distance) > margin, torch.full_like(distance, margin), distance)


def cycle_consistency_loss(reconstructed: Tensor, original: Tensor) -> Tensor:
    """Mean absolute difference [B, C, H, W]; the identity term is the same function."""
    return functional.l1_loss(_wide(reconstructed), _wide(original))


def r1_penalty(real_logits: Tensor, real_inputs: Tensor) -> Tensor:
    """Mean over the batch of the squared norm of d(sum of logits)/d(input), differentiable.

    Args:
        real_logits: logits of `real_inputs`, any shape.
        real_inputs: [B, C, H, W] with `requires_grad`.
    """
    (grad,) = torch.autograd.grad(real_logits.sum(), real_inputs, create_graph=True)
    return grad.flatten(1).square().sum(dim=1).mean()


def lambda_ds(epoch: int, w_ds: float, ds_decay: float) -> float:
    """Weight of the diversity term at `epoch` (from 1): `w_ds` falling linearly to 0 at `ds_decay + 1`, in epochs."""
    progress = min(max((epoch - 1) / ds_decay, 0.0), 1.0)
    return w_ds * (1 - progress)


def outlasting(config: Config) -> str | None:
    """What to say of a schedule of `lambda_ds` that does not come to 0 within the run; None of one that does.

    A run of one epoch has no schedule.
    """
    epochs, weights = config.training.epochs, config.loss
    last = lambda_ds(epochs, weights.w_ds, config.ds_decay)
    if epochs == 1 or last == 0:
        return None
    return (
        f"loss.ds_decay_epochs {weights.ds_decay_epochs:g} outlasts training.epochs {epochs}: the weight of the "
        f"diversity term falls from {weights.w_ds:g} to {last:.3g}, never to 0; set loss.ds_decay_epochs to a share of "
        f"the run, for example 0.5, or to at most {epochs - 1} epochs"
    )

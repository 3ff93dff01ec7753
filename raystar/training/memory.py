"""How much memory a training step takes, from the configuration alone, and what would make it fit."""

from __future__ import annotations

import torch
from torch import Tensor

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.batches import Batch
from raystar.training.state import TrainState
from raystar.training.step import kept_for_g

CONTEXT = 600 * 2**20
"""Bytes that a process takes of a GPU before its first tensor, about: CUDA's context, cuBLAS and cuDNN."""
_ROOM = 1.25  # workspaces, the optimiser's temporaries, and what the allocator cannot hand out in one piece


def step_bytes(config: Config, shape: tuple[int, int, int]) -> int:
    """Bytes that a training step takes at its largest, about, on a GPU, by the tensors that it keeps.

    Weights, gradients, AdamW's moments, averages, and what the backward pass of the update of G, E and F needs: the
    step is run on tensors without data, and what is saved is counted. In reduced precision it is taken to be half.

    Args:
        shape: (C, H, W) of a latent.
    """
    exact = override(config, {"training.use_amp": False, "training.use_compile": False, "training.device": "cpu"})
    state = TrainState.create(exact, "meta")
    copies = {"G": 4, "F": 4, "E": 4, "D": 4}
    if config.training.ema_epochs > 0:
        copies |= {"G": 5, "F": 5, "E": 5}
    weights = sum(4 * copies[name] * p.numel() for name, net in state.nets.items() for p in net.parameters())
    weight_storages = {_place(p) for _, net in state.nets.items() for p in net.parameters()}
    saved: dict[int, Tensor] = {}  # the tensors stay, so that no other takes the place of one

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in weight_storages:
            saved.setdefault(_place(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = kept_for_g(state, _batch(config, shape))
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del loss
    return int(_ROOM * (weights + kept * (0.5 if config.training.use_amp else 1.0)))


def step_key(config: Config) -> tuple[object, ...]:
    """What `step_bytes` depends on: configurations of one key take the same."""
    training = config.training
    return (
        config.model, len(config.data.domains), training.batch_size, training.recompute, training.use_amp,
        training.ema_epochs > 0, config.loss.w_id > 0, config.loss.w_ds > 0,
    )  # fmt: skip


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _batch(config: Config, shape: tuple[int, int, int]) -> Batch:
    B, Z = config.training.batch_size, config.model.latent_dim
    latents = (torch.zeros(B, *shape, device="meta") for _ in range(2))
    domains = (torch.zeros(B, dtype=torch.long, device="meta") for _ in range(2))
    return Batch(*latents, *domains, *(torch.zeros(B, Z, device="meta") for _ in range(3)))


def advice(config: Config, shape: tuple[int, int, int], room: int) -> str:
    """What would make a step fit into `room` bytes, in words: each key alone, with about what the step takes then."""
    now = step_bytes(config, shape)
    recomputed = [] if config.training.recompute else [{"training.recompute": True}]
    smaller = [{"training.batch_size": config.training.batch_size >> k} for k in range(1, 32)]
    words = []
    for settings in (recomputed, [values for values in smaller if values["training.batch_size"]]):
        sizes = ((values, step_bytes(override(config, values), shape)) for values in settings)
        fitting = next(((values, size) for values, size in sizes if size <= room), None)
        if fitting is not None:
            ((key, value),) = fitting[0].items()
            words.append(f"{key}={str(value).lower()} takes about {_gib(fitting[1])}")
    instead = " and ".join(words) or "lower training.batch_size or model.base_dim"
    return f"a step takes about {_gib(now)} of {_gib(room)}; {instead}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"

"""`torch.compile` of single networks, with eager as the labelled way out.

The original modules stay in `TrainState.nets` (saved, exported, and used by R1, whose second derivatives
compiled code does not have); compiled ones stand beside them in `TrainState.calls`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raystar.config import Config
from raystar.step import TrainState, autocast

_SWITCHES = {
    "G": "compile_generator",
    "F": "compile_mapping_network",
    "E": "compile_style_encoder",
    "D": "compile_discriminator",
}


@dataclass(frozen=True)
class Compiled:
    """What `compile_networks` did."""

    modules: tuple[str, ...]
    """Networks that run compiled, for example `("G", "E")`."""
    notes: tuple[str, ...]
    """One line for each network that fell back to eager: which, and why."""
    seconds: float
    """Time spent compiling, apart from any throughput."""


def compile_networks(state: TrainState) -> Compiled:
    """Compiles the networks that `training` asks for and runs each once, forwards and backwards.

    A network whose compilation fails for any reason keeps running eager; the note says why.
    """
    training = state.config.training
    if not training.use_compile:
        return Compiled((), (), 0.0)
    started = time.perf_counter()
    done, notes = [], []
    for name, switch in _SWITCHES.items():
        if not getattr(training, switch):
            continue
        try:
            compiled = _compile(getattr(state.nets, name), state.config)
            _exercise(name, compiled, state)
        # Dynamo, Inductor, Triton and the C++ compiler each raise their own kinds, and all mean the same here.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            notes.append(f"{name} runs eager, its compilation failed: {type(error).__name__}: {reason[:200]}")
            continue
        state.calls[name] = compiled
        done.append(name)
    return Compiled(tuple(done), tuple(notes), time.perf_counter() - started)


def _compile(net: torch.nn.Module, config: Config) -> Callable[..., Tensor]:
    training = config.training
    # A mode and options cannot be given together, so the mode is spelt out to let compile_cudagraphs decide.
    mode = None if training.compile_mode == "default" else training.compile_mode
    options = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    options["triton.cudagraphs"] = training.compile_cudagraphs
    return torch.compile(net, dynamic=training.compile_dynamic, fullgraph=training.compile_fullgraph, options=options)


def _exercise(name: str, call: Callable[..., Tensor], state: TrainState) -> None:
    """Runs `call` in the shapes of a training step, so that failures and seconds show before the first one."""
    config, device = state.config, state.device
    B, model = config.training.batch_size, config.model
    size = 32  # only compiled again, never wrong, for other latent sizes
    layout = torch.channels_last if config.training.channels_last else torch.contiguous_format

    def latents(n: int) -> Tensor:
        return torch.zeros(n, model.latent_channels, size, size, device=device).to(memory_format=layout)

    def domains(n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.long, device=device)

    styles = 5 if config.loss.w_id > 0 else 4
    inputs: dict[str, list[tuple[Tensor, Tensor]]] = {
        "G": [
            (latents(B), torch.zeros(styles * B, model.style_dim, device=device)),
            (latents(2 * B), torch.zeros(2 * B, model.style_dim, device=device)),
        ],
        "F": [(torch.zeros(3 * B, model.latent_dim, device=device), domains(3 * B))],
        "E": [(latents(2 * B), domains(2 * B))],
        "D": [(latents(3 * B), domains(3 * B)), (latents(2 * B), domains(2 * B))],
    }
    for first, second in inputs[name]:
        with autocast(config, device):
            output = call(first.requires_grad_(name in "GD"), second)
        output.float().sum().backward()
    getattr(state.nets, name).zero_grad(set_to_none=True)

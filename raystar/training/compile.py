"""`torch.compile` of single networks, with eager as the labelled way out.

The original modules stay in `TrainState.nets` (saved, exported, and used by R1, whose second derivatives
compiled code does not have); compiled ones stand beside them in `TrainState.calls`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raystar.config.load import get_value, override
from raystar.config.schema import Config
from raystar.data.batches import share
from raystar.model.device import autocast, channels_last, fast_bf16, fp16_on_cpu, layout
from raystar.training.losses import lambda_ds
from raystar.training.state import TrainState

logger = logging.getLogger(__name__)

_SWITCHES = {
    "G": "compile_generator",
    "F": "compile_mapping_network",
    "E": "compile_style_encoder",
    "D": "compile_discriminator",
}
SPEED_KEYS = tuple(
    f"training.{name}"
    for name in (
        "use_compile", "compile_mode", "compile_dynamic", "compile_fullgraph", "compile_cudagraphs",
        *_SWITCHES.values(), "recompute", "channels_last", "use_amp", "amp_dtype", "tf32", "cudnn_benchmark",
        "deterministic",
    )
)  # fmt: skip
"""Settings that change how fast a step is, and its results by rounding alone."""
_DEFAULTS = Config()
# compile_cudagraphs decides on CUDA graphs, whatever the mode says; without them these modes are others.
_MODES = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_RECOMPILE_LIMIT = 64  # of one network in one process; torch's 8 is used up by a few trials of different sizes


@dataclass(frozen=True)
class Compiled:
    """What `compile_networks` did."""

    modules: tuple[str, ...]
    """Networks that run compiled, for example `("G", "E")`."""
    notes: tuple[str, ...]
    """What was not done as asked, a line each: a network that fell back to eager, and why."""
    seconds: float
    """Time spent compiling, apart from any throughput."""


def compile_networks(state: TrainState, size: tuple[int, int]) -> Compiled:
    """Compiles the networks that `training` asks for and runs each as a step will, forwards and backwards.

    `size` is (H, W) of the latents.

    A network whose compilation fails for any reason keeps running eager; the note says why.
    """
    training = state.config.training
    if not training.use_compile:
        return Compiled((), (), 0.0)
    started = time.perf_counter()
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    done, notes = [], []
    if training.compile_cudagraphs and not graphs_possible():
        notes.append(f"compiled without CUDA graphs, which torch {torch.__version__} has in its main thread alone")
    for name, switch in _SWITCHES.items():
        if not getattr(training, switch):
            continue
        try:
            compiled = _compile(getattr(state.nets, name), state.config)
            _exercise(name, compiled, state, size)
        # Dynamo, Inductor, Triton and the C++ compiler each raise their own kinds, and all mean the same here.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            notes.append(f"{name} runs eager, its compilation failed: {type(error).__name__}: {reason[:200]}")
            continue
        state.calls[name] = compiled
        done.append(name)
    return Compiled(tuple(done), tuple(notes), time.perf_counter() - started)


def labels(config: Config, compiled: Compiled) -> dict[str, str]:
    """What runs compiled, and why something does not, in words for a run's tags; the latter also goes to stderr."""
    for note in compiled.notes:
        logger.warning(note)
    tags = {}
    if config.training.use_compile:
        tags["raystar.compiled_modules"] = " ".join(compiled.modules) or "none"
    if compiled.notes:
        tags["raystar.compile_note"] = "; ".join(compiled.notes)
    return tags


def graphs() -> int:
    """Graphs that this process has compiled so far; more of them during training are recompilations."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def canonical(config: Config, device: torch.device) -> Config:
    """`config` with the settings of `training` that make no difference on `device` set to their defaults.

    Two configurations that are canonically equal run the same code, so a search for speed tries only one.
    """
    if fp16_on_cpu(config, device):
        config = override(config, {"training.use_amp": False})
    training, same = config.training, []
    if device.type == "cpu":
        same += ["tf32", "cudnn_benchmark", "deterministic", "compile_cudagraphs"]
    if not fast_bf16(device):
        same += ["use_amp", "amp_dtype"]
    if not training.use_amp:
        same.append("amp_dtype")
    values = {f"training.{name}": get_value(_DEFAULTS, f"training.{name}") for name in same}
    values["training.channels_last"] = channels_last(config, device)
    if not training.use_compile or not any(getattr(training, switch) for switch in _SWITCHES.values()):
        names = ("mode", "dynamic", "fullgraph", "cudagraphs")
        switches = [*(f"compile_{name}" for name in names), *_SWITCHES.values(), "use_compile"]
        values |= {f"training.{name}": get_value(_DEFAULTS, f"training.{name}") for name in switches}
    else:
        values["training.compile_mode"] = _MODES.get(training.compile_mode, training.compile_mode)
    return override(config, values, "canonical")


def _compile(net: torch.nn.Module, config: Config) -> Callable[..., Tensor]:
    training = config.training
    # A mode and options cannot be given together, so the mode is spelt out to let compile_cudagraphs decide.
    mode = None if training.compile_mode == "default" else training.compile_mode
    options = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    options["triton.cudagraphs"] = training.compile_cudagraphs and graphs_possible()
    return torch.compile(net, dynamic=training.compile_dynamic, fullgraph=training.compile_fullgraph, options=options)


def graphs_possible() -> bool:
    """Whether Inductor's CUDA graphs work in this thread: before torch 2.13 only in the one that imported them.

    Tune runs each trial in a thread of its own (pytorch issue 123177).
    """
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 13) or threading.current_thread() is threading.main_thread()


def _exercise(name: str, call: Callable[..., Tensor], state: TrainState, size: tuple[int, int]) -> None:
    """Runs `call` on what a training step gives it, so that failures and seconds show before the first one.

    Shapes, types, and who needs gradients are those of `training.step.train_step`: another pattern is another graph.
    """
    config, device = state.config, state.device
    training, model = config.training, config.model
    part = share(training.batch_size, state.group.rank, state.group.size)
    B, styles = part.stop - part.start, 3 if config.loss.w_id > 0 else 2
    memory_format = layout(config, torch.empty(1, model.latent_channels, *size, device=device))
    with autocast(config, device):  # what networks hand on to each other is in autocast's type
        amp = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if amp else torch.float32
    translated = torch.float32 if model.residual else dtype  # a residual G adds to the content in the content's type

    def latents(n: int, *, fake: bool) -> Tensor:
        x = torch.zeros(n, model.latent_channels, *size, device=device, dtype=translated if fake else torch.float32)
        return x.to(memory_format=memory_format).requires_grad_(fake)

    def codes(n: int) -> Tensor:
        return torch.zeros(n, model.style_dim, device=device, dtype=dtype, requires_grad=True)

    def domains(n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.long, device=device)

    content = latents(B, fake=False)
    inputs: dict[str, list[tuple[Tensor, Tensor]]] = {
        "G": [(latents(2 * B, fake=True), codes(2 * B))],
        "F": [(torch.zeros(3 * B, model.latent_dim, device=device), domains(3 * B))],
        "E": [(latents(2 * B, fake=False), domains(2 * B)), (latents(2 * B, fake=True), domains(2 * B))],
        "D": [(latents(3 * B, fake=True).detach(), domains(3 * B)), (latents(2 * B, fake=True), domains(2 * B))],
    }
    net = getattr(state.nets, name)
    if name == "G":  # in epochs in which the pair of the diversity term is learnt from, and in those in which it is not
        begin, end = (lambda_ds(epoch, config.loss.w_ds, config.ds_decay) for epoch in (1, training.epochs))
        inputs[name] += [(content, codes((2 + styles) * B))] if begin > 0 else []
        inputs[name] += [(content, codes(styles * B))] if end == 0 else []
        if end == 0:
            with torch.no_grad(), autocast(config, device):
                call(content, codes(2 * B))
    for number, (first, second) in enumerate(inputs[name]):
        frozen = name == "D" and number == 1  # D is frozen while G is updated
        net.requires_grad_(not frozen)
        try:
            with autocast(config, device):
                output = call(first, second)
            output.float().sum().backward()
        finally:
            net.requires_grad_(True)
    net.zero_grad(set_to_none=True)

"""How fast settings train: their step beside the eager one, in turn, behind the parity gate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank
from raystar.data.batches import LatentDataset
from raystar.model.device import resolve_device, set_backends, synchronize
from raystar.training.compile import compile_networks, graphs, labels
from raystar.training.parity import check_parity
from raystar.training.state import TrainState
from raystar.training.step import train_step

_TURN = 5
"""Steps of one kind before the other has its turn: enough for a GPU's queue to fill, few enough for both kinds to
share each phase of a machine whose speed drifts."""


def check_steps(config: Config, bank: Bank) -> None:
    """Raises `RaystarError` if an epoch has too few steps to time."""
    data = LatentDataset(bank, config, torch.device("cpu"))
    if data.steps < 2 * _TURN:
        raise RaystarError(
            f"training.epoch_size: {len(data)} samples are {data.steps} steps, too few to time; "
            f"at least {2 * _TURN * config.training.batch_size} are wanted"
        )


def measure(config: Config, eager: Config, bank: Bank) -> Iterator[tuple[dict[str, float], dict[str, str]]]:
    """Times the step of `config` beside that of `eager`, both training; yields metrics and labels each epoch.

    Compiling comes before, apart from any timing. `eager` runs uncompiled, whatever it says.

    Raises:
        WrongResults: `config` gives other losses or gradients than eager float32.
    """
    device = resolve_device(config)
    data = LatentDataset(bank, config, device)
    check_steps(config, bank)
    candidate = TrainState.create(config, device)
    set_backends(config, device)
    compiled = compile_networks(candidate, bank.shape[1:])
    tags = labels(config, compiled)
    check_parity(candidate, data)
    reference = TrainState.create(override(eager, {"training.use_compile": False}, "eager"), device)
    states = (candidate, reference)
    _turn(states, data, 1, range(1, _TURN + 1))  # memory, caches and clocks settle
    for epoch in range(1, config.training.epochs + 1):
        data.set_epoch(epoch)
        before = graphs()
        # Whole turns of whole batches: an incomplete last batch is another size, and would be compiled for itself.
        whole = len(data) // config.training.batch_size
        turns = [range(first, first + _TURN) for first in range(1, whole - _TURN + 2, _TURN)]
        seconds = [_turn(states, data, epoch, steps) for steps in turns]
        samples = _TURN * config.training.batch_size
        yield (
            {
                # The median of neighbours: a burst of something else on the machine costs one pair, not the mean.
                "perf/speedup": statistics.median(theirs / own for own, theirs in seconds),
                "perf/steady_samples_per_s": samples / statistics.median(own for own, _ in seconds),
                "perf/eager_samples_per_s": samples / statistics.median(theirs for _, theirs in seconds),
                "perf/compile_s": compiled.seconds,
                "perf/compiled_modules": float(len(compiled.modules)),
                "perf/recompilations": float(graphs() - before),
            },
            tags,
        )


def _turn(states: Sequence[TrainState], data: LatentDataset, epoch: int, steps: range) -> list[float]:
    """Seconds that each of `states` takes for the same `steps`."""
    seconds = []
    for state in states:
        set_backends(state.config, state.device)  # they are the process's, and the two may want others
        synchronize(state.device)
        started = time.perf_counter()
        for step in steps:
            train_step(state, data.batch(step).to(state.device), epoch=epoch, step=step)
        synchronize(state.device)
        seconds.append(time.perf_counter() - started)
    return seconds

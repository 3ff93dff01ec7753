"""The training loop: `Trainer.run()` yields one `Progress` an epoch, and knows neither Ray nor MLflow."""

from __future__ import annotations

import copy
import gc
import json
import logging
import resource
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from raystar.base.console import PROGRESS
from raystar.base.errors import TrialDiverged, TrialOutOfMemory
from raystar.config.schema import Config
from raystar.data.bank import Bank
from raystar.data.batches import Batch, LatentDataset, check_epoch
from raystar.model.device import native, out_of_memory, resolve_device, set_backends
from raystar.model.native import kernels
from raystar.model.networks import Nets
from raystar.pictures import grid
from raystar.pictures.codec import Codec
from raystar.ruler.ruler import Ruler
from raystar.training.compile import compile_networks, graphs, labels
from raystar.training.display import Display
from raystar.training.loss_table import epoch_row
from raystar.training.losses import lambda_ds
from raystar.training.memory import advice
from raystar.training.resume import restore, snapshot
from raystar.training.schedule import rate_factor, set_rates
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, train_step
from raystar.training.system_metrics import Usage
from raystar.training.workers import ALONE, Group

logger = logging.getLogger(__name__)

EXPLODED = 1e6
"""A loss that is further from 0 has exploded: terms of a GAN that trains stay below some hundreds, R1's included."""

SUMMARY = "[Epoch Summary]"
"""What the line of an epoch begins with, before its JSON, where `training.log_json` is on."""

MAX_SKIPPED = 0.1
"""Share of an epoch's batches that may be left out for want of memory before the run fails."""


@dataclass(frozen=True)
class Progress:
    """What one epoch gave."""

    epoch: int
    step: int
    """Optimiser steps of the whole run until the epoch's end."""
    metrics: dict[str, float]
    """Some of `base.metrics.QUALITY`, and how busy the machine was."""
    images: dict[str, Image.Image]
    """`grid_ref` and `grid_noise`, in epochs that draw them."""
    first_images: dict[str, Image.Image]
    """The same of the untrained networks, to be recorded as epoch 0; with a fresh run's first pictures."""
    labels: dict[str, str]
    """Facts about the run in words, for the record's tags: what runs compiled, and why something does not."""
    checkpoint: dict[str, Any] = field(repr=False)
    """For `model.checkpoint.save`; its tensors are live, so save it before the next epoch is asked for."""


class Trainer:
    """Trains one configuration, alone or as one of several workers that share every batch.

    All workers train, report the same losses and stop together; only the first measures, draws and shows anything.

    Args:
        config: the whole configuration.
        bank: the latents (`data.bank.open_bank`).
        ruler: measures the networks as they are shown, in epochs that `measure_at` says; None measures nothing.
        codec: decodes the grids; None draws none.
        state: networks and optimisers; fresh ones from `training.seed` by default.
        first_epoch: the epoch that `state` is to be trained in next.
        checkpoint: continues after this checkpoint's epoch, bitwise as if never stopped.
        source: where the checkpoint comes from, for errors.
        name: shown in the terminal.
        group: the workers of this run; of `state`, where one is given.
        measure_at: epochs that the ruler measures, such as a sweep's rungs, besides every `ruler.every_epochs` and the
            last. Where neither is given, epochs with grids are measured.
    """

    def __init__(
        self,
        config: Config,
        bank: Bank,
        ruler: Ruler | None = None,
        codec: Codec | None = None,
        state: TrainState | None = None,
        *,
        first_epoch: int = 1,
        checkpoint: Mapping[str, Any] | None = None,
        source: str = "checkpoint",
        name: str = "",
        group: Group = ALONE,
        measure_at: Collection[int] | None = None,
    ) -> None:
        self.config = config
        self.device = state.device if state is not None else resolve_device(config)
        self.state = state if state is not None else TrainState.create(config, self.device, group)
        self.group = self.state.group
        first = self.group.rank == 0
        set_backends(config, self.device)
        _note_kernels(config, bank.shape, self.device)
        check_epoch(bank, config)
        self.data = LatentDataset(bank, config, self.device, self.group.rank, self.group.size)
        self.ruler = ruler.to(self.device) if ruler is not None and first else None
        self.codec = codec if first else None
        self.measure_at = measure_at
        self._grid_set: grid.GridSet | None = None
        self.first_epoch = first_epoch
        if checkpoint is not None:
            self.first_epoch = restore(self.state, checkpoint, source) + 1
        self.display = Display(config, name, self.data.steps)
        self._usage = Usage(self.device)
        self.first_step_at: float | None = None
        """Unix time at which the first step was done; None before."""

    def run(self) -> Iterator[Progress]:
        """Trains epoch by epoch.

        Raises:
            TrialDiverged: a loss became NaN or infinite, and the weights have not moved on it; or it exploded.
            TrialOutOfMemory: more than `MAX_SKIPPED` of an epoch's batches did not fit; with several workers, one.
        """
        if self.config.training.use_compile and self.config.progress != "off":
            logger.log(PROGRESS, "compiling the networks; minutes the first time, seconds from the cache")
        compiled = compile_networks(self.state, self.data.bank.shape[1:])
        tags = labels(self.config, compiled)
        # Kept as they are before the first step, which need not wait for pictures: they are drawn with the first grids.
        untrained = copy.deepcopy(self.state.nets) if self.first_epoch == 1 and self._draws else None
        fixed = {"perf/compile_s": compiled.seconds, "perf/compiled_modules": float(len(compiled.modules))}
        for epoch in range(self.first_epoch, self.config.training.epochs + 1):
            self._usage.begin()
            graphs_before = graphs()
            metrics = self._train_epoch(epoch) | fixed | self._usage.read()
            metrics["perf/recompilations"] = float(graphs() - graphs_before)
            started = time.perf_counter()
            if self.ruler is not None and self._measures_in(epoch):
                scores = self.ruler.measure(self.state.shown, self.config)
                metrics |= {f"eval/{name}": value for name, value in scores.items()}
            metrics["perf/eval_s"] = time.perf_counter() - started
            images, first_images = {}, {}
            if self._draws_in(epoch):
                images = self._draw(self.state.shown)
                if untrained is not None:
                    first_images = self._draw(untrained)
                    untrained = None
            done = epoch * self.data.steps
            if self.group.rank == 0:
                self.display.epoch_done(epoch, metrics)
                self._log_epoch(epoch_row(epoch, done, metrics))
            yield Progress(
                epoch, done, metrics, images, first_images, tags, snapshot(self.state, epoch, metrics, self.data.steps)
            )

    def _log_epoch(self, row: Mapping[str, float]) -> None:
        if self.config.training.log_json:
            logger.info(f"{SUMMARY} {json.dumps({'time': time.time(), **row})}")

    def _measures_in(self, epoch: int) -> bool:
        every = self.config.ruler.every_epochs
        if every is None and self.measure_at is None:
            every = self.config.grid_every
        return epoch in (self.measure_at or ()) or self._falls_on(epoch, every or 0)

    def _draws_in(self, epoch: int) -> bool:
        # What a sweep measures it shows as well: a trial that ends at a rung would else have no picture.
        return self._draws and (epoch in (self.measure_at or ()) or self._falls_on(epoch, self.config.grid_every))

    def _falls_on(self, epoch: int, every: int) -> bool:
        """Whether `epoch` is the last or one of every so many; 0 for none of these."""
        return epoch == self.config.training.epochs or (every > 0 and epoch % every == 0)

    @property
    def _draws(self) -> bool:
        return self.codec is not None and self.config.grid_every > 0

    def _draw(self, nets: Nets) -> dict[str, Image.Image]:
        assert self.codec is not None
        if self._grid_set is None:
            self._grid_set = grid.choose(self.data.bank, self.config, self.codec)
        return grid.draw(nets, self.config, self._grid_set, self.codec)

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        self.data.set_epoch(epoch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        # Sums stay on the device: reading one would make the host wait for every step before the next is queued.
        sums = torch.zeros(len(LOGGED), dtype=torch.float64, device=self.device)
        done, samples, skipped = 0, 0, 0
        before = (epoch - 1) * self.data.steps  # steps of the run
        started = time.perf_counter()
        for step, batch in enumerate(self.data.batches(), start=1):
            set_rates(self.state, self._rate_factor(before + step - 1))
            logs = self._try(batch, epoch, step)
            if logs is None:  # only here, where the exception no longer holds the step's activations
                skipped += 1
                self._recover_memory(epoch, skipped)
                continue
            values = torch.stack([logs[name].double() for name in LOGGED])
            sums.add_(values, alpha=self.data.weight(step))
            done += 1
            samples += self.data.rows(step)
            if self.first_step_at is None:
                self.first_step_at = time.time()
            self._show(epoch, step, values, sums)
        sums = self.group.sum(sums)
        means = dict(zip(LOGGED, (sums / max(done, 1)).tolist(), strict=True))
        _check_losses(means, means.values(), epoch, self.data.steps)
        seconds = time.perf_counter() - started  # after the sums were read, so all steps are done
        metrics = {
            f"train/{name}": value for name, value in (means | self._settings(epoch, before + self.data.steps)).items()
        }
        metrics |= {
            "perf/samples_per_s": samples / seconds,
            "perf/train_s": seconds,
            "perf/peak_memory_gib": self._peak_memory_gib(),
            "perf/skipped_batches": float(skipped),
        }
        return metrics

    def _rate_factor(self, step: int) -> float:
        return rate_factor(self.config.training, step, self.config.training.epochs * self.data.steps)

    def _settings(self, epoch: int, step: int) -> dict[str, float]:
        """What a schedule sets, as it stands before `step` of the run, from 0."""
        training, factor = self.config.training, self._rate_factor(step)
        return {
            "lambda_ds": lambda_ds(epoch, self.config.loss.w_ds, self.config.ds_decay),
            "lr_g": training.lr_g * factor,
            "lr_d": training.lr_d * factor,
            "lr_mapping": training.lr_mapping * factor,
        }

    def _try(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor] | None:
        """The losses of one step; None where there was no memory for it."""
        try:
            logs = train_step(self.state, batch, epoch=epoch, step=step)
            self.state.average(self.data.steps)
            return logs
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if self.group.size > 1:
            # The others wait for this worker's gradients, of which it has none; only its end can free them.
            raise TrialOutOfMemory(
                f"worker {self.group.rank} was out of memory in step {step} of epoch {epoch} (peak "
                f"{self._peak_memory_gib():.1f} GiB), and several workers cannot skip a batch; {self._memory_advice()}"
            )
        return None

    def _show(self, epoch: int, step: int, values: Tensor, sums: Tensor) -> None:
        """A step's losses on the screen and as JSON, where it is their turn; one that is not finite is found here."""
        training = self.config.training
        shown = step % training.display_interval == 0
        logged = training.log_json and step % training.log_interval == 0
        if not shown and not logged:
            return
        everywhere = self.group.sum(torch.stack([values * self.data.weight(step), sums])).tolist()
        current = dict(zip(LOGGED, everywhere[0], strict=True))
        _check_losses(current, everywhere[1], epoch, step)
        if shown and self.group.rank == 0:
            self.display.step(epoch, step, current)
        if logged and self.group.rank == 0:
            settings = self._settings(epoch, (epoch - 1) * self.data.steps + step - 1)
            logger.info(json.dumps({"time": time.time(), "epoch": epoch, "step": step, **current, **settings}))

    def _recover_memory(self, epoch: int, skipped: int) -> None:
        self.state.opt_g.zero_grad(set_to_none=True)
        self.state.opt_d.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if skipped > MAX_SKIPPED * self.data.steps:
            raise TrialOutOfMemory(
                f"out of memory in {skipped} of {self.data.steps} batches of epoch {epoch} "
                f"(peak {self._peak_memory_gib():.1f} GiB); {self._memory_advice()}"
            )

    def _memory_advice(self) -> str:
        if self.device.type != "cuda":
            return "lower training.batch_size or model.base_dim"
        return advice(self.config, self.data.bank.shape, torch.cuda.mem_get_info(self.device)[1])

    def _peak_memory_gib(self) -> float:
        """Of this worker: this epoch's GPU memory; on a CPU of the whole process since its start."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device)) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _note_kernels(config: Config, shape: tuple[int, int, int], device: torch.device) -> None:
    model = config.model
    width = model.base_dim // model.num_groups if model.norm == "adagn" else 1
    if not kernels.serves_width(width) and native(config, torch.empty(1, *shape, device=device)):
        logger.info(
            f"groups of {width} channels are normalised without raystar's native kernels, which take up to "
            f"{kernels.GROUP}, in powers of two; convolutions use them"
        )


def _check_losses(named: Mapping[str, float], sums: Any, epoch: int, step: int) -> None:
    if not all(map(_finite, sums)):
        bad = [name for name, value in named.items() if not _finite(value)]
        raise TrialDiverged(f"{' and '.join(bad) or 'a loss'} became NaN or infinite in epoch {epoch}, by step {step}")
    large = [f"{name} {value:.3g}" for name, value in named.items() if abs(value) > EXPLODED]
    if large:
        raise TrialDiverged(f"losses exploded in epoch {epoch}, by step {step}: {', '.join(large)}")


def _finite(value: float | Tensor) -> bool:
    return float("-inf") < float(value) < float("inf")

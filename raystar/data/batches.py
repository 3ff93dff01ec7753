"""A bank's latents in the order and the pairs that training sees."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raystar.base.console import note
from raystar.base.errors import RaystarError
from raystar.config.schema import Config
from raystar.data.bank import Bank

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one training step consumes; the noise travels with it, so a step is a pure function of its arguments.

    B contents, C x H x W latents, Z `latent_dim`.
    """

    content: Tensor
    """[B,C,H,W] unscaled latents of the source domains."""
    x_ref: Tensor
    """[B,C,H,W] unscaled latents of the target domains, the style references."""
    y_src: Tensor
    """[B] int64, domain of each content."""
    y_trg: Tensor
    """[B] int64, target domain, never the source domain."""
    z_trg: Tensor
    """[B,Z] noise of the latent-guided path."""
    z_1: Tensor
    """[B,Z] first noise of the diversity term."""
    z_2: Tensor
    """[B,Z] second noise of the diversity term."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def share(rows: int, rank: int, workers: int) -> slice:
    """The contiguous part of a batch of `rows` that worker `rank` takes; parts differ by one row at most.

    With fewer rows than workers everyone takes all of them: averaged over all workers' rows the losses and gradients
    are the same, and no worker is left with nothing to run.
    """
    if rows < workers:
        return slice(0, rows)
    return slice(rank * rows // workers, (rank + 1) * rows // workers)


def drawn(bank: Bank, config: Config) -> tuple[NDArray[np.int64], ...]:
    """Rows of each domain that training draws from: all training rows, or `data.max_samples` of them.

    Which ones depends on names alone, as the split does: picture by picture in the order in which pictures would be
    held out. So crops of a picture go together, but for those of the last, and ten are among fifty.
    """
    limits = config.data.max_samples
    if limits is None:
        return bank.train
    each = limits if isinstance(limits, tuple) else (limits,) * len(bank.train)
    return tuple(
        np.sort(rows[np.lexsort((rows, turns))[:limit]])
        for rows, turns, limit in zip(bank.train, bank.train_turns, each, strict=True)
    )


def epoch_samples(bank: Bank, config: Config) -> int:
    """Contents of one epoch: `training.epoch_size`, by default the largest domain that is drawn from, times domains."""
    limits = config.data.max_samples
    each = limits if isinstance(limits, tuple) else (limits,) * len(bank.train)
    pairs = zip(map(len, bank.train), each, strict=True)
    most = max(count if limit is None else min(limit, count) for count, limit in pairs)
    return config.training.epoch_size or most * len(bank.domains)


def check_epoch(bank: Bank, config: Config) -> None:
    """Raises `RaystarError` if an epoch would have no step: it has less than a batch, and such a rest is left out."""
    samples, batch = epoch_samples(bank, config), config.training.batch_size
    if config.training.drop_last and samples < batch:
        raise RaystarError(
            f"training.batch_size {batch} is more than an epoch's {samples} samples; "
            "lower it or set training.drop_last=false"
        )


class LatentDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Two uniform stages (source domain, another target domain, then a latent in each), batched by index.

    Every draw is a pure function of (`training.seed`, epoch, step), so a resumed run sees the same batches, and
    several workers (`rank` of `workers`) see the shares of the batches that one process would see.
    """

    def __init__(self, bank: Bank, config: Config, device: torch.device, rank: int = 0, workers: int = 1) -> None:
        self.bank = bank
        self.device = device
        self.training = config.training
        self.latent_dim = config.model.latent_dim
        self.rank, self.workers = rank, workers
        self.size = epoch_samples(bank, config)
        self.storage = _place(bank, config.data.preload_to_gpu, device)
        rows = drawn(bank, config)
        self._starts = np.cumsum([0, *map(len, rows)])
        self._rows = np.concatenate(rows)
        self._plan: dict[str, Tensor] = {}
        self._noise: Tensor | None = None
        """[3,size,Z] of the whole epoch, where it has gone to a GPU."""
        self.epoch = 0
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        """Draws the indices of a whole epoch (from 1)."""
        if epoch == self.epoch:
            return
        rng = np.random.default_rng([self.training.seed, epoch, 0])
        n = len(self.bank.domains)
        source = rng.integers(n, size=self.size)
        target = (source + rng.integers(1, n, size=self.size)) % n  # any domain but the source
        lengths = np.diff(self._starts)
        # A uniform number times a domain's length picks in domains of different lengths without a loop.
        u = rng.random((2, self.size))
        plan = {
            "y_src": source,
            "y_trg": target,
            "content": self._rows[self._starts[source] + (u[0] * lengths[source]).astype(np.int64)],
            "x_ref": self._rows[self._starts[target] + (u[1] * lengths[target]).astype(np.int64)],
        }
        # Once an epoch to where the latents are: a copy of a few numbers costs a GPU as much as a gather.
        self._plan = {name: torch.from_numpy(values).to(self.storage.device) for name, values in plan.items()}
        self.epoch = epoch
        if self.storage.device.type != "cpu":
            self.send_noise()

    def send_noise(self) -> None:
        """Sends the noise of the whole epoch to where the latents are.

        Once: a step's own, from ordinary memory, would wait for the step before, and could not be captured.
        """
        steps = range(1, -(-self.size // self.training.batch_size) + 1)
        noise = np.concatenate([self._drawn_noise(step) for step in steps], axis=1)
        self._noise = torch.from_numpy(noise).to(self.storage.device)

    def _drawn_noise(self, step: int) -> NDArray[np.float32]:
        """[3,rows,Z] for the whole batch, whoever asks: a row's noise does not depend on the number of workers."""
        rng = np.random.default_rng([self.training.seed, self.epoch, step])
        return rng.standard_normal((3, self.rows(step), self.latent_dim), dtype=np.float32)

    def __len__(self) -> int:
        return self.size

    @property
    def steps(self) -> int:
        """Steps of an epoch, with or without its incomplete last batch (`training.drop_last`)."""
        whole, rest = divmod(self.size, self.training.batch_size)
        return whole + (1 if rest and not self.training.drop_last else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample of the current epoch: `content`, `target_style` [C,H,W], and their domain ids."""
        plan = self._plan
        return {
            "content": self.storage[plan["content"][index]].float(),
            "target_style": self.storage[plan["x_ref"][index]].float(),
            "target_style_id": int(plan["y_trg"][index]),
            "source_style_id": int(plan["y_src"][index]),
        }

    def rows(self, step: int) -> int:
        """Rows of the whole batch of `step` (from 1): `training.batch_size`, or less in an incomplete last one."""
        return min(self.training.batch_size, self.size - (step - 1) * self.training.batch_size)

    def weight(self, step: int) -> float:
        """What this worker's means over its rows of `step` count for in the means over all workers' rows."""
        counts = [
            part.stop - part.start for part in (share(self.rows(step), r, self.workers) for r in range(self.workers))
        ]
        return counts[self.rank] / sum(counts)

    def batch(self, step: int) -> Batch:
        """This worker's share of the batch of `step` (from 1), on the storage's device, float32."""
        first = (step - 1) * self.training.batch_size
        part = share(self.rows(step), self.rank, self.workers)
        chosen = slice(first + part.start, first + part.stop)
        plan = {name: values[chosen] for name, values in self._plan.items()}
        noise = torch.from_numpy(self._drawn_noise(step)[:, part]) if self._noise is None else self._noise[:, chosen]
        return Batch(
            self.storage.index_select(0, plan["content"]).float(),
            self.storage.index_select(0, plan["x_ref"]).float(),
            plan["y_src"],
            plan["y_trg"],
            *noise.unbind(),
        )

    def batches(self) -> Iterable[Batch]:
        """The current epoch's batches on the training device, gathered ahead when they must travel there."""
        if self.storage.device.type == self.device.type:
            for step in range(1, self.steps + 1):
                yield self.batch(step)
            return
        workers = self.training.num_workers
        pin = self.training.pin_memory
        if workers == 0:
            for step in range(1, self.steps + 1):
                yield _sent(self.batch(step), self.device, pin)
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="raystar-batch") as pool:
            ahead: list[Future[Batch]] = []
            for step in range(1, self.steps + 1):
                while len(ahead) < 2 * workers and step + len(ahead) <= self.steps:
                    ahead.append(pool.submit(self._gathered, step + len(ahead), pin))
                yield ahead.pop(0).result().to(self.device, non_blocking=pin)

    def _gathered(self, step: int, pin: bool) -> Batch:
        batch = self.batch(step)
        return Batch(*(tensor.pin_memory() for tensor in batch)) if pin else batch


def _sent(batch: Batch, device: torch.device, pin: bool) -> Batch:
    if pin:
        batch = Batch(*(tensor.pin_memory() for tensor in batch))
    return batch.to(device, non_blocking=pin)


def _place(bank: Bank, preload: bool, device: torch.device) -> Tensor:
    """The latents where batches are gathered: GPU memory when asked for and half of what is free holds them."""
    if device.type != "cuda" or not preload:
        return bank.latents
    free, _ = torch.cuda.mem_get_info(device)
    if bank.latents.nbytes > free // 2:
        size = f"{bank.latents.nbytes / 2**30:.1f} GiB"
        note(logger, f"{size} of latents stay in CPU memory: they are more than half of what is free on the GPU")
        return bank.latents
    return bank.latents.to(device)

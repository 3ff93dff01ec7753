"""Workers that train one model together: gradients, losses and decisions are those of one process with the whole batch.

Knows `torch.distributed`, not who started its processes. Every worker holds the whole model and takes a share of
every batch. The losses are means over rows, so the whole batch's gradient is the workers' gradients averaged by rows.
They are averaged after `backward`, in one flat buffer, which leaves R1's double backward alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from raystar.base.errors import WorkerLost


@dataclass(frozen=True)
class Group:
    """The workers of one model. A group of one, the default, changes nothing, costs nothing and waits for nobody.

    Every method of a larger group is a collective: all workers call it, in the same order, or all wait. It raises
    `WorkerLost` where another worker's process is gone.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """The process group that `torch.distributed` was initialised with; one process where it was not."""
        if not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def sum(self, values: Tensor) -> Tensor:
        """`values`, of any shape, summed over the workers, the same bits on each."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        _all_reduce(total)
        return total

    def mean(self, value: Tensor, rows: int) -> Tensor:
        """The mean over all workers' rows, 0-d, from `value`, the mean over the `rows` rows of this worker."""
        if self.size == 1:
            return value
        sums = self.sum(torch.stack([value.detach() * rows, torch.full_like(value, rows)]))
        return sums[0] / sums[1]

    def average_gradients(self, parameters: Iterable[Parameter], rows: int, failed: Tensor) -> Tensor:
        """Puts the whole batch's gradients in place of those of this worker's `rows` rows, in one all_reduce.

        Args:
            parameters: the same, in the same order, on every worker; a gradient that is None counts as zeros.
            rows: rows of the batch that this worker's loss is the mean of.
            failed: 0-d float, 1 where this worker's loss is not finite, else 0.

        Returns:
            The same for the whole batch: 1 on every worker if any has failed.
        """
        if self.size == 1:
            return failed
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        # What weighs the sum and what forbids its use travel with it: nothing needs a second message.
        counts = torch.stack([torch.ones_like(failed), failed]).to(gradients[0].dtype)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), counts]) * rows
        _all_reduce(flat)
        means, all_rows, failures = flat[:-2], flat[-2], flat[-1]
        means /= all_rows
        for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))
        return (failures > 0).to(failed.dtype)


def _all_reduce(values: Tensor) -> None:
    try:
        distributed.all_reduce(values)
    except RuntimeError as error:  # gloo raises nothing narrower when a connection ends
        raise WorkerLost(f"the workers lost touch: {(str(error).splitlines() or [''])[0]}") from error


ALONE = Group()
"""One process, which trains by itself."""

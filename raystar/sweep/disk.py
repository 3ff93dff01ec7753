"""Whether a sweep's disk has room for it, before it starts and while it runs."""

from __future__ import annotations

import logging
import threading

import torch

from raystar.base.errors import RaystarError
from raystar.base.storage import Storage
from raystar.config.schema import Config
from raystar.model.networks import AVERAGED, NAMES, Nets
from raystar.record.retention import RECENT

logger = logging.getLogger(__name__)

_EXTRA_BYTES = 1 << 20  # a trial's pictures and records, about
_LOOK_S = 2.0


def checkpoint_bytes(config: Config) -> int:
    """Size of a trial's checkpoint: weights, AdamW's two moments and, where they are on, averages, all float32."""
    with torch.device("meta"):
        nets = Nets(config.model, len(config.data.domains))
    averaged = AVERAGED if config.training.ema_epochs > 0 else ()
    copies = {name: 4 if name in averaged else 3 for name in NAMES}
    return 4 * sum(copies[name] * parameter.numel() for name, net in nets.items() for parameter in net.parameters())


def check_space(storage: Storage, needed: int) -> None:
    """Refuses a sweep that would fill the disk.

    Raises:
        RaystarError: less than `needed` bytes are free.
    """
    free = storage.free_bytes()
    if free is not None and free < needed:
        raise RaystarError(
            f"{storage.uri}: {_size(free)} are free, and this sweep's checkpoints take about {_size(needed)}; free "
            "some space, choose another --out or --storage, or lower keep in the space file"
        )


def needed_bytes(checkpoint: int, at_a_time: int, keep: int, trials: int) -> int:
    """What a sweep's checkpoints and pictures take at most, about. `keep`: those that stay, `trials`: all of them."""
    return checkpoint * (at_a_time * (RECENT + 2) + min(keep, trials)) + trials * _EXTRA_BYTES


class DiskWatch:
    """Says when the disk that trials save to is full, since they wait then, and when it is not any more."""

    def __init__(self, storage: Storage, needed: int) -> None:
        self.storage = storage
        self.needed = needed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="raystar-disk", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        full = False
        while not self._over.wait(_LOOK_S):
            free = self.storage.free_bytes()
            if free is None:  # nobody knows
                return
            if (free < self.needed) != full:
                full = not full
                logger.warning(
                    f"the disk that holds {self.storage.uri} is full ({_size(free)} free, a checkpoint "
                    f"takes {_size(self.needed)}); trials wait until there is space again"
                    if full
                    else f"the disk that holds {self.storage.uri} has space again; trials continue"
                )

    def close(self) -> None:
        """Stops looking."""
        self._over.set()
        self._thread.join()


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

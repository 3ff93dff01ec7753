"""Makes trials go wrong on purpose. Python runs this at its start wherever the folder is on PYTHONPATH.

`RAYSTAR_TEST_FAULTS` names a folder with `faults.json`, a list of

    {"w_cyc": 2.0, "epoch": 2, "step": 3, "do": "nan", "times": 1}

A trial is known by its `loss.w_cyc`. `do`: `nan` poisons a weight, `oom` and `raise` raise, `kill` sends the trial's
own process SIGKILL, `alike` makes the ruler see no diversity, `half` writes half a checkpoint of the epoch, kills the
process whose number stands in the folder's file `driver`, and hangs. While a file `full` is there, no checkpoint can be
written: the disk is full.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["RAYSTAR_TEST_FAULTS"])


def due(config: Any, epoch: int, *kinds: str, step: int | None = None) -> Iterator[str]:
    """What is to go wrong here; each fault as often as it says, whichever process it hits."""
    for number, fault in enumerate(json.loads((FOLDER / "faults.json").read_text())):
        if fault["do"] not in kinds or fault["w_cyc"] != config.loss.w_cyc:
            continue
        if fault.get("epoch", epoch) != epoch or fault.get("step", step) != step:
            continue
        for turn in range(fault.get("times", 1)):
            try:
                (FOLDER / f"done-{number}-{turn}").touch(exist_ok=False)
            except FileExistsError:
                continue
            yield fault["do"]
            break


def patch_trainer(module: Any) -> None:
    train_step = module.train_step

    def faulty(state: Any, batch: Any, *, epoch: int, step: int) -> Any:
        import torch

        for fault in due(state.config, epoch, "nan", "oom", "raise", "kill", step=step):
            if fault == "nan":
                with torch.no_grad():
                    next(state.nets.G.parameters()).fill_(float("nan"))
            elif fault == "oom":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            elif fault == "raise":
                raise ValueError("broken on purpose")
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return train_step(state, batch, epoch=epoch, step=step)

    module.train_step = faulty


def patch_ruler(module: Any) -> None:
    measure = module.Ruler.measure

    def faulty(self: Any, nets: Any, config: Any) -> dict[str, float]:
        found = measure(self, nets, config)
        alike = any(due(config, 0, "alike"))
        return found | ({"diversity": 0.0} if alike else {})

    module.Ruler.measure = faulty


def patch_checkpoint(module: Any) -> None:
    write = module.write

    def faulty(path: Path, checkpoint: Any) -> None:
        from raystar.config.load import from_mapping

        if (FOLDER / "full").exists():
            (FOLDER / "was_full").touch()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, checkpoint)
        if any(due(from_mapping(checkpoint["config"], "saved"), checkpoint["epoch"], "half")):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(int((FOLDER / "driver").read_text()), signal.SIGKILL)
            time.sleep(600)

    module.write = faulty


PATCHES = {
    "raystar.training.trainer": patch_trainer,
    "raystar.ruler.ruler": patch_ruler,
    "raystar.model.checkpoint": patch_checkpoint,
}


class Finder(importlib.abc.MetaPathFinder):
    """Patches a module once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PATCHES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def load(module: Any) -> None:
            run(module)
            PATCHES[name](module)

        spec.loader.exec_module = load  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())

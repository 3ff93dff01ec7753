"""One trial: a Ray Train `TorchTrainer` around a `Trainer`, reporting to Ray Tune."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import ray.train
import torch
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from raystar import checkpoint as checkpoints
from raystar.codec import Codec, open_codec
from raystar.config import Config, from_mapping, override
from raystar.dataset import Bank, open_bank
from raystar.errors import RaystarError, TrialDiverged
from raystar.ruler import Ruler
from raystar.step import resolve_device
from raystar.summary import DIVERGED, FAILED, RUNNING, trial_name
from raystar.trainer import Progress, Trainer

CHECKPOINT, META = "checkpoint.pt", "meta.json"
WORST = 1e9
"""Reported by a trial that has no score to give: ASHA never stops a NaN, and stumbles over a missing value."""


@dataclass(frozen=True)
class Request:
    """What all trials of a sweep share; it travels to the workers, so it holds plain values only."""

    config: Mapping[str, Any]
    metric: str
    mode: str
    cache_dir: str
    pictures_dir: str
    gpu_share: float
    cpus: int


def run_trial(params: dict[str, Any], request: Request) -> None:
    """The Tune function. Local mode runs the loop in this process, which Tune reuses for the next trial."""
    TorchTrainer(
        train_loop,
        train_loop_config={"params": params, "request": request},
        scaling_config=ray.train.ScalingConfig(num_workers=0, use_gpu=request.gpu_share > 0),
    ).fit()


def train_loop(settings: dict[str, Any]) -> None:
    """Trains one configuration and reports every epoch; ends with a report, whatever happens."""
    request: Request = settings["request"]
    report = _Report(request)
    _settle_process()
    torch.set_num_threads(request.cpus)
    try:
        _train(override(from_mapping(request.config, "sweep"), settings["params"], "trial"), request, report)
    except TrialDiverged as error:
        report.ended(DIVERGED, str(error))
    except RaystarError as error:
        report.ended(FAILED, str(error))
    # Whatever a trial raises is that trial's result: the sweep goes on, and the trace is kept for the curious.
    except Exception as error:
        folder = Path(tune.get_context().get_trial_dir())
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        reason = (str(error).strip().splitlines() or [""])[0]
        report.ended(FAILED, f"{type(error).__name__}: {reason}"[:500])
    finally:
        # The process goes on to the next trial: nothing of this one may stay in its memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _return_free_memory()


def _return_free_memory() -> None:
    """Gives the allocator's free pages back to the system, where it is glibc's.

    It would keep them, in the pieces that one trial's sizes left: the next trial's do not fit into all of them.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _settle_process() -> None:
    """Takes what the imports left out of the collector's sight, once: it would be searched between all trials."""
    gc.collect()
    gc.freeze()


def _train(config: Config, request: Request, report: _Report) -> None:
    if 0 < request.gpu_share < 1:
        # A trial that shares its GPU fails on its own share instead of taking its neighbour's.
        torch.cuda.set_per_process_memory_fraction(request.gpu_share)
    bank = _bank(config, request.cache_dir)
    ruler = _ruler(config, request.cache_dir)
    codec = _codec(config) if config.grid_every else None
    trainer = Trainer(config, bank, ruler, codec, checkpoint=_restored())
    for progress in trainer.run():
        report.epoch(progress, trainer.first_step_at)


def _restored() -> dict[str, Any] | None:
    """The checkpoint that Tune restarts this trial from, after its process died."""
    found = tune.get_checkpoint()
    if found is None:
        return None
    with found.as_directory() as folder:
        return checkpoints.load(Path(folder) / CHECKPOINT)


# A reused process opens these once, not once a trial. Configurations that differ only in what a sweep may
# search give the same bank; the ruler also depends on the noise's length and the latents' scale.


def _bank(config: Config, cache_dir: str) -> Bank:
    return _open_bank(Config(data=config.data, model=_plain(config)), cache_dir)


def _ruler(config: Config, cache_dir: str) -> Ruler:
    kept = Config(data=config.data, model=_plain(config), ruler=config.ruler)
    return _build_ruler(kept, config.training.latent_scale, cache_dir)


def _codec(config: Config) -> Codec:
    return _open_codec(Config(visualization=config.visualization), str(resolve_device(config)))


def _plain(config: Config) -> Any:
    return override(
        Config(data=config.data),
        {"model.latent_channels": config.model.latent_channels, "model.latent_dim": config.model.latent_dim},
    ).model


@functools.lru_cache(maxsize=2)
def _open_bank(config: Config, cache_dir: str) -> Bank:
    return open_bank(config, cache_dir, verbose=False)


@functools.lru_cache(maxsize=2)
def _build_ruler(config: Config, latent_scale: float, cache_dir: str) -> Ruler:
    config = override(config, {"training.latent_scale": latent_scale})
    return Ruler.build(_open_bank(Config(data=config.data, model=config.model), cache_dir), config, cache_dir)


@functools.lru_cache(maxsize=2)
def _open_codec(config: Config, device: str) -> Codec:
    return open_codec(config, device)[0]  # the driver has told the user already


class _Report:
    """The seam between a trial and Tune."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.trial = tune.get_context().get_trial_name()
        self.last: dict[str, float] = {}
        self.epoch_number = 0

    def epoch(self, progress: Progress, first_step_at: float | None) -> None:
        """Saves and reports one epoch. Epochs that the ruler left out repeat its last metrics, for ASHA's sake."""
        self.epoch_number = progress.epoch
        self.last = {key: value for key, value in self.last.items() if key.startswith("eval/")} | progress.metrics
        images = {key: self._save_picture(key, image, progress.epoch) for key, image in progress.images.items()}
        first_images = {key: self._save_picture(key, image, 0) for key, image in progress.first_images.items()}
        result = {
            **self.last,
            "epoch": progress.epoch,
            "status": RUNNING,
            "images": images,
            "first_images": first_images,
            "first_step_at": first_step_at,
            "pid": os.getpid(),
        }
        with tempfile.TemporaryDirectory(prefix="raystar-") as folder:
            checkpoints.save(Path(folder) / CHECKPOINT, progress.checkpoint)
            meta = {"epoch": progress.epoch, self.request.metric: self.last[self.request.metric]}
            (Path(folder) / META).write_text(json.dumps(meta), encoding="utf-8")
            tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))

    def ended(self, status: str, reason: str) -> None:
        """The last report of a trial that did not come to its end."""
        worst = WORST if self.request.mode == "min" else -WORST
        # A later epoch than the last, so that ASHA sees it; its metric is nobody's best.
        tune.report(
            {
                self.request.metric: worst,
                "epoch": self.epoch_number + 1,
                "status": status,
                "reason": reason,
                "pid": os.getpid(),
            }
        )

    def _save_picture(self, key: str, image: Any, epoch: int) -> str:
        folder = Path(self.request.pictures_dir) / self.trial
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{key}_{epoch:04d}.png"
        image.save(path, compress_level=1)  # MLflow writes it again; time matters here, not bytes
        return str(path)


# -- the driver's side of Tune: module-level, since Tune pickles what it is given -------------------


class TrialNames:
    """Names trials in the order in which Tune first asks. Tune asks copies of this, hence the shared dictionary."""

    numbers: ClassVar[dict[str, int]] = {}

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.numbers.clear()

    def __call__(self, trial: Trial) -> str:
        return trial_name(self.numbers.setdefault(trial.trial_id, len(self.numbers)), self.trials)


class Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA that lets one trial, the baseline, run to its end: the others are measured against it.

    Its results still count in the rungs.
    """

    def __init__(self, exempt: str | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.exempt = exempt
        self.last_epoch = settings["max_t"]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """See `ray.tune.schedulers.TrialScheduler`."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if str(trial) == self.exempt and result["epoch"] < self.last_epoch:
            return str(TrialScheduler.CONTINUE)
        return decision


class Listener(Protocol):
    """Who hears what happens to trials."""

    def trial_started(self, name: str, params: dict[str, Any]) -> None:
        """A trial begins, or begins again after its process died."""

    def trial_reported(self, name: str, result: dict[str, Any]) -> None:
        """A trial reports an epoch, or that it cannot go on."""

    def trial_ended(self, name: str, reason: str | None, failed: bool) -> None:
        """A trial is over."""


class Recorder(tune.Callback):  # type: ignore[misc]
    """Hands Tune's events to a listener in the driver."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_started(str(trial), dict(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_reported(str(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_ended(str(trial), None, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """See `ray.tune.Callback`."""
        self.listener.trial_ended(str(trial), f"its process died {trial.num_failures} times", failed=True)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # the listener belongs to the running driver, not to Tune's saved state

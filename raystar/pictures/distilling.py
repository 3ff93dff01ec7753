"""A small decoder learns from a large one."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from raystar.base import torch_file as pt
from raystar.base.errors import RaystarError
from raystar.base.files import is_folder
from raystar.base.names import is_systems
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.listing import DEMO_ROOT, data_root
from raystar.model.device import fast_bf16
from raystar.pictures import decoder as decoders
from raystar.pictures.autoencoders import SCALE, VaeCodec
from raystar.pictures.codec import BuiltInCodec, Codec
from raystar.pictures.decoder import Decoder

logger = logging.getLogger(__name__)

BATCH = 4
_CHUNK = 8  # pictures decoded at once
HELD = 64
"""Held-out pictures of a dataset that are looked at."""
MADE = 0.25
"""Share of latents between and beside the real ones: what a generator makes is seldom quite like them."""
PEAK_RATE = 2e-3
_WARM_UP = 0.02  # of the time
_EMA = 0.999
_CHECK_EVERY_S = 120.0
_LARGE = 0.2  # an error from which on it counts as such, not squared: 25 of 255 grey levels


def settings_line(values: dict[str, float]) -> str:
    """Decibels by kind of latent, as a line."""
    return ", ".join(f"{kind} {value:.2f} dB" for kind, value in values.items())


def header_facts(teacher: str, reached: dict[str, float]) -> dict[str, str]:
    """What the decoder's file says of how it came about."""
    return {"teacher": teacher, "held_out_psnr_db": ", ".join(f"{k} {v:.2f}" for k, v in reached.items())}


class Lesson(NamedTuple):
    """Latents, and the teacher's pictures of them."""

    latents: Tensor
    """[n,4,H,W] float32, unscaled."""
    pictures: NDArray[np.uint8]
    """[n,8H,8W,3], memory-mapped."""
    digest: str = ""
    """Of the latents and the teacher."""


def gather(
    roots: Sequence[str], teacher: VaeCodec, work: Path, count: int, seed: int
) -> tuple[Lesson, dict[str, Lesson]]:
    """Reads the latents, makes more of them, and has the teacher decode what it has not decoded before.

    Args:
        roots: datasets as `data.data_root` takes them; all have the same share in the training.
        work: folder that keeps the packed latents and the pictures.
        count: pictures to train on, at most.
        seed: of the choice, and of the latents that are made.

    Returns:
        What to train on, and what is held out of each dataset, by its name.

    Raises:
        RaystarError: a dataset that cannot be read, has nothing held out, or differs in shape from the first.
    """
    names = [_name(root) for root in roots]
    if len(set(names)) < len(names):
        raise RaystarError(f"--latents: expected datasets of different names, found {', '.join(names)}")
    banks = {name: _bank(root, work) for name, root in zip(names, roots, strict=True)}
    shapes = {name: bank.shape for name, bank in banks.items()}
    if len(set(shapes.values())) > 1:
        raise RaystarError(f"--latents: expected latents of one shape, found {shapes}")
    rng = np.random.default_rng([seed, 0])
    invented = round(MADE * count)
    real = []
    held = {}
    for name, bank in banks.items():
        real.append(bank.rows(rng.permutation(np.concatenate(bank.train))[: (count - invented) // len(banks)]))
        kept = bank.rows(rng.permutation(np.concatenate(bank.held))[:HELD])
        held[name] = _taught(kept, teacher, work, f"held out of {name}", exact=True)
    pictured = torch.cat(real)
    latents = torch.cat([pictured, perturbed(pictured, invented, seed)])
    return _taught(latents, teacher, work, "to train on", exact=False), held


def _name(root: str) -> str:
    return "demo" if root == DEMO_ROOT else Path(root).expanduser().resolve().stem


def _bank(root: str, work: Path) -> Bank:
    path = data_root(root)
    if path.is_file():
        import safetensors

        try:
            with safetensors.safe_open(path, framework="np") as file:
                domains = sorted(file.keys())
        except Exception as error:  # whatever a damaged file makes its reader raise
            raise RaystarError(f"--latents: {path}: not a readable packed file: {pt.reason(error)}") from None
    elif is_folder(path):
        folders = (p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        domains = sorted(name for name in folders if not is_systems(name))
    else:
        raise RaystarError(f"--latents: {path}: expected a folder with one folder per domain, found nothing")
    bank = open_bank(override(Config(), {"data.data_root": root, "data.domains": domains}, "--latents"), work)
    if not any(map(len, bank.held)):
        raise RaystarError(f"--latents: {path}: expected two pictures or more in a domain, to hold one out")
    return bank


def perturbed(latents: Tensor, count: int, seed: int) -> Tensor:
    """Latents that no picture has, in three equal parts, as a generator might make them.

    Args:
        latents: [n,4,H,W] real ones.

    Returns:
        [count,4,H,W]: mixtures of two; real ones with noise of up to half their deviation; and real ones whose
        channels have another one's means and deviations.
    """
    rng = np.random.default_rng([seed, 1])
    first, second = (latents[torch.from_numpy(rng.integers(len(latents), size=count))] for _ in range(2))
    t = torch.from_numpy(rng.random((count, 1, 1, 1), np.float32))
    noise = torch.from_numpy(rng.standard_normal(first.shape, np.float32))
    mean, std = first.mean((2, 3), keepdim=True), first.std((2, 3), keepdim=True) + 1e-6
    other_mean, other_std = second.mean((2, 3), keepdim=True), second.std((2, 3), keepdim=True)
    kinds = [
        first.lerp(second, t),
        first + 0.5 * t * std * noise,
        (first - mean) / std * other_std + other_mean,
    ]
    return torch.stack([kinds[i % 3][i] for i in range(count)])


def _taught(latents: Tensor, teacher: VaeCodec, work: Path, what: str, exact: bool) -> Lesson:
    """The teacher's pictures, from `work` if they are there; what is half done is continued.

    Args:
        exact: in float32, and not in bf16, whose error of a grey level is far below a student's and costs half.
    """
    hashed = hashlib.sha256(bytes([exact]) + latents.numpy().tobytes())
    for name, value in sorted(teacher.model.state_dict().items()):
        hashed.update(name.encode() + value.float().cpu().numpy().tobytes())
    digest = hashed.hexdigest()[:16]
    path = work / f"pictures-{digest}.npy"
    shape = (len(latents), *teacher.decode(latents[:1]).shape[1:])
    if shape[1:] != (8 * latents.shape[2], 8 * latents.shape[3], 3):
        raise RaystarError(f"--teacher: expected pictures 8 times the latents' size, found {shape[1:]}")
    progress = path.with_suffix(".done")
    done = int(progress.read_text()) if path.is_file() and progress.is_file() else 0
    pictures = np.lib.format.open_memmap(path, "r+" if done else "w+", np.uint8, None if done else shape)
    quiet = not sys.stderr.isatty()
    with (
        torch.autocast(teacher.device.type, torch.bfloat16, enabled=not exact and fast_bf16(teacher.device)),
        tqdm(total=len(latents), initial=done, desc=f"the teacher decodes, {what}", disable=quiet) as bar,
    ):
        while done < len(latents):
            chunk = latents[done : done + _CHUNK]
            pictures[done : done + len(chunk)] = teacher.decode(chunk)
            pictures.flush()
            done += len(chunk)
            progress.write_text(str(done))
            bar.update(len(chunk))
    return Lesson(latents, pictures, digest)


def psnr(codec: Codec, lesson: Lesson) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB; a codec's smaller pictures are enlarged."""
    values: list[float] = []
    latents, pictures, _ = lesson
    for start in range(0, len(latents), _CHUNK):
        target = torch.from_numpy(pictures[start : start + _CHUNK].copy()).permute(0, 3, 1, 2).float()
        decoded = torch.from_numpy(codec.decode(latents[start : start + _CHUNK])).permute(0, 3, 1, 2).float()
        if decoded.shape != target.shape:
            decoded = functional.interpolate(decoded, target.shape[2:], mode="bicubic").clamp(0, 255)
        error = (decoded - target).square().mean((1, 2, 3)).clamp_min(1e-3)
        values += (10 * torch.log10(255**2 / error)).tolist()
    return sum(values) / len(values)


def measure(student: Decoder, held: Mapping[str, Lesson]) -> dict[str, float]:
    """`psnr` of a decoder on the held-out pictures of each dataset, rounded to fp16 as its file will be."""
    stored = Decoder(student.widths, student.blocks)
    stored.load_state_dict({name: value.half().float().cpu() for name, value in student.state_dict().items()})
    codec = BuiltInCodec(stored, "student")
    return {name: psnr(codec, lesson) for name, lesson in held.items()}


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Of pictures [B,3,h,w] in [-1,1]: small errors count squared, as decibels do, large ones as they are.

    One fused call: terms on pixels' differences would cost as much as the network.
    """
    return functional.smooth_l1_loss(output, target, beta=_LARGE)


def rate(share: float) -> float:
    """The learning rate after this share of the time: up, then down along a cosine."""
    if share < _WARM_UP:
        return PEAK_RATE * max(share / _WARM_UP, 0.01)
    return PEAK_RATE * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - _WARM_UP) / (1 - _WARM_UP)))))


def _batch(lesson: Lesson, rng: np.random.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scaled latents [B,4,h,w], and their pictures [B,3,8h,8w] in [-1,1]."""
    rows = np.sort(rng.choice(len(lesson.latents), BATCH, replace=len(lesson.latents) < BATCH))
    scaled = (lesson.latents[torch.from_numpy(rows)] * SCALE).to(device, memory_format=torch.channels_last)
    return scaled, torch.from_numpy(lesson.pictures[rows]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(
    lesson: Lesson,
    held: Mapping[str, Lesson],
    device: torch.device,
    seconds: float,
    seed: int,
    work: Path,
    out: Path,
    teacher: str,
) -> Decoder:
    """Trains for a time; every two minutes it says how far it is, and `out` and `work` are brought up to date.

    Returns:
        The moving average of the weights.
    """
    torch.manual_seed(seed)
    student, mean = Decoder().to(device), Decoder().to(device)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean.load_state_dict(student.state_dict())
    optimiser = torch.optim.AdamW(student.parameters(), lr=PEAK_RATE, weight_decay=1e-4)
    saved = work / "training.pt"
    step, spent = 0, 0.0
    if saved.is_file():
        step, spent = _resume(saved, lesson.digest, seed, student, mean, optimiser)
        logger.info(f"resuming after {spent / 60:.1f} minutes, step {step}")
    last_said, last = spent, time.monotonic()
    running: list[Tensor] = []
    while spent < seconds:
        scaled, target = _batch(lesson, np.random.default_rng([seed, 2, step]), device)
        for group in optimiser.param_groups:
            group["lr"] = rate(spent / seconds)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
            output = student(scaled)
        loss = loss_of(output.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            keep = min(_EMA, step / (step + 10))
            torch._foreach_lerp_(list(mean.parameters()), list(student.parameters()), 1 - keep)
        running.append(loss.detach())
        now = time.monotonic()
        spent, last = spent + now - last, now
        if spent - last_said >= _CHECK_EVERY_S or spent >= seconds:
            average = float(torch.stack(running).mean())
            if not math.isfinite(average):
                raise RaystarError(
                    f"the loss is {average} at step {step}; are the latents unscaled, the teacher sound?"
                )
            reached = measure(mean, held)
            logger.info(f"{spent / 60:6.1f} min  step {step:6d}  loss {average:.4f}  {settings_line(reached)}")
            running, last_said = [], spent
            decoders.save(mean, out, header_facts(teacher, reached))
            _keep(saved, lesson.digest, seed, student, mean, optimiser, step, spent)
            last = time.monotonic()  # measuring is not training
    return mean


def _resume(
    path: Path, lesson: str, seed: int, student: Decoder, mean: Decoder, optimiser: torch.optim.Optimizer
) -> tuple[int, float]:
    """Restores what `_keep` kept; returns the steps and seconds trained so far."""
    try:
        state = pt.read(path)
        same = (state["lesson"], state["seed"]) == (lesson, seed)
        if same:
            student.load_state_dict(state["student"])
            mean.load_state_dict(state["mean"])
            optimiser.load_state_dict(state["optimiser"])
            return int(state["step"]), float(state["seconds"])
    # Whatever a damaged file makes its reader, or a network of another shape makes torch, raise.
    except Exception as error:
        raise RaystarError(f"{path}: cannot be resumed ({pt.reason(error)}); remove it to begin anew") from None
    raise RaystarError(
        f"{path}: is of another teacher, other latents, --pictures or --seed; choose another --work, or remove it"
    )


def _keep(
    path: Path,
    lesson: str,
    seed: int,
    student: Decoder,
    mean: Decoder,
    optimiser: torch.optim.Optimizer,
    step: int,
    spent: float,
) -> None:
    state = {
        "lesson": lesson,
        "seed": seed,
        "student": student.state_dict(),
        "mean": mean.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seconds": spent,
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)

"""What every benchmark here does the same way: take turns, count, name the machine, print ratios."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from raystar.model.device import synchronize

P = ParamSpec("P")
T = TypeVar("T")


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with `--device` and `--threads`."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=None, help="threads on a CPU (all its cores)")
    return p


def settle(args: argparse.Namespace) -> torch.device:
    """Applies `--threads`, prints the machine, and returns the device."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"machine: {machine(device)}", flush=True)
    return device


def machine(device: torch.device) -> str:
    """Processor or GPU, threads, and the versions that decide speed."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        found = [line for line in _cpu_info() if line.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else platform.processor() or platform.machine()
        flags = next((line for line in _cpu_info() if line.startswith("flags")), "")
        wide = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {flag} " in f"{flags} "]
        where = f"{name} ({wide[0] if wide else 'no vector extension known'}), {torch.get_num_threads()} threads"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def take_turns(
    subjects: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of one call of each subject, called in turn (A B A B ...) with the round's number from 1.

    The machine's speed drifts over minutes; taking turns lets every subject have its share of each phase.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(1, warmup + rounds + 1):
        for name, subject in subjects.items():
            synchronize(device)
            started = time.perf_counter()
            subject(number)
            synchronize(device)
            if number > warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product of `dtype` here: what a training step can at best approach."""
    best = 0.0
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = take_turns({"mm": lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out)}, 7, device)["mm"]
        best = max(best, 2 * n**3 / seconds)
    return best


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process from `/proc/self/status`, for example `VmRSS` or `RssAnon`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux (pid {os.getpid()})")


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns in a process of its own that has done nothing else; it and all values are pickled."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with columns of one width; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

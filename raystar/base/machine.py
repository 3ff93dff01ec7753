"""What this machine has."""

from __future__ import annotations

import os
import subprocess


def usable_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_memory() -> list[int]:
    """Bytes of memory of each of this machine's NVIDIA GPUs; empty where nobody says.

    Asked of nvidia-smi: torch would open a context on the card, which takes memory for as long as this process lives.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return [int(line) * 2**20 for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []

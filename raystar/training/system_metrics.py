"""How busy a run's processor, memory and GPU are, epoch by epoch, under the names by which MLflow shows them."""

from __future__ import annotations

import psutil
import torch

_MEGABYTE = 1e6


class Usage:
    """What this process and its machine did between `begin` and `read`; no thread, no sampling.

    On a cluster each trial measures the node that it is on, which the process that writes to MLflow cannot see.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = psutil.Process()
        self.begin()

    def begin(self) -> None:
        """Starts counting anew."""
        psutil.cpu_percent(None)
        self._process.cpu_percent(None)

    def read(self) -> dict[str, float]:
        """`system/` metrics since `begin`.

        Processors in percent (of the whole machine; of one core for the process, so two busy cores are 200), memory
        in megabytes (1e6 bytes) and percent as it is now, GPU memory of the device that the run is on, all processes'.
        """
        memory = psutil.virtual_memory()
        metrics = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(None),
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_cpu_percentage": self._process.cpu_percent(None),
            "system/process_memory_megabytes": self._process.memory_info().rss / _MEGABYTE,
        }
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            gpu = self.device.index if self.device.index is not None else torch.cuda.current_device()
            metrics |= {
                f"system/gpu_{gpu}_memory_usage_megabytes": (total - free) / _MEGABYTE,
                f"system/gpu_{gpu}_memory_usage_percentage": 100 * (total - free) / total,
            }
        return metrics

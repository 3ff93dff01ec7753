"""raystar: hyper-parameter search for a latent-space StarGAN v2.

From Python: `run_sweep` starts a sweep, `load` opens an exported model. Both come when they are first asked for, since
torch and Ray take seconds.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raystar.exported.model import load
    from raystar.sweep.api import run_sweep
    from raystar.sweep.request import SweepRequest

# Before torch, which reads it once: batches of changing sizes would leave a GPU's memory in pieces that fit nothing.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

__version__ = "0.2.0.dev0"
__all__ = ["SweepRequest", "__version__", "load", "run_sweep"]

_WHERE = {
    "SweepRequest": "raystar.sweep.request",
    "load": "raystar.exported.model",
    "run_sweep": "raystar.sweep.api",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'raystar' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)

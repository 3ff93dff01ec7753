"""What all trials of a sweep must have alike, since their scores could not be compared, or they would not differ."""

from __future__ import annotations

from collections.abc import Mapping

from raystar.config.schema import key_field

_ALIKE: Mapping[str, str] = {
    "data.domains": "other pairs of domains would be measured, and scores of different pairs cannot be compared; run "
    "one sweep for each set of domains, with --set data.domains=[...]",
    "data.data_root": "scores of different pictures cannot be compared; run one sweep for each "
    "--set data.data_root=...",
    "data.eval_data_root": "the ruler measures on these latents, so scores could not be compared; run one sweep for "
    "each --set data.eval_data_root=...",
    "data.holdout": "the ruler measures on what is held out, so scores could not be compared; --set data.holdout=... "
    "sets it for the whole sweep",
    "data.cache_dir": "all trials share one cache; --set data.cache_dir=... sets it for the whole sweep",
    "checkpoint.save_dir": "a sweep keeps the checkpoints of each trial in a folder of its own, trials/<name>; leave "
    "it out",
    "visualization.save_dir": "a sweep keeps the grids of each trial in a folder of its own, pictures/<name>; leave "
    "it out",
    "training.epochs": "trials of different lengths cannot be compared; --epochs or scheduler.max_epochs sets it for "
    "the whole sweep",
    "training.device": "resources.gpus says where trials run",
    "model.num_domains": "it is the number of data.domains, which all trials share",
    "model.latent_channels": "it is that of the latents, which all trials share",
}
_RULER = "the ruler must be one and the same, or scores could not be compared; --set sets it for the whole sweep"


def why_alike(key: str, source: str) -> str | None:
    """Why a key must be the same in all trials, and what to do instead; None for one that may differ.

    Noises of another length (`model.latent_dim`) are other draws of the same kind, and latents of another scale
    (`training.latent_scale`) are measured without it: sources, references and pictures stay what they are, so these two
    may differ (tests/search/test_comparable.py).

    Raises:
        RaystarError: there is no such key; `source` is where it stands.
    """
    spec = key_field(key, source)
    if key in _ALIKE:
        return _ALIKE[key]
    if key.startswith("ruler."):
        return _RULER
    if not spec.metadata["result"]:
        return "it changes no result, so trials would not differ; --set sets it for the whole sweep"
    return None

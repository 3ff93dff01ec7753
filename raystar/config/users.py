"""Configuration files of the trainer that raystar's users come from, read as that trainer meant them.

A file that says `training.num_epochs` was written for it: keys that it leaves out have that trainer's defaults.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from raystar.base.errors import RaystarError, key_text, show

logger = logging.getLogger(__name__)

_RENAMED = {
    "training.num_epochs": "training.epochs",
    "training.allow_tf32": "training.tf32",
    "data.epoch_size": "training.epoch_size",
}
_DEFAULTS: dict[str, Any] = {
    "loss.w_id": 0.0,
    "loss.ds_margin": None,
    "loss.w_r1": 10.0,
    "loss.ds_decay_epochs": 1,
    "model.mapping_shared_layers": 3,
    "training.weight_decay": 0.0,
    "training.seed": 42,
}
"""Those that differ from raystar's, for files that name none."""
_IDLE = {
    "model.num_groups", "training.optim_fused", "training.console_log_path", "visualization.vae_subfolder",
    "visualization.num_samples", "visualization.random_noise_seed", "visualization.eval_dir",
    "visualization.auto_eval_latest", "data.image_root", "data.decoded_source_dir", "checkpoint.resume_path",
    "loss.loss_plot_path", "loss.loss_plot_interval",
}  # fmt: skip
"""Keys that change nothing here."""
_AS_BUILT = {
    "model.num_groups", "training.optim_fused", "visualization.vae_subfolder", "visualization.auto_eval_latest",
}  # fmt: skip
"""Of these, the ones that need no remark: what they ask for is done, or is no question with AdaIN."""
_SECTIONS = {"experiment", "eval"}
_BRANCHES = {"baseline_AdaIN": None, "AdaGN_with_SN": "AdaGN and spectral norm", "AdaGN_no_SN": "AdaGN"}


def translate(mapping: Mapping[Any, Any], source: str, *, whole: bool) -> Mapping[Any, Any]:
    """A file's content with raystar's keys, values and defaults; as it is where nothing in it is of that trainer.

    Args:
        whole: whether the file is the whole configuration, so that what it leaves out has a default.

    Raises:
        RaystarError: it asks for what raystar does not build, or says one thing under two names.
    """
    flat = {
        f"{section}.{key_text(name)}": value
        for section, content in mapping.items()
        if isinstance(content, Mapping)
        for name, value in content.items()
    }
    marks = {*_RENAMED, *_IDLE, "model.exp_branch"}
    if not (marks & flat.keys() or _SECTIONS & mapping.keys()):
        return mapping
    theirs = "training.num_epochs" in flat
    flat = {key: _fill(value, flat, source, key) for key, value in flat.items()}
    _check_networks(flat, source)
    _note({key for key in flat if key in _IDLE - _AS_BUILT or key.startswith("eval.")}, source)
    for name, ours in _RENAMED.items():
        if name in flat and ours in flat:
            raise RaystarError(f"{source}: {name} and {ours} are the same; leave one of them out")
    kept = {
        _RENAMED.get(key, key): value
        for key, value in flat.items()
        if key not in _IDLE and key != "model.exp_branch" and key.partition(".")[0] not in _SECTIONS
    }
    if theirs and whole:
        kept |= {key: value for key, value in _defaults(kept).items() if key not in kept}
    result: dict[Any, Any] = {s: c for s, c in mapping.items() if not isinstance(c, Mapping) and s not in _SECTIONS}
    for key, value in (_values(kept) if theirs else kept).items():
        section, _, name = key.partition(".")
        result.setdefault(section, {})[name] = value
    return result


def _fill(value: Any, flat: Mapping[str, Any], source: str, key: str) -> Any:
    """A text with its templates filled in: `{exp_name}` and `{outputs_dir}`, which may hold the former."""
    if not isinstance(value, str) or not ("{exp_name}" in value or "{outputs_dir}" in value):
        return value
    name = flat.get("experiment.name")
    if not isinstance(name, str) or not name:
        raise RaystarError(f"{source}: {key}: {show(value)} needs experiment.name, and the file has none")
    folder = flat.get("experiment.outputs_dir") or f"outputs/{name}"
    return value.replace("{outputs_dir}", str(folder)).replace("{exp_name}", name)


def _check_networks(flat: Mapping[str, Any], source: str) -> None:
    branch = flat.get("model.exp_branch")
    if branch is None and "model.num_groups" in flat:
        raise RaystarError(
            f"{source}: model.num_groups without model.exp_branch is of a time when AdaGN and spectral norm were the "
            "only networks, which raystar does not build; for AdaIN leave num_groups out"
        )
    if branch is not None and branch not in _BRANCHES:
        raise RaystarError(f"{source}: model.exp_branch: expected one of {', '.join(_BRANCHES)}, found {show(branch)}")
    if branch is not None and (missing := _BRANCHES[branch]) is not None:
        raise RaystarError(
            f"{source}: model.exp_branch: {branch} wants {missing}, which raystar does not build yet; "
            "baseline_AdaIN is there"
        )
    subfolder = flat.get("visualization.vae_subfolder")
    if subfolder not in (None, "", "vae"):
        raise RaystarError(
            f"{source}: visualization.vae_subfolder: raystar looks in the VAE's folder and in its vae/, "
            f"found {show(subfolder)}; name that folder in visualization.vae_model_name_or_path"
        )


def _defaults(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What that trainer takes for keys that a file leaves out."""
    every = kept.get("training.eval_interval", kept.get("training.save_interval"))
    return {
        **_DEFAULTS,
        "training.drop_last": not kept.get("training.compile_dynamic", False),
        **({"visualization.every_epochs": every} if every is not None else {}),
    }


def _values(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Values that mean the same under another name."""
    values = dict(kept)
    margin, dtype = values.get("loss.ds_margin"), values.get("training.amp_dtype")
    if isinstance(margin, int | float) and not isinstance(margin, bool) and margin <= 0:
        values["loss.ds_margin"] = None
    for key in ("loss.r1_interval", "loss.ds_decay_epochs"):
        if values.get(key) == 0 and not isinstance(values[key], bool):
            values[key] = 1
    if isinstance(dtype, str):
        values["training.amp_dtype"] = dtype.lower()
    if "training.progress_style" in values:  # since that key exists, the other hides the bar alone
        values.pop("training.progress_bar", None)
    for key in ("data.eval_data_root", "checkpoint.save_dir", "visualization.save_dir"):
        if values.get(key) == "":
            values[key] = None
    return values


def _note(keys: set[str], source: str) -> None:
    names = sorted({"eval" if key.startswith("eval.") else key for key in keys})
    if names:
        _note_once(f"{source}: {', '.join(names)} ha{'ve' if len(names) > 1 else 's'} no effect here")


@functools.cache
def _note_once(text: str) -> None:
    logger.warning(text)

"""Configuration files of the trainer that raystar's users come from, read as that trainer meant them.

A file that says `training.num_epochs` was written for it: keys that it leaves out have that trainer's defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

from raystar.base.errors import RaystarError, key_text, show
from raystar.config.schema import Config, ModelConfig

logger = logging.getLogger(__name__)

FILE, THEIR_DEFAULT = "file", "latent_cyclegan's default"
"""Where a key's value comes from."""
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
_DONE_ANYWAY = {"visualization.eval_dir", "visualization.auto_eval_latest"}
_IDLE = {
    *_DONE_ANYWAY, "training.optim_fused", "data.image_root", "data.decoded_source_dir", "loss.loss_plot_path",
    "loss.loss_plot_interval",
}  # fmt: skip
"""Keys that change nothing here."""
_AS_BUILT = {"training.optim_fused"}
"""Of these, the ones that need no remark: what they ask for is done."""
_SECTIONS = {"eval"}
_THEIRS = {
    "model": (
        "latent_channels", "style_dim", "base_dim", "num_domains", "n_res_blocks", "d_layers", "latent_dim",
        "mapping_hidden_dim", "mapping_shared_layers",
    ),
    "loss": ("w_adv", "w_sty", "w_ds", "ds_margin", "w_cyc", "w_id", "w_r1", "r1_interval", "ds_decay_epochs"),
    "training": (
        "seed", "batch_size", "num_epochs", "lr_g", "lr_d", "lr_mapping", "weight_decay", "lr_schedule",
        "warmup_steps", "min_lr_ratio", "use_amp", "amp_dtype", "allow_tf32", "cudnn_benchmark", "optim_fused",
        "latent_scale", "num_workers", "pin_memory", "use_compile", "compile_mode", "compile_dynamic",
        "compile_fullgraph", "compile_cudagraphs", "compile_generator", "compile_mapping_network",
        "compile_style_encoder", "compile_discriminator", "drop_last", "progress_bar", "progress_style",
        "display_interval", "log_json", "log_interval", "save_interval",
    ),
    "experiment": ("name", "outputs_dir"),
    "visualization": (
        "every_epochs", "vae_model_name_or_path", "vae_subfolder", "suppress_hf_warnings", "num_samples",
        "random_noise_seed", "save_dir",
    ),
    "data": ("data_root", "eval_data_root", "domains", "preload_to_gpu", "epoch_size"),
    "checkpoint": ("save_dir", "resume_path"),
}  # fmt: skip
"""The keys of that trainer's files that raystar has a value for."""
_BRANCHES = {
    "baseline_AdaIN": ("adain", "spectral"),
    "AdaGN_with_SN": ("adagn", "spectral"),
    "AdaGN_no_SN": ("adagn", "none"),
}
"""`model.norm` and `model.discriminator_norm` of each `model.exp_branch`."""


def translate(
    mapping: Mapping[Any, Any],
    source: str,
    *,
    whole: bool,
    quiet: bool = False,
    origins: MutableMapping[str, str] | None = None,
) -> Mapping[Any, Any]:
    """A file's content with raystar's keys, values and defaults; as it is where nothing in it is of that trainer.

    Args:
        whole: whether the file is the whole configuration, so that what it leaves out has a default.
        quiet: say nothing of keys that have no effect.
        origins: takes for each of raystar's keys where its value comes from, in words.

    Raises:
        RaystarError: it asks for what raystar does not build, or says one thing under two names.
    """
    flat = {
        f"{section}.{key_text(name)}": value
        for section, content in mapping.items()
        if isinstance(content, Mapping)
        for name, value in content.items()
    }
    sources: MutableMapping[str, str] = {} if origins is None else origins
    marks = {*_RENAMED, *_IDLE, "model.exp_branch"}
    templates = any(_is_template(value) for value in flat.values())
    if not (marks & flat.keys() or _SECTIONS & mapping.keys() or templates):
        sources.update(dict.fromkeys(flat, FILE))
        return mapping
    theirs = "training.num_epochs" in flat
    flat = {key: _fill(value, flat, source, key) for key, value in flat.items()}
    if flat.get("model.exp_branch", "") in ("", None):
        flat.pop("model.exp_branch", None)
    networks = _networks(flat, theirs, source)
    if not quiet:
        _note({key for key in flat if key in _IDLE - _AS_BUILT or key.startswith("eval.")}, source)
    for name, ours in _RENAMED.items():
        if name in flat and ours in flat:
            raise RaystarError(f"{source}: {name} and {ours} are the same; leave one of them out")
    kept = {
        _RENAMED.get(key, key): value
        for key, value in flat.items()
        if key not in _IDLE and key != "model.exp_branch" and key.partition(".")[0] not in _SECTIONS
    }
    sources.update(dict.fromkeys(kept, FILE))
    sources.update({_RENAMED[key]: f"{FILE} ({key})" for key in flat if key in _RENAMED})
    told = "model.exp_branch" if "model.exp_branch" in flat else "model.num_groups without exp_branch"
    sources.update(dict.fromkeys(networks, f"{FILE} ({told})"))
    kept |= networks
    if theirs and whole:
        defaults = {key: value for key, value in _defaults(kept).items() if key not in kept}
        sources.update(dict.fromkeys(defaults, THEIR_DEFAULT))
        kept |= defaults
    result: dict[Any, Any] = {s: c for s, c in mapping.items() if not isinstance(c, Mapping) and s not in _SECTIONS}
    for key, value in (_values(kept) if theirs else kept).items():
        section, _, name = key.partition(".")
        result.setdefault(section, {})[name] = value
    return result


def our_name(key: str, source: str) -> str:
    """A key as raystar spells it.

    Raises:
        RaystarError: that trainer's key says several things at once.
    """
    if key == "model.exp_branch":
        raise RaystarError(
            f"{source}: {key}: is model.norm and model.discriminator_norm here; search these, or list its values as "
            "experiments"
        )
    return _RENAMED.get(key, key)


def _is_template(value: Any) -> bool:
    return isinstance(value, str) and ("{exp_name}" in value or "{outputs_dir}" in value)


def _fill(value: Any, flat: Mapping[str, Any], source: str, key: str) -> Any:
    """A text with its templates filled in: `{exp_name}` and `{outputs_dir}`, which may hold the former."""
    if not _is_template(value):
        return value
    name = flat.get("experiment.name")
    if not isinstance(name, str) or not name:
        raise RaystarError(f"{source}: {key}: {show(value)} needs experiment.name, and the file has none")
    folder = flat.get("experiment.outputs_dir") or f"outputs/{name}"
    return value.replace("{outputs_dir}", str(folder)).replace("{exp_name}", name)


def unmarked_networks(base_dim: Any) -> dict[str, Any]:
    """The keys of the networks that were that trainer's only ones for a while, of so many channels."""
    return {"model.norm": "adagn", "model.discriminator_norm": "spectral", "model.encoder_groups": base_dim}


def _networks(flat: Mapping[str, Any], theirs: bool, source: str) -> dict[str, Any]:
    """`model.norm` and `model.discriminator_norm`, as far as the file says something about them in that trainer's way.

    For a while that trainer built nothing but AdaGN, with AdaIN's norms before the residual blocks, and spectral norm,
    and its files said no more than `num_groups`.
    """
    names = ("model.norm", "model.discriminator_norm")
    if "model.exp_branch" not in flat:
        if not theirs or "model.num_groups" not in flat or flat.keys() & set(names):
            return {}
        _note_once(
            f"{source}: model.num_groups without model.exp_branch is of a time when AdaGN and spectral norm were the "
            "only networks; they are taken (for AdaIN leave num_groups out)"
        )
        return unmarked_networks(flat.get("model.base_dim", Config().model.base_dim))
    branch = flat["model.exp_branch"]
    if not isinstance(branch, str) or branch not in _BRANCHES:
        raise RaystarError(f"{source}: model.exp_branch: expected one of {', '.join(_BRANCHES)}, found {show(branch)}")
    if named := sorted(flat.keys() & set(names)):
        raise RaystarError(f"{source}: model.exp_branch and {named[0]} say the same; leave one of them out")
    return dict(zip(names, _BRANCHES[branch], strict=True))


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
    for key in (
        "data.eval_data_root", "checkpoint.save_dir", "checkpoint.resume_path", "visualization.save_dir",
        "training.console_log_path", "experiment.name", "experiment.outputs_dir",
    ):  # fmt: skip
        if values.get(key) == "":
            values[key] = None
    if values.get("training.epoch_size") == 0:
        values["training.epoch_size"] = None
    return values


def to_theirs(config: Config, source: str) -> dict[str, dict[str, Any]]:
    """A configuration as that trainer reads it: its names, and no key that it does not know.

    Raises:
        RaystarError: networks that it does not build.
    """
    model = config.model
    if model.residual:
        raise RaystarError(f"{source}: model.residual: that trainer would take its weights for another function")
    if model.discriminator_dim not in (None, model.base_dim // 4):
        raise RaystarError(
            f"{source}: model.discriminator_dim {model.discriminator_dim}: that trainer builds base_dim / 4 alone, "
            f"here {model.base_dim // 4}"
        )
    values = dataclasses.asdict(config)
    values["data"]["domains"] = list(config.data.domains)
    values["data"]["epoch_size"] = config.training.epoch_size
    values["training"] |= {
        "num_epochs": config.training.epochs, "allow_tf32": config.training.tf32, "optim_fused": True,
        "progress_bar": config.progress != "off",
    }  # fmt: skip
    values["loss"]["ds_decay_epochs"] = max(1, round(config.ds_decay))
    values["visualization"]["every_epochs"] = config.grid_every
    values["visualization"]["num_samples"] = config.visualization.num_samples or config.num_domains
    values["model"]["num_domains"] = config.num_domains
    kept = {section: {key: values[section][key] for key in keys} for section, keys in _THEIRS.items()}
    networks = (model.norm, model.discriminator_norm)
    branch = next((name for name, built in _BRANCHES.items() if built == networks), None)
    if is_unmarked(model):
        kept["model"]["num_groups"] = model.num_groups
    elif model.norm == "adagn" and model.encoder_groups not in (None, model.num_groups):
        raise RaystarError(
            f"{source}: model.encoder_groups {model.encoder_groups}: that trainer builds num_groups alone, "
            f"{model.num_groups}, or with discriminator_norm spectral base_dim, {model.base_dim}"
        )
    elif branch is not None:
        kept["model"] |= {"exp_branch": branch, "num_groups": model.num_groups}
    return kept


def is_unmarked(model: ModelConfig) -> bool:
    """Whether networks are those of the time when that trainer's files did not say which (`unmarked_networks`)."""
    there = (model.norm, model.discriminator_norm, model.encoder_groups)
    return there == tuple(unmarked_networks(model.base_dim).values()) and model.num_groups != model.base_dim


def _note(keys: set[str], source: str) -> None:
    if drawn := sorted(keys & _DONE_ANYWAY):
        _note_once(
            f"{source}: {', '.join(drawn)}: the last epoch's grids are drawn as the others are, into the same folder "
            "(visualization.save_dir)"
        )
    keys = keys - _DONE_ANYWAY
    names = sorted({"eval" if key.startswith("eval.") else key for key in keys})
    if names:
        _note_once(f"{source}: {', '.join(names)} ha{'ve' if len(names) > 1 else 's'} no effect here")


@functools.cache
def _note_once(text: str) -> None:
    logger.warning(text)

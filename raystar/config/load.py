"""The configuration tree: every key of the specification, what raystar adds, and a loader that forgives nothing.

A configuration is a tree of frozen dataclasses. Reading a file, a `--set key=value` and a value drawn by the
search all go through the same check, so a misspelt key or an impossible value never reaches a trial.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

import raystar
from raystar.base.errors import RaystarError, key_text, misspelt, nearest, show
from raystar.base.files import is_file, is_folder

MAX_FILE_BYTES = 1_000_000
"""A configuration or space file is text written by hand; anything larger is the wrong file."""

MAX_NODES, MAX_DEPTH, MAX_SCALAR = 10_000, 32, 10_000
"""Values in one file, aliases written out; levels of them; characters of one. A small file can claim much."""

MAX_WHOLE = 2**31 - 1
"""Largest whole number of any key."""


def _key(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    result: bool = True,
) -> Any:
    """One configuration key. `result=False`: it cannot change what is computed, so the signature ignores it."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most}
    return field(default=default, metadata={"meaning": meaning, "result": result, "limits": limits})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the four networks (networks.md)."""

    latent_channels: int = _key(4, "channels of a latent", at_least=1)
    style_dim: int = _key(64, "length of a style code", at_least=1)
    latent_dim: int = _key(16, "length of the noise z", at_least=1)
    base_dim: int = _key(256, "channels of the generator", at_least=4)
    num_domains: int | None = _key(None, "number of domains; by default that of data.domains", at_least=2)
    n_res_blocks: int = _key(6, "AdaIN residual blocks of the generator", at_least=0)
    d_layers: int = _key(3, "depth of the discriminator", at_least=1)
    mapping_hidden_dim: int = _key(512, "width of the mapping network", at_least=1)
    mapping_shared_layers: int = _key(4, "shared layers of the mapping network", at_least=1)
    residual: bool = _key(False, "G gives x + net(x), and its last convolution starts at zero: it begins as identity")
    discriminator_dim: int | None = _key(
        None, "channels of the discriminator's first layer, a quarter of its widest; absent: base_dim / 4", at_least=1
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the losses (loss_terms.md). These are what `search_spaces/loss.yaml` searches."""

    w_adv: float = _key(1.0, "weight of the adversarial term", at_least=0)
    w_sty: float = _key(1.0, "weight of style reconstruction", at_least=0)
    w_ds: float = _key(1.0, "weight of the diversity term at epoch 1; it is subtracted", at_least=0)
    ds_decay_epochs: int | float = _key(
        20, "epochs over which w_ds falls linearly to 0; below 1, a share of training.epochs", above=0
    )
    ds_margin: float | None = _key(1.5, "upper limit of the rewarded diversity; null for none", above=0)
    w_cyc: float = _key(1.0, "weight of cycle consistency", at_least=0)
    w_id: float = _key(1.0, "weight of the identity term; 0 switches it off", at_least=0)
    w_r1: float = _key(2.0, "weight of the R1 gradient penalty", at_least=0)
    r1_interval: int = _key(16, "R1 is computed every so many steps and multiplied by as many", at_least=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The training loop."""

    seed: int = _key(0, "seed of initialisation, sampling and noise", at_least=0, at_most=2**31 - 1)
    epochs: int = _key(100, "epochs to train", at_least=1)
    batch_size: int = _key(16, "contents in one step", at_least=1)
    epoch_size: int | None = _key(None, "contents in one epoch; by default largest domain x domains", at_least=1)
    drop_last: bool = _key(True, "leave out an incomplete last batch")
    lr_g: float = _key(1e-4, "learning rate of generator and style encoder", above=0)
    lr_d: float = _key(1e-4, "learning rate of the discriminator", above=0)
    lr_mapping: float = _key(1e-6, "learning rate of the mapping network", above=0)
    weight_decay: float = _key(1e-4, "AdamW weight decay", at_least=0)
    ema_epochs: float = _key(
        0.0,
        "half-life, in epochs, of averages of G, F and E, which are then measured, drawn and exported; 0 for none",
        at_least=0,
    )
    latent_scale: float = _key(0.18215, "factor on latents before the networks", above=0)
    use_amp: bool = _key(True, "autocast the networks to amp_dtype")
    amp_dtype: Literal["bf16", "fp16"] = _key("bf16", "autocast type; fp16 needs a GPU")
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "where to train; auto takes a GPU when there is one")
    channels_last: bool = _key(False, "keep activations channels last in memory")
    tf32: bool = _key(True, "float32 products in TF32 on a GPU")
    cudnn_benchmark: bool = _key(True, "let cuDNN time its algorithms first; not with deterministic")
    deterministic: bool = _key(False, "cuDNN algorithms that repeat bit for bit; a CPU always does")
    num_workers: int = _key(
        4, "threads that gather batches ahead when latents stay in CPU memory and training is on a GPU",
        at_least=0, result=False,
    )  # fmt: skip
    pin_memory: bool = _key(True, "page-locked batches on their way to a GPU", result=False)
    use_compile: bool = _key(False, "torch.compile the networks chosen below")
    compile_mode: Literal[
        "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ] = _key("default", "mode of torch.compile")  # fmt: skip
    compile_dynamic: bool = _key(False, "compile for changing shapes")
    compile_fullgraph: bool = _key(False, "refuse graph breaks")
    compile_cudagraphs: bool = _key(False, "let Inductor use CUDA graphs")
    compile_generator: bool = _key(True, "compile G")
    compile_mapping_network: bool = _key(True, "compile F")
    compile_style_encoder: bool = _key(True, "compile E")
    compile_discriminator: bool = _key(True, "compile D (R1 always runs the original)")
    progress_style: Literal["bar", "percent", "off"] = _key("percent", "terminal display", result=False)
    progress_bar: bool = _key(True, "legacy: false is progress_style off", result=False)
    display_interval: int = _key(20, "steps between two refreshes of the display", at_least=1, result=False)
    log_json: bool = _key(False, "print JSON lines", result=False)
    log_interval: int = _key(100, "steps between two JSON lines", at_least=1, result=False)
    save_interval: int = _key(10, "epochs between two checkpoints of a single run", at_least=1, result=False)
    eval_interval: int | None = _key(
        None, "legacy: used when visualization.every_epochs is absent", at_least=1, result=False
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualizationConfig:
    """Decoded picture grids."""

    every_epochs: int | None = _key(
        None, "epochs between two grids, 0 for none; absent: training.eval_interval, else 5",
        at_least=0, result=False,
    )  # fmt: skip
    save_dir: str | None = _key(None, "folder of a single run's grids; by default vis/ in its own", result=False)
    vae_model_name_or_path: str | None = _key(
        None,
        "AutoencoderKL or AutoencoderTiny, hub name or folder; or a decoder's .safetensors; null: the built-in decoder",
        result=False,
    )
    suppress_hf_warnings: bool = _key(True, "silence the model libraries while they load", result=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Latents on disk: `<data_root>/<domain>/*.pt|*.npy`, or one packed .safetensors file."""

    data_root: str = _key("../../latent-256", "folder of domains, packed file, or raystar:demo", result=False)
    domains: tuple[str, ...] = _key(
        ("photo", "Hayao", "monet", "cezanne", "vangogh"), "names of the domains, in the order of their ids"
    )
    preload_to_gpu: bool = _key(True, "keep all latents in GPU memory when they fit", result=False)
    holdout: float = _key(0.1, "share of each domain's pictures that training never sees", at_least=0, at_most=0.5)
    eval_data_root: str | None = _key(None, "held-out latents from here instead of a share", result=False)
    cache_dir: str | None = _key(None, "packed latents and the ruler; by default cache/ under --out", result=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints of a single run (`raystar.train`); a sweep keeps its own."""

    save_dir: str | None = _key(None, "folder of epoch_xxxx.pt and latest.pt; by default <out>/<name>", result=False)
    init_from: str | None = _key(None, "a .pt checkpoint whose networks, not their averages, training starts from")


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerConfig:
    """The score that loss weights cannot move (raystar.ruler)."""

    every_epochs: int | None = _key(
        None,
        "epochs between two measurements, besides a sweep's rungs and the last epoch; absent: none besides, and in a "
        "single run those with grids",
        at_least=1,
    )
    sources: int = _key(
        32,
        "held-out contents translated for each ordered pair of domains, half by reference, half by noise",
        at_least=2,
    )
    targets: int = _key(256, "held-out latents of a domain that translations are compared with", at_least=4)
    styles: int = _key(4, "noises per content that measure diversity", at_least=2)
    features: str | None = _key(
        None,
        "a VGG state dictionary (.pth or .safetensors) whose features the ruler takes beside its own",
        result=False,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration. Read it by attribute: `config.loss.w_cyc`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    visualization: VisualizationConfig = field(default_factory=VisualizationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ruler: RulerConfig = field(default_factory=RulerConfig)

    @property
    def num_domains(self) -> int:
        """Number of domains N."""
        return len(self.data.domains)

    @property
    def ds_decay(self) -> float:
        """Epochs over which the weight of the diversity term falls to 0; of a share of the run, not always whole."""
        given = self.loss.ds_decay_epochs
        return given if given >= 1 else given * self.training.epochs

    @property
    def grid_every(self) -> int:
        """Epochs between two picture grids, 0 for none (spec: `every_epochs`, else legacy `eval_interval`)."""
        if self.visualization.every_epochs is not None:
            return self.visualization.every_epochs
        return self.training.eval_interval if self.training.eval_interval is not None else 5

    @property
    def progress(self) -> str:
        """`bar`, `percent` or `off`; the legacy `progress_bar: false` switches the display off."""
        return self.training.progress_style if self.training.progress_bar else "off"


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
    "visualization": VisualizationConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "ruler": RulerConfig,
}
_HINTS = {cls: typing.get_type_hints(cls) for cls in SECTIONS.values()}


def known_keys() -> list[str]:
    """Every dotted key, for example `loss.w_cyc`."""
    return [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in fields(cls)]


def key_field(key: str, source: str) -> dataclasses.Field[Any]:
    """The dataclass field behind a dotted key; `RaystarError` naming `source` if there is none."""
    section, _, name = key.partition(".")
    if section in SECTIONS:
        for candidate in fields(SECTIONS[section]):
            if candidate.name == name:
                return candidate
    raise RaystarError(f"{source}: unknown key {misspelt(key, known_keys())}")


# -- reading files ---------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice, since the second would silently win, and files without measure."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[int, int] = {}
        """Nodes below a finished node, aliases written out, by the node's id."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; counted, so that aliases of aliases end here and not in the memory."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.constructor.ConstructorError(None, None, "an alias stands inside of what it means", mark)
            self._count(self._sizes[id(node)], mark)
            return node
        before, self._depth = self._nodes, self._depth + 1
        self._count(1, mark)
        if self._depth > MAX_DEPTH:
            raise yaml.constructor.ConstructorError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        if self.check_event(yaml.ScalarEvent) and len(self.peek_event().value) > MAX_SCALAR:
            raise yaml.constructor.ConstructorError(None, None, f"a value of over {MAX_SCALAR} characters", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._nodes - before
        return node

    def _count(self, nodes: int, mark: yaml.Mark) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            words = f"more than {MAX_NODES} values (aliases written out)"
            raise yaml.constructor.ConstructorError(None, None, words, mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; PyYAML raises nearly anything at a text that is not of its `!!type`."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"no {kind} that can be read: {show(node.value)}", node.start_mark
            ) from None


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    own: dict[Any, Any] = {}
    merged: list[yaml.Node] = []
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            merged.append(value_node)
            continue
        key = loader.construct_object(key_node, deep=True)
        try:
            repeated = key in own
        except TypeError as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"a key must be text, found {show(key)}", key_node.start_mark
            ) from error
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {show(key)} is written twice", key_node.start_mark
            )
        own[key] = loader.construct_object(value_node, deep=True)
    # What is merged (`<<`) gives way to what stands here, and of several mappings the first counts.
    found: dict[Any, Any] = {}
    for value_node in merged:
        several = isinstance(value_node, yaml.SequenceNode)
        content = loader.construct_object(value_node, deep=True)
        for mapping in reversed(content if several else [content]):
            if not isinstance(mapping, dict):
                raise yaml.constructor.ConstructorError(
                    None, None, f"<< takes a mapping, found {show(mapping)}", value_node.start_mark
                )
            found |= mapping
    return found | own


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_StrictLoader)


def _pairs_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {show(key)} is written twice")
        found[key] = value
    return found


def _parse_json(text: str) -> Any:
    """JSON is nearly YAML, but a YAML parser takes the two halves of an escaped emoji for two characters."""
    return json.loads(text, object_pairs_hook=_pairs_without_duplicates)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Reads a YAML or JSON file that holds one mapping.

    Raises:
        RaystarError: missing, unreadable, over a megabyte, not YAML, a key twice, or not a mapping.
    """
    path = Path(path)
    if not is_file(path):
        found = "a folder" if is_folder(path) else "nothing"
        near = nearest(path.name, _names_in(path.parent)) if is_folder(path.parent) else ""
        raise RaystarError(f"{path}: expected a YAML or JSON file, found {found}{near}")
    kind, parse = ("JSON", _parse_json) if path.suffix == ".json" else ("YAML", _parse_yaml)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RaystarError(f"{path}: {path.stat().st_size} bytes is no configuration (limit {MAX_FILE_BYTES})")
        content = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RaystarError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RaystarError(f"{path}: not readable as text: {error}") from None
    except RecursionError:
        raise RaystarError(f"{path}: not readable as {kind}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RaystarError(f"{path}: not readable as {kind}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RaystarError(f"{path}: expected a mapping at the top, found {show(content)}")
    return content


def _names_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if is_file(path)]
    except OSError:
        return []


def find_shipped(path: str | Path) -> Path:
    """`path` itself, or the file of that name that ships with raystar when the working folder has none."""
    path = Path(path)
    if is_file(path) or is_folder(path) or path.is_absolute():
        return path
    package = Path(raystar.__file__).resolve().parent
    for root in (package.parent, package):  # a clone; an installed wheel
        if is_file(root / path):
            return root / path
    return path


def load_config(path: str | Path, base: Config | None = None) -> Config:
    """Reads a configuration file; keys that it leaves out keep those of `base`, by default the defaults.

    Raises:
        RaystarError: file, dotted key, what was found, what was expected and the nearest known key.
    """
    return from_mapping(read_mapping(path), str(path), base)


def request_config(path: str | Path, overlays: Sequence[str], assignments: Sequence[str]) -> Config:
    """A command line's configuration: `--config`, then each `--overlay` file, then each `--set key=value`."""
    config = load_config(find_shipped(path))
    for overlay in overlays:
        config = load_config(find_shipped(overlay), config)
    return override(config, dict(parse_assignment(text) for text in assignments), "--set")


def from_mapping(mapping: Mapping[Any, Any], source: str, base: Config | None = None) -> Config:
    """`base` (by default the defaults) with nested sections, as read from `source`, the name that errors give."""
    flat: dict[str, Any] = {}
    for section, content in mapping.items():
        if section not in SECTIONS:
            raise RaystarError(f"{source}: unknown section {misspelt(section, SECTIONS)}")
        if content is None:
            continue
        if not isinstance(content, Mapping):
            raise RaystarError(f"{source}: {section}: expected a section of keys, found {show(content)}")
        flat.update({f"{section}.{key_text(name)}": value for name, value in content.items()})
    return override(Config() if base is None else base, flat, source)


def override(config: Config, values: Mapping[str, Any], source: str = "override") -> Config:
    """`config` with dotted keys replaced, each value checked.

    Args:
        values: for example `{"loss.w_cyc": 2.0}`.
        source: where the values came from, named in errors.

    Raises:
        RaystarError: an unknown key, a wrong type, an impossible value, or values that contradict each other.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        key = key_text(key)
        checked = check_value(key, value, source)
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = checked
    changed = {name: dataclasses.replace(getattr(config, name), **new) for name, new in sections.items()}
    config = dataclasses.replace(config, **changed)
    _check_whole(config, source)
    return config


def _check_whole(config: Config, source: str) -> None:
    n = config.model.num_domains
    if n is not None and n != config.num_domains:
        raise RaystarError(
            f"{source}: model.num_domains is {n}, but data.domains names {config.num_domains}: "
            f"{', '.join(config.data.domains)}"
        )
    training = config.training
    if training.amp_dtype == "fp16" and training.use_amp and training.device == "cpu":
        raise RaystarError(f"{source}: training.amp_dtype: fp16 needs a GPU; take bf16 on a CPU")
    if training.drop_last and training.epoch_size is not None and training.epoch_size < training.batch_size:
        raise RaystarError(
            f"{source}: training.epoch_size {training.epoch_size} is below training.batch_size "
            f"{training.batch_size}, so an epoch would have no step; raise it or set training.drop_last=false"
        )


def parse_assignment(text: str) -> tuple[str, Any]:
    """Splits a `--set` argument `key=value`; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RaystarError(f"--set {key_text(text)}: expected key=value, for example --set loss.w_cyc=2.0")
    try:
        return key.strip(), _parse_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RaystarError(f"--set {key_text(text)}: the value cannot be read as YAML") from None


# -- checking one value ----------------------------------------------------------------------------


def check_value(key: str, value: Any, source: str) -> Any:
    """`value` converted to the type of `key`; `RaystarError` with what was expected if it cannot be."""
    spec = key_field(key, source)
    section = key.partition(".")[0]
    hint = _HINTS[SECTIONS[section]][spec.name]
    try:
        checked = _convert(hint, value)
        _check_limits(checked, spec.metadata["limits"])
        if key == "data.domains":
            _check_domains(checked)
        if key == "loss.ds_decay_epochs" and isinstance(checked, float) and checked > 1:
            raise ValueError("expected a whole number of epochs, or a share of the run below 1")
    except ValueError as error:
        raise RaystarError(f"{source}: {key}: {error}, found {show(value)} ({spec.metadata['meaning']})") from None
    return checked


def _convert(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if inner == [int, float]:  # whole numbers stay what they are where nothing else was possible
            number = _number(value)
            return _convert(int if number is not None and number.is_integer() else float, value)
        return None if value is None else _convert(inner[0], value)
    if origin is Literal:
        choices = typing.get_args(hint)
        # YAML 1.1 reads an unquoted `off` as false, and progress_style has a choice of that name.
        if value is False and "off" in choices:
            value = "off"
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(_is_text(v) for v in value):
            raise ValueError("expected a list of names")
        return tuple(value)
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value
    if hint is str:
        if not _is_text(value) or not value or "\0" in value:
            raise ValueError("expected text")
        return value
    number = _number(value)
    if hint is int:
        if number is None or not number.is_integer():
            raise ValueError("expected a whole number")
        if abs(number) > MAX_WHOLE:
            raise ValueError(f"expected a whole number up to {MAX_WHOLE}")
        return int(number)
    if number is None:
        raise ValueError("expected a number")
    return number


def _is_text(value: Any) -> bool:
    """Half of an escaped pair such as \\ud83d is text to Python, but no file can be named or written with it."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _number(value: Any) -> float | None:
    """A finite float, or None. Text is tried too: YAML 1.1 reads a `1e-4` without a dot as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number + 0.0 if math.isfinite(number) else None  # -0.0 equals 0.0, so it must not sign differently


def _check_limits(value: Any, limits: Mapping[str, float | None]) -> None:
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return
    if limits["at_least"] is not None and value < limits["at_least"]:
        raise ValueError(f"expected at least {limits['at_least']:g}")
    if limits["above"] is not None and value <= limits["above"]:
        raise ValueError(f"expected more than {limits['above']:g}")
    if limits["at_most"] is not None and value > limits["at_most"]:
        raise ValueError(f"expected at most {limits['at_most']:g}")


def _check_domains(domains: tuple[str, ...]) -> None:
    if len(domains) < 2:
        raise ValueError("expected at least two domains")
    if len(set(domains)) < len(domains):
        raise ValueError("expected each domain once")
    for name in domains:
        if not name.strip() or name in (".", "..") or re.search(r"[/\\\0]", name):
            raise ValueError(f"expected names of folders directly below data.data_root, not {name!r}")


# -- writing ---------------------------------------------------------------------------------------


def to_mapping(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain dictionaries, lists and scalars: what `from_mapping` reads."""
    mapping = dataclasses.asdict(config)
    mapping["data"]["domains"] = list(config.data.domains)
    return mapping


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that `load_config` reads back equal."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def overlay_yaml(values: Mapping[str, Any]) -> str:
    """Dotted keys as a YAML file for `--overlay`."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def get_value(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def signature(config: Config) -> str:
    """Twelve hex digits over every key that changes the result (not display, logging or paths)."""
    kept = {key: get_value(config, key) for key in known_keys() if key_field(key, "").metadata["result"]}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

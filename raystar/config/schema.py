"""Every configuration key: its default, its limits and what it means."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from raystar.base.errors import RaystarError, misspelt

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
class ExperimentConfig:
    """Names of a single run (`raystar.train`); a sweep's trials have their own."""

    name: str | None = _key(None, "the run's name; by default the configuration's with the time", result=False)
    outputs_dir: str | None = _key(
        None, "the run's folder; absent: outputs/<name> where experiment.name is set, else <out>/<name>", result=False
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the four networks (docs/networks.md)."""

    latent_channels: int = _key(4, "channels of a latent", at_least=1)
    style_dim: int = _key(64, "length of a style code", at_least=1)
    latent_dim: int = _key(16, "length of the noise z", at_least=1)
    base_dim: int = _key(256, "channels of the generator", at_least=4)
    num_domains: int | None = _key(None, "number of domains; by default that of data.domains", at_least=2)
    n_res_blocks: int = _key(6, "residual blocks of the generator", at_least=0)
    d_layers: int = _key(3, "depth of the discriminator", at_least=1)
    mapping_hidden_dim: int = _key(512, "width of the mapping network", at_least=1)
    mapping_shared_layers: int = _key(4, "shared layers of the mapping network", at_least=1)
    norm: Literal["adain", "adagn"] = _key(
        "adain", "normalisation in the generator: of each channel (AdaIN), or of groups of channels (AdaGN)"
    )
    num_groups: int = _key(32, "groups of channels that adagn normalises; must divide base_dim", at_least=1)
    encoder_groups: int | None = _key(
        None, "groups of adagn's norms before the residual blocks; absent: num_groups; base_dim: each channel alone",
        at_least=1,
    )  # fmt: skip
    discriminator_norm: Literal["none", "spectral"] = _key(
        "none", "spectral: every convolution of the discriminator is spectrally normalised"
    )
    residual: bool = _key(False, "G gives x + net(x), and its last convolution starts at zero: it begins as identity")
    discriminator_dim: int | None = _key(
        None, "channels of the discriminator's first layer, a quarter of its widest; absent: base_dim / 4", at_least=1
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the losses (docs/losses.md). These are what `search_spaces/loss.yaml` searches."""

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
    lr_schedule: Literal["none", "cosine", "linear"] = _key("none", "how all learning rates fall over the run's steps")
    warmup_steps: int = _key(0, "first steps, in which a schedule's learning rates rise to their values", at_least=0)
    min_lr_ratio: float = _key(
        0.0, "share of the learning rates that a schedule's last step has", at_least=0, at_most=1
    )
    weight_decay: float = _key(1e-4, "AdamW weight decay", at_least=0)
    ema_epochs: float = _key(
        0.0,
        "half-life, in epochs, of averages of G, F and E, which are then measured, drawn and exported; 0 for none",
        at_least=0,
    )
    latent_scale: float = _key(0.18215, "factor on latents before the networks", above=0)
    use_amp: bool = _key(True, "autocast the networks to amp_dtype")
    amp_dtype: Literal["bf16", "fp16"] = _key("bf16", "autocast type; fp16 is float32 on a CPU")
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "where to train; auto takes a GPU when there is one")
    channels_last: bool | None = _key(None, "keep activations channels last in memory; absent: on a GPU")
    recompute: bool = _key(
        False, "compute G's residual blocks again for their gradients instead of keeping them: less memory, more time"
    )
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
    log_json: bool = _key(False, "print JSON lines of steps, and a summary of each epoch", result=False)
    log_interval: int = _key(100, "steps between two JSON lines", at_least=1, result=False)
    console_log_path: str | None = _key(
        None, "file to which what a single run prints is appended; null for none", result=False
    )
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
    vae_subfolder: str | None = _key(
        "vae", "where that folder or repository holds the VAE, if not at its top; empty or null: nowhere", result=False
    )
    suppress_hf_warnings: bool = _key(True, "silence the model libraries while they load", result=False)
    num_samples: int | None = _key(
        None, "domains that a grid shows, the first of data.domains; absent: all", at_least=1, result=False
    )
    random_noise_seed: int = _key(
        0, "seed of the noise of a grid's first column; the others' follow", at_least=0, at_most=MAX_WHOLE, result=False
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Latents on disk: `<data_root>/<domain>/*.pt|*.npy`, or one packed .safetensors file."""

    data_root: str = _key("../../latent-256", "folder of domains, packed file, or raystar:demo", result=False)
    domains: tuple[str, ...] = _key(
        ("photo", "Hayao", "monet", "cezanne", "vangogh"), "names of the domains, in the order of their ids"
    )
    max_samples: int | tuple[int, ...] | None = _key(
        None, "training latents of a domain that are drawn from, one number or one a domain; null for all", at_least=1
    )
    preload_to_gpu: bool = _key(True, "keep all latents in GPU memory when they fit", result=False)
    holdout: float = _key(
        0.1, "share of each domain's pictures that training never sees; at 0 its own are measured",
        at_least=0, at_most=0.5,
    )  # fmt: skip
    eval_data_root: str | None = _key(None, "held-out latents from here instead of a share", result=False)
    cache_dir: str | None = _key(None, "packed latents and the ruler; by default cache/ under --out", result=False)

    @property
    def holds_out(self) -> bool:
        """Whether any latents are kept from training; where none are, the ruler measures on those of training."""
        return self.holdout > 0 or self.eval_data_root is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints: those that are begun from, and those of a single run (`raystar.train`); a sweep keeps its own."""

    save_dir: str | None = _key(None, "folder of epoch_xxxx.pt and latest.pt; by default <out>/<name>", result=False)
    init_from: str | None = _key(None, "a .pt checkpoint whose networks, not their averages, training starts from")
    resume_path: str | None = _key(
        None, "a single run continues after this checkpoint, if it is there and the run has none", result=False
    )
    map_domains: bool = _key(
        False, "a checkpoint of other domains, or of another order of them, gives each domain what it has of that name"
    )
    other_latent_scale: bool = _key(False, "a checkpoint of another training.latent_scale is meant to be used")


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

    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
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
        epochs = self.loss.ds_decay_epochs
        return epochs if epochs >= 1 else epochs * self.training.epochs

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
    "experiment": ExperimentConfig,
    "model": ModelConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
    "visualization": VisualizationConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "ruler": RulerConfig,
}
HINTS = {cls: typing.get_type_hints(cls) for cls in SECTIONS.values()}


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

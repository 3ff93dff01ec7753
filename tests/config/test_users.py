"""Configuration files of the trainer that users come from: their keys, their defaults, what has no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raystar.base.errors import RaystarError
from raystar.config import users
from raystar.config.load import get_value, load_config, to_yaml
from raystar.config.schema import Config

FILES = Path(__file__).parent / "users"
FIRST = {
    "loss.w_id": 0.0, "loss.ds_margin": None, "loss.w_r1": 10.0, "loss.ds_decay_epochs": 20, "training.seed": 42,
    "training.drop_last": True, "model.mapping_shared_layers": 3, "training.lr_schedule": "none",
}  # fmt: skip
WANTED: dict[str, dict[str, Any]] = {
    "first": FIRST | {"training.epochs": 100, "checkpoint.save_dir": "outputs/stargan_v2_baseline"},
    "first_overfit50": FIRST | {"training.epochs": 1000, "checkpoint.save_dir": "outputs/stargan_v2_overfit"},
    "schedule": {
        "training.epochs": 100, "training.epoch_size": 6144, "loss.w_id": 2.0, "loss.ds_margin": None,
        "checkpoint.save_dir": "outputs/stargan_v2_baseline_id2/ckpt",
    },
    "baseline": {
        "training.epochs": 100, "training.epoch_size": 6144, "loss.w_id": 1.0, "loss.ds_margin": 1.5, "loss.w_r1": 2.0,
        "checkpoint.save_dir": "outputs/new_baseline/ckpt",
    },
    "baseline_overfit50": {
        "training.epochs": 500, "training.epoch_size": None, "loss.w_id": 10.0, "loss.w_r1": 10.0,
        "visualization.save_dir": "outputs/stargan_v2_overfit_id_loss_10/vis", "data.eval_data_root": None,
    },
    "norms": {
        "training.epochs": 20, "training.lr_schedule": "cosine", "training.warmup_steps": 200,
        "training.min_lr_ratio": 0.1, "training.tf32": True, "training.drop_last": True, "training.batch_size": 64,
        "data.eval_data_root": "../datasets/pt_datasets/unscaled_test_dataset",
        "checkpoint.save_dir": "outputs/sn_gn_test_1/ckpt", "visualization.every_epochs": 1,
        "training.progress_style": "percent", "training.progress_bar": True, "model.norm": "adain",
        "model.discriminator_norm": "spectral", "checkpoint.resume_path": "outputs/sn_gn_test_1/ckpt/latest.pt",
        "training.console_log_path": "outputs/sn_gn_test_1/console.log", "visualization.num_samples": 5,
        "visualization.random_noise_seed": 42, "visualization.vae_subfolder": "vae",
    },
    "norms_overfit50": {"training.epochs": 500, "loss.w_id": 10.0, "training.epoch_size": None},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _unsaid() -> None:
    users._note_once.cache_clear()


def load(tmp_path: Path, text: str, base: Config | None = None) -> Config:
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", base)


@pytest.mark.parametrize("name", WANTED)
def test_their_files(name: str) -> None:
    """What a file says is what it says, under raystar's names; what it leaves out is that trainer's default."""
    config = load_config(FILES / f"{name}.yaml")
    for key, value in WANTED[name].items():
        assert get_value(config, key) == value, key
    content = yaml.safe_load((FILES / f"{name}.yaml").read_text())
    checked = 0
    for section in ("model", "loss", "training"):
        for key, value in content[section].items():
            if hasattr(getattr(config, section), key) and key not in ("progress_bar", "console_log_path"):
                expected = None if key == "ds_margin" and value <= 0 else value
                assert get_value(config, f"{section}.{key}") == expected, key
                checked += 1
    assert checked > 20


def test_every_file_is_listed() -> None:
    assert {path.stem for path in FILES.glob("*.yaml")} == WANTED.keys()


def test_what_has_no_effect_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        load_config(FILES / "norms.yaml")
    assert capsys.readouterr().err == (
        f"note: {FILES / 'norms.yaml'}: visualization.auto_eval_latest, visualization.eval_dir: the last epoch's grids "
        "are drawn as the others are, into the same folder (visualization.save_dir)\n"
        f"note: {FILES / 'norms.yaml'}: data.decoded_source_dir, data.image_root, eval have no effect here\n"
    )


def test_what_it_makes_is_raystars_own(tmp_path: Path) -> None:
    """A configuration that is written out has no traces of the file that it came from."""
    config = load_config(FILES / "norms.yaml")
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training: {num_epochs: 7}", "training.epochs", 7),
        ("training: {num_epochs: 7}", "loss.w_r1", 10.0),
        ("training: {epochs: 7}", "loss.w_r1", Config().loss.w_r1),  # raystar's own
        ("training: {num_epochs: 7}", "training.weight_decay", 0.0),
        ("training: {num_epochs: 7, compile_dynamic: true}", "training.drop_last", False),
        ("training: {num_epochs: 7, save_interval: 3}", "visualization.every_epochs", 3),
        ("training: {num_epochs: 7, save_interval: 3, eval_interval: 2}", "visualization.every_epochs", 2),
        ("training: {num_epochs: 7, amp_dtype: BF16}", "training.amp_dtype", "bf16"),
        ("training: {num_epochs: 7, amp_dtype: FP16}", "training.amp_dtype", "fp16"),
        ("training: {num_epochs: 7}\ndata: {epoch_size: 0}", "training.epoch_size", None),
        ("training: {num_epochs: 7, progress_bar: false}", "training.progress_bar", False),
        ("training: {num_epochs: 7, progress_bar: false, progress_style: bar}", "training.progress_bar", True),
        ("training: {num_epochs: 7}\nloss: {ds_margin: 0, r1_interval: 0, ds_decay_epochs: 0}", "loss.ds_margin", None),
        ("training: {num_epochs: 7}\nloss: {ds_margin: -1, r1_interval: 0, ds_decay_epochs: 0}", "loss.r1_interval", 1),
        ("training: {num_epochs: 7}\nloss: {ds_margin: -1, ds_decay_epochs: 0}", "loss.ds_decay_epochs", 1),
        ("training: {num_epochs: 7}\ndata: {eval_data_root: ''}", "data.eval_data_root", None),
        ("training: {num_epochs: 7, console_log_path: ''}", "training.console_log_path", None),
        ("training: {num_epochs: 7}", "visualization.random_noise_seed", 0),  # the numbers of grids stay raystar's
        ("training: {num_epochs: 7}", "visualization.num_samples", None),
        ("training: {num_epochs: 7}\nvisualization: {vae_subfolder: other}", "visualization.vae_subfolder", "other"),
        ("training: {num_epochs: 7}\nvisualization: {vae_subfolder: null}", "visualization.vae_subfolder", None),
        ("visualization: {vae_subfolder: ''}", "visualization.vae_subfolder", None),
        (
            "experiment: {name: a b}\ncheckpoint: {save_dir: '{outputs_dir}/ck'}",
            "checkpoint.save_dir",
            "outputs/a b/ck",
        ),
        (
            "experiment: {name: x, outputs_dir: '/o/{exp_name}'}\ncheckpoint: {save_dir: '{outputs_dir}/{exp_name}'}",
            "checkpoint.save_dir",
            "/o/x/x",
        ),
        ("model: {exp_branch: baseline_AdaIN, num_groups: 32}", "model.norm", "adain"),
        ("model: {exp_branch: baseline_AdaIN, num_groups: 32}", "model.discriminator_norm", "spectral"),
        ("model: {exp_branch: AdaGN_with_SN, num_groups: 16}", "model.norm", "adagn"),
        ("model: {exp_branch: AdaGN_with_SN, num_groups: 16}", "model.num_groups", 16),
        ("model: {exp_branch: AdaGN_with_SN, num_groups: 16}", "model.discriminator_norm", "spectral"),
        ("model: {exp_branch: AdaGN_no_SN}", "model.norm", "adagn"),
        ("model: {exp_branch: AdaGN_no_SN}", "model.discriminator_norm", "none"),
        ("model: {num_groups: 8, base_dim: 64}\ntraining: {num_epochs: 7}", "model.norm", "adagn"),
        ("model: {num_groups: 8, base_dim: 64}\ntraining: {num_epochs: 7}", "model.discriminator_norm", "spectral"),
        ("model: {num_groups: 8, base_dim: 64}\ntraining: {num_epochs: 7}", "model.encoder_groups", 64),
        ("model: {num_groups: 8}", "model.norm", "adain"),  # raystar's own key
        ("model: {exp_branch: null}\ntraining: {num_epochs: 7}", "model.norm", "adain"),
        ("model: {exp_branch: '', num_groups: 8}\ntraining: {num_epochs: 7}", "model.norm", "adagn"),
        ("checkpoint: {resume_path: ''}\ntraining: {num_epochs: 7}", "checkpoint.resume_path", None),
        ("training: {allow_tf32: false}", "training.tf32", False),
        ("data: {epoch_size: 640}", "training.epoch_size", 640),
    ],
)
def test_keys_and_defaults(tmp_path: Path, text: str, key: str, value: Any) -> None:
    assert get_value(load(tmp_path, text), key) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {exp_branch: other}", "expected one of baseline_AdaIN, AdaGN_with_SN, AdaGN_no_SN, found 'other'"),
        ("model: {exp_branch: AdaGN_no_SN, norm: adagn}", "model.exp_branch and model.norm say the same"),
        ("model: {exp_branch: AdaGN_no_SN, num_groups: 3}", "model.num_groups 3 does not divide model.base_dim 256"),
        ("training: {num_epochs: 1, epochs: 2}", "training.num_epochs and training.epochs are the same"),
        ("checkpoint: {save_dir: '{outputs_dir}/x'}\nexperiment: {}", "needs experiment.name"),
        ("training: {console_log_path: '{outputs_dir}/console.log'}", "needs experiment.name"),
        (
            "training: {num_epochs: 1}\nvisualization: {num_samples: 0}",
            "visualization.num_samples: expected at least 1",
        ),
        ("training: {num_epochs: 1, lrg: 3}\nloss: {w_idd: 1}", "unknown keys 'training.lrg'"),
        ("training: {num_epochs: 0}", "training.epochs: expected at least 1"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RaystarError) as caught:
        load(tmp_path, text)
    assert words in str(caught.value)
    assert str(tmp_path / "c.yaml") in str(caught.value)


def test_an_overlay_of_theirs_changes_what_it_names_alone(tmp_path: Path) -> None:
    base = load(tmp_path, "training: {epochs: 3}\nloss: {w_r1: 0.5}")
    changed = load(tmp_path, "training: {num_epochs: 9}", base)
    assert (changed.training.epochs, changed.loss.w_r1, changed.training.seed) == (9, 0.5, base.training.seed)

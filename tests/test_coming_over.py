"""Somebody who trains with latent_cyclegan comes over with a folder of theirs, and goes back; as commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from raystar import export, score, train, translate
from raystar.__main__ import main as raystar
from raystar.base.errors import RaystarError
from raystar.config.load import from_mapping, load_config, request_config
from raystar.exported import model as models
from raystar.model import checkpoint as checkpoints
from raystar.training.resume import snapshot, state_of
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, losses_of
from tests.kit import theirs
from tests.kit.support import write_latents
from tests.model.test_users_checkpoints import batch, outputs, trained

SMALL = [
    "training.epoch_size=16",
    "training.batch_size=8",
    "training.device=cpu",
    "ruler.sources=3",
    "data.holdout=0.25",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Their working folder: latents, the configuration, and the run's checkpoints after one epoch."""
    monkeypatch.chdir(tmp_path)
    write_latents(tmp_path / "latents", tuple(theirs.DOMAINS))
    saved = tmp_path / "outputs/tiny/ckpt/latest.pt"
    saved.parent.mkdir(parents=True)
    trained("AdaGN_with_SN", saved, "_orig_mod.")
    content = theirs.config("AdaGN_with_SN")
    content["data"]["data_root"] = "latents"
    content["visualization"]["vae_model_name_or_path"] = None
    content["visualization"]["every_epochs"] = 2
    content["checkpoint"] = {"save_dir": "{outputs_dir}/ckpt", "resume_path": "{outputs_dir}/ckpt/latest.pt"}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def sets(*texts: str) -> list[str]:
    return [part for text in (*SMALL, *texts) for part in ("--set", text)]


def test_a_run_goes_on_where_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`checkpoint.resume_path` is enough; the run has the experiment's name; what it writes goes on there."""
    command = ["--config", "theirs.yaml", *sets("training.num_epochs=2"), "--out", "runs"]
    assert train.main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "resuming after outputs/tiny/ckpt/latest.pt, as checkpoint.resume_path says" in shown
    assert "run tiny: 2 epochs of 2 steps on cpu, after epoch 1 of outputs/tiny/ckpt/latest.pt" in shown
    assert not (folder / "runs/mlflow.db").exists()
    assert train.main(command) == 0
    saved = checkpoints.load("outputs/tiny/ckpt/latest.pt")
    assert (saved["epoch"], saved["raystar"] != "") == (2, True)
    assert (folder / "outputs/tiny/ckpt/epoch_0002.pt").is_file()
    trainer = theirs.Trainer("AdaGN_with_SN")
    trainer.load(folder / "outputs/tiny/ckpt/latest.pt")
    assert (trainer.epoch, trainer.global_step) == (2, 4)


def test_resume_path_serves_where_the_run_has_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = ["checkpoint.save_dir=elsewhere", "training.epochs=2"]
    command = ["--config", "theirs.yaml", *sets(*moved), "--dry-run"]
    for more in ([], ["--resume"], ["--resume", "--name", "other"]):
        assert train.main([*command, *more]) == 0
        assert "after epoch 1 of outputs/tiny/ckpt/latest.pt" in capsys.readouterr().out
    assert train.main([*command, "--set", "checkpoint.resume_path=gone.pt"]) == 0
    shown = capsys.readouterr()
    assert "note: checkpoint.resume_path: gone.pt is not there; the run begins from its start" in shown.err
    assert "from its start" in shown.out


def test_the_configuration_inside_of_a_checkpoint_is_enough(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "moved.pt"
    (folder / "outputs/tiny/ckpt/latest.pt").rename(file)
    command = ["--resume", str(file), *sets("data.data_root=latents", "training.epochs=2"), "--dry-run"]
    assert train.main(command) == 0
    assert f"after epoch 1 of {file}" in capsys.readouterr().out
    with pytest.raises(RaystarError, match=r"--config: expected a file, .*, or --resume and a checkpoint"):
        train.main(["--resume", "--name", "x"])


def test_nothing_is_overwritten_that_a_file_is_not_the_newest_of(folder: Path) -> None:
    (folder / "moved.pt").write_bytes((folder / "outputs/tiny/ckpt/latest.pt").read_bytes())
    with pytest.raises(RaystarError, match=r"outputs/tiny/ckpt holds checkpoints already, which would be overwritten"):
        train.main(["--config", "theirs.yaml", "--resume", "moved.pt", *sets()])
    with pytest.raises(RaystarError, match=r"a checkpoint, found nothing"):
        train.main(["--config", "theirs.yaml", "--resume", "other.pt", *sets("checkpoint.save_dir=elsewhere")])


def test_other_domains_are_named_and_can_be_mapped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = sets("data.domains=[monet,photo]", "model.num_domains=2", "training.epochs=2")
    with pytest.raises(RaystarError, match=r"data\.domains \[photo, Hayao, monet\] there, \[monet, photo\] now"):
        train.main(["--config", "theirs.yaml", *other, "--dry-run"])
    assert train.main(["--config", "theirs.yaml", *other, "--dry-run", "--map-domains"]) == 0
    assert "2 domains" in capsys.readouterr().out


def test_the_score_of_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--checkpoint", "outputs/tiny/ckpt/latest.pt", *sets("data.data_root=latents"), "--out", "measured"]
    assert score.main(command) == 0
    shown = capsys.readouterr().out
    assert "epoch 1" in shown
    assert "losses on 15 held-out latents: d_loss " in shown
    facts = json.loads((folder / "measured/score.json").read_text())
    assert facts["metrics"]["eval/score"] > facts["references"]["nothing"]["eval/score"]
    assert list(facts["losses"]) == list(LOGGED)
    for name in ("grid_ref", "grid_noise"):
        assert Image.open(folder / f"measured/{name}.png").width > 300
    with pytest.raises(RaystarError, match="already there"):
        score.main(command)
    assert score.main([*command[:-2], "--set", "data.holdout=0"]) == 0
    shown = capsys.readouterr()
    assert "losses on 60 training latents: d_loss " in shown.out
    assert "note: data.holdout is 0" in shown.err


def test_the_score_is_what_training_measures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "theirs.yaml", *sets("training.epochs=2")]) == 0
    saved = checkpoints.load("outputs/tiny/ckpt/latest.pt")
    assert score.main(["--checkpoint", "outputs/tiny/ckpt/latest.pt", *sets(), "--out", "measured"]) == 0
    measured = json.loads((folder / "measured/score.json").read_text())["metrics"]
    wanted = {name: value for name, value in saved["metrics"].items() if name.startswith("eval/")}
    assert measured == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_losses_of_leaves_networks_as_they_are(folder: Path) -> None:
    checkpoint = checkpoints.load("outputs/tiny/ckpt/latest.pt")
    config = from_mapping(checkpoint["config"], "latest.pt")
    state = state_of(config, "cpu", checkpoint, "latest.pt")
    before = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in state.nets.items()}
    first, second = (losses_of(state, batch(3), epoch=2) for _ in range(2))
    assert first == second
    assert first["r1"] > 0
    for name, net in state.nets.items():
        for key, value in net.state_dict().items():
            assert torch.equal(value, before[name][key])
            assert value.grad is None


def test_a_checkpoint_is_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By reference, bit for bit what the networks give: through an export, through the file itself, as a command."""
    file = folder / "outputs/tiny/ckpt/latest.pt"
    assert export.main(["--checkpoint", str(file), "--out", "model"]) == 0
    latent = np.load(folder / "latents/photo/picture00x.npy")
    reference = np.load(folder / "latents/monet/picture01x.npy")
    x, x_ref = (torch.from_numpy(array).float()[None] for array in (latent, reference))
    nets = theirs.Trainer("AdaGN_with_SN")
    content = torch.load(file, weights_only=True)
    for name in "GE":
        getattr(nets, name).load_state_dict({k.removeprefix("_orig_mod."): v for k, v in content[name].items()})
    with torch.no_grad():
        wanted = nets.G(x * 0.18215, nets.E(x_ref * 0.18215, torch.tensor([2]))) / 0.18215
    exported, direct = (models.load(path, "cpu").translate(x, "monet", x_ref) for path in ("model", file))
    assert torch.equal(exported, direct)
    torch.testing.assert_close(exported, wanted, rtol=1e-5, atol=1e-5)
    for model, out in (("model", "a.npy"), (str(file), "b.npy")):
        command = ["--model", model, "--input", "latents/photo/picture00x.npy", "--domain", "monet", "--device", "cpu"]
        assert translate.main([*command, "--reference", "latents/monet/picture01x.npy", "--out", out]) == 0
    assert np.array_equal(np.load(folder / "a.npy"), np.load(folder / "b.npy"))


def test_going_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "theirs.yaml", *sets("training.epochs=2")]) == 0
    command = ["--checkpoint", "outputs/tiny/ckpt/latest.pt", "--legacy-pt", "back/latest.pt"]
    assert export.main(command) == 0
    assert "written to back/latest.pt: epoch 2" in capsys.readouterr().out
    trainer = theirs.Trainer("AdaGN_with_SN")
    trainer.load(folder / "back/latest.pt")
    state = state_of(load_config("theirs.yaml"), "cpu", checkpoints.load("outputs/tiny/ckpt/latest.pt"), "latest.pt")
    for one, other in zip(outputs(trainer, batch(3)), outputs(state.nets, batch(3)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    content = torch.load(folder / "back/latest.pt", weights_only=True)
    assert list(content) == ["epoch", "global_step", "G", "F", "E", "D", "opt_g", "opt_d", "config"]
    assert content["config"]["training"]["num_epochs"] == 2
    (folder / "back.yaml").write_text(yaml.safe_dump(content["config"]))
    assert load_config("back.yaml").model == load_config("theirs.yaml").model
    for wrong, words in (
        (command, "already there"),
        (["--sweep", "x", "--legacy-pt", "b.pt"], "goes with --checkpoint alone"),
    ):
        with pytest.raises(RaystarError, match=words):
            export.main(wrong)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": {"residual": True}}, "would take its weights for another function"),
        ({"model": {"discriminator_dim": 3}}, "builds base_dim / 4 alone, here 2"),
        ({"model": {"norm": "adagn", "num_groups": 4, "encoder_groups": 2}}, "builds num_groups alone, 4"),
    ],
)
def test_what_cannot_go_back(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    content = {"base_dim": 8} | changed["model"]
    config = from_mapping({"model": content, "data": {"domains": theirs.DOMAINS}}, "x")
    checkpoints.save(tmp_path / "c.pt", snapshot(TrainState.create(config, "cpu"), 1, {}))
    with pytest.raises(RaystarError, match=words):
        export.main(["--checkpoint", str(tmp_path / "c.pt"), "--legacy-pt", str(tmp_path / "back.pt")])
    assert not (tmp_path / "back.pt").exists()


def test_where_values_come_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "over.yaml").write_text("loss: {w_cyc: 3}")
    command = ["theirs.yaml", "--overlay", "over.yaml", "--set", "training.lr_g=2e-3"]
    assert raystar(["config", *command]) == 0
    shown = capsys.readouterr().out
    lines = {line.split(":")[0].strip(): line for line in shown.splitlines() if line.startswith("  ")}
    for key, value, origin in (
        ("w_adv", "1.0", "file"),
        ("epochs", "4", "file (training.num_epochs)"),
        ("norm", "adagn", "file (model.exp_branch)"),
        ("w_cyc", "3.0", "over.yaml"),
        ("lr_g", "0.002", "--set"),
        ("seed", "42", "file"),
        ("drop_last", "true", "latent_cyclegan's default"),
        ("ema_epochs", "0.0", "raystar's default"),
        ("domains", "[photo, Hayao, monet]", "file"),
    ):
        assert lines[key].partition("#")[0].strip() == f"{key}: {value}"
        assert lines[key].partition("# ")[2] == origin, key
    (folder / "resolved.yaml").write_text(shown)  # what is printed is a configuration itself
    wanted = request_config("theirs.yaml", ["over.yaml"], ["training.lr_g=2e-3"])
    assert load_config(folder / "resolved.yaml") == wanted

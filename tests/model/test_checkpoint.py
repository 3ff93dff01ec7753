"""Checkpoints: back bit by bit, or refused in one line; nothing half-written, no code run."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raystar.base.errors import RaystarError
from raystar.config.load import from_mapping, override, to_yaml
from raystar.data.bank import Bank, open_bank
from raystar.data.batches import Batch
from raystar.model import checkpoint as checkpoints
from raystar.model.networks import NAMES, Nets
from raystar.training import resume
from raystar.training.state import TrainState
from raystar.training.step import LOGGED, train_step
from raystar.training.trainer import Trainer
from tests.kit.support import ROOT, tiny_config, write_latents

CONFIG = tiny_config("unused", loss__r1_interval=2)
METRICS = {"eval/score": 1.625, "train/g_loss": 0.1}


class Trap:
    """Unpickling makes a folder: the proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def make_batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    content, x_ref = (5 * torch.randn(3, 4, 16, 16, generator=g) for _ in range(2))
    noise = [torch.randn(3, CONFIG.model.latent_dim, generator=g) for _ in range(3)]
    return Batch(content, x_ref, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]), *noise)


def trained(steps: int = 3) -> TrainState:
    state = TrainState.create(CONFIG, "cpu")
    for step in range(1, steps + 1):
        train_step(state, make_batch(step), epoch=1, step=step)
    return state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoints.save(tmp_path / "runs" / "c.pt", resume.snapshot(trained(), 3, METRICS))
    return tmp_path / "runs" / "c.pt"


def tensors_of(value: Any) -> dict[str, torch.Tensor]:
    return {name: leaf for name, leaf in checkpoints.leaves("", value) if isinstance(leaf, torch.Tensor)}


def assert_equal(left: Any, right: Any) -> None:
    a, b = dict(checkpoints.leaves("", left)), dict(checkpoints.leaves("", right))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- round trip ------------------------------------------------------------------------------------


def test_everything_comes_back_bit_by_bit(saved: Path) -> None:
    state, loaded = trained(), checkpoints.load(saved)
    assert_equal(loaded, resume.snapshot(state, 3, METRICS))
    assert len(tensors_of(loaded["opt_g"])) > 20
    assert from_mapping(loaded["config"], "c") == CONFIG
    assert loaded["metrics"] == METRICS
    assert files(saved.parent) == ["c.pt"]

    fresh = TrainState.create(CONFIG, "cpu")
    assert resume.restore(fresh, loaded, str(saved)) == 3
    assert_equal(resume.snapshot(fresh, 3, METRICS), resume.snapshot(state, 3, METRICS))
    # And a step from here is a step from there.
    logs = [train_step(s, make_batch(9), epoch=2, step=2) for s in (state, fresh)]
    assert all(torch.equal(logs[0][key], logs[1][key]) for key in logs[0])
    assert_equal(fresh.nets.state_dict(), state.nets.state_dict())
    assert_equal(fresh.opt_d.state_dict(), state.opt_d.state_dict())


def test_saving_replaces_the_older_one(saved: Path) -> None:
    checkpoints.save(saved, resume.snapshot(trained(1), 4, {}))
    assert checkpoints.load(saved)["epoch"] == 4
    assert files(saved.parent) == ["c.pt"]


def test_the_digest_follows_every_value() -> None:
    checkpoint = resume.snapshot(trained(1), 1, METRICS)
    digest = checkpoints.digest(checkpoint)
    assert checkpoints.digest(resume.snapshot(trained(1), 1, METRICS)) == digest
    for name, value in (("epoch", 2), ("metrics", METRICS | {"eval/score": 1.6250000000000002})):
        assert checkpoints.digest(checkpoint | {name: value}) != digest
    moments = checkpoint["opt_d"]["state"][0]["exp_avg"]
    moments.view(-1)[0] += 1e-6
    assert checkpoints.digest(checkpoint) != digest


# -- damage ----------------------------------------------------------------------------------------


def refused(path: Path, words: str) -> str:
    with pytest.raises(RaystarError, match=words) as caught:
        checkpoints.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.97, 0.9999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    refused(saved, "truncated or damaged")


def test_a_flipped_bit_is_noticed_wherever_it_is(saved: Path) -> None:
    """Either refused in words, or the bit means nothing (archive padding) and all values are the same."""
    wanted = checkpoints.load(saved)
    content = saved.read_bytes()
    refusals = 0
    for place in range(11, len(content), len(content) // 120):
        flipped = bytearray(content)
        flipped[place] ^= 0x10
        saved.write_bytes(flipped)
        try:
            loaded = checkpoints.load(saved)
        except RaystarError:
            refusals += 1
        else:
            assert_equal(loaded, wanted)
    assert refusals > 50


def test_a_changed_weight_does_not_match_the_digest(saved: Path) -> None:
    raw = torch.load(saved, weights_only=True)
    raw["E"]["shared.0.weight"][0, 0, 0, 0] += 1e-3
    torch.save(raw, saved)
    refused(saved, "damaged .*does not match its digest")


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    path, marker = tmp_path / "c.pt", tmp_path / "code ran"
    content = {name: {} for name in NAMES} | {"epoch": 1, "config": Trap(marker)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    refused(path, "not opened, since it could run code")
    assert not marker.exists()
    torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert marker.exists()  # the trap was live


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"G": {}, "F": {}, "E": {}}, "expected a dictionary with the networks G, F, E, D"),
        ([1, 2], "expected a dictionary with the networks"),
        (torch.zeros(3), "expected a dictionary with the networks"),
        ({"G": {}, "F": {}, "E": torch.zeros(2), "D": {}}, "network E holds no weights"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", words)


def test_missing_files_folders_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "c.pt", "expected a checkpoint, found nothing")
    monkeypatch.chdir(tmp_path)
    refused(Path("there/c.pt"), f"found nothing; looked for {tmp_path}/there/c.pt, since relative paths start at the")
    refused(tmp_path, "found a folder")


@pytest.mark.parametrize(
    "text", [b"epoch 3 was good\n", b"best so far\n", b"(no more)", b"\x80\x02J\x01", b"\x00" * 40, b"PK\x03\x04"]
)
def test_text_and_noise_are_refused(tmp_path: Path, text: bytes) -> None:
    """Each is read as a pickle, and each goes wrong in another way."""
    (tmp_path / "notes.pt").write_bytes(text)
    refused(tmp_path / "notes.pt", "truncated or damaged|not opened")


# -- writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["pickling", "flushing", "renaming"])
def test_a_failed_save_keeps_the_old_file_andleaves_no_other(
    saved: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = saved.read_bytes()
    checkpoint = resume.snapshot(trained(1), 4, {})

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "pickling":
        checkpoint["config"] = lambda: None
    else:
        monkeypatch.setattr(os, "fsync" if failing == "flushing" else "replace", full)
    with pytest.raises((OSError, pickle.PicklingError, AttributeError)):
        checkpoints.save(saved, checkpoint)
    assert files(saved.parent) == ["c.pt"]
    assert saved.read_bytes() == before


# -- users' checkpoints ----------------------------------------------------------------------------


def test_a_checkpoint_of_compiled_networks_loads(tmp_path: Path) -> None:
    """As networks.md describes users' files: `_orig_mod.` before every key, no digest."""
    state = trained()
    foreign = {
        "epoch": 7,
        **{name: {f"_orig_mod.{k}": v for k, v in net.state_dict().items()} for name, net in state.nets.items()},
        "opt_g": state.opt_g.state_dict(),
        "opt_d": state.opt_d.state_dict(),
        "config": {"model": {"base_dim": 8}},
    }
    torch.save(foreign, tmp_path / "latest.pt")
    loaded = checkpoints.load(tmp_path / "latest.pt")
    fresh = TrainState.create(CONFIG, "cpu")
    assert resume.restore(fresh, loaded, "latest.pt") == 7
    assert_equal(fresh.nets.state_dict(), state.nets.state_dict())
    assert_equal(fresh.opt_g.state_dict(), state.opt_g.state_dict())


USERS_CONFIG = {"model": {"base_dim": 8, "style_dim": 6}, "training": {"lr_g": 1e-4, "betas": [0.0, 0.99]}, "tag": None}


def plain_adamw(groups: list[dict[str, Any]], **form: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, betas=(0.0, 0.99), weight_decay=1e-4, **form)


def users_file(
    path: Path, prefix: str = "", *, groups: int = 3, **form: Any
) -> tuple[Nets, torch.optim.AdamW, torch.optim.AdamW]:
    """What a trainer written in plain torch leaves after two updates of each network: `form` is AdamW's.

    It has G, E and F in three groups; raystar 0.1 had them in two.
    """
    nets = Nets.create(CONFIG.model, CONFIG.num_domains, 5)
    G, F, E = (list(net.parameters()) for net in (nets.G, nets.F, nets.E))
    joined = [G, E] if groups == 3 else [G + E]
    opt_g = plain_adamw([*({"params": each, "lr": 1e-4} for each in joined), {"params": F, "lr": 1e-6}], **form)
    opt_d = plain_adamw([{"params": list(nets.D.parameters()), "lr": 1e-4}], **form)
    for seed in (1, 2):
        batch = make_batch(seed)
        styles = nets.E(batch.x_ref, batch.y_trg) + nets.F(batch.z_trg, batch.y_trg)
        loss = nets.D(nets.G(batch.content, styles), batch.y_trg).square().mean() + styles.square().mean()
        for optimizer in (opt_g, opt_d):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (opt_g, opt_d):
            optimizer.step()
    torch.save(
        {
            "epoch": 1,
            **{name: {f"{prefix}{k}": v for k, v in net.state_dict().items()} for name, net in nets.items()},
            "opt_g": opt_g.state_dict(),
            "opt_d": opt_d.state_dict(),
            "config": USERS_CONFIG,
        },
        path,
    )
    return nets, opt_g, opt_d


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("bank")
    return open_bank(tiny_config(write_latents(folder / "latents")), folder / "cache")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("form", [{"foreach": True}, {"fused": True, "groups": 2}], ids=str)
def test_training_resumes_from_a_users_checkpoint(
    tmp_path: Path, bank: Bank, capsys: pytest.CaptureFixture[str], prefix: str, form: dict[str, Any]
) -> None:
    """Bitwise as from the same networks and moments that raystar itself saved."""
    nets, opt_g, opt_d = users_file(tmp_path / "latest.pt", prefix, **form)
    twin = TrainState.create(CONFIG, "cpu")
    for (_, own), (_, theirs) in zip(twin.nets.items(), nets.items(), strict=True):
        own.load_state_dict(theirs.state_dict())
    for own, theirs in ((twin.opt_g, opt_g), (twin.opt_d, opt_d)):
        own_ones, their_ones = ([p for group in o.param_groups for p in group["params"]] for o in (own, theirs))
        for parameter, source in zip(own_ones, their_ones, strict=True):
            own.state[parameter] = {key: value.clone() for key, value in theirs.state[source].items()}
    checkpoints.save(tmp_path / "raystar.pt", resume.snapshot(twin, 1, {}))

    ends = []
    for name in ("latest.pt", "raystar.pt"):
        trainer = Trainer(CONFIG, bank, checkpoint=checkpoints.load(tmp_path / name), source=name)
        (progress,) = trainer.run()
        assert progress.epoch == 2
        for optimizer in (trainer.state.opt_g, trainer.state.opt_d):
            for group in optimizer.param_groups:
                assert (group["fused"], group["foreach"]) == (True, None)
            assert {int(moments["step"]) for moments in optimizer.state.values()} == {2 + 4}
        ends.append(progress.checkpoint | {"metrics": {k: progress.metrics[f"train/{k}"] for k in LOGGED}})
    assert_equal(*ends)
    assert capsys.readouterr().err == ""


def test_the_configurations_learning_rates_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users_file(tmp_path / "latest.pt")
    config = tiny_config("unused", training__lr_mapping=0.25, training__weight_decay=0.5)
    state = TrainState.create(config, "cpu")
    resume.restore(state, checkpoints.load(tmp_path / "latest.pt"), "runs/x/latest.pt")
    assert [group["lr"] for group in state.opt_g.param_groups] == [1e-4, 1e-4, 0.25]
    assert {group["weight_decay"] for group in (*state.opt_g.param_groups, *state.opt_d.param_groups)} == {0.5}
    (note,) = capsys.readouterr().err.splitlines()
    for words in ("note: runs/x/latest.pt: ", "lr 1e-06 there, 0.25 now", "weight_decay 0.0001 there, 0.5 now"):
        assert words in note
    before = state.nets.F.unshared[0].weight.detach().clone()
    train_step(state, make_batch(1), epoch=1, step=1)
    assert (state.nets.F.unshared[0].weight - before).abs().max() > 0.1  # AdamW's step is about its rate


def _regrouped(checkpoint: dict[str, Any], nets: Nets, groups: list[list[torch.Tensor]], optimizer: Any = None) -> None:
    made = (optimizer or plain_adamw)([{"params": group} for group in groups], lr=1e-4)
    for group in groups:
        for parameter in group:
            parameter.grad = torch.ones_like(parameter)
    made.step()
    checkpoint["opt_g"] = made.state_dict()


def _sgd(groups: Any, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


@pytest.mark.parametrize(
    ("arrange", "optimizer", "words"),
    [
        (lambda g, f, e: [g, f, e], None, "its groups have 20, 10, 12 parameters, expected 20, 12, 10"),
        (lambda g, f, e: [g + e + f], None, "its groups have 42 parameters, expected 20, 12, 10"),
        (lambda g, f, e: [e + g, f], None, r"order: exp_avg of G.encoder.0.weight is \[64, 4, 3, 3\], expected \[8, 4"),
        (lambda g, f, e: [g, e, f], _sgd, "expected step, exp_avg, exp_avg_sq of AdamW, found momentum_buffer"),
    ],
    ids=["F before E", "one group", "E before G", "SGD"],
)
def test_an_optimiser_of_another_order_is_refused(
    tmp_path: Path, arrange: Callable[..., Any], optimizer: Any, words: str
) -> None:
    nets, _, _ = users_file(tmp_path / "latest.pt")
    checkpoint = checkpoints.load(tmp_path / "latest.pt")
    _regrouped(checkpoint, nets, arrange(*(list(net.parameters()) for net in (nets.G, nets.F, nets.E))), optimizer)
    message = restoring(checkpoint)
    assert "optimiser opt_g cannot be restored" in message
    assert re.search(words, message), message
    assert message.endswith("checkpoint.init_from starts from its networks alone")


@pytest.mark.slow
def test_the_command_line_resumes_from_a_users_checkpoint(tmp_path: Path) -> None:
    config = tiny_config(write_latents(tmp_path / "latents"), visualization__every_epochs=0)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    folder = tmp_path / "runs" / "X"
    folder.mkdir(parents=True)
    users_file(folder / "latest.pt", "_orig_mod.")
    shutil.copy(folder / "latest.pt", tmp_path / "theirs.pt")
    command = [sys.executable, "-m", "raystar.train", "--config", str(tmp_path / "config.yaml"), "--resume"]
    done = subprocess.run(
        [*command, "--name", "X", "--out", str(tmp_path / "runs"), "--epochs", "3", "--set", "loss.r1_interval=2",
         "--set", "loss.ds_decay_epochs=2"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert files(folder) == [
        "config.yaml", "epoch_0003.pt", "latest.pt", "losses.csv", "spool.done.jsonl", "spool.jsonl",
    ]  # fmt: skip
    config = override(config, {"training.epochs": 3, "loss.r1_interval": 2, "loss.ds_decay_epochs": 2})
    trainer = Trainer(
        config, open_bank(config, tmp_path / "cache"), checkpoint=checkpoints.load(tmp_path / "theirs.pt")
    )
    *_, progress = trainer.run()
    found = checkpoints.load(folder / "latest.pt")
    for part in (*NAMES, "opt_g", "opt_d"):
        assert_equal(found[part], progress.checkpoint[part])


def test_an_optimiser_that_has_not_stepped_is_restored(tmp_path: Path) -> None:
    users_file(tmp_path / "latest.pt")
    checkpoint = checkpoints.load(tmp_path / "latest.pt")
    checkpoint["opt_d"]["state"] = {}
    state = TrainState.create(CONFIG, "cpu")
    resume.restore(state, checkpoint, "latest.pt")
    assert not state.opt_d.state
    assert state.opt_g.state


# -- the newest that is whole ----------------------------------------------------------------------


def numbered(folder: Path, *epochs: int) -> list[Path]:
    """Checkpoints of the epochs, newest first."""
    state = trained(1)
    for epoch in epochs:
        checkpoints.save(folder / f"epoch_{epoch:04d}.pt", resume.snapshot(state, epoch, {}))
    return [folder / f"epoch_{epoch:04d}.pt" for epoch in sorted(epochs, reverse=True)]


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = numbered(tmp_path, 1, 2, 3)
    checkpoint, path = checkpoints.load_latest(paths)
    assert (checkpoint["epoch"], path) == (3, paths[0])
    assert capsys.readouterr().err == ""
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    checkpoint, path = checkpoints.load_latest(paths)
    assert (checkpoint["epoch"], path) == (2, paths[1])
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    for words in (str(paths[0]), "truncated or damaged", f"going back to {paths[1]}"):
        assert words in shown
    paths[1].unlink()
    checkpoint, path = checkpoints.load_latest(paths)
    assert (checkpoint["epoch"], path) == (1, paths[2])


def test_no_whole_checkpoint_is_an_error_about_the_newest(tmp_path: Path) -> None:
    paths = numbered(tmp_path, 1, 2)
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(RaystarError, match=r"epoch_0002\.pt: truncated or damaged"):
        checkpoints.load_latest(paths)
    with pytest.raises(RaystarError, match="no checkpoint was found"):
        checkpoints.load_latest([])


# -- what does not fit -----------------------------------------------------------------------------


def restoring(checkpoint: dict[str, Any], **changed: Any) -> str:
    state = TrainState.create(tiny_config("unused", **changed), "cpu")
    with pytest.raises(RaystarError) as caught:
        resume.restore(state, checkpoint, "best.pt")
    message = str(caught.value)
    assert message.startswith("best.pt: ")
    assert len(message.splitlines()) == 1
    assert len(message) < 250
    return message


def test_another_architecture_is_one_clear_line(saved: Path) -> None:
    message = restoring(checkpoints.load(saved), model__base_dim=12)
    assert "network G does not fit the configuration" in message
    assert "encoder.0.weight" in message
    assert "[8, 4, 3, 3]" in message
    assert "[12, 4, 3, 3]" in message
    assert "network F" in restoring(checkpoints.load(saved), model__mapping_hidden_dim=16)
    assert "res_blocks.1" in restoring(checkpoints.load(saved), model__n_res_blocks=6)


def test_networks_optimisers_and_epochs_that_are_missing(saved: Path) -> None:
    whole = checkpoints.load(saved)
    missing = {"E": "network E", "opt_g": "optimiser opt_g", "opt_d": "optimiser opt_d", "epoch": "found null"}
    for name, words in missing.items():
        assert words in restoring({key: value for key, value in whole.items() if key != name})
    assert "optimiser opt_g" in restoring(whole | {"opt_g": whole["opt_d"]})
    assert "expected the number of its epoch, found -1" in restoring(whole | {"epoch": -1})

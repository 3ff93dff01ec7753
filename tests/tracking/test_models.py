"""Models outside raystar: ONNX graphs, the card, and models in an MLflow store with their champion."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raystar import export
from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.exported import model as model_module
from raystar.exported import onnx as graphs
from raystar.exported.picture_translator import PictureTranslator
from raystar.model import networks
from raystar.pictures.codec import open_codec
from raystar.tracking import relay
from raystar.tracking import tracker as tracker_module
from raystar.tracking.mlflow import models as registry
from raystar.tracking.relay import Relay
from raystar.tracking.tracker import PARENT
from tests.exported.test_export import CONFIG, FACTS, make_checkpoint, make_nets, some_latents
from tests.kit.support import ROOT
from tests.tracking.test_tracking import Flaky, Mute, Server, copy_store, opened, rows

TELLING = FACTS | {
    "metric": "eval/score", "mode": "min", "trials": 6, "run_id": "abc", "git_commit": "0123456789abcdef",
    "baseline": {"trial": "t00", "score": 2.0}, "data": {"name": "pictures", "digest": "d1", "latents": 120},
    "versions": {"raystar": "0.1.0", "torch": "2.13.0"},
    "metrics": {"eval/score": 1.53125, "eval/style": 0.4, "eval/movement": 0.9, "train/g_loss": 3.0},
}  # fmt: skip


# -- ONNX -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx") / "model"
    model_module.write(folder, make_checkpoint(make_nets()), TELLING, {})
    assert model_module.add_onnx(folder) < 1e-5
    return folder


def run_graph(folder: Path, name: str, **inputs: np.ndarray) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, inputs)[0])


def test_onnx_graphs_translate_as_pytorch_does(onnx_export: Path) -> None:
    """In sizes that the graphs were neither made from nor checked with."""
    model = model_module.load(onnx_export, "cpu")
    latents = 5 * torch.randn(5, 4, 24, 72)
    reference = some_latents(1, seed=3)
    for number, domain in enumerate(model.domains):
        y = np.array([number])
        by_noise = run_graph(onnx_export, "mapping", noise=networks.noise(7, 5).numpy(), domain=y)
        by_reference = run_graph(onnx_export, "style_encoder", reference=reference.numpy(), domain=y)
        for style, how in ((by_noise, {"seed": 7}), (by_reference, {"reference": reference})):
            wanted = model.translate(latents, domain, **how)
            styles = style.expand(5, -1).contiguous().numpy()
            found = run_graph(onnx_export, "generator", latents=latents.numpy(), style=styles)
            assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert not torch.allclose(by_noise, by_reference, rtol=0.1)


def test_the_cards_onnx_lines_work_without_torch_and_raystar(onnx_export: Path, tmp_path: Path) -> None:
    card = (onnx_export / "README.md").read_text()
    assert re.search(r"agree with PyTorch to \d\.\de-\d\d", card)
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", card, re.S) if "onnxruntime" in block]
    latents = some_latents(1, seed=9)
    np.save(tmp_path / "latents.npy", latents.numpy())
    onnx_export.rename(tmp_path / "this_folder")
    try:
        program = f"import sys, numpy\nlatents = numpy.load('latents.npy')\n{lines}\nnumpy.save('out.npy', out)\n"
        program += "print([m for m in ('torch', 'raystar', 'onnx') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    finally:
        (tmp_path / "this_folder").rename(onnx_export)
    assert done.stdout == "[]\n"
    wanted = model_module.load(onnx_export, "cpu").translate(latents, "vangogh", seed=0)
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_an_onnx_file_knows_its_domains(onnx_export: Path) -> None:
    import onnxruntime

    for name in graphs.FILES:
        facts = onnxruntime.InferenceSession(str(onnx_export / name)).get_modelmeta().custom_metadata_map
        assert json.loads(facts["domains"]) == ["photo", "monet", "vangogh"]
    assert json.loads((onnx_export / "metrics.json").read_text())["onnx"]["difference"] < 1e-5


def test_a_graph_that_computes_something_else_is_refused(
    onnx_export: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = model_module.load(onnx_export, "cpu")
    names = ("noise", "domain")
    examples = [graphs._inputs(names, CONFIG, size) for size in graphs._SIZES]
    right = graphs._Mapping(model.nets)
    assert graphs._difference(onnx_export / "mapping.onnx", right, names, examples) < 1e-5
    with torch.no_grad():
        model.nets.F.unshared[1].bias.add_(0.01)
    assert graphs._difference(onnx_export / "mapping.onnx", right, names, examples) > graphs.TOLERANCE


def test_onnx_without_its_packages_is_one_line_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(RaystarError, match=r"--onnx needs the packages onnxscript; pip install 'raystar\[onnx\]'"):
        export.main(["--checkpoint", str(tmp_path / "no.pt"), "--onnx", "--out", str(tmp_path / "out")])


# -- the card -------------------------------------------------------------------------------------


def test_the_card_says_where_a_model_comes_from_and_how_good_it_is(onnx_export: Path) -> None:
    card = (onnx_export / "README.md").read_text()
    for words in (
        "between photo, monet, vangogh", "8 epochs of up to 2", "seed 0", "`pictures`, 120 latents, digest `d1`",
        "one of 6 trials", "torch 2.13.0, commit `0123456789ab`", "`loss.w_cyc`: 2.5", "| score | 1.5312 |",
        "| style | 0.4000 |", "doing nothing scores 1.1", "(t00) has score 2.0000: this model is 23.4% better",
        "raystar.translate --model this_folder", "What it cannot do",
    ):  # fmt: skip
        assert words in card
    assert "g_loss" not in card


def test_the_card_of_a_foreign_checkpoint_claims_nothing(tmp_path: Path) -> None:
    model_module.write(tmp_path / "m", make_checkpoint(make_nets()), {"trial": "latest", "epoch": None}, {})
    card = (tmp_path / "m/README.md").read_text()
    assert "unknown number of epochs" in card
    for words in ("How good it is", "Sweep", "Data:", "None", "onnx", "varied"):
        assert words not in card


# -- models in a store ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    opened(folder).close()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_RETRY_S", (0.01,))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAYSTAR_VAE", raising=False)


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> Path:
    copy_store(empty_store, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finalist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finalist") / "t00_0008" / registry.EXPORT
    folder.parent.mkdir()
    model_module.write(folder, make_checkpoint(make_nets()), TELLING, {})
    return folder


def sweep(store: Path, finalist: Path, number: int, score: float, comparable: str = "same") -> Relay:
    """A sweep of one trial, whose model is registered; not closed yet."""
    tracker = opened(store, spool=store / f"spool{number}.jsonl", common_tags={"raystar.sweep": f"s{number}"})
    tracker.start(PARENT, params={}, tags={}, text={}, name=f"s{number}")
    tracker.start("t00", params={"loss.w_cyc": 2.5}, tags={"raystar.trial": "t00"}, text={})
    tracker.log("t00", 7, {"eval/score": 3.0}, {})
    tracker.log("t00", 8, {"eval/score": score, "train/g_loss": 1.0}, {})
    tracker.end("t00", "finished", None)
    tracker.attach(PARENT, {}, {"raystar.best_trial": "t00"}, {})
    tracker.end(PARENT, "finished", None)
    hand_in(tracker, finalist, score, comparable)
    return tracker


def hand_in(tracker: Relay, finalist: Path, score: float, comparable: str = "same") -> None:
    tracker.log_model("t00", 8, finalist, {"loss.w_cyc": 2.5}, {"raystar.trial": "t00"})
    tracker.register("t00", 8, score, "a description", comparable)


def champion(store: Path) -> int:
    return rows(store, "select version from registered_model_aliases where alias = 'champion'")[0][0]


def test_the_champion_moves_to_a_better_model_only(store: Path, finalist: Path) -> None:
    told = []
    for number, (score, comparable) in enumerate([(2.0, "a"), (2.5, "a"), (1.5, "a"), (9.0, "b")], start=1):
        tracker = sweep(store, finalist, number, score, comparable)
        tracker.close()
        assert not tracker.waiting
        told.append((tracker.registered, champion(store)))
    assert told == [
        ("models:/raystar-d@champion (version 1)", 1),
        ("models:/raystar-d/2; models:/raystar-d@champion stays version 1, score 2.0000", 1),
        ("models:/raystar-d@champion (version 3; version 1 was, 2.0000)", 3),
        ("models:/raystar-d@champion (version 4; version 3 was, on other data or by another measure)", 4),
    ]
    assert [row[0] for row in rows(store, "select name from registered_models")] == ["raystar-d"]


def test_a_model_has_its_runs_metrics_of_that_epoch_and_is_listed_with_the_run(store: Path, finalist: Path) -> None:
    sweep(store, finalist, 1, 1.5).close()
    (run,) = rows(store, "select run_uuid from runs where name = 't00'")[0]
    assert rows(store, "select source_run_id, status, name from logged_models") == [(run, 2, "s1-t00")]  # 2: ready
    assert rows(store, "select metric_name, metric_value, metric_step from logged_model_metrics") == [
        ("eval/score", 1.5, 8)
    ]
    assert rows(store, "select param_key, param_value from logged_model_params") == [("loss.w_cyc", "2.5")]
    outputs = "select count(*) from inputs where source_type = 'RUN_OUTPUT' and source_id = "
    assert rows(store, f"{outputs}'{run}'") == [(1,)]
    scores = rows(store, "select step, value from metrics where key = 'eval/score' order by step")
    assert scores == [(7, 3.0), (8, 1.5)]  # and the run's own curve is as it was
    files = {p.name for p in (store / "artifacts/models").rglob("*") if p.is_file()}
    assert {"MLmodel", "raystar_model.py", "model.safetensors", "README.md"} <= files
    assert not [name for name in files if name.endswith(".pkl")]


def once(store: Path) -> None:
    for table, count in (
        ("logged_models", 1), ("logged_model_metrics", 1), ("registered_models", 1), ("model_versions", 1),
        ("registered_model_aliases", 1), ("inputs where source_type = 'RUN_OUTPUT'", 1),
    ):  # fmt: skip
        assert rows(store, f"select count(*) from {table}") == [(count,)], table


def test_a_resumed_sweep_registers_nothing_twice(store: Path, finalist: Path) -> None:
    first = sweep(store, finalist, 1, 1.5)
    delivered(first)
    lines = (store / "spool1.jsonl").read_bytes()
    first.close()
    once(store)
    again = sweep(store, finalist, 1, 1.5)  # says all of it again
    assert again.model_epoch("t00") == 8
    again.close()
    once(store)
    (store / "spool1.jsonl").write_bytes(lines)  # as if every mark was lost
    (store / "spool1.done.jsonl").unlink()
    opened(store, spool=store / "spool1.jsonl").close()
    once(store)


def second_trial(tracker: Relay) -> None:
    """Returns once the store has all of it, and all that was recorded before."""
    delivered(tracker)
    tracker.start("t01", params={}, tags={}, text={})
    tracker.end("t01", "finished", None)
    delivered(tracker)


def delivered(tracker: Relay) -> None:
    until = time.monotonic() + 60
    while tracker.waiting:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_server_whose_answers_are_lost_gets_a_model_once(
    store: Path, finalist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSTAR_LAST_RECORDS_TIMEOUT_S", "600")
    tracker = sweep(store, finalist, 1, 1.5)
    second_trial(tracker)
    tracker.store.client = client = Mute(tracker.store.client, missing=40)
    tracker.log_model("t01", 3, finalist, {}, {})
    tracker.register("t01", 3, 1.4, "better", "same")
    tracker.close()
    assert client.lost
    assert rows(store, "select count(*) from logged_models") == [(2,)]
    assert rows(store, "select version, description from model_versions order by version") == [
        (1, "a description"), (2, "better"),
    ]  # fmt: skip
    assert champion(store) == 2


def test_models_wait_for_a_server_that_is_away(store: Path, finalist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSTAR_LAST_RECORDS_TIMEOUT_S", "0.2")
    tracker = sweep(store, finalist, 1, 1.5)
    second_trial(tracker)
    tracker.store.client = Flaky(tracker.store.client, missing=10**9)
    tracker.log_model("t01", 3, finalist, {}, {})
    tracker.register("t01", 3, 1.4, "better", "same")
    tracker.close()
    assert tracker.waiting == 2
    assert champion(store) == 1
    opened(store, spool=store / "spool1.jsonl").close()
    assert champion(store) == 2


@pytest.mark.parametrize("declined", ["create_logged_model", "create_registered_model"])
def test_a_store_without_models_costs_a_note_and_nothing_else(
    store: Path, finalist: Path, declined: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    class Declining(Flaky):
        def __getattr__(self, name: str) -> Any:
            if name == declined:
                raise MlflowException("not for you", PERMISSION_DENIED)
            return getattr(self.client, name)

    tracker = opened(store, spool=store / "spool1.jsonl")
    tracker.store.client = Declining(tracker.store.client, 0)
    tracker.start("t00", params={}, tags={}, text={})
    hand_in(tracker, finalist, 1.5)
    tracker.end("t00", "finished", None)
    tracker.close()
    told = capsys.readouterr().err.splitlines()
    assert not tracker.waiting
    assert tracker.registered is None
    assert rows(store, "select name, status from runs") == [("t00", "FINISHED")]
    assert "note: MLflow" in told[0]
    assert "not for you" in told[0]
    assert not [line for line in told if not line.startswith("note: ")]


@pytest.mark.slow
def test_models_go_through_a_server(
    store: Path, finalist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSTAR_LAST_RECORDS_TIMEOUT_S", "600")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "remote")  # whose artifacts go through the server as well
    server = Server(store)
    server.start()
    try:
        server.wait()
        tracker = opened(store, server.uri, spool=store / "spool1.jsonl")
        tracker.start("t00", params={}, tags={}, text={})
        tracker.log("t00", 8, {"eval/score": 1.5}, {})
        hand_in(tracker, finalist, 1.5)
        tracker.close()
        assert tracker.registered == "models:/remote-d@champion (version 1)"
        run = str(tracker.run_id("t00"))
        assert export.main(["--run", run, "--tracking-uri", server.uri, "--out", str(tmp_path / "out")]) == 0
    finally:
        server.stop(signal.SIGKILL)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (finalist / "model.safetensors").read_bytes()
    once(store)


# -- back out of a store --------------------------------------------------------------------------


def test_any_runs_model_comes_back_from_the_store(store: Path, finalist: Path, tmp_path: Path) -> None:
    tracker = sweep(store, finalist, 1, 1.5)
    tracker.close()
    uri, run = f"sqlite:///{store}/mlflow.db", tracker.run_id("t00")
    assert export.main(["--run", str(run), "--tracking-uri", uri, "--out", str(tmp_path / "out")]) == 0
    for path in finalist.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    moved = tmp_path / "elsewhere"  # the whole store, which names its old folder
    moved.mkdir()
    for name in ("mlflow.db", "artifacts"):
        (store / name).rename(moved / name)
    again = ["--run", str(run), "--tracking-uri", f"sqlite:///{moved}/mlflow.db", "--out", str(tmp_path / "again")]
    assert export.main(again) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (finalist / "model.safetensors").read_bytes()


def test_a_model_comes_back_from_a_folder_of_any_name(store: Path, finalist: Path, tmp_path: Path) -> None:
    odd = tmp_path / "what? my 50%25 #runs, 'ü'"
    odd.mkdir()
    copy_store(store / "mlflow.db", odd)
    moved = shutil.copytree(finalist, odd / "model")
    tracker = sweep(odd, moved, 1, 1.5)
    tracker.close()
    words = ["--run", str(tracker.run_id("t00")), "--runs", str(odd)]
    assert export.main([*words, "--out", str(odd / "out")]) == 0
    assert (odd / "out/model.safetensors").read_bytes() == (finalist / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "runs" in path.name] == [odd.name]


def test_a_run_without_a_model_falls_back_to_its_checkpoint(store: Path, finalist: Path, tmp_path: Path) -> None:
    from raystar.model import checkpoint as checkpoints

    tracker = sweep(store, finalist, 1, 1.5)
    kept = tmp_path / "kept/epoch_0003.pt"
    checkpoints.save(kept, make_checkpoint(make_nets()))
    tracker.start("t01", params={"loss.w_cyc": 0.5}, tags={"raystar.trial": "t01"}, text={})
    tracker.attach("t01", {}, {tracker_module.CHECKPOINT: str(kept)}, {})
    tracker.start("t02", params={}, tags={"raystar.trial": "t02"}, text={})
    tracker.close()
    uri = ["--tracking-uri", f"sqlite:///{store}/mlflow.db", "--out", str(tmp_path / "out")]
    assert export.main(["--run", str(tracker.run_id("t01")), *uri]) == 0
    facts = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (facts["trial"], facts["sweep"], facts["epoch"]) == ("t01", "s1", 8)
    assert facts["params"] == {"loss.w_cyc": "0.5"}
    kept.unlink()
    uri[-1] = str(tmp_path / "none")
    has = rf"runs with a model: {tracker.run_id('t00')} \(t00 of s1\)$"
    for run, words in (
        (tracker.run_id("t01"), "its checkpoint .*epoch_0003.pt cannot be used"),
        (tracker.run_id("t02"), "neither a model nor a checkpoint"),
        ("0" * 32, "has no such run"),
    ):
        with pytest.raises(RaystarError, match=f"{words}.*; {has}") as caught:
            export.main(["--run", str(run), *uri])
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(RaystarError, match=r"no MLflow store at .*mlflow\.db; name it with --tracking-uri"):
        export.main(["--run", "abc", "--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


# -- served ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(finalist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    registry.save(folder, finalist)
    return folder


def frame(**columns: list[Any]) -> Any:
    import pandas

    return pandas.DataFrame(columns)


def decoded(answer: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer)))


def encoded(picture: Image.Image, kind: str = "PNG") -> str:
    data = io.BytesIO()
    picture.save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


def test_a_served_model_translates_latents_as_the_command_line_does(served: Path, finalist: Path) -> None:
    import mlflow

    model, translator = mlflow.pyfunc.load_model(str(served)), model_module.load(finalist, "cpu")
    direct = PictureTranslator(translator, open_codec(translator.config)[0])
    latents, reference = some_latents(2), some_latents(1, seed=5)
    table = frame(
        latent=[latent.tolist() for latent in latents],
        domain=["monet", "vangogh"],
        reference_latent=[None, reference[0].tolist()],
    )
    found = model.predict(table, params={"seed": 3, "latents": True})
    wanted = [
        direct.restyle(latents[:1], "monet", None, 3),
        direct.restyle(latents[1:], "vangogh", reference, None),
    ]
    for row, latent in zip(found.to_dict("records"), wanted, strict=True):
        assert torch.equal(torch.tensor(row["latent"])[None], latent)
        assert decoded(row["picture"]).mode == "RGB"
    assert list(model.predict(table).columns) == ["picture"]


def test_a_served_model_says_what_is_wrong_and_where(served: Path) -> None:
    import mlflow

    model = mlflow.pyfunc.load_model(str(served))
    good = some_latents(1)[0].tolist()
    for columns, words in (
        ({"latent": [good], "domain": ["mone"]}, "row 0: domain 'mone'.*did you mean 'monet'"),
        ({"latent": [good, None], "domain": ["monet", "monet"]}, "row 1: expected either a picture or a latent"),
        ({"latent": [good[:2]], "domain": ["monet"]}, r"row 0: latents: expected \[B,4,H,W\]"),
        ({"picture": ["abc"], "domain": ["monet"]}, "row 0: picture: expected a picture as base64, found 3 characters"),
    ):
        with pytest.raises(Exception, match=words):
            model.predict(frame(**columns))
    model = mlflow.pyfunc.load_model(str(served), model_config={"vae": str(ROOT / "no-such-vae")})
    with pytest.raises(Exception, match=r"row 0: model_config vae: .*no-such-vae.* is not there"):
        model.predict(frame(picture=[encoded(Image.new("RGB", (64, 64)))], domain=["monet"]))


def test_a_served_model_translates_pictures_as_raystar_translate_does(
    served: Path, finalist: Path, faithful_vae: Path
) -> None:
    import mlflow

    from raystar.exported.picture_translator import PictureTranslator
    from raystar.pictures.autoencoders import open_vae

    vae = str(faithful_vae)
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 256, (80, 100 + 8 * i, 3), np.uint8)) for i in range(2)]
    reference = pictures[1].resize((90, 90))
    direct = PictureTranslator(model_module.load(finalist, "cpu"), open_vae(vae))
    model = mlflow.pyfunc.load_model(str(served), model_config={"vae": vae})
    sent = frame(picture=[f"data:image/png;base64,{encoded(p)}" for p in pictures], domain=["monet", "monet"])
    for columns, params, how in (
        ({}, {"seed": 4}, {"seed": 4}),
        ({"reference": [encoded(reference)] * 2}, {}, {"reference": reference}),
    ):
        answers = model.predict(sent.assign(**columns), params=params)
        for answer, wanted in zip(answers["picture"], direct.translate(pictures, "monet", **how), strict=True):
            assert np.array_equal(np.asarray(decoded(answer)), np.asarray(wanted))
    with pytest.raises(Exception, match="row 0: picture: expected a picture as base64, found 4 characters"):
        model.predict(frame(picture=["abcd"], domain=["monet"]))


def test_loading_a_served_model_imports_no_ray_and_prints_nothing(served: Path) -> None:
    program = (
        "import json, sys, mlflow, pandas\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "latent = [[[0.5] * 8] * 8] * 4\n"
        "found = model.predict(pandas.DataFrame({'latent': [latent], 'domain': ['monet']}))\n"
        "print(len(found), *({'ray', 'diffusers', 'optuna'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-W", "default::UserWarning", "-c", program, str(served)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "1\n"
    assert "hint" not in done.stderr


def test_the_registered_name() -> None:
    assert registry.model_name("raystar", "raystar:demo") == "raystar-demo"
    assert registry.model_name("my/team", "my pictures: 2") == "my-team-2"
    assert registry.model_name("raystar", "latents") == "raystar-latents"


def test_scores_under_one_key_were_measured_alike(tmp_path: Path) -> None:
    from raystar.data.bank import open_bank
    from raystar.ruler.samples import measured_by
    from tests.kit.support import tiny_config, write_latents

    config = tiny_config(write_latents(tmp_path / "latents", count=8, size=8))
    bank = open_bank(config, tmp_path / "cache")
    key = measured_by(bank, config)
    assert measured_by(bank, override(config, {"loss.w_cyc": 9.0, "training.epochs": 9})) == key
    for changed in ({"ruler.sources": 2}, {"training.latent_scale": 0.5}, {"data.holdout": 0.5}):
        other = override(config, changed)
        assert measured_by(open_bank(other, tmp_path / "cache"), other) != key

"""Exports: the networks' own numbers, plain files that say what they are, and one line for what is wrong."""

from __future__ import annotations

import ast
import html
import json
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file, save_file

from raystar import export, translate
from raystar.base.errors import RaystarError
from raystar.base.markdown import paragraphs
from raystar.base.names import shown
from raystar.config.load import load_config, override, to_mapping, to_yaml
from raystar.config.schema import Config
from raystar.exported import model as model_module
from raystar.exported.model_card import card
from raystar.model import checkpoint as checkpoints
from raystar.model import networks
from raystar.model.networks import NAMES, Nets
from raystar.training import resume
from raystar.training.state import TrainState
from tests.kit.support import ROOT, tiny_config

DOMAINS = ("photo", "monet", "vangogh")
CONFIG = tiny_config("somewhere", DOMAINS, training__latent_scale=0.2, loss__w_cyc=2.5)
FACTS = {
    "sweep": "loss", "trial": "trial_0007", "epoch": 8, "metric": "score", "score": 1.53125,
    "metrics": {"eval/score": 1.53125}, "params": {"loss.w_cyc": 2.5},
}  # fmt: skip


def make_nets() -> Nets:
    """Networks whose translations depend on the style; fresh ones ignore it."""
    nets = Nets.create(CONFIG.model, len(DOMAINS), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for block in nets.G.res_blocks:
            for layer in (block.adain1, block.adain2):
                layer.fc.weight.copy_(torch.randn(layer.fc.weight.shape, generator=generator))
        for net in (nets.F, nets.E):
            for head in net.unshared:
                head.weight.mul_(10)
    return nets


def make_checkpoint(nets: Nets) -> dict[str, Any]:
    return {"epoch": 8, **nets.state_dict(), "config": to_mapping(CONFIG), "metrics": FACTS["metrics"]}


@pytest.fixture
def nets() -> Nets:
    return make_nets()


@pytest.fixture
def folder(tmp_path: Path, nets: Nets) -> Path:
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "drawn.png")
    model_module.write(tmp_path / "runs/best", make_checkpoint(nets), FACTS, {"grid.png": tmp_path / "drawn.png"})
    return tmp_path / "runs/best"


def some_latents(count: int, seed: int = 0) -> torch.Tensor:
    return 5 * torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- what is written -------------------------------------------------------------------------------


def test_an_export_is_plain_files(folder: Path) -> None:
    assert files(folder) == ["README.md", "config.yaml", "grid.png", "metrics.json", "model.safetensors"]
    assert files(folder.parent) == ["best"]
    assert load_config(folder / "config.yaml") == CONFIG
    assert json.loads((folder / "metrics.json").read_text()) == FACTS
    with Image.open(folder / "grid.png") as picture:
        assert picture.getpixel((0, 0)) == (1, 2, 3)
    readme = (folder / "README.md").read_text()
    for words in ("loss: trial_0007", "photo, monet, vangogh", "8 epochs", "| score | 1.5312 |", "`loss.w_cyc`: 2.5"):
        assert words in readme


BAD = [
    "<img src=x onerror=alert(1)>", "a](b)", "![x](y)", "`code`", "``", "*strong*", "__init__", "&lt;", "a|b", "\\",
    "www.example.com", "https:", "# title", "- item", "~~x~~", "$(id)", "it's", "-dash", "a\n```\n<script>", "\x1b[31m",
    '"quoted"', "e\u0301",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_names_are_no_markup(name: str) -> None:
    """The card's text shows them; its headings, links, images and blocks are those of any other card."""
    assert _marks(name) == _marks("plain")
    text = _rendered(name)
    told = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    words = unicodedata.normalize("NFC", html.unescape(re.sub(r"<[^>]*>", "", told)))
    assert words.count(unicodedata.normalize("NFC", shown(name.replace("\n", " ")))) >= 7
    blocks = [html.unescape(block) for block in re.findall(r"<pre><code[^>]*>(.*?)</code></pre>", text, re.DOTALL)]
    words = shlex.split(blocks[0])
    assert words[:3] == ["python", "-m", "raystar.translate"]
    args = translate.parser().parse_args(words[3:])
    assert args.domain == unicodedata.normalize("NFC", name)
    called = next(node for node in ast.walk(ast.parse(blocks[1])) if isinstance(node, ast.Call) and len(node.args) == 2)
    assert ast.literal_eval(called.args[1]) == args.domain
    assert len(ast.parse(blocks[2]).body) == 7


def _rendered(name: str) -> str:
    config = override(Config(), {"data.domains": ["photo", name]})
    facts = {
        **FACTS, "sweep": name, "trial": name, "run_id": name, "data": {"name": name, "latents": 1, "digest": "d"},
        "params": {"checkpoint.init_from": name}, "finals": None, "trials": 2,
    }  # fmt: skip
    markdown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return str(markdown.render(card(config, facts, ["grid.png", "generator.onnx"])))


def _marks(name: str) -> list[str]:
    return re.findall(r"<(/?\w+)", re.sub(r"<pre>.*?</pre>", "<pre>", _rendered(name), flags=re.DOTALL))


def test_notes_are_shown_as_they_are_written() -> None:
    text = "\n".join(BAD).replace("```", "")
    shown_text = MarkdownIt("commonmark", {"html": True}).render(paragraphs("x " + text.replace("\n", "\nx ")))
    assert re.findall(r"<(\w+)", shown_text) == ["p"]
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown_text


@pytest.mark.parametrize(
    ("share", "words"), [(0, "pictures that training saw, since"), (0.1, "that training never saw")]
)
def test_the_card_says_of_what_its_score_is(share: float, words: str) -> None:
    config = override(Config(), {"data.holdout": share})
    text = card(config, {"metrics": {"eval/score": 0.5, "eval/movement": 0.5}}, [])
    assert words in text
    assert ("never saw" in text) == (share > 0)


def test_the_weights_keep_their_names_and_bits(folder: Path, nets: Nets) -> None:
    tensors = load_file(folder / "model.safetensors")
    wanted = {f"{name}.{key}": value for name, net in nets.items() for key, value in net.state_dict().items()}
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], value) for key, value in wanted.items())


def test_an_older_export_is_replaced_whole(folder: Path, nets: Nets) -> None:
    (folder / "stray.txt").write_text("of the older one")
    with torch.no_grad():
        nets.G.decoder[2].bias.add_(1)
    model_module.write(folder, make_checkpoint(nets), FACTS, {})
    assert files(folder) == ["README.md", "config.yaml", "metrics.json", "model.safetensors"]
    assert "grid.png" not in (folder / "README.md").read_text()
    assert files(folder.parent) == ["best"]
    assert torch.equal(model_module.load(folder, "cpu").nets.G.decoder[2].bias, nets.G.decoder[2].bias)


def test_a_failed_export_leaves_the_older_one_and_nothing_else(folder: Path, nets: Nets, tmp_path: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match=r"no such\.png"):
        model_module.write(folder, make_checkpoint(nets), FACTS, {"grid.png": tmp_path / "no such.png"})
    assert (folder / "model.safetensors").read_bytes() == before
    assert files(folder.parent) == ["best"]


# -- translating -----------------------------------------------------------------------------------


def test_by_reference_is_the_networks_own_output(folder: Path, nets: Nets) -> None:
    model = model_module.load(folder, "cpu")
    latents, references = some_latents(3), some_latents(3, 1)
    seen = []
    for number, domain in enumerate(DOMAINS):
        y = torch.full((3,), number)
        with torch.no_grad():
            wanted = nets.G(latents * 0.2, nets.E(references * 0.2, y)) / 0.2
            one_style = nets.E(references[:1] * 0.2, y[:1]).expand(3, -1)
            wanted_by_one = nets.G(latents * 0.2, one_style) / 0.2
        found = model.translate(latents, domain, reference=references)
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)
        for reference in (references[:1], references[0]):
            assert torch.equal(model.translate(latents, domain, reference=reference), wanted_by_one)
        assert not torch.equal(wanted, wanted_by_one)
        seen.append(found)
    assert not torch.equal(seen[0], seen[1])


def test_by_seed_is_the_networks_own_output(folder: Path, nets: Nets) -> None:
    model = model_module.load(folder, "cpu")
    latents = some_latents(2)
    z = torch.from_numpy(np.random.default_rng(11).standard_normal((1, 5), dtype=np.float32))
    assert torch.equal(networks.noise(11, 5), z)
    y = torch.tensor([1, 1])
    with torch.no_grad():
        wanted = nets.G(latents * 0.2, nets.F(z.expand(2, -1), y)) / 0.2
    found = model.translate(latents, "monet", seed=11)
    assert torch.equal(found, wanted)
    torch.manual_seed(1)
    assert torch.equal(model.translate(latents, "monet", seed=11), found)
    assert not torch.equal(model.translate(latents, "monet", seed=12), found)
    assert not torch.equal(model.translate(latents, "vangogh", seed=11), found)
    assert torch.equal(model.translate(latents, "monet"), model.translate(latents, "monet", seed=0))


def test_one_seed_is_one_style_for_the_whole_batch(folder: Path) -> None:
    model = model_module.load(folder, "cpu")
    latents = some_latents(4)
    together = model.translate(latents, "photo", seed=3)
    alone = torch.cat([model.translate(latents[i : i + 1], "photo", seed=3) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_half_precision_latents_are_translated_in_float32(folder: Path) -> None:
    model = model_module.load(folder, "cpu")
    latents = some_latents(2).half()
    assert torch.equal(model.translate(latents, "photo", seed=1), model.translate(latents.float(), "photo", seed=1))
    assert not any(p.requires_grad for _, net in model.nets.items() for p in net.parameters())


@pytest.mark.parametrize(
    ("latents", "domain", "options", "words"),
    [
        ((2, 4, 16, 16), "vangog", {}, r"'vangog' .*did you mean 'vangogh'\?\): photo, monet, vangogh"),
        ((2, 4, 16, 16), "cubism", {}, "'cubism' is not one of the model's: photo, monet, vangogh"),
        ((4, 16, 16), "photo", {}, r"latents: expected \[B,4,H,W\].*found \[4, 16, 16\]"),
        ((2, 3, 16, 16), "photo", {}, r"latents: expected \[B,4,H,W\].*found \[2, 3, 16, 16\]"),
        ((0, 4, 16, 16), "photo", {}, r"latents: expected \[B,4,H,W\].*found \[0, 4, 16, 16\]"),
        ((2, 4, 16, 16), "photo", {"reference": (3, 4, 16, 16)}, "reference: expected 1 or 2 latents, found 3"),
        ((2, 4, 16, 16), "photo", {"reference": (2, 16, 16)}, r"reference: expected \[B,4,H,W\].*\[1, 2, 16, 16\]"),
        ((2, 4, 16, 16), "photo", {"reference": (4, 16)}, "reference: expected"),
        ((2, 4, 16, 16), "photo", {"reference": (1, 4, 16, 16), "seed": 0}, "a reference or a seed, not both"),
        ((2, 4, 16, 16), "photo", {"seed": -1}, "seed: expected 0 or more, found -1"),
    ],
)
def test_what_cannot_be_translated(
    folder: Path, latents: tuple[int, ...], domain: str, options: dict[str, Any], words: str
) -> None:
    options = {key: torch.zeros(value) if key == "reference" else value for key, value in options.items()}
    with pytest.raises(RaystarError, match=words):
        model_module.load(folder, "cpu").translate(torch.zeros(latents), domain, **options)


def test_whole_numbers_are_no_latents(folder: Path) -> None:
    with pytest.raises(RaystarError, match=r"latents: .*floating point.*int64"):
        model_module.load(folder, "cpu").translate(torch.zeros(1, 4, 16, 16, dtype=torch.int64), "photo")


def test_references_may_have_another_size(folder: Path) -> None:
    model = model_module.load(folder, "cpu")
    reference = 5 * torch.randn(4, 24, 8, generator=torch.Generator().manual_seed(1))
    assert model.translate(some_latents(2), "photo", reference=reference).shape == (2, 4, 16, 16)


# -- broken exports --------------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _drop_weights(folder: Path, prefix: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(prefix)}, folder / "model.safetensors")


BREAK: dict[str, tuple[Any, str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"expected an exported model \(model\.safetensors\)"),
    "truncated": (_truncate, r"model\.safetensors: truncated or damaged"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors: truncated or damaged"),
    "no configuration": (lambda f: (f / "config.yaml").unlink(), r"config\.yaml: .*found nothing"),
    "bad configuration": (lambda f: (f / "config.yaml").write_text("model: {basedim: 3}"), "model.basedim"),
    "other sizes": (
        lambda f: (f / "config.yaml").write_text(to_yaml(override(CONFIG, {"model.base_dim": 16}))),
        "network G does not fit",
    ),
    "other domains": (
        lambda f: (f / "config.yaml").write_text(to_yaml(override(CONFIG, {"data.domains": ["a", "b"]}))),
        "network F does not fit",
    ),
    "no network": (lambda f: _drop_weights(f, "E."), "network E does not fit"),
    "no parameter": (lambda f: _drop_weights(f, "D.main.0.bias"), r"network D .*main\.0\.bias"),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_export_is_refused_in_one_line(folder: Path, how: str) -> None:
    destroy, words = BREAK[how]
    destroy(folder)
    with pytest.raises(RaystarError, match=words) as caught:
        model_module.load(folder, "cpu")
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RaystarError, match="nowhere: expected an exported model"):
        model_module.load(tmp_path / "nowhere")


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, nets: Nets) -> Path:
    state = TrainState.create(CONFIG, "cpu")
    state.nets.load_state_dict(nets.state_dict(), "nets")
    checkpoints.save(tmp_path / "epoch_0008.pt", resume.snapshot(state, 8, {"eval/score": 1.25}))
    return tmp_path / "epoch_0008.pt"


@pytest.mark.parametrize("there", [False, True])
def test_a_checkpoint_becomes_an_export(
    saved: Path, nets: Nets, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    out = tmp_path / "deep/er/out"
    if there:
        out.mkdir(parents=True)  # an empty folder is as good as none
    assert export.main(["--checkpoint", str(saved), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert str(out) in shown
    assert "model.safetensors" in shown
    assert files(out) == ["README.md", "config.yaml", "metrics.json", "model.safetensors"]
    assert files(out.parent) == ["out"]
    facts = json.loads((out / "metrics.json").read_text())
    assert (facts["trial"], facts["epoch"], facts["score"]) == ("epoch_0008", 8, 1.25)
    model = model_module.load(out, "cpu")
    assert model.config == CONFIG
    for name, net in nets.items():
        for key, value in getattr(model.nets, name).state_dict().items():
            assert torch.equal(value, net.state_dict()[key]), (name, key)


def test_a_users_compiled_checkpoint_becomes_an_export(tmp_path: Path, nets: Nets) -> None:
    states = {name: {f"_orig_mod.{k}": v for k, v in net.state_dict().items()} for name, net in nets.items()}
    mapping = to_mapping(CONFIG)
    del mapping["ruler"]  # raystar's own section: no older file has it
    torch.save({"epoch": 3, **states, "opt_g": {}, "opt_d": {}, "config": mapping}, tmp_path / "latest.pt")
    assert export.main(["--checkpoint", str(tmp_path / "latest.pt"), "--out", str(tmp_path / "out")]) == 0
    latents = some_latents(1)
    with torch.no_grad():
        wanted = nets.G(latents * 0.2, nets.F(networks.noise(0, 5), torch.tensor([2]))) / 0.2
    assert torch.equal(model_module.load(tmp_path / "out", "cpu").translate(latents, "vangogh"), wanted)


def refused(arguments: list[str], words: str) -> None:
    with pytest.raises(RaystarError, match=words) as caught:
        export.main(arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_there_is_not_overwritten(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    refused(["--checkpoint", str(saved), "--out", str(tmp_path / "out")], "--out .*out: already there")
    assert files(tmp_path / "out") == ["mine.txt"]
    refused(["--checkpoint", str(saved), "--out", str(saved)], "already there")


def test_checkpoints_that_cannot_be_exported(saved: Path, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    refused(["--checkpoint", str(tmp_path / "no.pt"), *out], r"no\.pt: expected a checkpoint, found nothing")
    whole = torch.load(saved, weights_only=True)
    del whole["digest"]
    torch.save({k: v for k, v in whole.items() if k != "config"}, tmp_path / "bare.pt")
    refused(["--checkpoint", str(tmp_path / "bare.pt"), *out], r"bare\.pt: holds no configuration")
    whole["config"]["model"]["base_dim"] = 16
    torch.save(whole, tmp_path / "other.pt")
    refused(["--checkpoint", str(tmp_path / "other.pt"), *out], r"other\.pt: network G does not fit")
    assert not (tmp_path / "out").exists()


def test_metrics_of_another_trainer_that_are_no_numbers(saved: Path, tmp_path: Path) -> None:
    whole = torch.load(saved, weights_only=True)
    del whole["digest"]
    whole["metrics"] = {"loss": torch.tensor(0.5), "best": None, "eval/score": 1.5}
    torch.save(whole, tmp_path / "latest.pt")
    assert export.main(["--checkpoint", str(tmp_path / "latest.pt"), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["metrics"] == {"eval/score": 1.5}


def test_the_best_of_a_sweep(folder: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    folder.rename(tmp_path / "kept")
    for name in ("loss", "other"):
        (runs / name).mkdir()
        (runs / name / "sweep.json").write_text("{}")
    arguments = ["--runs", str(runs), "--out", str(out)]
    refused(["--sweep", "los", *arguments], r"--sweep los: no such sweep in .*runs \(did you mean 'loss'\?\)")
    refused(["--sweep", "loss", *arguments], "--sweep loss: no trial of it has a model yet")
    (tmp_path / "kept").rename(runs / "loss/best")
    assert export.main(["--sweep", "loss", *arguments]) == 0
    assert files(out) == files(runs / "loss/best")
    assert (out / "model.safetensors").read_bytes() == (runs / "loss/best/model.safetensors").read_bytes()
    assert files(tmp_path) == ["drawn.png", "out", "runs"]


def test_a_damaged_best_is_not_passed_on(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "kept")
    (tmp_path / "runs/loss").mkdir()
    (tmp_path / "kept").rename(tmp_path / "runs/loss/best")
    _truncate(tmp_path / "runs/loss/best")
    arguments = ["--sweep", "loss", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    refused(arguments, "truncated or damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", ["--out x", "--sweep a --checkpoint b --out x", "--sweep a"])
def test_requests_that_say_too_little_or_too_much(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        export.main(arguments.split())
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_using_an_export_needs_neither_ray_nor_mlflow(folder: Path) -> None:
    program = (
        "import sys, torch, raystar.export\n"
        "out = raystar.export.load(sys.argv[1], 'cpu').translate(torch.zeros(1, 4, 16, 16), 'monet', seed=1)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'ray', 'mlflow', 'diffusers', 'optuna'}))\n"
        "print(tuple(out.shape))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "\n(1, 4, 16, 16)\n"
    assert done.stderr == ""


def test_every_network_is_exported(folder: Path) -> None:
    prefixes = {key.partition(".")[0] for key in load_file(folder / "model.safetensors")}
    assert prefixes == set(NAMES)

"""Folders of pictures to latents: file by file, the codec's own numbers, and what a killed process leaves."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
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

from raystar import encode, tune
from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import open_bank
from raystar.data.holdout import picture_of
from raystar.demo.painter import paint
from raystar.encode import main
from raystar.pictures import encoding
from raystar.pictures.autoencoders import SCALE, VaeCodec, open_vae
from raystar.pictures.codec import open_codec
from raystar.pictures.job import latent_names
from raystar.ruler.ruler import Ruler
from raystar.training.trainer import Trainer
from tests.kit.autoencoder import latents_of, pictures_of
from tests.kit.support import ROOT, tiny_config
from tests.pictures.test_codec import KINDS, OTHERS, build
from tests.pictures.test_pictures import gradient, png


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small untrained autoencoder of each kind."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind) / "vae"
        build(kind).save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def vae(vaes: dict[str, Path]) -> Path:
    return vaes["AutoencoderTiny"]


def noise(seed: int, width: int = 80, height: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def fill(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(root / name)
    return root


def run(images: Path, out: Path, vae: Path, *more: str) -> int:
    return main(["--images", str(images), "--out", str(out), "--vae", str(vae), "--size", "64", *more])


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def files(out: Path) -> dict[str, tuple[int, int]]:
    """Every latent, and what changes when it is written again."""
    found = {}
    for path in sorted(out.glob("*/*")):
        found[str(path.relative_to(out))] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures went through the codec, call by call."""
    calls: list[int] = []
    original = VaeCodec.encode

    def counting(self: VaeCodec, pixels: Any) -> Any:
        calls.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(VaeCodec, "encode", counting)
    return calls


# -- the codec's numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_codecs_own_and_unscaled(vaes: dict[str, Path], tmp_path: Path, kind: str) -> None:
    images = fill(tmp_path / "pics", "a/one.png", "a/two.png", "b/three.png")
    assert run(images, tmp_path / "out", vaes[kind]) == 0
    import diffusers

    model = getattr(diffusers, kind).from_pretrained(vaes[kind], low_cpu_mem_usage=False).eval()
    for name in ("a/one", "a/two", "b/three"):
        pixels = np.asarray(Image.open(images / f"{name}.png").crop((8, 0, 72, 64)), np.float32)
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            found = model.encode(x)
            wanted = found.latents / SCALE if kind == "AutoencoderTiny" else found.latent_dist.mean
        latent = np.load(tmp_path / f"out/{name}.npy", allow_pickle=False)
        assert latent.dtype == np.float32
        assert latent.shape == (4, 8, 8)
        assert np.abs(latent - wanted[0].numpy()).max() < 1e-5 * np.abs(latent).max()
    written = manifest(tmp_path / "out")
    assert (written["kind"], written["size"], written["space"]) == (kind, 64, "unscaled")
    assert written["domains"] == {"a": 2, "b": 1}
    assert written["latents"]["a/one.png"]["latent"] == "a/one.npy"


@pytest.mark.parametrize(("kind", "changed", "words"), OTHERS)
def test_an_autoencoder_of_other_latents_encodes_nothing(
    vaes: dict[str, Path], tmp_path: Path, kind: str, changed: dict[str, Any], words: str
) -> None:
    shutil.copytree(vaes[kind], tmp_path / "vae")
    config = tmp_path / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(RaystarError) as refused:
        run(fill(tmp_path / "pics", "a/one.png"), tmp_path / "out", tmp_path / "vae")
    assert str(refused.value).startswith(f"--vae: {config}: expected an autoencoder of Stable Diffusion 1.5's latents")
    assert words in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [64, 96, 160, 224, 288])
def test_pictures_of_every_size_are_encoded_measured_and_trained_on(vae: Path, tmp_path: Path, size: int) -> None:
    """What encode takes, the dataset, the ruler, the networks and the grids take as well."""
    images = tmp_path / "pics"
    for number in range(12):
        path = images / f"{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number, size + 8, size).save(path)
    arguments = ["--images", str(images), "--out", str(tmp_path / "out"), "--vae", str(vae), "--size", str(size)]
    assert main(arguments) == 0
    keys = {"training__epochs": 1, "training__epoch_size": 4, "visualization__every_epochs": 1, "data__holdout": 0}
    config = tiny_config(tmp_path / "out", ("a", "b"), **keys)
    bank = open_bank(config, tmp_path / "cache")
    assert bank.shape == (4, size // 8, size // 8)
    codec, _ = open_codec(config)
    (progress,) = Trainer(config, bank, Ruler.build(bank, config), codec).run()
    assert all(math.isfinite(value) for value in progress.metrics.values())
    assert "eval/score" in progress.metrics
    assert progress.images.keys() == {"grid_ref", "grid_noise"}


def test_less_precision_where_it_is_asked_for(vae: Path, tmp_path: Path) -> None:
    images = fill(tmp_path / "pics", "a/one.png")
    for name, flags in (("full", ()), ("half", ("--half",)), ("bf16", ("--dtype", "bfloat16"))):
        assert run(images, tmp_path / name, vae, *flags) == 0
    full, half, bf16 = (np.load(tmp_path / n / "a/one.npy", allow_pickle=False) for n in ("full", "half", "bf16"))
    assert half.dtype == np.float16
    assert (half == full.astype(np.float16)).all()
    assert bf16.dtype == np.float32
    assert 1e-4 < np.abs(bf16 - full).max() / np.abs(full).max() < 0.05


def test_painted_pictures_as_diffusers_encodes_and_decodes_them(faithful_vae: Path, tmp_path: Path) -> None:
    """To 1e-5, as diffusers hands them out: latents as the codec scales them, pictures in [0, 1]."""
    from diffusers import AutoencoderTiny
    from diffusers.image_processor import VaeImageProcessor

    by_hand = faithful_vae.name != "taesd"
    pictures = {f"{domain}/1.png": paint(domain, 1, 256) for domain in ("photo", "woodcut")}
    for name, picture in pictures.items():
        (tmp_path / "pics" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "pics" / name)
    out, vae = tmp_path / "out", str(faithful_vae)
    assert main(["--images", str(tmp_path / "pics"), "--out", str(out), "--vae", vae]) == 0
    model = AutoencoderTiny.from_pretrained(vae, low_cpu_mem_usage=False).eval()
    latents = [np.load(out / Path(name).with_suffix(".npy"), allow_pickle=False) for name in pictures]
    found = torch.from_numpy(np.stack(latents))
    processor = VaeImageProcessor()
    with torch.no_grad():
        wanted = model.encode(processor.preprocess(list(pictures.values()))).latents
        assert (found * SCALE - wanted).abs().max() < 1e-5
        decoded, again = (
            processor.postprocess(model.decode(z).sample, output_type="pt") for z in (found * SCALE, wanted)
        )
    assert (decoded - again).abs().max() < 1e-5
    assert (2.5 if by_hand else 3) < found.std() < 7  # unscaled
    shown = open_vae(vae).decode(found)
    originals = np.stack([np.asarray(picture) for picture in pictures.values()])
    # Block averages lose the woodcut's lines; that they lose nothing else is seen below.
    assert 10 * np.log10(255**2 / ((shown.astype(float) - originals) ** 2).mean()) > (18 if by_hand else 20)
    if by_hand:
        torch.testing.assert_close(found, latents_of(originals), rtol=1e-5, atol=1e-5)
        assert np.abs(shown - pictures_of(found)).max() < 0.51


# -- file by file ----------------------------------------------------------------------------------


def test_a_folder_with_everything_in_it(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = fill(tmp_path / "pics", "a/good.png", "a/deep/er/good.png", "b/truncated.jpg", "b/good.webp")
    content = (images / "b/truncated.jpg").read_bytes()
    (images / "b/truncated.jpg").write_bytes(content[: len(content) // 2])
    (images / "a/text.png").write_text("words")
    noise(1, 8, 8).resize((1, 1)).save(images / "a/dot.png")
    noise(2).convert("CMYK").save(images / "a/cmyk.jpg")
    rows = b"".join(b"\0" + (np.arange(64) * 1000).astype(">u2").tobytes() for _ in range(64))
    (images / "a/sixteen.png").write_bytes(png(64, 64, 16, 0, rows))
    noise(3).save(images / "a/moving.gif", save_all=True, append_images=[noise(4), noise(5)])
    (images / "a/loop").symlink_to(images / "a")
    (images / "a/all").symlink_to(images)
    (images / "b/self.png").symlink_to("self.png")
    noise(6).save(images / "loose.png")
    (images / "a/notes.txt").touch()
    (images / "empty").mkdir()
    assert run(images, tmp_path / "out", vae) == 1
    shown = capsys.readouterr()
    good = ["a/cmyk", "a/deep-er-good", "a/good", "a/moving", "a/sixteen", "b/good"]
    assert sorted(files(tmp_path / "out")) == [f"{name}.npy" for name in good]
    listed = dict(re.findall(r"^  (\S+): (.*)$", shown.err, re.MULTILINE))
    assert sorted(listed) == [
        "a/all", "a/dot.png", "a/loop", "a/text.png", "b/self.png", "b/truncated.jpg", "empty", "loose.png"
    ]  # fmt: skip
    assert "8 could not be used" in shown.err
    assert listed["a/dot.png"] == "1x1 pixels are too few: the shorter side needs 16 or more"
    assert "truncated" in listed["b/truncated.jpg"]
    assert "not a picture" in listed["a/text.png"]
    assert "1 files that are no pictures: 1 .txt" in shown.err
    assert "6 latents in" in shown.out
    assert "data.domains=[a, b]" in shown.out
    assert manifest(tmp_path / "out")["bad"] == listed
    assert run(images, tmp_path / "out", vae, "--skip-bad") == 0
    first = np.load(tmp_path / "out/a/moving.npy", allow_pickle=False)
    noise(3).save(tmp_path / "frame.gif")
    alone = fill(tmp_path / "alone", "a/x.png")
    os.replace(tmp_path / "frame.gif", alone / "a/moving.gif")
    assert run(alone, tmp_path / "alone_out", vae) == 0
    assert np.allclose(first, np.load(tmp_path / "alone_out/a/moving.npy", allow_pickle=False), atol=1e-3)
    config = override(
        Config(), {"data.data_root": str(tmp_path / "out"), "data.domains": ["a", "b"], "data.holdout": 0}
    )
    assert len(open_bank(config, tmp_path / "cache").names) == 6


def test_small_pictures_are_enlarged_and_told(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = fill(tmp_path / "pics", "a/one.png")
    noise(1, 32, 24).save(images / "a/small.png")
    assert run(images, tmp_path / "out", vae) == 0
    assert "1 pictures are smaller" in capsys.readouterr().err
    assert np.load(tmp_path / "out/a/small.npy", allow_pickle=False).shape == (4, 8, 8)


def test_a_latent_that_is_not_finite_is_no_latent(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = fill(tmp_path / "pics", "a/one.png", "a/two.png")
    original = VaeCodec.encode

    def broken(self: VaeCodec, pixels: Any) -> Any:
        latents = original(self, pixels)
        latents[0, 1, 2, 3] = torch.inf
        return latents

    monkeypatch.setattr(VaeCodec, "encode", broken)
    assert run(images, tmp_path / "out", vae) == 1
    assert list(files(tmp_path / "out")) == ["a/two.npy"]
    assert "a/one.png: its latent holds NaN" in capsys.readouterr().err


def test_names() -> None:
    sources = ["p/a.jpg", "p/a.png", "p/A.webp", "p/x_0.jpg", "p/x_0.png", "p/x_1.png", "p/s/x_0.jpg", "q/a.jpg",
               "p/s-x_0.jpg", "p/s/x_0.jpeg", f"p/{'n' * 250}.jpg", f"p/{'n' * 249}m.jpg"]  # fmt: skip
    names = latent_names(sources, {}, ["p/x_1.npy"])
    assert names["p/a.jpg"] == "p/a.npy"
    assert names["p/a.png"] == "p/a.png.npy"
    assert names["p/A.webp"] == "p/A.webp.npy"  # some file systems see no difference between a and A
    assert names["p/x_0.png"] == "p/x.png_0.npy"
    assert names["p/x_1.png"] == "p/x.png_1.npy"  # somebody else's file is there
    assert names["q/a.jpg"] == "q/a.npy"
    assert names["p/s/x_0.jpg"] == "p/s-x_0.npy"
    assert names["p/s-x_0.jpg"] == "p/s-x.jpg_0.npy"
    assert len({name.casefold() for name in names.values()}) == len(sources)
    assert max(len(name) for name in names.values()) < 250
    # Crops of one picture stay crops of one picture.
    stems = [Path(names[f"p/x_{i}.png"]).stem for i in (0, 1)]
    assert len(set(picture_of([*stems, *"abcdefgh"])[:2])) == 1
    # A picture keeps its latent, whatever comes in before it.
    assert latent_names(["p/a.jpg", "p/a.png"], {"p/a.png": "p/a.npy"}, []) == {
        "p/a.png": "p/a.npy", "p/a.jpg": "p/a.jpg.npy"
    }  # fmt: skip


ODD_DOMAINS = [
    b"-dash", b"0", b"0x1F", b"1", b"12:30:45", b"1e3", b"2024-06-18", b"[x]", b"a, b", "café".encode(), b"key: value",
    b"no", b"null", b"token", b"caf\xe9", b"a\\b", b"'q'", b"\x1b[31m", b"a\nb", b" x ", b"$HOME", b"%", b"~", b"#1",
]  # fmt: skip


def test_the_next_command_runs_as_it_stands(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images = os.fsencode(fill(tmp_path / "pics", *(f"photo/{i}.png" for i in range(8))).parent)
    first = images + b"/pics/photo/1.png"
    for domain in ODD_DOMAINS:
        os.mkdir(images + b"/pics/" + domain)
        for number in range(8):
            os.link(first, images + b"/pics/" + domain + b"/%d.png" % number)
    out = tmp_path / "#latents: 'all' of them, ~"
    assert run(tmp_path / "pics", out, vae, "--skip-bad") == 0
    (shown,) = re.findall("^next: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert shown.isprintable()
    verb, *words = shlex.split(shown)[2:]
    assert verb == "raystar.tune"
    small = ("model.base_dim=8", "data.holdout=0.5", "ruler.sources=2")
    request = tune.parser().parse_args([*words, "--dry-run", *(word for key in small for word in ("--set", key))])
    plan = tune.make_plan(tune.request_of(request))
    texts = {"caf%E9" if domain == b"caf\xe9" else domain.decode() for domain in ODD_DOMAINS}
    assert set(plan.bank.domains) == texts | {"photo"}
    assert Path(plan.bank.root) == out
    assert len(plan.bank.names) == 8 * (len(ODD_DOMAINS) + 1)


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_of_any_bytes_are_listed_on_any_terminal(vae: Path, tmp_path: Path, encoding: str) -> None:
    images = os.fsencode(fill(tmp_path / "pics", "é/1.png").parent) + b"/pics"
    os.mkdir(images + b"/caf\xe9")
    os.link(images + "/é/1.png".encode(), images + b"/caf\xe9/b\xfccher.png")
    for name in (b"bad\xff\x1b[31mname.png", b"b\nad.png"):
        Path(os.fsdecode(images + b"/caf\xe9/" + name)).write_bytes(b"zzz")
    words = ["--images", str(tmp_path / "pics"), "--out", str(tmp_path / "out"), "--vae", str(vae), "--size", "64"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-m", "raystar.encode", *words], cwd=ROOT, capture_output=True, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert rb"caf\xe9/bad\xff\x1b[31mname.png: not a picture" in done.stderr
    assert b"data.domains=[caf%E9, " in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["caf%E9", "manifest.json", "é"]


def test_accents_composed_or_not_are_one_name(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a folder that comes from macOS has them; the bank finds such a domain as well."""
    composed, apart = "café", "cafe\u0301"
    images = fill(
        tmp_path / "pics", f"{composed}/1.png", f"{apart}/2.png", f"{apart}/é.png", f"{apart}/e\u0301.png", "b/1.png"
    )
    assert run(images, tmp_path / "out", vae) == 0
    assert "data.domains=[b, café]" in capsys.readouterr().out
    made = [name for name in files(tmp_path / "out") if name.startswith("caf")]
    assert sorted(made) == ["café/1.npy", "café/2.npy", "café/é.npy", "café/é.png.npy"]
    (tmp_path / "out" / composed).rename(tmp_path / "out" / apart)
    assert run(images, tmp_path / "out", vae) == 0
    keys = {"data.data_root": str(tmp_path / "out"), "data.holdout": 0}
    for domains in ([composed, "b"], [apart, "b"]):
        config = override(Config(), {**keys, "data.domains": domains})
        assert config.data.domains == (composed, "b")
        assert len(open_bank(config, tmp_path / "cache").names) == 5
    with pytest.raises(RaystarError, match="expected each domain once"):
        override(Config(), {**keys, "data.domains": [composed, apart]})
    (tmp_path / "out" / composed).mkdir()
    with pytest.raises(RaystarError, match="2 folders are called café, their accents composed and decomposed"):
        open_bank(config, tmp_path / "cache")


def test_what_systems_leave_is_no_domain_and_no_picture(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = fill(
        tmp_path / "pics", "a/1.png", "a/@eaDir/1.png/thumb.jpg", "a/.ipynb_checkpoints/1.png", "__MACOSX/a/1.png",
        "@eaDir/a.jpg", "b/__MACOSX/2.png", "b/1.png",
    )  # fmt: skip
    (images / "a/Thumbs.db").write_bytes(b"thumbs")
    assert run(images, tmp_path / "out", vae) == 0
    assert sorted(files(tmp_path / "out")) == ["a/1.npy", "b/1.npy"]
    assert "note" not in capsys.readouterr().err


def test_folders_that_cannot_be_domains(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = os.fsencode(fill(tmp_path / "pics", "a/1.png", "caf%E9/1.png", " /1.png").parent) + b"/pics"
    os.mkdir(images + b"/caf\xe9")
    os.link(images + b"/a/1.png", images + b"/caf\xe9/1.png")
    assert run(tmp_path / "pics", tmp_path / "out", vae) == 1
    assert sorted(files(tmp_path / "out")) == ["a/1.npy", "caf%E9/1.npy"]
    told = capsys.readouterr().err
    assert "a domain needs a name of more than spaces" in told
    assert r"caf\xe9: its latents' folder, caf%E9, is that of caf%E9; rename the folder" in told
    with pytest.raises(RaystarError, match="its name is not UTF-8, so no file can say where it is"):
        run(tmp_path / "pics", tmp_path / os.fsdecode(b"out\xe9"), vae)


# -- again -----------------------------------------------------------------------------------------


def test_only_what_changed_is_done_again(
    vaes: dict[str, Path], vae: Path, tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = fill(tmp_path / "pics", "a/1.png", "a/2.png", "a/3.jpg", "b/4.png"), tmp_path / "out"

    def again(*flags: str, vae: Path = vae) -> tuple[int, set[str]]:
        before = files(out) if out.exists() else {}
        encoded.clear()
        run(images, out, vae, *flags)
        after = files(out)
        return sum(encoded), {name for name in after if after[name] != before.get(name)}

    everything = {"a/1.npy", "a/2.npy", "a/3.npy", "b/4.npy"}
    assert again() == (4, everything)
    assert again() == (0, set())
    noise(9).save(images / "a/2.png")
    (images / "a/new.png").write_bytes((images / "a/1.png").read_bytes())
    assert again() == (2, {"a/2.npy", "a/new.npy"})
    (out / "b/4.npy").unlink()
    assert again() == (1, {"b/4.npy"})
    (out / "b/4.npy").write_bytes(b"half of it")
    assert again() == (1, {"b/4.npy"})
    everything.add("a/new.npy")
    for flags in (("--size", "96"), ("--half", "--size", "96")):
        assert again(*flags) == (5, everything)
        assert again(*flags) == (0, set())
    assert again(vae=vaes["AutoencoderKL"]) == (5, everything)
    copy = tmp_path / "elsewhere"
    os.symlink(vaes["AutoencoderKL"], copy)
    assert again(vae=copy) == (0, set())  # the same weights
    # What is no longer usable, or there, leaves nothing that is taken for it.
    (images / "a/1.png").write_bytes(b"broken")
    (images / "a/3.jpg").unlink()
    capsys.readouterr()
    assert again(vae=copy) == (0, set())
    assert "a/1.npy" not in files(out)
    assert "1 latents are of pictures that are not there any more" in capsys.readouterr().err
    assert sorted(manifest(out)["latents"]) == ["a/2.png", "a/3.jpg", "a/new.png", "b/4.png"]


def test_latents_of_others_stay(vae: Path, tmp_path: Path) -> None:
    images, out = fill(tmp_path / "pics", "a/1.png"), tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a/1.npy").write_bytes(b"somebody's")
    assert run(images, out, vae) == 0
    assert (out / "a/1.npy").read_bytes() == b"somebody's"
    assert np.load(out / "a/1.png.npy", allow_pickle=False).shape == (4, 8, 8)
    other = fill(tmp_path / "other", "a/0.png", "a/1.png")
    with pytest.raises(RaystarError, match=r"holds the latent of another a/1\.png"):
        run(other, out, vae)
    # The same pictures at another place are the same.
    os.rename(images, tmp_path / "moved")
    before = files(out)
    assert run(tmp_path / "moved", out, vae) == 0
    assert files(out) == before


def test_killed_it_resumes(vae: Path, tmp_path: Path, encoded: list[int]) -> None:
    images, out = tmp_path / "pics", tmp_path / "out"
    first = fill(images, "a/0.png", "b/0.png") / "a/0.png"
    for domain in "ab":
        for number in range(1, 200):
            os.link(first, images / domain / f"{number}.png")
    command = [sys.executable, "-m", "raystar.encode", "--images", str(images), "--out", str(out), "--vae", str(vae)]
    process = subprocess.Popen([*command, "--size", "128"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        over = time.monotonic() + 120
        while len(list(out.glob("*/*.npy"))) < 20 and time.monotonic() < over:
            assert process.poll() is None
            time.sleep(0.005)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "manifest.json").exists()
    (out / "a/.9.part").write_bytes(b"half of one")
    done = {name: stamp for name, stamp in files(out).items() if name.endswith(".npy")}
    assert 20 <= len(done) < 400
    for name in done:
        assert np.load(out / name, allow_pickle=False).shape == (4, 16, 16)
    assert main([*command[3:], "--size", "128"]) == 0
    after = files(out)
    assert len(after) == 400  # and nothing half-written
    assert {name: after[name] for name in done} == done
    assert sum(encoded) == 400 - len(done)
    assert len(manifest(out)["latents"]) == 400
    assert sorted(p.name for p in out.iterdir()) == ["a", "b", "manifest.json"]


def test_interrupted_it_says_so_and_resumes(
    vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoded: list[int]
) -> None:
    images, out = fill(tmp_path / "pics", *(f"a/{i}.png" for i in range(6))), tmp_path / "out"
    monkeypatch.setattr(encode, "BATCH_PIXELS", 2 * 64 * 64)
    counting = VaeCodec.encode

    def interrupted(self: VaeCodec, pixels: Any) -> Any:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return counting(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(VaeCodec, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(images, out, vae)
    assert "4 of 6 latents are in" in capsys.readouterr().err
    assert len(manifest(out)["latents"]) == 4
    assert run(images, out, vae) == 0
    assert encoded == [2, 2, 2]
    assert "2 made" in capsys.readouterr().out


# -- what is refused -------------------------------------------------------------------------------


def test_one_process_at_a_time(vae: Path, tmp_path: Path) -> None:
    images = fill(tmp_path / "pics", "a/1.png")
    with encoding._alone(tmp_path / "out"), pytest.raises(RaystarError, match="another process is encoding into it"):
        run(images, tmp_path / "out", vae)
    assert run(images, tmp_path / "out", vae) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--images": "nowhere"}, r"--images .*nowhere: expected a folder with one folder .* found nothing"),
        ({"--images": "pics/a/1.png"}, r"found a file"),
        ({"--images": "pics/a"}, r"found no picture in any\n  1\.png: lies in no domain's folder; move it to"),
        ({"--images": "hollow"}, r"found no picture in any$"),
        ({"--out": "pics/a/latents"}, r"--out .*: lies inside of --images"),
        ({"--out": "pics"}, r"lies inside of"),
        ({"--out": "taken/out"}, r"--out taken/out: nothing can be written into taken/out \(Not a directory\)"),
        ({"--out": "taken"}, r"expected a folder, found a file"),
        ({"--size": "100"}, r"--size 100: expected 64 or more pixels, divisible by 32"),
        ({"--size": "32"}, r"--size 32"),
        ({"--vae": "nowhere"}, r"--vae: nowhere: expected a hub name \(owner/model\) or a model's folder"),
        ({"--vae": "hollow"}, r"--vae: .*hollow: expected config\.json"),
        ({"--vae": "damaged"}, r"--vae .*damaged: cannot be loaded \(.*\); pictures need the VAE of Stable Diffusion"),
    ],
)
def test_wrong_requests(
    tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "pics", "a/1.png")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "taken").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    change = {k: f"./{v}" if k == "--vae" and v in ("hollow", "damaged") else v for k, v in change.items()}
    words = {"--images": "pics", "--out": "out", "--vae": str(vae), "--size": "64"} | change
    with pytest.raises(RaystarError, match=message):
        main([part for pair in words.items() for part in pair])
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_something_else(tmp_path: Path, vae: Path) -> None:
    images = fill(tmp_path / "pics", "a/1.png")
    for content in ("{", "[]", '{"latents": {"a/1.png": {}}}'):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/manifest.json").write_text(content)
        with pytest.raises(RaystarError, match=r"manifest\.json: not a manifest of raystar\.encode"):
            run(images, tmp_path / "out", vae)
        assert (tmp_path / "out/manifest.json").read_text() == content


def test_the_gradient_is_not_turned(vae: Path, tmp_path: Path) -> None:
    """Rows are rows: the pixels that reach the codec, by hand."""
    (tmp_path / "a").mkdir()
    gradient(96, 64).save(tmp_path / "a/g.png")
    pixels, enlarged = encoding.prepare(tmp_path / "a/g.png", 64)
    assert not enlarged
    assert pixels.shape == (64, 64, 3)
    assert pixels[0, 0].tolist() == [16 * 255 // 95, 0, 40]
    assert pixels[63, 0].tolist() == [16 * 255 // 95, 255, 40]

"""Folders and domains of any name: a command accepts them or refuses them in words, writes nowhere else, and what it
prints to be run is read back as it was meant. To search longer, with new names each time, name how many times as many:

    RAYSTAR_FUZZ=100 python -m pytest tests/test_names.py
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from raystar import encode, export, train, translate, tune
from raystar.base.console import last_words
from raystar.base.errors import RaystarError
from raystar.base.names import as_text, composed
from raystar.config.assignment import assignment
from raystar.config.load import override, request_config, to_mapping
from raystar.config.schema import Config
from raystar.data.listing import data_root
from raystar.model import checkpoint as checkpoints
from raystar.tracking.mlflow.client import connect
from raystar.training.state import TrainState
from tests.kit.autoencoder import save_block_averages
from tests.kit.support import TINY, tiny_config, write_latents

TIMES = int(os.environ.get("RAYSTAR_FUZZ", "1"))
ODD = [
    "-dash", "--set", "0", "1", "0x1F", "1e3", "12:30:45", "2024-06-18", "no", "null", "~", "~root", "true", "[x]",
    "a, b", "key: value", "café", "cafe\u0301", "token", "api_key: x", "my runs", "what?runs", "50%25", "100%", "#1",
    "a#b", "'", '"', "it's", "$HOME", "$(id)", "`id`", "!!", "a;b", "a|b", "a&b", "*", "\\", "a\\", "{exp_name}", "{}",
    "raystar:demo", "sqlite:", "a.png", "a.gif", "x.npy", ".hidden", " ", " x ", "\t", "\n", "a\nb", "\r", "\x7f",
    "\x1b[31mred", "\u202eabc", "\u00a0", "\u3000", "😀", "\ufeff", "<img src=x onerror=alert(1)>", "a](b)", "x" * 255,
    "ü" * 127, "😀" * 63, "CON", "http:", "s3:", "a=b", "=", ",", "@eaDir", "Thumbs.db", "e\u0301" * 60, "\u0958" * 85,
    "best", "cache",
]  # fmt: skip
BYTES = [b"caf\xe9", b"\xff" * 255, b"\x80\x1b", b"a\xe9, b", b"\xc3"]
names = (
    st.sampled_from(
        [os.fsencode(name) for name in ODD] + [b"caf\xe9", b"\xff" * 255, b"\x80\x1b", b"a\xe9, b", b"\xc3"]
    )
    | st.binary(min_size=1, max_size=255)
    | st.text(min_size=1, max_size=40).map(lambda text: text.encode(errors="ignore"))
).filter(lambda name: name not in (b"", b".", b"..") and not {b"/", b"\0"} & {bytes([byte]) for byte in name})
names = names.filter(lambda name: len(name) <= 255).map(os.fsdecode)


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(
        max_examples=count * TIMES, derandomize=TIMES == 1, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_block_averages(tmp_path_factory.mktemp("vae") / "vae")


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A working folder of its own, beside which nothing may be written."""
    before, environment = Path.cwd(), dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="raystar-names-") as outer:
        inner = Path(outer) / "here"
        inner.mkdir()
        os.chdir(inner)
        try:
            yield inner
            assert os.listdir(outer) == ["here"]
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environment)


def called(main: Callable[[list[str]], int], *words: str, writes: tuple[str, ...]) -> str | None:
    """What a command prints, or None where it refuses in words; it makes nothing but `writes` in the working folder."""
    before, out = set(os.listdir()), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = main(list(words))
    except RaystarError as error:
        told = last_words(error)
        assert told.startswith("error: ")
        of_names = sum(word.count("\n") for word in words)
        assert told.count("\n") <= 2 * of_names or "found no picture" in told, told
        told.encode()  # any terminal shows it
        return None
    finally:
        assert set(os.listdir()) - before <= set(writes)
    assert status in (0, 1), out.getvalue()
    return out.getvalue()


def commands(printed: str, kind: str) -> list[list[str]]:
    """The printed commands, as a shell takes them apart."""
    found = re.findall(rf"^{kind}: +(.*(?:\n(?!\w+: ).*)*)$", printed, re.MULTILINE)
    return [shlex.split(line) for line in found]


def pictures(folder: Path, name: str, count: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng([len(name), number]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number}.png")


def plain(*names: str) -> bool:
    """Whether nothing about the names is a reason to refuse them."""
    return all(as_text(name) == composed(name) and name.strip() and name[0] != "~" for name in names) and not (
        {"raystar:demo", "{exp_name}"} & set(names)
    )


SMALL = [f"{key}={value}" for key, value in {**TINY, "ruler.sources": 2, "data.holdout": 0.5}.items()]


@example(domain="a, b", images="[x]", out="~")
@example(domain="\n\udce9", images="-", out="raystar:demo")
@example(domain="x" * 255, images="ü" * 127, out="😀" * 63)
@examples(40)
@given(domain=names, images=names, out=names)
def test_pictures_to_a_sweep(vae: Path, domain: str, images: str, out: str) -> None:
    with place() as here:
        if images == out:
            return
        for name in (domain, "photo"):
            pictures(here / images / name, name, 8)
        words = (f"--images={images}", f"--out={out}", f"--vae={vae}", "--size=64", "--device=cpu")
        printed = called(encode.main, *words, writes=(out,))
        if printed is None:
            return
        for verb, *rest in [line[2:] for line in commands(printed, "next")]:
            assert verb == "raystar.tune"
            args = tune.parser().parse_args(rest)
            config = request_config(None, [], args.set)
            assert data_root(config.data.data_root).resolve() == (here / out).resolve()
            assert set(config.data.domains) == {composed(as_text(domain)), "photo"} or len(os.fsencode(domain)) > 80
            more = [word for key in SMALL for word in ("--set", key)]
            runs = called(tune.main, *rest, *more, "--dry-run", "--out=runs", "--name=s", writes=("runs",))
            assert runs is not None
            assert f"  {config.data.domains[0]}: 4 latents to train on, 4 held out" in runs


@examples(40)
@given(out=names, root=names, domain=names)
def test_a_sweep_that_is_not_started(out: str, root: str, domain: str) -> None:
    with place() as here:
        if out == root or domain == "a":
            return
        write_latents(here / root, ("a", domain), 8)
        keys = [assignment("data.data_root", root), assignment("data.domains", ["a", domain]), *SMALL]
        words = [f"--set={key}" for key in keys] + ["--dry-run", f"--out={out}", "--name=s"]
        sweep = called(tune.main, "--space=search_spaces/loss.yaml", *words, writes=(out,))
        run = called(train.main, "--config=configs/stargan_v2_latent.yaml", *words, writes=(out,))
        assert (sweep is None) == (run is None)
        assert sweep is not None or not plain(out, root, domain)


@example(domain="\r", file="[x]", out="x" * 255, source="\udce9", to="y" * 255)
@example(domain="```\n```", file="~", out="\udce9", source="-", to="a.gif")
@examples(25)
@given(domain=names, file=names, out=names, source=names, to=names)
def test_a_checkpoint_to_pictures(vae: Path, domain: str, file: str, out: str, source: str, to: str) -> None:
    with place() as here:
        if len({file, out, source, to}) < 4:
            return
        try:
            config = override(tiny_config("x", ("a", "b")), {"data.domains": ["a", domain]})
        except RaystarError:
            return
        state = TrainState.create(config, device="cpu")
        checkpoint = {"epoch": 1, **state.nets.state_dict(), "config": to_mapping(config)}
        (here / file).mkdir()
        checkpoints.save(here / file / "latest.pt", checkpoint)
        pictures(here / source, "x", 2)
        made = called(export.main, f"--checkpoint={file}/latest.pt", f"--out={out}", writes=(out,))
        assert made is not None
        block = re.search(r"\n(`{3,})\n(python .*?)\n\1\n", (here / out / "README.md").read_bytes().decode(), re.DOTALL)
        assert block is not None
        args = translate.parser().parse_args(shlex.split(block[2])[3:])
        assert args.domain == composed(domain)
        words = (
            f"--model={out}",
            f"--input={source}",
            f"--domain={domain}",
            f"--vae={vae}",
            "--device=cpu",
            "--compare",
        )
        if called(translate.main, *words, f"--out={to}", writes=(to,)) is not None:
            assert len(os.listdir(here / to)) == 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh MLflow store: one takes seconds to make."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@example(out="my what?runs, 50%25", root="'#1'", domain="<img src=x>")
@examples(6)
@given(out=names, root=names, domain=st.sampled_from(ODD))
def test_a_run_and_the_command_that_it_prints(store: Path, out: str, root: str, domain: str) -> None:
    with place() as here:
        if out == root:
            return
        try:
            config = override(Config(), {"data.domains": ["a", domain]})
        except RaystarError:
            return
        write_latents(here / root, ("a", domain), 8)
        (here / out).mkdir()
        shutil.copy(store, here / out / "mlflow.db")
        keys = [assignment("data.data_root", root), assignment("data.domains", config.data.domains)]
        words = [f"--set={key}" for key in (*keys, *SMALL, "training.epochs=1")]
        config_file = "--config=configs/stargan_v2_latent.yaml"
        printed = called(train.main, config_file, *words, f"--out={out}", "--name=s", writes=(out,))
        if printed is None:
            assert not plain(out, root)
            return
        ((_, _, verb, *rest),) = commands(printed, "export")
        assert verb == "raystar.export"
        assert called(export.main, *rest, writes=("my_model",)) is not None
        assert (here / "my_model/model.safetensors").is_file()

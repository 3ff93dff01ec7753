"""Latents to pictures: the preview's colours, both kinds of autoencoder, and what happens when one cannot be had.

The built-in decoder has a file of its own.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open

from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.demo import DOMAINS, latents_path, thumbnails_path
from raystar.pictures import autoencoders
from raystar.pictures import decoder as decoders
from raystar.pictures.autoencoders import VaeCodec, open_vae
from raystar.pictures.codec import BuiltInCodec, PreviewCodec, check_codec, need_codec, open_codec
from tests.kit.support import ROOT

SCALE = 0.18215


def config_of(name: str | Path | None, **keys: object) -> Config:
    return override(Config(), {"visualization.vae_model_name_or_path": None if name is None else str(name), **keys})


def to_bytes(rgb: torch.Tensor) -> NDArray[np.uint8]:
    """[B,3,h,w] in [-1,1] -> [B,h,w,3], as a picture is written."""
    return ((rgb.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def assert_same_pictures(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> None:
    """Equal but for rounding: two copies of a network differ by 1e-5 when their memory is aligned differently."""
    difference = np.abs(found.astype(int) - wanted)
    assert difference.max() <= 1
    assert difference.mean() < 0.001


# -- the preview -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channel", "value", "colour"),
    [
        (0, 1.0, (172, 157, 169)),
        (1, 1.0, (169, 191, 157)),
        (2, 1.0, (91, 150, 162)),
        (3, 1.0, (100, 94, 36)),
        (3, -1.0, (155, 161, 219)),
        (0, 0.0, (128, 128, 128)),
        (1, 100.0, (255, 255, 255)),
        (1, -100.0, (0, 0, 0)),
    ],
)
def test_a_constant_latent_is_one_colour(channel: int, value: float, colour: tuple[int, int, int]) -> None:
    """By hand: (matrix row * value + 1) * 127.5, for a channel whose scaled latent is `value` everywhere."""
    latents = torch.zeros(2, 4, 8, 12)
    latents[:, channel] = value / SCALE
    pictures = PreviewCodec().decode(latents)
    assert pictures.shape == (2, 32, 48, 3)
    assert pictures.dtype == np.uint8
    assert (pictures == np.array(colour, np.uint8)).all()


def test_channels_add_up_and_places_stay() -> None:
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 0, :, 4:] = 1 / SCALE
    latents[0, 1, :, 4:] = 1 / SCALE
    picture = PreviewCodec().decode(latents)[0]
    assert picture[16, 4].tolist() == [128, 128, 128]
    assert picture[16, 28].tolist() == [214, 220, 199]
    assert PreviewCodec().decode(latents.half())[0, 16, 28].tolist() == [214, 220, 199]


def test_the_preview_shows_the_demos_colours() -> None:
    """Against the shipped thumbnails of the same pictures, 8x8 pixels each."""
    sheet = np.asarray(Image.open(thumbnails_path()), np.float64)
    errors, spread = [], []
    with safe_open(latents_path(), framework="pt") as stored:
        for row, domain in enumerate(DOMAINS):
            pictures = PreviewCodec().decode(stored.get_slice(domain)[:12])
            small = pictures.reshape(12, 8, 16, 8, 16, 3).mean((2, 4))
            wanted = sheet[8 * row : 8 * row + 8, : 12 * 8].reshape(8, 12, 8, 3).swapaxes(0, 1)
            errors.append(((small - wanted) ** 2).mean())
            spread.append(wanted.var())
    assert np.mean(errors) < 0.18 * np.mean(spread)


# -- autoencoders from a folder --------------------------------------------------------------------


def build(kind: str, **changed: Any) -> Any:
    """A small autoencoder of the kind, untrained, that enlarges 8 times and whose pictures have contrast."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(4)
        if kind == "AutoencoderKL":
            model = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1, **{"latent_channels": 4, **changed},
            )  # fmt: skip
            with torch.no_grad():
                model.decoder.conv_out.weight.mul_(2)
        else:
            model = diffusers.AutoencoderTiny(
                encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4, **changed,
            )  # fmt: skip
            with torch.no_grad():
                for parameter in model.decoder.parameters():
                    parameter.mul_(2)
    return model.eval()


Models = dict[str, tuple[Any, Path]]
KINDS = ("AutoencoderKL", "AutoencoderTiny")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    found = {}
    for kind in KINDS:
        model, folder = build(kind), tmp_path_factory.mktemp(kind) / "it"
        model.save_pretrained(folder)
        found[kind] = (model, folder)
    return found


@pytest.fixture(scope="module")
def halved(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The same in half precision, as diffusers stores a variant: no file has the plain name."""
    found = {}
    for kind in KINDS:
        model, folder = copy.deepcopy(models[kind][0]).half(), tmp_path_factory.mktemp(kind) / "half"
        model.save_pretrained(folder, variant="fp16")
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json", "diffusion_pytorch_model.fp16.safetensors"
        ]  # fmt: skip
        found[kind] = (model.float(), folder)
    return found


def some_latents(count: int) -> torch.Tensor:
    return 5 * torch.randn(count, 4, 4, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("whole_pipeline", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_diffusers_own(
    models: Models, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, whole_pipeline: bool
) -> None:
    """AutoencoderKL takes unscaled latents, AutoencoderTiny scaled ones; `folder` or `folder/vae`."""
    model, folder = models[kind]
    if whole_pipeline:
        shutil.copytree(folder, tmp_path / "pipeline/vae")
        folder = tmp_path / "pipeline"
    codec, note = open_codec(config_of(folder))
    shown = capfd.readouterr()
    assert (shown.out, shown.err, note) == ("", "", None)
    assert isinstance(codec, VaeCodec)
    assert codec.name == folder.name
    latents = some_latents(3)
    factor = SCALE if kind == "AutoencoderTiny" else 1.0
    with torch.no_grad():
        wanted = to_bytes(model.decode(latents * factor).sample)
        other_scaling = to_bytes(model.decode(latents * (SCALE if factor == 1 else 1)).sample)
    found = codec.decode(latents)
    assert found.shape == (3, 32, 48, 3)
    assert found.dtype == np.uint8
    assert_same_pictures(found, wanted)
    # The check has teeth: these pictures have contrast, and the other kind's scaling gives others.
    assert wanted.std() > 5
    assert np.abs(wanted.astype(int) - other_scaling).mean() > 2


def test_the_subfolder_is_the_configurations(models: Models, tmp_path: Path) -> None:
    """In the folder itself, else where `vae_subfolder` says; nowhere else where that is empty."""
    key = "visualization.vae_subfolder"
    tiny, full = (models[kind][1] for kind in ("AutoencoderTiny", "AutoencoderKL"))
    whole = tmp_path / "pipeline"
    shutil.copytree(tiny, whole / "vae")
    shutil.copytree(full, whole / "parts/decoding")

    def kind(**keys: object) -> str:
        codec, note = open_codec(config_of(whole, **keys))
        assert note is None
        assert isinstance(codec, VaeCodec)
        return type(codec.model).__name__

    assert kind() == "AutoencoderTiny"
    assert kind(**{key: "parts/decoding"}) == kind(**{key: "parts/decoding/"}) == "AutoencoderKL"
    assert f"{whole}: expected config.json in it or in its vea/ folder" in refused(whole, **{key: "vea"})
    assert refused(whole, **{key: ""}).endswith(f"{whole}: expected config.json in it")
    shutil.copytree(full, whole, dirs_exist_ok=True)
    assert kind() == kind(**{key: ""}) == "AutoencoderKL"


@pytest.mark.parametrize("place", ["a folder", "the cache", "the hub"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_there_in_half_precision_alone(
    halved: Models, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    model, folder = halved[kind]
    if place == "the cache":
        go_offline(monkeypatch)
        cached(hub, folder, "vae")
    with served(folder, monkeypatch) if place == "the hub" else contextlib.nullcontext():
        codec, note = open_codec(config_of(folder if place == "a folder" else "owner/model"))
    assert note is None
    assert isinstance(codec, VaeCodec)
    assert {parameter.dtype for parameter in codec.model.parameters()} == {torch.float32}
    with torch.no_grad():
        wanted = to_bytes(model.decode(some_latents(2) * (SCALE if kind == "AutoencoderTiny" else 1)).sample)
    assert_same_pictures(codec.decode(some_latents(2)), wanted)


def test_a_large_batch_is_decoded_in_pieces(models: Models) -> None:
    codec, _ = open_codec(config_of(models["AutoencoderTiny"][1]))
    latents = some_latents(19)
    together = codec.decode(latents)
    alone = np.concatenate([codec.decode(latents[i : i + 1]) for i in range(19)])
    assert together.shape == (19, 32, 48, 3)
    assert_same_pictures(together, alone)
    assert not any(p.requires_grad for p in codec.model.parameters())  # type: ignore[attr-defined]


def test_where_there_is_no_room_for_a_batch_fewer_are_decoded_at_once(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a training; a single picture that does not fit is an error."""
    codec, _ = open_codec(config_of(models["AutoencoderTiny"][1]))
    assert isinstance(codec, VaeCodec)
    wanted = codec.decode(some_latents(9))
    decode, sizes, room = codec.model.decode, list[int](), 2

    def narrow(chunk: torch.Tensor) -> Any:
        sizes.append(len(chunk))
        if len(chunk) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(chunk)

    monkeypatch.setattr(codec.model, "decode", narrow)
    assert_same_pictures(codec.decode(some_latents(9)), wanted)
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        codec.decode(some_latents(1))


def test_loading_leaves_stderr_and_loggers_as_they_were(models: Models) -> None:
    logger = logging.getLogger("huggingface_hub")
    before, stream = logger.level, sys.stderr
    open_codec(config_of(models["AutoencoderTiny"][1]))
    assert logger.level == before
    assert sys.stderr is stream


def test_the_first_load_of_a_process_is_silent(models: Models) -> None:
    """Imports included, which a test in this process would not see."""
    program = (
        "import sys; from raystar.pictures.codec import open_codec; from raystar.config.load import override; "
        "from raystar.config.schema import Config; "
        "c = override(Config(), {'visualization.vae_model_name_or_path': sys.argv[1]}); print(open_codec(c)[1])"
    )
    command = [sys.executable, "-c", program, str(models["AutoencoderTiny"][1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("None\n", "")


# -- what is refused, and what falls back ----------------------------------------------------------


def refused(name: str | Path, **keys: object) -> str:
    """The message, the same whether the folder is checked beforehand or opened."""
    with pytest.raises(RaystarError) as checked:
        check_codec(config_of(name, **keys))
    with pytest.raises(RaystarError) as opened:
        open_codec(config_of(name, **keys))
    assert str(checked.value) == str(opened.value)
    assert len(str(opened.value).splitlines()) == 1
    return str(opened.value)


def test_folders_that_hold_no_autoencoder(tmp_path: Path) -> None:
    message = refused(tmp_path)
    assert str(tmp_path) in message
    assert "config.json" in message
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    message = refused(tmp_path)
    assert f"{tmp_path}/config.json" in message
    assert "expected AutoencoderKL or AutoencoderTiny, found 'UNet2DConditionModel'" in message
    (tmp_path / "config.json").write_text("{}")
    assert "found None" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{nothing")
    assert "not readable" in refused(tmp_path)


@pytest.mark.parametrize("name", ["{tmp}/nowhere", "./nowhere", "~/no such folder/vae", "nowhere", "a/b/c"])
def test_paths_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(name.replace("{tmp}", str(tmp_path)))
    assert "visualization.vae_model_name_or_path" in message
    assert "the folder is not there" in message
    if name in ("./nowhere", "nowhere", "a/b/c"):
        where = tmp_path / name
        assert message.endswith(f"; looked for {where}, since relative paths start at the folder of the command")


OTHERS = [
    ("AutoencoderKL", {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
     "found 16 channels, scaling_factor 1.5305, shift_factor 0.0609; take Stable Diffusion 1.5's"),
    ("AutoencoderKL", {"scaling_factor": 0.13025}, "found scaling_factor 0.13025;"),
    ("AutoencoderKL", {"scaling_factor": None}, "found scaling_factor null;"),
    ("AutoencoderKL", {"block_out_channels": [8, 8, 8]}, "found pictures 4 times as large;"),
    ("AutoencoderTiny", {"latent_channels": 16}, "found 16 channels;"),
    ("AutoencoderTiny", {"encoder_block_out_channels": [8] * 5}, "found pictures 16 times as large;"),
]  # fmt: skip
"""Autoencoders of other latents, by what differs in their `config.json`, and what is said of them."""


@pytest.mark.parametrize(("kind", "changed", "words"), OTHERS)
def test_an_autoencoder_of_other_latents(
    models: Models, tmp_path: Path, kind: str, changed: dict[str, Any], words: str
) -> None:
    folder = spoiled(models, tmp_path / "it", kind, changed)
    message = refused(folder)
    assert message.startswith(f"visualization.vae_model_name_or_path: {folder}/config.json: expected an autoencoder")
    assert words in message
    with pytest.raises(RaystarError, match=re.escape(f"--vae: {folder}/config.json: expected an autoencoder")):
        open_vae(str(folder))


def spoiled(models: Models, folder: Path, kind: str, changed: dict[str, Any]) -> Path:
    """A model's folder whose configuration says something else; returns it."""
    shutil.copytree(models[kind][1], folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changed))
    return folder


@pytest.mark.parametrize("place", ["the cache", "the hub"])
def test_a_hub_name_of_other_latents(
    models: Models, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Refused before anything starts, for which its `config.json` is enough."""
    folder = spoiled(models, tmp_path / "it", "AutoencoderKL", {"scaling_factor": 0.13025})
    if place == "the cache":
        go_offline(monkeypatch)
        cached(hub, folder, "vae")
        message = refused("owner/model")
    else:
        with served(folder, monkeypatch) as asked:
            message = refused("owner/model")
        assert "/owner/model/resolve/main/config.json" in asked
        assert not any("safetensors" in path for path in asked if path.startswith("GET"))
    assert message.startswith("visualization.vae_model_name_or_path: owner/model: expected an autoencoder of Stable")


def test_latents_of_another_number_of_channels(tmp_path: Path, models: Models) -> None:
    """Their own VAE makes pictures of them, of whatever scale; without it there are none, and that is said."""
    channels = {"model.latent_channels": 16}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build("AutoencoderKL", latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)
    model.save_pretrained(tmp_path / "sixteen")
    codec, note = open_codec(config_of(tmp_path / "sixteen", **channels))
    assert note is None
    assert isinstance(codec, VaeCodec)
    latents = torch.randn(2, 16, 4, 6)
    with torch.no_grad():
        assert_same_pictures(codec.decode(latents), to_bytes(model.decode(latents).sample))
    key = "visualization.vae_model_name_or_path"
    remark = f"no pictures: model.latent_channels is 16, and the built-in decoder takes 4; {key} names an "
    remark += "AutoencoderKL of 16"
    assert open_codec(config_of(None, **channels)) == (None, remark)
    with pytest.raises(RaystarError, match="no pictures: "):
        need_codec(config_of(None, **channels))
    (tmp_path / "sixteen/diffusion_pytorch_model.safetensors").unlink()
    codec, note = open_codec(config_of(tmp_path / "sixteen", **channels))
    assert codec is None
    assert note is not None
    assert note.startswith(f"{tmp_path / 'sixteen'} cannot be loaded (")
    assert note.endswith(f"); {remark}")
    four, tiny = models["AutoencoderKL"][1], models["AutoencoderTiny"][1]
    assert "expected an AutoencoderKL of 16 channels (model.latent_channels), whose" in refused(four, **channels)
    assert "found 4 channels, an AutoencoderTiny; take the one" in refused(tiny, **channels)
    assert "found a decoder's file, which takes 4" in refused(decoders.PACKAGED, **channels)


def assert_fell_back(config: Config, name: str) -> str:
    codec, note = open_codec(config)
    assert isinstance(codec, BuiltInCodec)
    assert codec.name == "raystar"
    assert note is not None
    assert len(note.splitlines()) == 1
    assert len(note) < 300
    assert name in note
    assert "built-in decoder" in note
    return note


@pytest.mark.parametrize("damage", ["truncated", "gone", "of another size"])
def test_damaged_weights_cost_the_pictures_only(
    models: Models, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "it"
    shutil.copytree(models["AutoencoderTiny"][1], folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "gone":
        weights.unlink()
    else:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"decoder_block_out_channels": [16] * 4}))
    assert_fell_back(config_of(folder), str(folder))
    assert capfd.readouterr().err == ""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; returns its folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "10" if "TIMEOUT" in name else "1"))
    return tmp_path / "hub"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails the test as soon as the time is over, whatever the code is waiting for."""

    def over(*_: object) -> None:
        pytest.fail(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the variable is read when the module is imported


def test_a_hub_name_without_a_network_falls_back_at_once(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import diffusers  # noqa: F401  (its import is not what is timed)

    go_offline(monkeypatch)
    check_codec(config_of("raystar-tests/no-such-model"))  # a hub name is not refused beforehand
    with within(3):
        assert_fell_back(config_of("raystar-tests/no-such-model"), "raystar-tests/no-such-model")
    assert capfd.readouterr().err == ""  # the note is for the caller to print


def test_the_note_tells_an_unreachable_hub_from_a_wrong_model(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looked into the repository, so the note must not say what is in it."""
    go_offline(monkeypatch)
    note = assert_fell_back(config_of("raystar-tests/no-such-model"), "raystar-tests/no-such-model")
    assert "no AutoencoderKL or AutoencoderTiny in it" not in note


@pytest.mark.parametrize("answers", ["refuses", "never answers"])
def test_a_hub_that_does_not_answer_costs_a_bounded_time(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], answers: str
) -> None:
    """A port that refuses, and one that takes the connection and stays silent."""
    import diffusers  # noqa: F401
    from huggingface_hub import constants, file_download

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(autoencoders, "_HUB_TIMEOUT_S", 0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers == "never answers":
            server.listen()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for module in (constants, file_download):  # both are read when their modules are imported
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        with within(5):
            note = assert_fell_back(config_of("raystar-tests/no-such-model"), "raystar-tests/no-such-model")
        assert "in it" not in note  # nobody looked into the repository
        if answers == "never answers":
            server.settimeout(1)
            server.accept()[0].close()  # it was this server that was asked
    assert capfd.readouterr().err == ""


def cached(hub: Path, folder: Path, subfolder: str) -> Path:
    """Lays a model into the cache as the hub's client does, under owner/model; returns where its files are."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    (repository / "blobs").mkdir()
    place = repository / "snapshots" / revision / subfolder
    place.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, repository / f"blobs/{number}")
        (place / file.name).symlink_to(repository / f"blobs/{number}")
    return place


@contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine that has one model, owner/model, with a folder's files at its top.

    Yields what it is asked for, `METHOD PATH` and the path alone.
    """
    from huggingface_hub import constants, file_download

    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            asked.extend((self.path, f"{self.command} {self.path}"))
            prefix, _, name = self.path.partition("/resolve/main/")
            content = b""
            if prefix == "/owner/model" and (folder / name).is_file():
                content = (folder / name).read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", 40 * "a")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def log_message(self, *_: object) -> None: ...

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


OPEN = """
import sys, time
import numpy as np, torch
import diffusers
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.pictures.codec import open_codec
names = {"vae_model_name_or_path": "owner/model", "vae_subfolder": sys.argv[1]}
config = override(Config(), {f"visualization.{key}": value for key, value in names.items()})
began = time.perf_counter()
codec, note = open_codec(config)
print(f"{codec.name}, {note}, {time.perf_counter() - began:.1f}")
np.save(sys.argv[2], codec.decode(torch.load(sys.argv[3], weights_only=True)))
"""


@pytest.mark.parametrize("weights", ["safetensors", "bin", "none"])
def test_the_cache_of_a_machine_whose_hub_is_away(models: Models, tmp_path: Path, weights: str) -> None:
    """Nothing is offline by the environment: the hub's address is a port that nobody listens at. A whole model, of
    which the VAE alone is in the cache, under the subfolder's name."""
    model, folder = models["AutoencoderKL"]
    place = cached(tmp_path / "home/hub", folder, "decoding")
    if weights != "safetensors":
        (place / "diffusion_pytorch_model.safetensors").unlink()
    if weights == "bin":
        torch.save(model.state_dict(), place / "diffusion_pytorch_model.bin")
    torch.save(some_latents(2), tmp_path / "latents.pt")
    with socket.socket() as closed:  # bound, and listening to nobody
        closed.bind(("127.0.0.1", 0))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
        environment |= {
            "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", OPEN, "decoding", str(tmp_path / "made.npy"), str(tmp_path / "latents.pt")],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found, seconds = done.stdout.rsplit(", ", 1)
    assert float(seconds) < 10
    if weights == "none":
        assert found.startswith(
            "raystar, owner/model cannot be loaded (not in the cache, and the hub cannot be reached: "
        )
        assert f"; there is no folder {ROOT / 'owner/model'} either); pictures use the built-in decoder" in found
        return
    assert found == "model, None"
    with torch.no_grad():
        wanted = to_bytes(model.decode(some_latents(2)).sample)
    assert_same_pictures(np.load(tmp_path / "made.npy"), wanted)


@pytest.mark.parametrize(("kind", "subfolder"), [("AutoencoderTiny", ""), ("AutoencoderKL", "vae")])
def test_a_hub_name_in_the_cache_loads_without_a_network(
    models: Models, hub: Path, monkeypatch: pytest.MonkeyPatch, kind: str, subfolder: str
) -> None:
    go_offline(monkeypatch)
    model, folder = models[kind]
    cached(hub, folder, subfolder)
    codec, note = open_codec(config_of("owner/model"))
    assert note is None
    assert codec.name == "model"
    latents = some_latents(2)
    with torch.no_grad():
        wanted = to_bytes(model.decode(latents * (SCALE if kind == "AutoencoderTiny" else 1)).sample)
    assert_same_pictures(codec.decode(latents), wanted)


# -- there and back --------------------------------------------------------------------------------


def test_a_painted_picture_survives_the_round_trip(faithful_vae: Path) -> None:
    from diffusers import AutoencoderTiny

    from raystar.demo.__main__ import encode
    from raystar.demo.painter import paint

    picture = paint("photo", 3)
    model = AutoencoderTiny.from_pretrained(faithful_vae, local_files_only=True, low_cpu_mem_usage=False)
    codec, note = open_codec(config_of(faithful_vae))
    assert note is None
    back = codec.decode(encode(model.eval(), [picture]))[0].astype(np.float64)
    error = ((back - np.asarray(picture, np.float64)) ** 2).mean()
    assert back.shape == (256, 256, 3)
    assert 10 * math.log10(255**2 / error) > 20

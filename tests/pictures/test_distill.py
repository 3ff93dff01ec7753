"""Training a decoder: what it is trained on, its loss, and a whole small run that is resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raystar import distill
from raystar.base.errors import RaystarError
from raystar.model.device import fast_bf16
from raystar.pictures import decoder as decoders
from raystar.pictures import distilling
from raystar.pictures.autoencoders import SCALE, VaeCodec
from raystar.pictures.codec import PreviewCodec, open_codec
from raystar.pictures.decoder import Decoder
from tests.kit.support import write_latents
from tests.pictures.test_codec import build, config_of


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder with untrained weights: any function of latents will do to be learned."""
    folder = tmp_path_factory.mktemp("teacher") / "small_vae"
    build("AutoencoderTiny").save_pretrained(folder)
    return folder


def codec_of(folder: Path) -> VaeCodec:
    found, _ = open_codec(config_of(folder))
    assert isinstance(found, VaeCodec)
    return found


# -- what is learned -------------------------------------------------------------------------------


def test_held_out_pictures_are_not_trained_on(teacher: Path, tmp_path: Path) -> None:
    roots = [str(write_latents(tmp_path / name, size=8, seed=seed)) for seed, name in enumerate(("one", "two"))]
    lesson, held = distilling.gather(roots, codec_of(teacher), tmp_path, 40, seed=0)
    assert list(held) == ["one", "two"]
    assert [len(some.latents) for some in held.values()] == [6, 6]  # a tenth of 20, in three domains, twice
    assert lesson.latents.shape == (40, 4, 8, 8)
    real = {latent.numpy().tobytes() for latent in lesson.latents[:30]}
    assert len(real) == 30
    for some in held.values():
        assert not real & {latent.numpy().tobytes() for latent in some.latents}
        assert np.array_equal(some.pictures, codec_of(teacher).decode(some.latents))
    # bf16 rounds, but they are the same pictures.
    exact = codec_of(teacher).decode(lesson.latents).astype(int)
    assert np.abs(lesson.pictures - exact).mean() < 2
    assert exact.std() > 5


def test_the_teacher_decodes_a_latent_once(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was cut short resumes where it was; a finished one asks only for a picture's size."""
    root = str(write_latents(tmp_path / "data", size=8))
    codec = codec_of(teacher)
    decode, asked = codec.decode, []

    def counted(latents: torch.Tensor) -> object:
        if len(asked) == 6:
            raise KeyboardInterrupt
        asked.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(codec, "decode", counted)
    with pytest.raises(KeyboardInterrupt):
        distilling.gather([root], codec, tmp_path, 40, seed=0)
    assert asked == [1, 6, 1, 8, 8, 8]
    asked.clear()
    lesson, _ = distilling.gather([root], codec, tmp_path, 40, seed=0)
    assert asked == [1, 1, 8, 8]
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16(torch.device("cpu"))):
        assert np.abs(lesson.pictures - decode(lesson.latents).astype(int)).max() <= 1
    asked.clear()
    distilling.gather([root], codec, tmp_path, 40, seed=0)
    assert asked == [1, 1]


def test_latents_that_no_picture_has() -> None:
    """Mixtures lie between two, noise leaves the mean, and the third kind has another one's statistics."""
    real = torch.stack([torch.full((4, 16, 16), float(value)) for value in (0, 1)])
    real += 0.1 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    made = distilling.perturbed(real, 60, seed=1)
    assert made.shape == (60, 4, 16, 16)
    assert torch.equal(made, distilling.perturbed(real, 60, seed=1))
    assert not torch.equal(made, distilling.perturbed(real, 60, seed=2))
    means = made.mean((1, 2, 3))
    assert ((means[0::3] > 0.1) & (means[0::3] < 0.9)).any()
    for others in (means[1::3], means[2::3]):
        assert ((others.abs() < 0.05) | ((others - 1).abs() < 0.05)).all()
    assert made[1::3].std((2, 3)).max() > 1.05 * made[2::3].std((2, 3)).max()


def test_loss_by_hand() -> None:
    """0.1 off counts 0.1 * 0.1 / (2 * 0.2); 1 off counts 1 - 0.2 / 2."""
    zero = torch.zeros(1, 3, 4, 4)
    assert float(distilling.loss_of(zero + 0.1, zero)) == pytest.approx(0.025)
    assert float(distilling.loss_of(zero - 1, zero)) == pytest.approx(0.9)


def test_the_rate_rises_and_falls() -> None:
    rates = [distilling.rate(share) for share in (0, 0.01, 0.02, 0.51, 1, 1.5)]
    peak = distilling.PEAK_RATE
    assert rates == pytest.approx([0.01 * peak, peak / 2, peak, peak * 0.5025, peak * 0.005, peak * 0.005])


# -- a whole run -----------------------------------------------------------------------------------


def test_a_decoder_is_trained_saved_used_and_gone_on_with(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_latents(tmp_path / "data", size=8), tmp_path / "mine.safetensors"
    arguments = ["--teacher", str(teacher), "--latents", str(root), "--out", str(out), "--pictures", "40"]
    assert distill.main([*arguments, "--minutes", "0.05"]) == 0
    said = capsys.readouterr().out
    assert "40 pictures to train on, 6 of data held out" in said
    assert f"--set visualization.vae_model_name_or_path={out}" in said
    codec, note = open_codec(config_of(out))
    assert (codec.name, note) == ("mine", None)
    # It has learned something: it is closer to its teacher than the preview, and than it was.
    _, held = distilling.gather([str(root)], codec_of(teacher), tmp_path / "mine.work", 40, seed=0)
    torch.manual_seed(0)
    before = distilling.measure(Decoder(), held)["data"]
    after = distilling.psnr(codec, held["data"])
    assert after > max(before, distilling.psnr(PreviewCodec(), held["data"])) + 1
    assert f"decoder:        data {after:.2f} dB" in said

    first = torch.load(tmp_path / "mine.work/training.pt", weights_only=True)
    assert distill.main([*arguments, "--minutes", "0.08"]) == 0
    second = torch.load(tmp_path / "mine.work/training.pt", weights_only=True)
    assert f"step {first['step']}\n" in capsys.readouterr().out
    assert second["step"] > first["step"]
    assert 4.8 <= second["seconds"] < 4.8 + 3
    with pytest.raises(RaystarError, match=r"training.pt: is of another teacher, other latents, --pictures or --seed"):
        distill.main([*arguments, "--seed", "1"])
    # Over already: the same command says how good it is, and trains no more.
    weights = decoders.load(out).state_dict()
    assert distill.main([*arguments, "--minutes", "0.08"]) == 0
    assert all(torch.equal(value, weights[name]) for name, value in decoders.load(out).state_dict().items())


def test_latents_reach_the_network_scaled(teacher: Path) -> None:
    """A decoder takes what AutoencoderTiny takes."""
    model = decoders.load()
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = ((model(latents).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    found, _ = open_codec(config_of(None))
    assert np.abs(found.decode(latents / SCALE) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}/decoder.pt"], "--out: expected a .safetensors file"),
        (["--out", "{tmp}/nowhere/a.safetensors"], "in a folder that exists"),
        (["--minutes", "0"], "--minutes: expected more than 0"),
        (["--minutes", "nan"], "--minutes: expected more than 0"),
        (["--pictures", "3"], "--pictures: expected 4 or more"),
        (["--seed", "-1"], "--seed: expected 0"),
        (["--device", "toaster"], "--device: toaster"),
        (["--teacher", "{tmp}/nowhere"], "--teacher"),
        (["--teacher", "{shipped}"], "or a model's folder, found a file"),
        (["--latents", "{tmp}/nowhere"], "--latents: "),
        (["--latents", "{tmp}/data", "{tmp}/other"], "expected latents of one shape"),
        (["--latents", "{tmp}/single"], "expected two pictures or more in a domain"),
        (["--latents", "{tmp}/data", "{tmp}/again/data"], "datasets of different names"),
    ],
)
def test_requests_that_are_refused(teacher: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    write_latents(tmp_path / "data", size=8)
    write_latents(tmp_path / "again/data", size=8)
    write_latents(tmp_path / "other", size=12)
    write_latents(tmp_path / "single", count=1, size=8)
    given = ["--teacher", str(teacher), "--latents", str(tmp_path / "data"), "--out", str(tmp_path / "a.safetensors")]
    places = {"{tmp}": str(tmp_path), "{shipped}": str(decoders.PACKAGED)}
    for argument in arguments:
        for name, place in places.items():
            argument = argument.replace(name, place)
        given.append(argument)
    with pytest.raises(RaystarError) as refused:
        distill.main(given)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1

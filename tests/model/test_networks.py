"""What `model.residual`, `discriminator_dim` and norms make of networks, and everything that networks go through."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raystar import export
from raystar.base.errors import RaystarError, WrongResults
from raystar.config.load import from_mapping, override
from raystar.config.schema import Config, ModelConfig
from raystar.data.bank import Bank, open_bank
from raystar.data.batches import Batch, LatentDataset
from raystar.exported import model as model_module
from raystar.exported import onnx as graphs
from raystar.model import checkpoint as checkpoints
from raystar.model import networks
from raystar.model.layers import SpectralConv
from raystar.model.native import kernels, library
from raystar.model.networks import NAMES, Discriminator, Generator, Nets
from raystar.search import space
from raystar.sweep.disk import checkpoint_bytes
from raystar.train import initial_state
from raystar.training import compile as compile_module
from raystar.training import resume
from raystar.training.compile import compile_networks
from raystar.training.parity import check_parity
from raystar.training.state import TrainState
from raystar.training.step import train_step
from raystar.training.trainer import Trainer
from tests.kit import textbook
from tests.kit.support import tiny_config, write_latents
from tests.training.test_step import make_batch

pytestmark = pytest.mark.usefixtures("bf16")

NEW = {"model__residual": True, "model__discriminator_dim": 6}
NORMS = {"model__norm": "adagn", "model__num_groups": 4, "model__discriminator_norm": "spectral"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def bank(root: Path) -> Bank:
    return open_bank(tiny_config(root), root.parent / "cache")


@pytest.fixture(params=[NEW, NEW | NORMS], ids=["AdaIN", "AdaGN and spectral norm"])
def config(root: Path, request: pytest.FixtureRequest) -> Config:
    return tiny_config(root, **request.param)


def woken(nets: Nets, seed: int = 5) -> Nets:
    """Gives all parameters that start at zero values, so that every path through the networks matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, net in nets.items():
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return nets


def floats(config: Config) -> Batch:
    """A batch of three in float32."""
    batch = make_batch(3, config.model.latent_dim)
    return Batch(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in batch))


# -- model.residual --------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("base_dim", [8, 32], ids=["PyTorch's kernels", "native kernels where there are any"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("each", [1, 3])
def test_it_begins_as_exactly_the_identity(amp: bool, base_dim: int, layout: torch.memory_format, each: int) -> None:
    G = Generator(ModelConfig(base_dim=base_dim, n_res_blocks=1, style_dim=6, residual=True))
    G.to(memory_format=layout)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=layout)
    s = torch.randn(2 * each, 6)
    with torch.autocast("cpu", torch.bfloat16) if amp else contextlib.nullcontext():
        assert kernels.serves(x, base_dim) == (amp and base_dim == 32 and library.unavailable() is None)
        found = G(x, s)
    assert found.dtype == torch.float32
    assert torch.equal(found, x.repeat(each, 1, 1, 1))
    assert found.is_contiguous(memory_format=layout)  # translations keep the layout of the contents


def test_without_it_nothing_begins_as_the_identity() -> None:
    G = Generator(ModelConfig(base_dim=8, n_res_blocks=1, style_dim=6))
    x = torch.randn(2, 4, 8, 8)
    assert (G(x, torch.randn(2, 6)) - x).abs().max() > 0.1


def plain_generator(G: Generator, x: Tensor, s: Tensor) -> Tensor:
    """The textbook's G, with the content added at the end."""
    return textbook.generator(dict(G.named_parameters()), x, s, residual=True)


@pytest.mark.parametrize("each", [1, 3])
def test_it_equals_the_plain_form_in_float64(each: int) -> None:
    """Values and all gradients, those of content and style among them."""
    model = ModelConfig(base_dim=8, n_res_blocks=2, style_dim=6, residual=True)
    nets = woken(Nets.create(model, 3, seed=1).to(torch.float64))
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    s = torch.randn(2 * each, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2 * each, 4, 8, 8, dtype=torch.float64)
    inputs = [x, s, *nets.G.parameters()]
    found = nets.G(x, s)
    wanted = torch.cat([plain_generator(nets.G, x, one) for one in s.chunk(each)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    gradients = (torch.autograd.grad(y, inputs, upstream) for y in (found, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert a.any()


def test_from_zero_only_the_last_convolution_learns_at_first() -> None:
    """What it is multiplied by has no gradient until it has moved; from then on everything has."""
    G = Generator(ModelConfig(base_dim=8, n_res_blocks=1, style_dim=6, residual=True))
    optimizer = torch.optim.SGD(G.parameters(), lr=0.1)
    x, s, upstream = torch.randn(2, 4, 8, 8), torch.randn(2, 6), torch.randn(2, 4, 8, 8)
    moving = []
    for _ in range(3):
        optimizer.zero_grad()
        G(x, s).backward(upstream)
        moving.append({name for name, p in G.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-12})
        optimizer.step()
    assert moving[0] == {"decoder.2.weight", "decoder.2.bias"}
    assert {"encoder.0.weight", "res_blocks.0.conv1.weight", "res_blocks.0.adain1.fc.weight"} <= moving[2]


@pytest.mark.parametrize("step", [1, 16])
def test_a_step_equals_the_textbook(step: int) -> None:
    config = tiny_config("unused", **NEW)
    state = TrainState.create(config, "cpu")
    woken(state.nets.to(torch.float64))
    twin, batch = copy.deepcopy(state.nets), make_batch(3, config.model.latent_dim)
    logs = train_step(state, batch, epoch=2, step=step)
    d = textbook.d_terms(twin, batch, config, step)
    d["d_loss"].backward()
    gradients = {f"D.{name}": p.grad for name, p in twin.D.named_parameters()}
    twin.D.load_state_dict(state.nets.D.state_dict())  # the generator's losses use the updated D
    twin.D.zero_grad()
    g = textbook.g_terms(twin, batch, config, epoch=2)
    g["g_loss"].backward()
    gradients |= {f"{n}.{name}": p.grad for n in "GFE" for name, p in getattr(twin, n).named_parameters()}
    for name, net in state.nets.items():
        for key, parameter in net.named_parameters():
            wanted = gradients[f"{name}.{key}"]
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9, msg=f"{name}.{key}")
    for key, value in (d | g).items():
        assert logs[key].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-9), key


# -- model.discriminator_dim -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_dim", "first", "d_layers", "widths"),
    [
        (256, None, 3, [64, 128, 256]),  # the specification's
        (256, None, 5, [64, 128, 256, 256, 256]),
        (256, 64, 5, [64, 128, 256, 256, 256]),
        (32, None, 3, [8, 16, 32]),
        (32, 32, 3, [32, 64, 128]),
        (32, 32, 5, [32, 64, 128, 128, 128]),
        (32, 3, 4, [3, 6, 12, 12]),
        (10, None, 3, [2, 4, 8]),
        (10, None, 4, [2, 4, 8, 10]),
        (32, 16, 1, [16, 32]),
    ],
)
def test_widths_of_the_discriminator(base_dim: int, first: int | None, d_layers: int, widths: list[int]) -> None:
    D = Discriminator(ModelConfig(base_dim=base_dim, d_layers=d_layers, discriminator_dim=first), 5)
    layers = [layer for layer in D.main if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == [*widths, 5]
    assert [layer.in_channels for layer in layers] == [4, *widths]
    assert D(torch.randn(2, 4, 16, 16), torch.tensor([0, 4])).shape[:2] == (2, 1)


# -- what networks go through ----------------------------------------------------------------------


def test_a_run_resumes_bitwise(config: Config, bank: Bank, tmp_path: Path) -> None:
    config = override(config, {"training.epochs": 3, "training.use_amp": True, "model.base_dim": 32})
    *_, whole = Trainer(config, bank).run()
    (half,) = Trainer(override(config, {"training.epochs": 1}), bank).run()
    checkpoints.save(tmp_path / "c.pt", half.checkpoint)
    *_, resumed = Trainer(config, bank, checkpoint=checkpoints.load(tmp_path / "c.pt")).run()
    for part in (*NAMES, "opt_g", "opt_d"):
        for (key, a), (_, b) in zip(
            checkpoints.leaves(part, whole.checkpoint[part]), checkpoints.leaves(part, resumed.checkpoint[part]),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key


@pytest.fixture
def saved(config: Config, tmp_path: Path) -> Path:
    state = TrainState.create(config, "cpu")
    woken(state.nets)
    train_step(state, floats(config), epoch=1, step=1)
    checkpoints.save(tmp_path / "epoch_0001.pt", resume.snapshot(state, 1, {}))
    return tmp_path / "epoch_0001.pt"


def test_an_export_translates_as_the_networks_do(saved: Path, config: Config, tmp_path: Path) -> None:
    assert export.main(["--checkpoint", str(saved), "--out", str(tmp_path / "model")]) == 0
    model = model_module.load(tmp_path / "model", "cpu")
    assert model.config.model == config.model
    weights = checkpoints.load(saved)
    G, F, scale = Generator(config.model), Nets.create(config.model, 3, 0).F, config.training.latent_scale
    G.load_state_dict(weights["G"])
    F.load_state_dict(weights["F"])
    latents = 5 * torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        s = F(networks.noise(3, config.model.latent_dim).expand(2, -1), torch.tensor([1, 1]))
        wanted = G(latents * scale, s) / scale
        if config.model.norm == "adain":
            torch.testing.assert_close(wanted, plain_generator(G, latents * scale, s) / scale, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.translate(latents, "b", seed=3), wanted)
    assert "added to the picture" in (tmp_path / "model/README.md").read_text()


def test_its_onnx_graphs_agree(saved: Path, config: Config, tmp_path: Path) -> None:
    nets = Nets.of(config.model, 3, {name: checkpoints.load(saved)[name] for name in NAMES}, "c.pt")
    for _, net in nets.items():
        net.eval().requires_grad_(False)
    assert graphs.write(tmp_path, nets, config) < 1e-5


def test_the_room_that_a_checkpoint_takes(saved: Path, config: Config) -> None:
    large = override(config, {"model.discriminator_dim": 48})
    state = TrainState.create(large, "cpu")
    train_step(state, floats(large), epoch=1, step=1)
    path = saved.with_name("large.pt")
    checkpoints.save(path, resume.snapshot(state, 1, {}))
    assert checkpoint_bytes(large) == pytest.approx(path.stat().st_size, rel=0.1)
    assert checkpoint_bytes(large) > 2 * checkpoint_bytes(config)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model.residual": False}, "model.residual true there, false now; set model.residual=true"),
        ({"model.discriminator_dim": 12}, "network D does not fit the configuration: size mismatch for main.0.weight"),
        ({"model.discriminator_dim": None}, "network D does not fit the configuration: size mismatch for main.0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    saved: Path, config: Config, changed: dict[str, Any], words: str
) -> None:
    config = override(config, {**changed, "checkpoint.init_from": str(saved)})
    checkpoint = checkpoints.load(saved)
    if config.model.discriminator_norm == "spectral":
        words = words.replace("main.0.weight", "main.0").replace("main.0", "main.0.bias")
    for attempt in (
        lambda: resume.restore(TrainState.create(config, "cpu"), checkpoint, str(saved)),
        lambda: initial_state(config, torch.device("cpu")),
    ):
        with pytest.raises(RaystarError) as caught:
            attempt()
        assert str(caught.value).startswith(f"{saved}: ")
        assert words in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_that_says_nothing_is_of_networks_without_residual(saved: Path, config: Config) -> None:
    """Users' own trainers know no such key."""
    checkpoint = {key: value for key, value in checkpoints.load(saved).items() if key != "config"}
    with pytest.raises(RaystarError, match=r"model\.residual false there, true now"):
        resume.restore(TrainState.create(config, "cpu"), checkpoint, "theirs.pt")
    plain = override(config, {"model.residual": False})
    assert resume.restore(TrainState.create(plain, "cpu"), checkpoint, "theirs.pt") == 1


# -- compiling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norms", [{}, NORMS], ids=["", "AdaGN and spectral norm"])
def test_networks_are_compiled_for_what_a_step_gives_them(
    root: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch, amp: bool, residual: bool, norms: dict[str, Any]
) -> None:
    """Every shape, type, layout and need of gradients of the first step was seen before it: nothing compiles again."""
    seen: dict[str, set[Any]] = {name: set() for name in NAMES}

    def spy(net: nn.Module, config: Config) -> Any:
        (name,) = (n for n, found in state.nets.items() if found is net)

        def call(*inputs: Tensor) -> Tensor:
            frozen = not next(net.parameters()).requires_grad
            seen[name].add(
                (
                    frozen,
                    torch.is_grad_enabled(),
                    *((tuple(x.shape), x.dtype, x.stride(), x.requires_grad) for x in inputs),
                )
            )
            return net(*inputs)

        return call

    monkeypatch.setattr(compile_module, "_compile", spy)
    config = tiny_config(
        root,
        model__residual=residual,
        model__base_dim=32,
        training__use_amp=amp,
        training__use_compile=True,
        **norms,
        loss__ds_decay_epochs=1,
    )
    state = TrainState.create(config, "cpu")
    assert compile_networks(state, bank.shape[1:]).modules == ("G", "F", "E", "D")
    exercised = copy.deepcopy(seen)
    data = LatentDataset(bank, config, torch.device("cpu"))
    for epoch in range(1, config.training.epochs + 1):  # in the last the diversity term has no weight left
        train_step(state, data.batch(1), epoch=epoch, step=1)
    assert seen == exercised


@pytest.mark.slow
@pytest.mark.parametrize("norms", [{}, NORMS], ids=["", "AdaGN and spectral norm"])
def test_compiled_it_gives_the_same_losses(root: Path, bank: Bank, norms: dict[str, Any]) -> None:
    config = tiny_config(
        root, **NEW, **norms, training__use_compile=True, loss__r1_interval=2, training__compile_style_encoder=False
    )
    config = override(config, {"training.compile_mapping_network": False})
    compiled, eager = TrainState.create(config, "cpu"), TrainState.create(config, "cpu")
    done = compile_networks(compiled, bank.shape[1:])
    assert (done.modules, done.notes) == (("G", "D"), ())
    before = compile_module.graphs()
    data = LatentDataset(bank, config, torch.device("cpu"))
    for step in (1, 2):
        found, wanted = (train_step(s, data.batch(step), epoch=1, step=step) for s in (compiled, eager))
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    assert compile_module.graphs() == before


@pytest.mark.parametrize("settings", [{}, {"training.use_amp": True}, {"training.channels_last": True}], ids=str)
@pytest.mark.parametrize("norms", [{}, NORMS], ids=["", "AdaGN and spectral norm"])
def test_the_parity_gate_lets_rounding_through(
    root: Path, bank: Bank, settings: dict[str, Any], norms: dict[str, Any]
) -> None:
    config = override(tiny_config(root, **NEW, **norms), settings | {"model.base_dim": 32})
    state = TrainState.create(config, "cpu")
    check_parity(state, LatentDataset(bank, config, torch.device("cpu")))
    x = torch.randn(2, 4, 16, 16)
    assert torch.equal(state.nets.G(x, torch.randn(2, 6)), x)  # and leaves the identity that it began as


def test_the_parity_gate_sees_the_content_missing(root: Path, bank: Bank) -> None:
    config = tiny_config(root, **NEW)
    state = TrainState.create(config, "cpu")
    state.calls["G"] = lambda x, s: state.nets.G(x, s) - x.repeat(len(s) // len(x), 1, 1, 1)
    with pytest.raises(WrongResults):
        check_parity(state, LatentDataset(bank, config, torch.device("cpu")))


# -- norms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [8, 1], ids=["groups of 8 channels", "one group of 64"])
def test_native_kernels_serve_groups_of_channels(
    root: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, groups: int
) -> None:
    """In bf16, where there are any: wide groups are left to PyTorch, and a note says so; the results are alike."""
    if library.unavailable() is not None:
        pytest.skip("no native kernels here")
    called: list[str] = []
    for name in ("conv3x3", "norm_leaky"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, k=kernel, n=name: called.append(n) or k(*a))
    sizes = {"model__base_dim": 64, "model__num_groups": groups}
    config = tiny_config(root, **NORMS | sizes, training__use_amp=True)
    with caplog.at_level("INFO"):
        trainer = Trainer(config, bank)
    assert ("groups of 64 channels are normalised without" in caplog.text) == (groups == 1)
    given = LatentDataset(bank, config, torch.device("cpu")).batch(1)
    found = train_step(trainer.state, given, epoch=1, step=1)
    assert set(called) == {"conv3x3", *(["norm_leaky"] if groups == 8 else [])}
    monkeypatch.setattr(kernels, "serves", lambda *_: False)
    wanted = train_step(TrainState.create(config, "cpu"), given, epoch=1, step=1)
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), rel=0.03, abs=0.03), name


def test_spectral_norm_bounds_every_layer(config: Config) -> None:
    """What weights are divided by is their largest singular value, whatever training has made of them."""
    config = override(config, {"model.discriminator_norm": "spectral", "training.lr_d": 0.05})
    state = TrainState.create(config, "cpu")
    for step in range(1, 9):
        train_step(state, floats(config), epoch=1, step=step)
    layers = [layer for layer in state.nets.D.main if isinstance(layer, SpectralConv)]
    found = []
    for layer in layers:
        layer.iterate(2000)
        matrix = layer.weight_orig.detach().flatten(1)
        found.append(torch.dot(layer.weight_u, matrix @ layer.weight_v).item())
        assert found[-1] == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-3)
    assert max(abs(sigma - 1) for sigma in found) > 0.05  # it is the quotient that is 1


# -- searching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [{"randint": [4, 33]}, {"choice": [None, 4, 32]}], ids=str)
def test_both_can_be_searched(draws: dict[str, Any]) -> None:
    content = {
        "trials": 12,
        "space": {"model.discriminator_dim": draws, "model.residual": {"choice": [False, True]}},
    }
    found = space.from_mapping(content, Config(), "s.yaml")
    points = found.points(Config(), torch.device("cpu"))
    assert points is not None
    assert points[0] == {"model.discriminator_dim": None, "model.residual": False}
    assert {point["model.residual"] for point in points} == {False, True}
    sizes = {point["model.discriminator_dim"] for point in points[1:]}
    assert len(sizes) > 2
    assert sizes <= {None, *range(4, 33)}
    for point in points:
        assert from_mapping({}, "x", override(Config(), point)).model.residual is point["model.residual"]


def test_norms_can_be_searched() -> None:
    content = {
        "search": "grid",
        "space": {
            "model.norm": {"choice": ["adain", "adagn"]},
            "model.num_groups": {"choice": [8, 32]},
            "model.discriminator_norm": {"choice": ["none", "spectral"]},
        },
    }
    points = space.from_mapping(content, Config(), "s.yaml").points(Config(), torch.device("cpu"))
    assert points is not None
    assert len(points) == 8
    odd = override(Config(), {"model.base_dim": 36})
    with pytest.raises(RaystarError, match=r"s\.yaml: model\.num_groups 8 does not divide model\.base_dim 36"):
        space.from_mapping(content, odd, "s.yaml").points(odd, torch.device("cpu"))


@pytest.mark.parametrize(
    ("draws", "words"),
    [
        ({"randint": [0, 8]}, "discriminator_dim: expected at least 1, found 0"),
        ({"uniform": [4, 8]}, "takes whole numbers or names; use randint or choice"),
        ({"choice": ["wide"]}, "expected a whole number"),
    ],
    ids=str,
)
def test_widths_that_cannot_be_searched(draws: dict[str, Any], words: str) -> None:
    with pytest.raises(RaystarError, match=words):
        space.from_mapping({"space": {"model.discriminator_dim": draws}}, Config(), "s.yaml")


def test_tpe_needs_a_baseline_that_it_can_name() -> None:
    pytest.importorskip("optuna")
    content = {"search": "tpe", "space": {"model.discriminator_dim": {"randint": [4, 33]}}}
    with pytest.raises(RaystarError, match=r"discriminator_dim: .*baseline.*null.*set it, or baseline: false"):
        space.from_mapping(content, Config(), "s.yaml").points(Config(), torch.device("cpu"))
    set_one = override(Config(), {"model.discriminator_dim": 8})
    assert space.from_mapping(content, set_one, "s.yaml").points(set_one, torch.device("cpu")) is None

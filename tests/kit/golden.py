"""Golden numbers of a training step, recorded from `textbook.py` in float64: `python -m tests.kit.golden` writes them.

A case is a `.json` (settings and the losses of each step) and a `.safetensors`:

- `init.<net>.<parameter>` and `final.<net>.<parameter>`: all parameters before the first and after the last step.
  What begins at zero (AdaIN, with `residual` the last convolution) does not here, so that every path matters.
- `step<k>.content`, `.target_style` [B,4,H,W] unscaled, `.source_style_id`, `.target_style_id` [B], `.z_trg`, `.z_1`,
  `.z_2` [B,Z]: the batches, k from 1.
- `forward.*`: what the networks make of the first batch before any update.

What is drawn is rounded to float16, in which it is stored, so that float32 and float64 begin at the same numbers;
`final.*` and `forward.*` are stored in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.kit import textbook

FOLDER = Path(__file__).resolve().parents[1] / "data" / "golden"
NOISES = ("z_trg", "z_1", "z_2")

_MODEL = {
    "latent_channels": 4, "style_dim": 6, "base_dim": 8, "n_res_blocks": 2, "d_layers": 3, "latent_dim": 5,
    "mapping_hidden_dim": 12, "mapping_shared_layers": 2, "residual": False, "discriminator_dim": None,
}  # fmt: skip
_LOSS = {
    "w_adv": 0.8, "w_sty": 1.3, "w_ds": 0.9, "ds_margin": 1.5, "w_cyc": 1.7, "w_id": 0.7, "w_r1": 2.5, "r1_interval": 2,
    "ds_decay_epochs": 20,
}  # fmt: skip
_TRAINING = {
    "latent_scale": 0.18215, "weight_decay": 0.01, "lr_g": 1e-4, "lr_d": 2e-4, "lr_mapping": 1e-5, "epochs": 30,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    # Five domains, so that some heads go unused; identity, and R1 at the second of three steps.
    "step_full": {
        "domains": 5, "epoch": 1, "steps": 3, "batch": 4, "size": 16, "seed": 1,
        "model": _MODEL, "loss": _LOSS, "training": _TRAINING,
    },
    # No identity, no margin, no R1, the diversity term at less than its weight, a small D, an odd batch.
    "step_no_identity": {
        "domains": 3, "epoch": 6, "steps": 2, "batch": 3, "size": 8, "seed": 2,
        "model": _MODEL | {"n_res_blocks": 1, "d_layers": 2, "mapping_shared_layers": 1},
        "loss": _LOSS | {"w_id": 0.0, "ds_margin": None, "r1_interval": 16}, "training": _TRAINING,
    },
    # G adds to its content, a wide and deep D, R1 at every step, a margin that is reached, a share of the run.
    "step_residual": {
        "domains": 2, "epoch": 4, "steps": 2, "batch": 3, "size": 8, "seed": 3,
        "model": _MODEL | {"residual": True, "discriminator_dim": 6, "d_layers": 5, "n_res_blocks": 1},
        "loss": _LOSS | {"ds_margin": 1e-3, "r1_interval": 1, "ds_decay_epochs": 0.5}, "training": _TRAINING,
    },
}  # fmt: skip


# -- what is drawn ---------------------------------------------------------------------------------


def conv_shapes(name: str, inputs: int, outputs: int, kernel: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def linear_shapes(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def shapes(model: dict[str, Any], domains: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Network, name and shape of every parameter that docs/networks.md speaks of."""
    b, channels, style = model["base_dim"], model["latent_channels"], model["style_dim"]
    G = [*conv_shapes("encoder.0", channels, b), *conv_shapes("encoder.3", b, b)]
    G += [(f"encoder.{at}.{name}", (b,)) for at in (1, 4) for name in ("weight", "bias")]
    for block in range(model["n_res_blocks"]):
        for stage in (1, 2):
            G += linear_shapes(f"res_blocks.{block}.adain{stage}.fc", style, 2 * b)
            G += conv_shapes(f"res_blocks.{block}.conv{stage}", b, b)
    G += [*conv_shapes("decoder.0", b, b // 2), *conv_shapes("decoder.2", b // 2, channels)]
    F, width = [], model["latent_dim"]
    for layer in range(model["mapping_shared_layers"]):
        F += linear_shapes(f"shared.{2 * layer}", width, model["mapping_hidden_dim"])
        width = model["mapping_hidden_dim"]
    m = max(b // 2, 64)
    E = [*conv_shapes("shared.0", channels, m), *conv_shapes("shared.2", m, b), *conv_shapes("shared.4", b, b)]
    for domain in range(domains):
        F += linear_shapes(f"unshared.{domain}", width, style)
        E += linear_shapes(f"unshared.{domain}", b, style)
    first = width = model["discriminator_dim"] or b // 4
    D = [*conv_shapes("main.0", channels, first)]
    for layer in range(1, max(model["d_layers"], 2)):
        D += conv_shapes(f"main.{2 * layer}", width, min(2 * width, 4 * first))
        width = min(2 * width, 4 * first)
    D += conv_shapes(f"main.{2 * max(model['d_layers'], 2)}", width, domains, kernel=1)
    for net, parameters in {"G": G, "F": F, "E": E, "D": D}.items():
        yield from ((net, name, shape) for name, shape in parameters)


def draw(case: dict[str, Any]) -> dict[str, Tensor]:
    """The parameters before the first step, and the batches; float16 but for the domains."""
    rng = np.random.default_rng(case["seed"])

    def normal(deviation: float, *shape: int) -> Tensor:
        return torch.from_numpy((deviation * rng.standard_normal(shape)).astype(np.float16))

    drawn = {}
    for net, name, shape in shapes(case["model"], case["domains"]):
        fan_in = int(np.prod(shape[1:])) or 1
        drawn[f"init.{net}.{name}"] = normal(0.3 if len(shape) == 1 else fan_in**-0.5, *shape)
    B, Z, N = case["batch"], case["model"]["latent_dim"], case["domains"]
    for k in range(1, case["steps"] + 1):
        for name in ("content", "target_style"):
            drawn[f"step{k}.{name}"] = normal(5, B, case["model"]["latent_channels"], case["size"], case["size"])
        y_src = rng.integers(N, size=B)
        drawn[f"step{k}.source_style_id"] = torch.from_numpy(y_src)
        drawn[f"step{k}.target_style_id"] = torch.from_numpy((y_src + rng.integers(1, N, size=B)) % N)
        for name in NOISES:
            drawn[f"step{k}.{name}"] = normal(1, B, Z)
    return drawn


# -- what is recorded ------------------------------------------------------------------------------


def settings_of(record: dict[str, Any]) -> SimpleNamespace:
    """A record's settings, as the textbook reads them."""
    model = {"residual": False, "discriminator_dim": None} | record["model"]
    return SimpleNamespace(
        model=SimpleNamespace(**model), loss=SimpleNamespace(**record["loss"]),
        training=SimpleNamespace(**record["training"]),
    )  # fmt: skip


def weights_of(tensors: dict[str, Tensor], when: str, dtype: torch.dtype) -> textbook.Weights:
    """The parameters `init` or `final` of a case, copied."""
    weights: textbook.Weights = {net: {} for net in "GFED"}
    for key, value in tensors.items():
        if key.startswith(f"{when}."):
            net, name = key.removeprefix(f"{when}.").split(".", 1)
            weights[net][name] = value.to(dtype, copy=True)
    return weights


def batch_of(tensors: dict[str, Tensor], step: int, dtype: torch.dtype) -> SimpleNamespace:
    """The batch of a step under the names of raystar's `Batch`, in its order."""
    x, x_ref, *noise = (tensors[f"step{step}.{name}"].to(dtype) for name in ("content", "target_style", *NOISES))
    y_src, y_trg = (tensors[f"step{step}.{side}_style_id"] for side in ("source", "target"))
    return SimpleNamespace(content=x, x_ref=x_ref, y_src=y_src, y_trg=y_trg, **dict(zip(NOISES, noise, strict=True)))


def forward(nets: Any, batch: Any, latent_scale: float) -> dict[str, Tensor]:
    """`forward.*` of four networks."""
    x_ref = batch.x_ref * latent_scale
    with torch.no_grad():
        s_ref = nets.E(x_ref, batch.y_trg)
        return {
            "forward.s_ref": s_ref,
            "forward.s_lat": nets.F(batch.z_trg, batch.y_trg),
            "forward.fake_ref": nets.G(batch.content * latent_scale, s_ref),
            "forward.logits": nets.D(x_ref, batch.y_trg),
        }


def train(record: dict[str, Any], tensors: dict[str, Tensor], steps: int) -> tuple[list[Any], dict[str, Tensor]]:
    """The textbook's losses of each step in float64, and `forward.*` and `final.*`."""
    settings, wide = settings_of(record), torch.float64
    training = textbook.Training(weights_of(tensors, "init", wide), settings)
    outputs = forward(training.nets, batch_of(tensors, 1, wide), settings.training.latent_scale)
    losses = [training.step(batch_of(tensors, k, wide), record["epoch"], k) for k in range(1, steps + 1)]
    for net, parameters in training.nets.weights.items():
        outputs |= {f"final.{net}.{name}": p.detach() for name, p in parameters.items()}
    return losses, outputs


def record_of(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What belongs into a case's two files."""
    case = copy.deepcopy(CASES[name])
    record = {key: case[key] for key in ("model", "loss", "training", "epoch")}
    record["model"]["num_domains"] = case["domains"]
    drawn = draw(case)
    record["steps"], outputs = train(record, drawn, case["steps"])
    record["lambda_ds"] = textbook.lambda_ds(settings_of(record), case["epoch"])
    sums = {key: sum(losses[key] for losses in record["steps"]) for key in record["steps"][0]}
    record["epoch_mean"] = {key: value / case["steps"] for key, value in sums.items()}
    return record, drawn | outputs


def read(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A case's record and tensors."""
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kit.golden", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="where to (default: %(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        record, tensors = record_of(name)
        (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        save_file({key: value.contiguous() for key, value in tensors.items()}, out / f"{name}.safetensors")
        print(out / f"{name}.safetensors", (out / f"{name}.safetensors").stat().st_size, "bytes")


if __name__ == "__main__":
    main()

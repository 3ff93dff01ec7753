"""What perfect translations look like: the demo's landscapes in other styles, painted, not translated.

`python -m tests.kit.repainted TAESD_FOLDER` writes `tests/data/repainted.safetensors` (a minute): the landscapes of the
sources of a ruler over `open_small_demo`, painted in each other domain by the demo's painter and encoded as the demo's
latents are; fp16 unscaled latents [n,4,32,32] under `<domain>-><domain>`, and the numbers of the n sources of each
domain as metadata. The painter is raystar's own, so they ship, as the demo's latents do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.demo import DOMAINS as PAINTED
from raystar.demo import latents_path
from raystar.demo.__main__ import encode
from raystar.demo.painter import RENDERINGS, SEED
from raystar.demo.scene import make_scene
from raystar.pictures.autoencoders import open_vae
from raystar.ruler.samples import choose

FILE = Path(__file__).resolve().parents[1] / "data" / "repainted.safetensors"
DOMAINS = ("photo", "woodcut", "watercolour")
SOURCES = 6
TRAIN, HELD_OUT = range(30), range(80, 96)
"""Numbers of the demo's pictures: few, so that a ruler over them is built in seconds."""


def open_small_demo(root: Path) -> tuple[Bank, Config]:
    """A bank of some of the demo's latents, which are written below `root`, and its configuration."""
    with safe_open(latents_path(), framework="np") as stored:
        for part, numbers in (("train", TRAIN), ("held out", HELD_OUT)):
            for domain in DOMAINS:
                (root / part / domain).mkdir(parents=True, exist_ok=True)
                for number in numbers:
                    np.save(root / part / domain / f"{number:03d}.npy", stored.get_tensor(domain)[number])
    config = override(
        Config(), {
            "data.data_root": str(root / "train"), "data.eval_data_root": str(root / "held out"),
            "data.domains": list(DOMAINS), "ruler.sources": SOURCES, "training.use_amp": False,
        },
    )  # fmt: skip
    return open_bank(config, root / "cache"), config


def source_numbers(bank: Bank, config: Config) -> dict[str, list[int]]:
    """By domain, the numbers of the pictures that a ruler over this bank has as sources."""
    with safe_open(latents_path(), framework="pt") as stored:
        pictures = {domain: stored.get_tensor(domain).float() for domain in DOMAINS}
    sources = choose(bank, config).sources / config.training.latent_scale
    return {
        domain: [int((pictures[domain] - latent).abs().mean((1, 2, 3)).argmin()) for latent in each]
        for domain, each in zip(bank.domains, sources, strict=True)
    }


def repaint(own: str, number: int, domain: str) -> Image.Image:
    """The landscape of the demo's picture `number` of the domain `own`, painted as `domain`."""
    rng = np.random.default_rng([SEED, PAINTED.index(own), number])
    rgb = RENDERINGS[domain](make_scene(rng, 256), rng)
    return Image.fromarray((np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8))


def read() -> tuple[dict[tuple[str, str], Tensor], dict[str, list[int]]]:
    """Unscaled latents [n,4,32,32] by source and target domain, and the numbers of the sources' pictures."""
    with safe_open(FILE, framework="pt") as file:
        latents = {tuple(key.split("->")): file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        return latents, json.loads(file.metadata()["sources"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kit.repainted", description=__doc__.splitlines()[0])
    parser.add_argument("taesd", help="folder of the AutoencoderTiny madebyollin/taesd")
    codec = open_vae(parser.parse_args().taesd).model
    with tempfile.TemporaryDirectory() as folder:
        numbers = source_numbers(*open_small_demo(Path(folder)))
    latents = {}
    for source in DOMAINS:
        for target in DOMAINS:
            if target != source:
                each = [encode(codec, [repaint(source, number, target)]) for number in numbers[source]]
                latents[f"{source}->{target}"] = torch.cat(each).half().contiguous()
    save_file(latents, FILE, metadata={"sources": json.dumps(numbers), "codec": "madebyollin/taesd (MIT)"})
    print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()

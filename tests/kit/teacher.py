"""What TAESD, which the built-in decoder was distilled from, makes of some painted latents.

`python -m tests.kit.teacher TAESD_FOLDER` writes `tests/data/teacher.png`: the middle, 16x16 of 32x32, of a held-out
latent of each of the demo's domains, decoded, side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import open_bank
from raystar.demo import DOMAINS
from raystar.pictures.autoencoders import open_vae

SHEET = Path(__file__).resolve().parents[1] / "data" / "teacher.png"


def painted_latents(cache: Path) -> torch.Tensor:
    """[N,4,32,32]: of each of the demo's domains a latent that the decoder was not trained on."""
    bank = open_bank(override(Config(), {"data.data_root": "raystar:demo", "data.domains": list(DOMAINS)}), cache)
    return bank.rows(np.concatenate([rows[:1] for rows in bank.held]))


def middle(latents: torch.Tensor) -> torch.Tensor:
    return latents[:, :, 8:24, 8:24].contiguous()


def sheet(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures [N,h,w,3] side by side [h,N*w,3]."""
    return np.concatenate(list(pictures), axis=1)


def teachers_pictures() -> NDArray[np.uint8]:
    """[N,128,128,3] of `middle(painted_latents(...))`, as they ship."""
    return np.stack(np.split(np.asarray(Image.open(SHEET)), len(DOMAINS), axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kit.teacher", description=__doc__.splitlines()[0])
    parser.add_argument("taesd", help="folder of the AutoencoderTiny madebyollin/taesd")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="of the demo's latents (%(default)s)")
    arguments = parser.parse_args()
    pictures = open_vae(arguments.taesd).decode(middle(painted_latents(arguments.cache)))
    Image.fromarray(sheet(pictures)).save(SHEET, optimize=True)


if __name__ == "__main__":
    main()

"""`python -m raystar.distill`: trains a built-in decoder to show what an autoencoder's decoder would.

    python -m raystar.distill --teacher my_vae --latents raystar:demo my_latents --out decoder.safetensors

The teacher decodes every latent once. A tenth of every domain, whole pictures with all their crops, is not trained on;
on it the decoder and the linear preview are compared with the teacher. The result serves as
`visualization.vae_model_name_or_path`, and the shipped one was made in this way.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from raystar.base import torch_file as pt
from raystar.base.console import run_cli
from raystar.base.errors import RaystarError
from raystar.base.files import is_folder
from raystar.pictures import decoder as decoders
from raystar.pictures.autoencoders import open_vae
from raystar.pictures.codec import PreviewCodec
from raystar.pictures.distilling import BATCH, gather, header_facts, measure, psnr, settings_line, train


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m raystar.distill",
        description="Trains a small decoder to show what an autoencoder's decoder would, at a twentieth of its cost.",
    )
    p.add_argument(
        "--teacher", metavar="NAME", required=True, help="AutoencoderKL or AutoencoderTiny, hub name or folder"
    )
    p.add_argument(
        "--latents", metavar="DATA", nargs="+", required=True,
        help="folders of domains with unscaled latents, packed .safetensors files, or raystar:demo",
    )  # fmt: skip
    p.add_argument("--out", metavar="FILE", type=Path, required=True, help="the decoder's .safetensors file")
    p.add_argument("--minutes", metavar="N", type=float, default=40.0, help="time to train for (40)")
    p.add_argument("--pictures", metavar="N", type=int, default=1000, help="pictures to train on, at most (1000)")
    p.add_argument("--seed", metavar="N", type=int, default=0, help="of weights, batches and added latents (0)")
    p.add_argument(
        "--work", metavar="DIR", type=Path,
        help="the teacher's pictures and the state of the training, from which the same command resumes "
        "(FILE with .work)",
    )  # fmt: skip
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda, ... (a GPU if there is one)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m raystar.distill`."""
    args = parser().parse_args(argv)
    if args.out.suffix != ".safetensors" or not is_folder(args.out.parent):
        raise RaystarError(f"--out: expected a .safetensors file in a folder that exists, found {args.out}")
    if not 0 < args.minutes < math.inf:
        raise RaystarError(f"--minutes: expected more than 0, found {args.minutes}")
    if args.pictures < BATCH:
        raise RaystarError(f"--pictures: expected {BATCH} or more, found {args.pictures}")
    if not 0 <= args.seed < 2**32:
        raise RaystarError(f"--seed: expected 0 to {2**32 - 1}, found {args.seed}")
    device = _device(args.device)
    work = args.work or args.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    teacher = open_vae(args.teacher, device, "--teacher")
    if device.type == "cpu":
        teacher.batch_size = 1  # one picture's features are more than the caches hold
    lesson, held = gather(args.latents, teacher, work, args.pictures, args.seed)
    print(
        f"{len(lesson.latents)} pictures to train on, {', '.join(f'{len(h.latents)} of {n}' for n, h in held.items())} "
        f"held out; {args.minutes:g} minutes on {device}",
        flush=True,
    )
    preview = {name: psnr(PreviewCodec(), some) for name, some in held.items()}
    print("linear preview: " + settings_line(preview), flush=True)
    student = train(lesson, held, device, args.minutes * 60, args.seed, work, args.out, teacher.name)
    reached = measure(student, held)
    print("decoder:        " + settings_line(reached))
    print("gain:           " + settings_line({name: reached[name] - preview[name] for name in reached}))
    decoders.save(student, args.out, header_facts(teacher.name, reached))
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} KB; use it with")
    print(f"  --set visualization.vae_model_name_or_path={args.out}")
    return 0


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise RaystarError(f"--device: {name}: {pt.reason(error)}") from None


if __name__ == "__main__":
    run_cli(main)

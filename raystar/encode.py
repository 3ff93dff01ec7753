"""Folders of pictures -> unscaled latents: `python -m raystar.encode`.

A latent is there whole or not at all. What is done is written down picture by picture, in a journal that a killed
process leaves behind and the next one reads; at the end it becomes `manifest.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from raystar.base.command import command
from raystar.base.console import duration, run_cli
from raystar.base.errors import RaystarError
from raystar.base.names import shown
from raystar.base.scratch import check_takes
from raystar.config.assignment import assignment
from raystar.data.listing import DEMO_ROOT
from raystar.pictures.autoencoders import DEFAULT_VAE, VaeCodec, check_vae, open_vae
from raystar.pictures.encoding import BATCH_PIXELS, DTYPES, Settings, digest, encode
from raystar.pictures.job import Job, listed

# -- the command line ------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m raystar.encode",
        description="Encodes folders of pictures, one a domain, into the latents that raystar trains on. Stopped and "
        "started again it continues; later it does what is new or has changed.",
    )
    p.add_argument("--images", metavar="DIR", type=Path, required=True, help="DIR/<domain>/ with pictures at any depth")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="where latents go: DIR/<domain>/*.npy")
    p.add_argument(
        "--vae", metavar="NAME", default=DEFAULT_VAE,
        help="AutoencoderKL or AutoencoderTiny, a folder or a hub name (%(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--size", metavar="PIXELS", type=int, default=256,
        help="the shorter side is scaled to it, the longer one cut to its middle (%(default)s)",
    )  # fmt: skip
    p.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="what the VAE computes in (%(default)s)")
    p.add_argument("--half", action="store_true", help="store float16: half the room, three digits")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a GPU if there is one (auto)")
    p.add_argument(
        "--skip-bad", action="store_true", help="exit with 0 although some pictures cannot be used; they are listed"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """`python -m raystar.encode`: 0, 1 if a picture cannot be used, 2 for a wrong request."""
    args = parser().parse_args(argv)
    if args.size < 64 or args.size % 32:
        raise RaystarError(f"--size {args.size}: expected 64 or more pixels, divisible by 32")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RaystarError("--device cuda: torch finds no GPU; take auto or cpu")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    check_vae(args.vae, "--vae")
    job = listed(args.images, args.out)
    check_takes(args.out, f"--out {args.out}", "choose another folder")
    total = sum(map(len, job.domains.values()))
    print(f"{total} pictures in {len(job.domains)} domains; loading {args.vae}", file=sys.stderr, flush=True)
    codec = open_vae(args.vae, device)
    settings = Settings(
        args.vae, type(codec.model).__name__, digest(codec), args.size, args.dtype,
        "float16" if args.half else "float32",
    )  # fmt: skip
    batch = max(1, BATCH_PIXELS // args.size**2)
    started = time.monotonic()
    try:
        encode(job, VaeCodec(codec.model, codec.name, codec.device, batch, DTYPES[args.dtype]), settings)
    except KeyboardInterrupt:
        print(f"{len(job.done)} of {total} latents are in {args.out}; the same command continues", file=sys.stderr)
        raise
    _tell(job, args.vae, time.monotonic() - started)
    return 1 if job.bad and not args.skip_bad else 0


def _tell(job: Job, vae: str, seconds: float) -> None:
    """What was done, what was not and why, and what comes next."""
    counts = ", ".join(f"{domain} {sum(s in job.done for s in named)}" for domain, named in job.domains.items())
    print(
        f"{len(job.done)} latents in {job.out}: {shown(counts)}; {job.encoded} made in {duration(seconds)}"
        + (f", {len(job.done) - job.encoded} were there" if len(job.done) > job.encoded else "")
    )
    if job.enlarged:
        print(f"note: {job.enlarged} pictures are smaller than the size asked for and were enlarged", file=sys.stderr)
    if job.ignored:
        kinds = shown(", ".join(f"{count} {suffix}" for suffix, count in job.ignored.most_common(5)))
        print(f"note: left out {job.ignored.total()} files that are no pictures: {kinds}", file=sys.stderr)
    if job.stale:
        print(
            f"note: {len(job.stale)} latents are of pictures that are not there any more; remove them if training "
            f"should not see them: {shown(', '.join(job.stale[:3]))}{', ...' if len(job.stale) > 3 else ''}",
            file=sys.stderr,
        )
    if job.bad:
        print(f"{len(job.bad)} could not be used:", file=sys.stderr)
        for name, reason in sorted(job.bad.items()):
            print(shown(f"  {name}: {reason}"), file=sys.stderr)
    usable = [domain for domain, named in job.domains.items() if any(source in job.done for source in named)]
    if len(usable) > 1:
        print(f"next: {_next(job.out, usable, vae)}")


def _next(out: Path, domains: list[str], vae: str) -> str:
    """The command of a sweep on these latents."""
    # To configurations these mean something else than a folder here.
    root = str(out.absolute() if str(out).startswith("~") or str(out) == DEMO_ROOT else out)
    settings = {"data.data_root": root, "data.domains": domains}
    settings |= {"visualization.vae_model_name_or_path": vae} if vae != DEFAULT_VAE else {}
    return command(
        "tune", ("--space", "search_spaces/loss.yaml"), ("--config", "configs/stargan_v2_latent.yaml"),
        *(("--set", assignment(key, value)) for key, value in settings.items()),
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)

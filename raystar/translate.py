"""Pictures in, pictures out: a trained model with its VAE around it; `python -m raystar.translate`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from raystar.base.console import run_cli
from raystar.base.errors import RaystarError, nearest
from raystar.base.files import is_file, is_folder
from raystar.base.names import composed, shown
from raystar.data.latent import read_latent
from raystar.exported.model import Translator, load
from raystar.exported.picture_translator import SMALLEST, PictureTranslator
from raystar.pictures.autoencoders import DEFAULT_VAE, open_vae
from raystar.pictures.codec import Codec, need_codec
from raystar.pictures.grid import side_by_side
from raystar.pictures.reading import SUFFIXES, find, flat, read, scaled
from raystar.pictures.results import Task, check_places, into_folder

_LATENTS = (".npy", ".pt")
_WRITTEN = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_OPAQUE = (".bmp", ".jpeg", ".jpg")


# -- the command line ------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m raystar.translate",
        description="Translates a picture, or a folder of them, with an exported model. Results keep their picture's "
        "size, proportions and transparency. Latents (.npy, .pt) are translated as well.",
    )
    p.add_argument(
        "--model",
        metavar="PATH",
        type=Path,
        required=True,
        help="an export, for example runs/NAME/best, or a .pt checkpoint",
    )
    p.add_argument("--input", metavar="PATH", type=Path, required=True, help="a picture or a folder, at any depth")
    p.add_argument("--domain", metavar="NAME", required=True, help="one of the model's")
    p.add_argument("--reference", metavar="FILE", type=Path, help="a picture of that domain, whose style is taken")
    p.add_argument("--seed", metavar="N", type=int, help="of the style, where there is no reference (0)")
    p.add_argument("--samples", metavar="K", type=int, help="that many styles: the seeds N, N + 1, ... (1)")
    p.add_argument(
        "--out", metavar="PATH", type=Path, required=True,
        help="a folder for PNG files, or one file: .png .jpg .webp .avif .tif .bmp, .npy for its latent",
    )  # fmt: skip
    p.add_argument("--compare", action="store_true", help="beside each, a labelled strip: original, reference, results")
    p.add_argument("--latents", action="store_true", help="write latents (.npy) into the folder instead of pictures")
    p.add_argument("--resize", metavar="PIXELS", type=int, help="first scale the shorter side; the result stays so")
    p.add_argument(
        "--tile", metavar="PIXELS", type=int,
        help="translate in overlapping tiles of this size instead of pictures as wholes (from 4096 pixels on)",
    )  # fmt: skip
    p.add_argument("--vae", metavar="NAME", help=f"folder or hub name (the model's own, or else {DEFAULT_VAE})")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="a GPU if there is one (auto)")
    p.add_argument("--force", action="store_true", help="overwrite results that are there")
    return p


def main(argv: list[str] | None = None) -> int:
    """`python -m raystar.translate`: 0, 1 if a picture of a folder cannot be used, 2 for a wrong request."""
    args = parser().parse_args(argv)
    args.domain = composed(args.domain)
    seeds = _seeds(args.reference, args.seed, args.samples)
    if args.resize is not None and args.resize < SMALLEST:
        raise RaystarError(f"--resize {args.resize}: expected {SMALLEST} pixels or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RaystarError("--device cuda: torch finds no GPU; take auto or cpu")
    tasks, bad = _tasks(args, seeds)
    translator = load(args.model, None if args.device == "auto" else args.device)
    if args.domain not in translator.domains:
        raise RaystarError(
            f"--domain {args.domain}: not one of the model's{nearest(args.domain, translator.domains)}: "
            f"{', '.join(translator.domains)}"
        )
    inputs = [task.source for task in tasks] + ([args.reference] if args.reference else [])
    codec = _codec(translator, args.vae, any(_is_picture(path) for path in inputs))
    worker = _Worker(PictureTranslator(translator, codec, args.tile), args.domain, seeds, args.resize)
    if args.reference is not None:
        try:
            worker.take_reference(args.reference)
        except ValueError as error:
            raise RaystarError(f"--reference {args.reference}: {error}") from None
    terminal = sys.stderr.isatty()
    with tqdm(
        total=len(tasks) * len(seeds), desc="translating", file=sys.stderr,
        mininterval=0.5 if terminal else 15, ascii=not terminal, dynamic_ncols=terminal,
    ) as bar:  # fmt: skip
        for task in tasks:
            try:
                worker.run(task, bar.update)
            except ValueError as error:
                bad.append((str(task.source), str(error)))
    done = (len(tasks) - sum(name == str(task.source) for task in tasks for name, _ in bad)) * len(seeds)
    if bad and not is_folder(args.input):
        raise RaystarError(f"--input {args.input}: {bad[0][1]}")
    print(f"{done} result{'s' * (done != 1)} in {args.out}")
    if bad:
        print(f"{len(bad)} could not be used:", file=sys.stderr)
        for name, reason in sorted(bad):
            print(shown(f"  {name}: {reason}"), file=sys.stderr)
    return 1 if bad else 0


def _seeds(reference: Path | None, seed: int | None, samples: int | None) -> list[int | None]:
    if reference is not None:
        if seed is not None or samples is not None:
            raise RaystarError("--reference: its style is one; give it, or --seed and --samples, not both")
        return [None]
    if seed is not None and seed < 0:
        raise RaystarError(f"--seed {seed}: expected 0 or more")
    if samples is not None and samples < 1:
        raise RaystarError(f"--samples {samples}: expected 1 or more")
    return list(range(seed or 0, (seed or 0) + (samples or 1)))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() not in _LATENTS


def _tasks(args: argparse.Namespace, seeds: list[int | None]) -> tuple[list[Task], list[tuple[str, str]]]:
    """What is to be done, and which files of a folder cannot be.

    Raises:
        RaystarError: nothing to translate, results that cannot be written or would be inputs the next time, or what is
            there in their place.
    """
    source, out, bad = args.input, args.out, list[tuple[str, str]]()
    if is_folder(source):
        listing = find(source, suffixes=(*SUFFIXES, *_LATENTS))
        bad = [(f"{source}/{name}", reason) for name, reason in listing.bad]
        names = listing.pictures
        if not names:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in bad[:20])
            raise RaystarError(f"--input {source}: expected pictures or latents in it, found none{reasons}")
        if out.resolve().is_relative_to(source.resolve()):
            raise RaystarError(f"--out {out}: lies inside of --input {source}; choose a place beside it")
        sources = [source / name for name in names]
    elif os.path.exists(source):
        sources, names = [source], [source.name]
    else:
        raise RaystarError(f"--input {source}: expected a picture, a latent or a folder of them, found nothing")
    suffix = out.suffix.lower()
    if suffix in (*_WRITTEN, ".npy") and not is_folder(out):
        if len(sources) * len(seeds) > 1:
            raise RaystarError(f"--out {out}: one file, but there will be {len(sources) * len(seeds)}; name a folder")
        if args.latents and suffix != ".npy":
            raise RaystarError(f"--out {out}: --latents writes .npy files")
        tasks = [Task(sources[0], [out], out.with_name(f"{out.stem}_compare.png") if args.compare else None)]
    elif suffix in (*SUFFIXES, ".pt") and not is_folder(out):
        raise RaystarError(f"--out {out}: {suffix} files are not written; take {' '.join((*_WRITTEN, '.npy'))}")
    elif os.path.lexists(out) and not is_folder(out):
        raise RaystarError(f"--out {out}: expected a folder or a picture's name, found another file")
    else:
        ends = [""] if len(seeds) == 1 else [f"_seed{seed}" for seed in seeds]
        tasks = into_folder(out, sources, names, ends, ".npy" if args.latents else ".png", args.compare)
    planned = [path for task in tasks for path in task.paths]
    existing = [path for path in planned if os.path.lexists(path)]
    read_ones = {path.resolve() for path in (*sources, *([args.reference] if args.reference else []))}
    if inputs := [path for path in existing if path.resolve() in read_ones]:
        raise RaystarError(f"--out {inputs[0]}: is the input itself; choose another")
    if args.resize is not None and not any(_is_picture(path) for path in sources):
        raise RaystarError("--resize: latents are not scaled; leave it out")
    check_places(out, planned)
    if existing and not args.force:
        raise RaystarError(
            f"--out {out}: {len(existing)} of {len(planned)} results are there already, {existing[0]} for one; choose "
            "another place, or overwrite them with --force"
        )
    return tasks, bad


def _codec(translator: Translator, vae: str | None, encodes: bool) -> Codec:
    """The VAE; where there are latents alone, whatever can decode them."""
    config = translator.config
    channels = config.model.latent_channels
    if vae is not None:
        return open_vae(vae, translator.device, channels=channels)
    if encodes:
        named = config.visualization.vae_model_name_or_path
        # A decoder's file cannot encode.
        if named is None or is_file(Path(named)):
            return open_vae(DEFAULT_VAE, translator.device, channels=channels)
        subfolder = config.visualization.vae_subfolder
        return open_vae(named, translator.device, subfolder=subfolder, channels=channels)
    codec, note = need_codec(config, translator.device)
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    return codec


class _Worker:
    """Reads, translates and writes one input after the other."""

    def __init__(self, translator: PictureTranslator, domain: str, seeds: list[int | None], side: int | None) -> None:
        self.translator = translator
        self.domain = domain
        self.seeds = seeds
        self.side = side
        self.style: Tensor | None = None
        """[1,4,H,W] unscaled latents of the reference."""
        self.reference: tuple[str, Image.Image] | None = None

    def take_reference(self, path: Path) -> None:
        """Takes the style of a picture or of a latent. ValueError says why it cannot be used."""
        if _is_picture(path):
            picture = read(path)
            self.style = self.translator.encode_reference(picture)
        else:
            self.style = self._latents(path)
            picture = self.translator.decode(self.style)
        self.reference = (path.stem, picture)

    def run(self, task: Task, done: Callable[[], object]) -> None:
        """Writes all results of one input, and calls `done` after each. ValueError says why it cannot be used."""
        original: Image.Image | None = None
        if _is_picture(task.source):
            picture = read(task.source)
            original = picture if self.side is None else scaled(picture, self.side)
            latents = self.translator.encode(original)
        else:
            latents = self._latents(task.source)
            if task.strip is not None:
                original = self.translator.decode(latents)
        strip = [] if original is None else [(task.source.stem, original)]
        strip += [] if self.reference is None else [(f"reference: {self.reference[0]}", self.reference[1])]
        margin = len(strip)
        for seed, result in zip(self.seeds, task.results, strict=True):
            translated = self.translator.restyle(latents, self.domain, self.style, seed)
            if result.suffix.lower() == ".npy":
                _write(result, partial(np.save, arr=translated[0].numpy(), allow_pickle=False))
            if task.strip is not None or result.suffix.lower() != ".npy":
                picture = self.translator.decode(translated, original)
                strip.append((self.domain if seed is None else f"{self.domain}, seed {seed}", picture))
                if result.suffix.lower() != ".npy":
                    _save(result, picture)
            done()
        if task.strip is not None:
            _save(task.strip, side_by_side(strip, margin))

    def _latents(self, path: Path) -> Tensor:
        channels = self.translator.translator.config.model.latent_channels
        return torch.from_numpy(read_latent(str(path), channels)).float()[None]


def _save(path: Path, picture: Image.Image) -> None:
    picture = flat(picture) if path.suffix.lower() in _OPAQUE else picture
    _write(path, lambda part: picture.save(part, quality=95))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file, which is there whole or not at all."""
    part = path.with_name(f".{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise RaystarError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    run_cli(main)

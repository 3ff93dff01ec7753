"""Paint the demo pictures, or paint and encode them: `python -m raystar.demo --help`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raystar.demo import DOMAINS, latents_path
from raystar.demo.painter import SEED, paint

SCALE = 0.18215
"""Stable Diffusion 1.5's latent scale. AutoencoderTiny's latents are scaled already; the file's are not."""
SIZE = 256
THUMBNAIL = 8
_BATCH = 4


class _ArgumentError(Exception):
    """A bad argument; the message is one line for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 for a bad argument."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.count < 1:
            raise _ArgumentError(f"--count must be 1 or more, not {arguments.count}")
        if arguments.encode is None:
            if arguments.out is None:
                raise _ArgumentError("--out DIR says where the pictures go")
            _paint_folder(arguments.out, arguments.count, arguments.force)
        else:
            _encode(arguments.encode, arguments.out or latents_path(), arguments.count, arguments.force)
    except _ArgumentError as problem:
        print(f"raystar.demo: error: {problem}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m raystar.demo",
        description="Paint demo pictures in five styles as PNG files, or paint them and write their latents.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="folder for the pictures, DIR/<domain>/000.png ...; with --encode the latents' file "
        "(default: the one that raystar ships)",
    )
    parser.add_argument("--count", type=int, default=96, help="pictures a domain (default: %(default)s)")
    parser.add_argument(
        "--encode",
        type=Path,
        metavar="CODEC_FOLDER",
        help="folder of a diffusers AutoencoderTiny for SD 1.5 latents: write latents instead of pictures, "
        "and thumbnails.png beside them",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    return parser


def _pictures(count: int) -> Iterator[tuple[str, int, Image.Image]]:
    """Paint every picture in order, keeping one line of progress up to date."""
    total = count * len(DOMAINS)
    done = 0
    for domain in DOMAINS:
        for index in range(count):
            yield domain, index, paint(domain, index, SIZE)
            done += 1
            if sys.stderr.isatty() or done == total:
                end = "\n" if done == total else ""
                print(f"\rpainted {done} of {total} pictures", end=end, file=sys.stderr, flush=True)


def _paint_folder(folder: Path, count: int, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise _ArgumentError(f"{folder} is not a folder")
    taken = [p for d in DOMAINS for i in range(count) if (p := folder / d / f"{i:03d}.png").exists()]
    if taken and not force:
        raise _ArgumentError(f"{taken[0]} exists already ({len(taken)} such files): --force overwrites")
    for domain in DOMAINS:
        try:
            (folder / domain).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _ArgumentError(f"cannot make the folder {folder / domain}: {error.strerror}") from None
    for domain, index, picture in _pictures(count):
        picture.save(folder / domain / f"{index:03d}.png")


def _load_codec(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise _ArgumentError(f"no codec in {folder}: it must be the folder of an AutoencoderTiny, with a config.json")
    from diffusers import AutoencoderTiny

    try:
        return AutoencoderTiny.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _ArgumentError(f"cannot load an AutoencoderTiny from {folder}: {first}") from None


def _encode(codec_folder: Path, out: Path, count: int, force: bool) -> None:
    thumbnails = out.with_name("thumbnails.png")
    for path in (out, thumbnails):
        if path.exists() and not force:
            raise _ArgumentError(f"{path} exists already: --force overwrites")
    if not out.parent.is_dir():
        raise _ArgumentError(f"no folder {out.parent} to write {out.name} into")
    codec = _load_codec(codec_folder)

    import torch
    from safetensors.torch import save_file

    tensors = {d: torch.empty(count, 4, SIZE // 8, SIZE // 8, dtype=torch.float16) for d in DOMAINS}
    small = np.zeros((len(DOMAINS) * THUMBNAIL, count * THUMBNAIL, 3), np.uint8)
    waiting: list[Image.Image] = []
    for domain, index, picture in _pictures(count):
        row, column = DOMAINS.index(domain) * THUMBNAIL, index * THUMBNAIL
        small[row : row + THUMBNAIL, column : column + THUMBNAIL] = thumbnail(picture)
        waiting.append(picture)
        if len(waiting) == _BATCH or index == count - 1:
            tensors[domain][index + 1 - len(waiting) : index + 1] = encode(codec, waiting).half()
            waiting = []
    metadata = {
        "format": "raystar-latents-1",
        "space": "unscaled SD1.5 VAE latents",
        "codec": "madebyollin/taesd (AutoencoderTiny, MIT)",
        "scale": str(SCALE),
        "painter": "raystar.demo.painter",
        "seed": str(SEED),
        "command": "python -m raystar.demo --encode <taesd folder>",
        "licence": "Apache-2.0",
        "numpy": version("numpy"),
        "pillow": version("pillow"),
    }
    # A run cut short must not leave half a file; and save_file makes files that only their owner can read.
    part = out.with_name(out.name + ".part")
    save_file(tensors, part, metadata=metadata)
    part.chmod(0o644)
    part.replace(out)
    Image.fromarray(small).save(thumbnails, optimize=True)


def thumbnail(picture: Image.Image) -> np.ndarray:
    """Average a picture over boxes down to uint8 [8, 8, 3]."""
    return np.asarray(picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


def encode(codec: Any, pictures: Sequence[Image.Image]) -> Any:
    """Encode RGB pictures of one size with an AutoencoderTiny: unscaled latents [N, 4, H/8, W/8], float32."""
    import torch

    values = np.stack([np.asarray(p.convert("RGB"), np.float32) for p in pictures])
    batch = torch.from_numpy(values).permute(0, 3, 1, 2) / 127.5 - 1.0
    with torch.no_grad():
        return codec.encode(batch).latents / SCALE


if __name__ == "__main__":
    sys.exit(main())

"""The built-in decoder beside the linear preview and an autoencoder: time a picture, and how close the pictures come.

    python -m benchmarks.decoder --threads 1 --vae ../shared/data/taesd --data ../shared/data/latents

Without --vae, the built-in decoder and the preview are timed. With it, both are also compared with its pictures of
held-out latents: the demo's, and those of --data.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from raystar import demo
from raystar.base.errors import RaystarError
from raystar.config.load import override
from raystar.config.schema import Config
from raystar.data.bank import open_bank
from raystar.data.listing import DEMO_ROOT
from raystar.pictures.autoencoders import VaeCodec
from raystar.pictures.codec import Codec, PreviewCodec, need_codec
from raystar.pictures.distilling import Lesson, psnr


def main() -> None:
    """The command line."""
    p = measure.parser(__doc__.splitlines()[0])
    p.add_argument("--vae", metavar="NAME", help="an autoencoder that the pictures are compared with")
    p.add_argument("--data", metavar="DIR", help="latents to compare on besides the demo's: a folder of domains")
    p.add_argument("--rounds", type=int, default=15, help="rounds that are timed")
    p.add_argument("--held", type=int, default=12, help="held-out latents of each domain that are compared")
    args = p.parse_args()
    device = measure.settle(args)
    codecs: dict[str, Codec] = {"preview": PreviewCodec(), "built-in": codec_of(None, device)}
    if args.vae is not None:
        codecs["autoencoder"] = codec_of(args.vae, device)
    sets = {"painted": held_out(DEMO_ROOT, demo.DOMAINS, args.held)}
    if args.data is not None:
        domains = tuple(sorted(path.name for path in Path(args.data).iterdir() if path.is_dir()))
        sets["real"] = held_out(args.data, domains, args.held)
    for batch in (1, 8):
        report_time(codecs, sets["painted"][:batch], args.rounds, device)
    if args.vae is not None:
        report_distance(codecs, sets)


def codec_of(name: str | None, device: torch.device) -> Codec:
    """The codec of that name; what cannot be had ends the benchmark."""
    codec, note = need_codec(override(Config(), {"visualization.vae_model_name_or_path": name}), device)
    if note is not None:
        raise RaystarError(note)
    return codec


def held_out(root: str, domains: tuple[str, ...], each: int) -> Tensor:
    """[n,4,H,W] unscaled latents that the built-in decoder was not trained on."""
    config = override(Config(), {"data.data_root": root, "data.domains": list(domains)})
    with tempfile.TemporaryDirectory() as folder:
        bank = open_bank(config, folder)
        return bank.rows(np.concatenate([rows[:each] for rows in bank.held]))


def report_time(codecs: dict[str, Codec], latents: Tensor, rounds: int, device: torch.device) -> None:
    """Prints the time of one picture, in turn; on a processor that others use too, its own time says more."""
    own: dict[str, list[float]] = {name: [] for name in codecs}

    def timed(name: str) -> None:
        started = time.process_time()
        codecs[name].decode(latents)
        own[name].append(time.process_time() - started)

    seconds = measure.take_turns({name: lambda _, name=name: timed(name) for name in codecs}, rounds, device)
    rows = [[f"batch of {len(latents)}", "ms a picture", "of processor time", "of built-in's"]]
    used = {name: statistics.median(values[-rounds:]) for name, values in own.items()}
    for name, value in used.items():
        wall, busy = (1e3 * spent / len(latents) for spent in (seconds[name], value))
        rows.append([name, f"{wall:.1f}", f"{busy:.1f}", f"{value / used['built-in']:.2f}"])
    print(measure.table(rows), flush=True)


def report_distance(codecs: dict[str, Codec], sets: dict[str, Tensor]) -> None:
    """Prints each codec's mean PSNR against the autoencoder's pictures."""
    rows = [["dB against the autoencoder", "preview", "built-in", "gain"]]
    teacher = codecs["autoencoder"]
    assert isinstance(teacher, VaeCodec)
    for name, latents in sets.items():
        lesson = Lesson(latents, teacher.decode(latents))
        found = [psnr(codecs[name], lesson) for name in ("preview", "built-in")]
        rows.append([f"{name}, {len(latents)} held out", *(f"{v:.2f}" for v in found), f"{found[1] - found[0]:+.2f}"])
    print(measure.table(rows))


if __name__ == "__main__":
    main()

"""What a large folder of latents costs: packing, reopening, private memory, drawing a batch.

`python -m benchmarks.data` writes its own latents (five domains of fp16 4x32x32) into a temporary folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.measure import in_fresh_process, parser, resident_bytes, settle, table, take_turns
from raystar.config.load import from_mapping, override
from raystar.config.schema import Config
from raystar.data.bank import open_bank, reopen_bank
from raystar.data.batches import LatentDataset
from raystar.training.state import TrainState
from raystar.training.step import train_step

DOMAINS = ("a", "b", "c", "d", "e")
FORMATS = ("npy", "pt")


def write_files(root: Path, files: int, form: str) -> None:
    """`files` latents [4,32,32] fp16, spread over the domains."""
    rng = np.random.default_rng(0)
    for number in range(files):
        folder = root / DOMAINS[number % len(DOMAINS)]
        folder.mkdir(parents=True, exist_ok=True)
        latent = (5.5 * rng.standard_normal((4, 32, 32), dtype=np.float32)).astype(np.float16)
        if form == "npy":
            np.save(folder / f"picture{number:06d}x.npy", latent)
        else:
            torch.save(torch.from_numpy(latent), folder / f"picture{number:06d}x.pt")


def configuration(root: Path, **changed: Any) -> Config:
    """Two residual blocks of 64 channels, batches of 8; keyword arguments use `__` for the dot."""
    values: dict[str, Any] = {
        "data.data_root": str(root), "data.domains": list(DOMAINS), "training.use_amp": False,
        "model.base_dim": 64, "model.n_res_blocks": 2, "training.batch_size": 8,
    }  # fmt: skip
    return override(from_mapping({}, "benchmark"), values | {k.replace("__", "."): v for k, v in changed.items()})


def private_memory(config: Config, cache: Path) -> tuple[int, int]:
    """Private bytes that this process gains by opening the bank and reading every latent of it.

    Two counts: anonymous pages (`RssAnon`), and pages that it alone has changed (`Private_Dirty`).
    """
    before = resident_bytes("RssAnon"), _private_dirty()
    bank = open_bank(config, cache, verbose=False)
    total = sum(float(part.double().sum()) for part in bank.latents.split(16))
    assert np.isfinite(total)
    return resident_bytes("RssAnon") - before[0], _private_dirty() - before[1]


def _private_dirty() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup has no Private_Dirty")


def reopening(config: Config, cache: Path, times: int) -> tuple[float, float, float]:
    """Median seconds of `open_bank` on a packed dataset, `reopen_bank`, and `os.stat` of every file, in turn."""
    key = open_bank(config, cache, verbose=False).key
    paths = [str(path) for domain in DOMAINS for path in (Path(config.data.data_root) / domain).iterdir()]
    found = take_turns(
        {
            "open": lambda _: open_bank(config, cache, verbose=False),
            "reopen": lambda _: reopen_bank(config, cache, key),
            "stat": lambda _: [os.stat(path) for path in paths],
        },
        times,
        torch.device("cpu"),
    )
    return found["open"], found["reopen"], found["stat"]


def drawing(config: Config, cache: Path, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of a training step, of drawing its batch, and of a DataLoader that collates it item by item."""
    dataset = LatentDataset(open_bank(config, cache, verbose=False), config, device)
    state = TrainState.create(config, device)
    batches = iter(_endless(dataset))
    items = iter(DataLoader(dataset, batch_size=config.training.batch_size, shuffle=True))
    batch = next(batches)
    draw = take_turns(
        {"draw": lambda _: next(batches), "loader": lambda _: _moved(next(items), device)}, 10 * rounds, device
    )
    # Away from the step: after it, the first touch of cold memory would be counted as the draw's.
    return draw | take_turns({"step": lambda i: train_step(state, batch, epoch=1, step=i)}, rounds, device)


def _endless(dataset: LatentDataset) -> Iterator[Any]:
    while True:
        yield from dataset.batches()


def _moved(items: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in items.items()}


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.data`."""
    p = parser(
        "Packs generated latents, opens them again, counts the private memory of a second process, and draws "
        "batches beside a training step (base_dim 64, 2 blocks, batch 8) and beside a collating DataLoader. "
        "With --device cuda, batches are drawn on the GPU for a step there."
    )
    p.add_argument("--files", type=int, default=20_000, help="latents of each format (20000)")
    p.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="file formats (both)")
    p.add_argument("--rounds", type=int, default=10, help="steps to time; ten times as many draws (10)")
    p.add_argument("--folder", type=Path, help="where the temporary files go (the system's temporary folder)")
    args = p.parse_args(argv)
    device = settle(args)
    rows = [
        ["format", "files/s", "MB", "open ms", "/ os.stat of all", "reopen ms", "RssAnon share", "Private_Dirty share"]
    ]
    with tempfile.TemporaryDirectory(prefix="raystar-data-", dir=args.folder) as temporary:
        for form in args.formats:
            root, cache = Path(temporary) / form, Path(temporary) / "cache"
            print(f"writing {args.files} .{form} files", file=sys.stderr, flush=True)
            write_files(root, args.files, form)
            config = configuration(root)
            started = time.perf_counter()
            size = open_bank(config, cache).latents.nbytes
            seconds = time.perf_counter() - started
            opening, again, stat = reopening(config, cache, times=9)
            anonymous, dirty = in_fresh_process(private_memory, config, cache)
            rows.append([
                f".{form}", f"{args.files / seconds:.0f}", f"{size / 1e6:.0f}", f"{1e3 * opening:.0f}",
                f"{opening / stat:.2f}", f"{1e3 * again:.0f}", f"{anonymous / size:.1%}", f"{dirty / size:.1%}",
            ])  # fmt: skip
        print(table(rows), flush=True)
        found = drawing(config, cache, device, args.rounds)
    print(
        f"drawing a batch {1e3 * found['draw']:.3f} ms, {found['draw'] / found['step']:.3%} of a step "
        f"({1e3 * found['step']:.1f} ms); a DataLoader that collates items takes "
        f"{found['loader'] / found['draw']:.1f} times as long ({1e3 * found['loader']:.3f} ms)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Does a stranger recognise the domain? `python -m benchmarks.recognised --sweep NAME [--runs runs]`.

A classifier that has seen nothing but real training pictures, by other statistics than the ruler's (histograms of
colours, of local binary patterns and of the directions of edges; logistic regression), is shown held-out pictures, the
untouched sources, the channel transfer, and translations by the sweep's best model and by its baseline's, half by
reference and half by noise. The share that it takes for the target domain is printed for each, and by domain.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from raystar.config.folders import cache_dir
from raystar.config.load import from_mapping
from raystar.data.bank import Bank, open_bank
from raystar.exported.model import Translator
from raystar.model import checkpoint as checkpoints
from raystar.model.checkpoint import shown_weights
from raystar.model.networks import Nets
from raystar.pictures import decoder as decoders
from raystar.pictures.codec import BUILT_IN, BuiltInCodec
from raystar.ruler.distances import channel_transfer

_HUES, _CODES, _DIRECTIONS = 6, 59, 8
_SOURCES = 6


def seen(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Pictures [B,h,w,3] -> histograms [B,d]."""
    return np.stack([np.concatenate([_colours(p), *(_textures(p, step) for step in (1, 2, 4))]) for p in pictures])


def _colours(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    levels = picture.astype(int) * _HUES // 256
    code = (levels[..., 0] * _HUES + levels[..., 1]) * _HUES + levels[..., 2]
    return np.sqrt(np.bincount(code.ravel(), minlength=_HUES**3) / code.size)


def _uniform_codes() -> NDArray[np.int64]:
    """Local binary patterns with at most two changes around the circle have a bin each, all others share one."""
    table, used = np.full(256, _CODES - 1), 0
    for code in range(256):
        bits = [code >> i & 1 for i in range(8)]
        if sum(a != b for a, b in zip(bits, bits[1:] + bits[:1], strict=True)) <= 2:
            table[code], used = used, used + 1
    assert used == _CODES - 1
    return table


_TABLE = _uniform_codes()


def _textures(picture: NDArray[np.uint8], step: int) -> NDArray[np.float64]:
    grey = picture[::step, ::step].mean(axis=2)
    middle = grey[1:-1, 1:-1]
    around = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    h, w = middle.shape
    code = sum(((grey[y : y + h, x : x + w] > middle + 2).astype(int) << i) for i, (y, x) in enumerate(around))
    patterns = np.bincount(_TABLE[code].ravel(), minlength=_CODES) / code.size
    down, across = np.gradient(grey)
    strength = np.hypot(down, across)
    direction = ((np.arctan2(down, across) % np.pi) * _DIRECTIONS / np.pi).astype(int) % _DIRECTIONS
    edges = np.bincount(direction.ravel(), weights=strength.ravel(), minlength=_DIRECTIONS) / strength.size
    return np.concatenate([np.sqrt(patterns), np.log1p(edges), np.log1p(np.quantile(strength, (0.5, 0.9, 0.98)))])


def train(bank: Bank, codec: BuiltInCodec) -> Pipeline:
    """The classifier, of training pictures alone."""
    pictures = [seen(codec.decode(bank.rows(rows[:160]))) for rows in bank.train]
    labels = np.repeat(np.arange(len(pictures)), [len(p) for p in pictures])
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=2000)).fit(
        np.concatenate(pictures), labels
    )


def share(classifier: Pipeline, codec: BuiltInCodec, by_target: list[Tensor]) -> list[float]:
    """Of unscaled latents [m,C,H,W], one tensor a target domain, the shares that are taken for that domain."""
    return [float((classifier.predict(seen(codec.decode(x))) == y).mean()) for y, x in enumerate(by_target)]


def translate(model: Translator, bank: Bank) -> list[Tensor]:
    """Held-out pictures of every other domain, half by reference, half by noise, one tensor a target domain."""
    found: list[Tensor] = []
    for y, domain in enumerate(bank.domains):
        fakes = []
        for source, rows in enumerate(bank.held):
            if source == y:
                continue
            x = bank.rows(rows[:_SOURCES])
            for number, one in enumerate(x):
                reference = bank.rows(bank.held[y])[number] if number % 2 else None
                fakes.append(model.translate(one[None], domain, reference, None if number % 2 else number))
        found.append(torch.cat(fakes))
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    folder = args.runs / args.sweep
    summary = json.loads((folder / "summary.json").read_text())
    config = from_mapping(json.loads((folder / "sweep.json").read_text())["config"], "sweep.json")
    bank = open_bank(config, cache_dir(config, args.runs))
    codec = BuiltInCodec(decoders.load(), BUILT_IN)
    classifier = train(bank, codec)

    others = [[bank.rows(rows[:_SOURCES]) for s, rows in enumerate(bank.held) if s != y] for y in range(len(bank.held))]
    wanted = [bank.rows(rows) for rows in bank.held]
    rows: dict[str, list[Tensor]] = {
        "real held-out pictures": wanted,
        "doing nothing": [torch.cat(x) for x in others],
        "channel transfer": [
            torch.cat([channel_transfer(x, wanted[y][: len(x)]) for x in others[y]]) for y in range(len(wanted))
        ],
    }
    for role in ("baseline", "best"):
        name = summary[role]["parent"] or summary[role]["trial"]
        runs = [t for t in summary["trials"] if name in (t["trial"], t["parent"]) and t["checkpoint"]]
        trial = min(runs, key=lambda t: float(t["score"]))
        path = folder / trial["checkpoint"]
        checkpoint = checkpoints.load(path)
        trained = from_mapping(checkpoint["config"], str(path))
        nets = Nets.of(trained.model, trained.num_domains, shown_weights(checkpoint), str(path))
        rows[f"{role} {trial['trial']}, score {trial['score']:.4f}"] = translate(
            Translator(nets, trained, torch.device("cpu")), bank
        )
    print(f"{'taken for the target domain':34} {'all':>6}  " + "  ".join(f"{d[:13]:>13}" for d in bank.domains))
    for name, latents in rows.items():
        found = share(classifier, codec, latents)
        print(f"{name:34} {np.mean(found):6.0%}  " + "  ".join(f"{value:13.0%}" for value in found))


if __name__ == "__main__":
    main()

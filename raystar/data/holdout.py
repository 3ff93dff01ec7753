"""Which pictures are held out for the ruler; crops of one picture stay together."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raystar.base.names import composed
from raystar.data.listing import Part

_CROP = re.compile(r"_\d+$")


def picture_of(stems: Sequence[str]) -> list[str]:
    """The picture that each latent of one domain belongs to: crops `name_0`, `name_1` in one folder share one.

    Numbered files (`photo_001`, `photo_002`, ...) look like crops of one picture too. So where dropping the
    number would put more than a fifth of the domain into one group, the number is taken to count pictures.
    """
    groups = [_CROP.sub("", stem) for stem in stems]
    largest = Counter(groups).most_common(1)[0][1]
    return groups if largest <= max(2, len(stems) // 5) else list(stems)


def turns(part: Part) -> list[int]:
    """The turn in which each latent's picture would be held out: depends on names alone, never on a seed."""
    prefix = len(part.domain_name) + 1
    groups = picture_of([composed(os.path.splitext(name[prefix:])[0]) for name in part.names])
    # Hashing spreads the choice evenly over any naming scheme, and adding files moves few others.
    digests = {g: hashlib.sha256(os.fsencode(composed(f"{part.domain_name}/{g}"))).digest() for g in set(groups)}
    turn = {group: number for number, group in enumerate(sorted(digests, key=digests.__getitem__))}
    return [turn[group] for group in groups]


def pictures_held(turns: NDArray[np.int64], share: float) -> int:
    """How many pictures make about `share` of a domain's latents; one at least stays for training."""
    if share == 0:
        return 0
    count = max(1, round(share * len(turns)))
    latents = np.cumsum(np.bincount(turns))  # of the first picture, the first two, ...
    return min(int(np.searchsorted(latents, count)) + 1, len(latents) - 1)

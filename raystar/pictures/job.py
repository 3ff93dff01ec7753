"""What `encode` has to do: the pictures of every domain, what became of each, and the names of their latents."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from raystar.base.errors import RaystarError
from raystar.base.files import is_folder
from raystar.base.names import LONGEST, alike, as_text, composed, folded, is_systems, shortened
from raystar.config.folders import check_text
from raystar.pictures import reading as pictures

_LISTED = 20
_CROP = re.compile(r"(_\d+)?\Z")  # what dataset.picture_of takes for the number of a crop
_LONGEST = 200  # bytes of a latent's name; file systems take 255, with suffixes


@dataclass
class Job:
    """What is to be encoded and what became of it; pictures are named `<domain>/<path below it>`."""

    images: Path
    out: Path
    domains: dict[str, list[str]]
    """The pictures of each domain, which is called as its folder is, as far as that is text (`base.names.as_text`)."""
    bad: dict[str, str] = field(default_factory=dict)
    """Picture or link: why it cannot be used."""
    ignored: Counter[str] = field(default_factory=Counter)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Picture: its record in the manifest."""
    encoded: int = 0
    enlarged: int = 0
    stale: list[str] = field(default_factory=list)
    """Latents of pictures that are no longer there."""

    @property
    def folders(self) -> dict[str, str]:
        """Each domain's folder below `out`: the one that is there under its name, however composed, or a new one."""
        return {domain: next(iter(alike(self.out, domain)), domain) for domain in self.domains}


def listed(images: Path, out: Path) -> Job:
    """Finds the pictures of every domain.

    Raises:
        RaystarError: no folder, no domains in it, or no picture in any.
    """
    if not is_folder(images):
        raise RaystarError(
            f"--images {images}: expected a folder with one folder of pictures per domain, found "
            + ("a file" if images.exists() else "nothing")
        )
    if out.resolve().is_relative_to(images.resolve()):
        raise RaystarError(f"--out {out}: lies inside of --images {images}; choose a folder beside it")
    if out.exists() and not out.is_dir():
        raise RaystarError(f"--out {out}: expected a folder, found a file")
    check_text(out, "--out")
    job = Job(images, out, {})
    entries = dict[str, str]()
    for entry in _entries(images):
        path = images / entry
        if entry.startswith(".") or is_systems(entry):
            continue
        if not is_folder(path):
            if path.is_symlink() and not path.exists():
                job.bad[entry] = "a link that leads nowhere"
            elif path.suffix.lower() in pictures.SUFFIXES:
                job.bad[entry] = f"lies in no domain's folder; move it to {images}/<domain>/"
            continue
        listing = pictures.find(path, images)
        job.bad |= {f"{entry}/{name}": reason for name, reason in listing.bad}
        job.ignored += listing.ignored
        domain = domain_of(entry)
        if not domain.strip():
            job.bad[entry] = "a domain needs a name of more than spaces; rename the folder"
        elif composed(other := entries.setdefault(domain, entry)) != composed(entry):
            job.bad[entry] = f"its latents' folder, {domain}, is that of {other}; rename the folder"
        elif listing.pictures:
            job.domains.setdefault(domain, []).extend(f"{entry}/{name}" for name in listing.pictures)
        elif not listing.bad:
            job.bad[entry] = "a domain's folder without pictures"
    if not job.domains:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in list(job.bad.items())[:_LISTED])
        raise RaystarError(
            f"--images {images}: expected one folder of pictures per domain ({images}/photo/*.jpg, ...), found no "
            f"picture in any{reasons}"
        )
    return job


def domain_of(entry: str) -> str:
    """The domain of a folder of pictures: its name, as text that a configuration and a file system take."""
    return shortened(as_text(entry), LONGEST)


def _entries(images: Path) -> list[str]:
    try:
        return sorted(os.listdir(images))
    except OSError as error:
        raise RaystarError(f"--images {images}: cannot be read: {error.strerror}") from None


def latent_names(
    sources: Sequence[str], kept: Mapping[str, str], taken: Sequence[str], folders: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The latent of each picture, `<domain>/<name>.npy`; no two differ in capitals or composed accents alone.

    `photo/a_1.jpg` becomes `photo/a_1.npy`, `photo/2019/a_1.jpg` becomes `photo/2019-a_1.npy`. Where that is taken,
    the suffix goes in, before the number of a crop: `photo/a.png_1.npy`.

    Args:
        sources: pictures, `<folder>/<path>`.
        kept: the latents that pictures have already, which they keep.
        taken: other files that are there.
        folders: domains whose latents' folder is called otherwise.
    """
    used = {folded(name) for name in (*kept.values(), *taken)}
    names = dict(kept)
    for source in sources:
        if source in kept:
            continue
        entry, _, path = source.partition("/")
        domain = domain_of(entry)
        folder = (folders or {}).get(domain, domain)
        stem = path[: len(path) - len(PurePosixPath(path).suffix)].replace("/", "-")
        stem = composed(stem)
        stem = os.fsencode(stem)[:_LONGEST].decode(errors="ignore") if len(os.fsencode(stem)) > _LONGEST else stem
        mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
        suffix = PurePosixPath(path).suffix.lower()
        for insert in ("", suffix, f".{mark}"):
            cut = _CROP.search(stem).start()  # type: ignore[union-attr]  # it matches nothing, too
            name = f"{folder}/{stem[:cut]}{insert}{stem[cut:]}.npy"
            if folded(name) not in used:
                break
        used.add(folded(name))
        names[source] = name
    return {source: names[source] for source in sources}

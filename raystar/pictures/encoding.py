"""Pictures to latents: a folder of images becomes a folder of latents, and again only what changed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from raystar import __version__
from raystar.base.errors import RaystarError
from raystar.base.files import is_folder, wait_for_space, write_whole
from raystar.base.journal import Journal
from raystar.pictures import reading as pictures
from raystar.pictures.autoencoders import VaeCodec

MANIFEST = "manifest.json"
_JOURNAL = ".manifest.jsonl"
_PART = ".part"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_PIXELS = 8 * 256 * 256  # takes about 3 GiB in a full-sized VAE
_LISTED = 20
_CROP = re.compile(r"(_\d+)?\Z")  # what dataset.picture_of takes for the number of a crop
_LONGEST = 200  # bytes of a latent's name; file systems take 255, with suffixes


class Settings(NamedTuple):
    """What makes a latent, besides its picture."""

    codec: str
    """The name that was asked for."""
    kind: str
    """AutoencoderKL or AutoencoderTiny."""
    codec_digest: str
    """SHA-256 of the codec's weights: the same from a hub or a folder."""
    size: int
    """Pixels along a side."""
    computed_in: str
    stored_as: str

    @property
    def key(self) -> str:
        """Equal settings make equal latents; the codec's name alone changes nothing."""
        return hashlib.sha256(json.dumps(self[1:]).encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Of a latent's file."""
        return 128 + 4 * (self.size // 8) ** 2 * np.dtype(self.stored_as).itemsize  # numpy's header is padded to 128


@dataclass
class Job:
    """What is to be encoded and what became of it; pictures are named `<domain>/<path below it>`."""

    images: Path
    out: Path
    domains: dict[str, list[str]]
    bad: dict[str, str] = field(default_factory=dict)
    """Picture or link: why it cannot be used."""
    ignored: Counter[str] = field(default_factory=Counter)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Picture: its record in the manifest."""
    encoded: int = 0
    enlarged: int = 0
    stale: list[str] = field(default_factory=list)
    """Latents of pictures that are no longer there."""


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
    job = Job(images, out, {})
    for entry in sorted(os.listdir(images)):
        path = images / entry
        if entry.startswith("."):
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
        if listing.pictures:
            job.domains[entry] = [f"{entry}/{name}" for name in listing.pictures]
        elif not listing.bad:
            job.bad[entry] = "a domain's folder without pictures"
    if not job.domains:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in list(job.bad.items())[:_LISTED])
        raise RaystarError(
            f"--images {images}: expected one folder of pictures per domain ({images}/photo/*.jpg, ...), found no "
            f"picture in any{reasons}"
        )
    return job


def digest(codec: VaeCodec) -> str:
    """SHA-256 over a codec's weights, as they are loaded."""
    hasher = hashlib.sha256()
    for name, weight in sorted(codec.model.state_dict().items()):
        hasher.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        hasher.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def latent_names(sources: Sequence[str], kept: Mapping[str, str], taken: Sequence[str]) -> dict[str, str]:
    """The latent of each picture, `<domain>/<name>.npy`; no two differ in capitals alone.

    `photo/a_1.jpg` becomes `photo/a_1.npy`, `photo/2019/a_1.jpg` becomes `photo/2019-a_1.npy`. Where that is taken,
    the suffix goes in, before the number of a crop: `photo/a.png_1.npy`.

    Args:
        sources: pictures, `<domain>/<path>`.
        kept: the latents that pictures have already, which they keep.
        taken: other files that are there.
    """
    used = {name.casefold() for name in (*kept.values(), *taken)}
    names = dict(kept)
    for source in sources:
        if source in kept:
            continue
        domain, _, path = source.partition("/")
        stem = path[: len(path) - len(PurePosixPath(path).suffix)].replace("/", "-")
        stem = os.fsencode(stem)[:_LONGEST].decode(errors="ignore") if len(os.fsencode(stem)) > _LONGEST else stem
        mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
        suffix = PurePosixPath(path).suffix.lower()
        for insert in ("", suffix, f".{mark}"):
            cut = _CROP.search(stem).start()  # type: ignore[union-attr]  # it matches nothing, too
            name = f"{domain}/{stem[:cut]}{insert}{stem[cut:]}.npy"
            if name.casefold() not in used:
                break
        used.add(name.casefold())
        names[source] = name
    return {source: names[source] for source in sources}


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time writes into `out`; a killed one leaves nothing locked."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise RaystarError(f"--out {out}: cannot be made: {error.strerror}") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RaystarError(f"--out {out}: another process is encoding into it") from None
        yield
    finally:
        os.close(folder)


def _recorded(out: Path) -> dict[str, Any]:
    """The manifest and what a killed process had done since."""
    manifest: dict[str, Any] = {}
    path = out / MANIFEST
    if path.exists():
        try:
            manifest = json.loads(path.read_text())
            for record in manifest["latents"].values():
                str(record["latent"]), str(record["settings"]), [*record["picture"]]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise RaystarError(
                f"{path}: not a manifest of raystar.encode ({type(error).__name__}); move it away, or choose another "
                "--out"
            ) from None
    latents = manifest.get("latents", {})
    for entry in Journal(out / _JOURNAL):
        latents[entry.pop("source")] = entry
    return {"images": manifest.get("images"), "latents": latents}


def _stamp(path: Path) -> list[int]:
    """What changes when a picture does: its size and the time of its last change, in nanoseconds."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _is_done(record: Mapping[str, Any], stamp: list[int], settings: Settings, out: Path) -> bool:
    try:
        size = (out / record["latent"]).stat().st_size
    except OSError:
        return False
    return record["picture"] == stamp and record["settings"] == settings.key and size == settings.bytes


class _Prepared(NamedTuple):
    source: str
    stamp: list[int]
    pixels: NDArray[np.uint8]  # [size,size,3]
    enlarged: bool


def prepare(path: Path, size: int) -> tuple[NDArray[np.uint8], bool]:
    """A picture as the codec gets it, [size,size,3], and whether it had to be enlarged.

    Upright, in sRGB, on white paper where it is transparent; its shorter side scaled to `size`, the middle of the
    longer one.

    Raises:
        ValueError: why it cannot be used; also of pictures of less than a quarter of `size`, which hold too little.
    """
    picture = pictures.read(path, size)
    if 4 * min(picture.size) < size:
        raise ValueError(
            f"{picture.width}x{picture.height} pixels are too few: the shorter side needs {-(-size // 4)} or more"
        )
    return np.asarray(pictures.square(pictures.flat(picture), size)), min(picture.size) < size


def encode(job: Job, codec: VaeCodec, settings: Settings) -> None:
    """Encodes what is not done yet; `job` then knows what became of each picture.

    Raises:
        RaystarError: `job.out` holds latents of other pictures of the same names, or is in use.
    """
    with _alone(job.out):
        recorded = _recorded(job.out)
        root = str(job.images.resolve())
        sources = [source for named in job.domains.values() for source in named]
        old: dict[str, dict[str, Any]] = recorded["latents"]
        todo: list[str] = []
        for source in sources:
            try:
                stamp = _stamp(job.images / source)
            except OSError as error:  # gone since it was listed
                job.bad[source] = error.strerror or str(error)
                continue
            if source not in old:
                todo.append(source)
            elif _is_done(old[source], stamp, settings, job.out):
                job.done[source] = old[source]
            elif recorded["images"] not in (None, root) and old[source]["picture"] != stamp:
                raise RaystarError(
                    f"--out {job.out}: holds the latent of another {source}, from {recorded['images']}; "
                    "choose another folder"
                )
            else:
                todo.append(source)
        names = _names(job, sources, old)
        for part in job.out.glob(f"*/.*{_PART}"):  # of a killed process
            part.unlink()
        journal = Journal(job.out / _JOURNAL)
        try:
            _encode_all(job, codec, settings, todo, names, journal)
        finally:
            others = {s: r for s, r in old.items() if s not in job.done and (job.out / r["latent"]).exists()}
            job.stale = sorted(record["latent"] for source, record in others.items() if source not in names)
            _write_manifest(job, settings, root, others)
            journal.close()
            journal.path.unlink(missing_ok=True)


def _names(job: Job, sources: Sequence[str], old: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    kept = {source: str(record["latent"]) for source, record in old.items()}
    ours = set(kept.values())
    taken = [
        f"{domain}/{path.name}"
        for domain in job.domains
        for path in (job.out / domain).glob("*.npy")
        if f"{domain}/{path.name}" not in ours
    ]
    return latent_names(sources, kept, taken)


def _encode_all(
    job: Job, codec: VaeCodec, settings: Settings, todo: Sequence[str], names: Mapping[str, str], journal: Journal
) -> None:
    for domain in job.domains:
        (job.out / domain).mkdir(exist_ok=True)
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=len(todo), desc="encoding", unit=" pictures", file=sys.stderr, disable=not todo, leave=True,
        mininterval=0.5 if terminal else 15, ascii=not terminal, dynamic_ncols=terminal,
    )  # fmt: skip
    batch: list[_Prepared] = []

    def finish() -> None:
        if not batch:
            return
        latents = codec.encode(np.stack([one.pixels for one in batch]))
        for one, latent in zip(batch, latents, strict=True):
            _save(job, one, latent, names[one.source], settings, journal)
        bar.update(len(batch))
        batch.clear()

    with bar:
        for source, prepared in _prepared(job.images, todo, settings.size, codec.batch_size):
            if isinstance(prepared, _Prepared):
                batch.append(prepared)
                if len(batch) == codec.batch_size:
                    finish()
                continue
            job.bad[source] = prepared
            (job.out / names[source]).unlink(missing_ok=True)  # of what the picture was before
            bar.update()
        finish()


def _prepared(images: Path, sources: Sequence[str], size: int, batch: int) -> Iterator[tuple[str, _Prepared | str]]:
    """Each picture, or the reason why it cannot be used, in order; read in threads, two batches ahead."""

    def load(source: str) -> _Prepared | str:
        try:
            stamp = _stamp(images / source)
            return _Prepared(source, stamp, *prepare(images / source, size))
        except (OSError, ValueError) as error:
            return str(error)

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="raystar-picture")
    ahead: deque[tuple[str, Future[_Prepared | str]]] = deque()
    waiting = iter(sources)
    try:
        while True:
            while len(ahead) < 2 * batch + workers and (source := next(waiting, None)) is not None:
                ahead.append((source, pool.submit(load, source)))
            if not ahead:
                return
            source, future = ahead.popleft()
            yield source, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _save(job: Job, one: _Prepared, latent: Tensor, name: str, settings: Settings, journal: Journal) -> None:
    values = latent.numpy().astype(settings.stored_as)
    path = job.out / name
    if not np.isfinite(values).all():
        job.bad[one.source] = "its latent holds NaN or infinite numbers"
        path.unlink(missing_ok=True)
        return
    part = path.with_name(f".{path.stem}{_PART}")

    def write() -> None:
        with part.open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())

    wait_for_space(path, write)
    record = {"latent": name, "picture": one.stamp, "settings": settings.key}
    # The record comes first, and counts if there is a file: should the process die in between, the picture is made
    # again under the same name. An older latent must not be taken for it.
    path.unlink(missing_ok=True)
    journal.append({"source": one.source, **record})
    os.replace(part, path)
    job.done[one.source] = record
    job.encoded += 1
    job.enlarged += one.enlarged


def _write_manifest(job: Job, settings: Settings, root: str, others: Mapping[str, Any]) -> None:
    content = {
        "format": "raystar-latents-2",
        "space": "unscaled",
        **settings._asdict(),
        "settings": settings.key,
        "fit": "shorter side scaled to size (Lanczos), middle of the longer side; transparent parts white",
        "raystar": __version__,
        "pillow": version("pillow"),
        "images": root,
        "domains": {domain: sum(s in job.done for s in named) for domain, named in job.domains.items()},
        "latents": dict(sorted({**others, **job.done}.items())),
        "bad": dict(sorted(job.bad.items())),
    }
    wait_for_space(job.out / MANIFEST, lambda: write_whole(job.out / MANIFEST, json.dumps(content, indent=1) + "\n"))

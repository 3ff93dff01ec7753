"""Pictures to latents: a folder of images becomes a folder of latents, and again only what changed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from raystar import __version__
from raystar.base.errors import RaystarError
from raystar.base.files import wait_for_space, write_whole
from raystar.base.journal import Journal
from raystar.base.locks import Held, hold
from raystar.base.names import alike
from raystar.pictures import reading as pictures
from raystar.pictures.autoencoders import VaeCodec
from raystar.pictures.job import Job, latent_names

MANIFEST = "manifest.json"
_JOURNAL = ".manifest.jsonl"
_PART = ".part"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH_PIXELS = 8 * 256 * 256  # takes about 3 GiB in a full-sized VAE


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


def digest(codec: VaeCodec) -> str:
    """SHA-256 over a codec's weights, as they are loaded."""
    hasher = hashlib.sha256()
    for name, weight in sorted(codec.model.state_dict().items()):
        hasher.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        hasher.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time writes into `out`; a killed one leaves nothing locked."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RaystarError(f"--out {out}: cannot be made: {error.strerror}") from None
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(out, wait=False))
        except Held as held:
            raise RaystarError(f"--out {out}: another process is encoding into it ({held})") from None
        except OSError as error:
            raise RaystarError(f"--out {out}: cannot be opened: {error.strerror}") from None
        yield


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
    for record in latents.values():
        record["latent"] = _as_there(out, str(record["latent"]))
    return {"images": manifest.get("images"), "latents": latents}


def _as_there(out: Path, latent: str) -> str:
    """A recorded latent's name, as it is now: a copy of its folder may have been composed otherwise on the way."""
    folder, _, name = latent.partition("/")
    if latent.isascii() or os.path.lexists(out / latent):
        return latent
    folder = next(iter(alike(out, folder)), folder)
    return f"{folder}/{next(iter(alike(out / folder, name)), name)}" if (out / folder).is_dir() else latent


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
        f"{folder}/{path.name}"
        for folder in job.folders.values()
        for path in (job.out / folder).glob("*.npy")
        if f"{folder}/{path.name}" not in ours
    ]
    return latent_names(sources, kept, taken, job.folders)


def _encode_all(
    job: Job, codec: VaeCodec, settings: Settings, todo: Sequence[str], names: Mapping[str, str], journal: Journal
) -> None:
    for folder in job.folders.values():
        try:
            (job.out / folder).mkdir(exist_ok=True)
        except OSError as error:
            raise RaystarError(f"--out {job.out}: {folder}: cannot be made: {error.strerror}") from None
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

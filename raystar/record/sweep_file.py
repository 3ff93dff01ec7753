"""`sweep.json`: what a sweep was asked for and ran with, and what has changed when it is resumed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import raystar
from raystar import __version__
from raystar.base.errors import RaystarError, nearest
from raystar.base.files import write_whole
from raystar.search.purpose import PURPOSES, QUALITY

RECORD, JOURNAL = "sweep.json", "journal.jsonl"
"""Files of a sweep's folder."""

_KEYS = {"request", "config", "space", "trials", "data", "code", "tracking_uri"}
_LIBRARIES = ("torch", "ray", "mlflow", "numpy")
_LISTED = 10  # changed files of raystar's, beyond which their number says as much


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `sweep.json`. A record that is there and says something else is kept beside it, numbered."""
    path = folder / RECORD
    text = json.dumps(content, indent=1, default=str) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (kept := folder / f"sweep.{number}.json").exists():
            number += 1
        shutil.copy2(path, kept)
    write_whole(path, text)


def read_record(out: Path, name: str) -> dict[str, Any]:
    """The record of a sweep that is to be resumed.

    Raises:
        RaystarError: there is no such sweep, its files are another user's, or the record is damaged.
    """
    folder = out / name
    path = folder / RECORD
    if not path.is_file():
        known = [record.parent.name for record in out.glob(f"*/{RECORD}")] if out.is_dir() else []
        hint = f"; there are {', '.join(sorted(known)[:20])}" if known else ""
        raise RaystarError(f"--resume {name}: {path} is not there{nearest(name, known)}{hint}")
    for file in (folder, *sorted(entry for entry in folder.iterdir() if entry.is_file())):
        # Whoever wrote these files says what is run and where; only the same user is trusted with that.
        if file.stat().st_uid != os.getuid():
            raise RaystarError(
                f"--resume {name}: {file} belongs to user {file.stat().st_uid}, not to you ({os.getuid()}); "
                "only sweeps of one's own are resumed"
            )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RaystarError(f"--resume {name}: {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        raise RaystarError(f"--resume {name}: {path}: expected the record of a sweep of raystar {__version__}")
    return content


def code() -> dict[str, str]:
    """What runs: versions, and a digest of every source file of raystar's."""
    package = Path(raystar.__file__).resolve().parent
    files = sorted(file for file in package.rglob("*") if file.suffix in (".py", ".cpp"))
    digests = {f"raystar/{file.relative_to(package)}": _digest(file) for file in files}
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}, **digests}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def differences(then: Mapping[str, Any], now: Mapping[str, Any], what: str) -> list[str]:
    """One line for each leaf of two mappings that differs."""
    old, new = dict(leaves("", then)), dict(leaves("", now))
    keys = [*old, *(key for key in new if key not in old)]
    absent = "nothing"
    return [
        f"{what}: {key}: {old.get(key, absent)} then, {new.get(key, absent)} now"
        for key in keys
        if old.get(key, absent) != new.get(key, absent)
    ]


def code_differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What ran and what runs: libraries, and files of raystar's one by one, or how many where there are many."""
    changes = differences(then, now, "code")
    files = [line for line in changes if line.startswith("code: raystar/")]
    if len(files) <= _LISTED:
        return changes
    others = [line for line in changes if line not in files]
    return [*others, f"code: {len(files)} of raystar's files are others, as in another version"]


def of_0_1(record: Mapping[str, Any]) -> bool:
    """Whether version 0.1 wrote a record, as it is. It holds every key; this one came later."""
    training = record["config"].get("training")
    return isinstance(training, Mapping) and "ema_epochs" not in training


def begun_by(record: Mapping[str, Any]) -> str:
    """The version of raystar that began a sweep. Records say so since 0.2."""
    return str(record.get("begun_by", "0.1.0" if of_0_1(record) else __version__))


def as_meant(content: Any, record: Mapping[str, Any]) -> Any:
    """The content of the space file of a sweep that 0.1 began, with what it took for open keys.

    The first rung is at a fifth of a run since, and ranks by the outlook. Of later sweeps the content is as it is.
    """
    if not isinstance(content, Mapping) or not of_0_1(record):
        return content
    scheduler = content.get("scheduler", {})
    if not isinstance(scheduler, Mapping):
        return content
    purpose = PURPOSES.get(str(content.get("purpose", QUALITY.name)), QUALITY)
    metric = content.get("metric", purpose.metric)
    once = {"finalists": 3} if purpose.models else {}  # nothing was trained again from other seeds
    return {**once, **content, "scheduler": {"grace_epochs": 1, "metric": metric, **scheduler}}


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of everything in nested mappings; sequences are values, as lists."""
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(f"{name}.{key}" if name else str(key), value[key])
    else:
        yield name, list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

"""Where a sweep's records and its trials' files go, and where those of one that is resumed lie now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from raystar.base.errors import RaystarError
from raystar.base.secrets import redact
from raystar.base.storage import Storage
from raystar.record.places import RUNS, Origins, find
from raystar.sweep.request import SweepRequest
from raystar.tracking.mlflow.address import STORE, absolute_uri, default_uri, sqlite_file, sqlite_uri
from raystar.tracking.mlflow.standing import has_runs
from raystar.tracking.spool import known_runs
from raystar.tracking.tracker import SPOOL

logger = logging.getLogger(__name__)


def tracking_uri(request: SweepRequest, name: str, before: Mapping[str, Any] | None) -> str:
    """Where records go; a resumed sweep stays with its store, wherever that lies now.

    Raises:
        RaystarError: its store is not there, or another is named that does not have its runs.
    """
    uri = absolute_uri(request.tracking_uri or default_uri(request.out))
    if before is None:
        return uri
    runs = known_runs(request.out / name / SPOOL)
    kept = str(before["tracking_uri"])
    then = find(kept, request.out)
    if redact(uri) in (then, kept):
        return uri
    if request.tracking_uri is not None:
        if has_runs(uri, runs):
            logger.info(f"the runs of sweep {name} were in {then} and are in {redact(uri)} now")
            return uri
        raise RaystarError(f"--tracking-uri: this sweep's runs are in {then}, not in {redact(uri)}")
    # Earlier versions wrote whole paths; a folder that was moved or copied since has the store with it.
    own = sqlite_uri(request.out.resolve() / STORE)
    if "began_in" not in before and sqlite_file(then) is not None and runs and has_runs(own, runs):
        return own
    if redact(then + "x") != then + "x":
        raise RaystarError(f"--tracking-uri: this sweep's runs are in {then}; give it again, with its password")
    file = sqlite_file(then)
    if file is not None and not (file.is_file() if runs else file.parent.is_dir()):
        raise RaystarError(
            f"--resume {name}: this sweep's runs are in {then}, which is not there; say where it lies now with "
            "--tracking-uri"
        )
    return absolute_uri(then)


def shared_storage(request: SweepRequest, name: str, before: Mapping[str, Any] | None) -> Storage | None:
    """Where trials keep their files, if not in the runs folder; those of a resumed sweep lie where they lie.

    Raises:
        RaystarError: they are not there, or not where it is said.
    """
    given = Storage(request.storage) if request.storage else None
    then = (before or {}).get("storage")
    if before is None or (then is None and given is None):
        return given
    known = Storage(Origins(before, request.out).path(find(str(then), request.out)) if then else str(request.out))
    if given is None:
        begun = known_runs(request.out / name / SPOOL)
        if begun and not str(then).startswith(RUNS) and known.path is not None and not known.path.is_dir():
            raise RaystarError(
                f"--resume {name}: its trials' files are in {known.uri}, which is not there; say where they lie now "
                "with --storage"
            )
        return known
    if given.uri != known.uri and not given.child(name).list("trials"):
        raise RaystarError(
            f"--storage: the files of this sweep's trials are in {redact(known.uri)}, not in {redact(given.uri)}"
        )
    return given

"""Ray, here or on other machines: starting and joining it, what its nodes have, and work that each of them must do.

Nodes come and go while a sweep runs. What is checked here is checked on the nodes of the moment; what trials need is
therefore also within reach of a node that joins later (`ensure_local`).
"""

from __future__ import annotations

import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raystar.base.console import shows
from raystar.base.errors import RaystarError, in_short
from raystar.base.limits import NODE, limit
from raystar.base.secrets import redact
from raystar.base.storage import Storage

_SHOW_AFTER_S = 2.0
_STEERING_CPUS = 0.01
"""What the function that steers a group of workers takes beside them."""


# -- nodes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.host} ({self.address}, node {self.id[:8]})"


def nodes() -> list[Node]:
    """The nodes that are alive, in a fixed order."""
    import ray

    alive = [
        Node(
            each["NodeID"],
            each["NodeManagerHostname"],
            each["NodeManagerAddress"],
            each["Resources"].get("CPU", 0.0),
            each["Resources"].get("GPU", 0.0),
        )
        for each in ray.nodes()
        if each["Alive"]
    ]
    return sorted(alive, key=lambda node: (node.host, node.id))


def check_resources(cpus: float, gpus: float, workers: int, where: str) -> int:
    """How many trials the cluster's nodes hold side by side. A worker fits on one node; a group of them may spread.

    Args:
        cpus: processors of each worker.
        gpus: GPUs of each worker, a share of one or whole ones.
        where: what to name in an error, for example `loss.yaml: resources`.

    Raises:
        RaystarError: not a single trial fits.
    """
    alive = nodes()
    fit = trials_that_fit([(node.cpus, node.gpus) for node in alive], cpus, gpus, workers)
    if fit:
        return fit
    trial = "a trial wants" if workers == 1 else f"{workers} workers want, each,"
    largest = max(alive, key=lambda node: (node.gpus, node.cpus) if gpus else (node.cpus, node.gpus))
    raise RaystarError(
        f"{where}: {trial} {cpus:g} processors and {gpus:g} GPUs; the largest of {len(alive)} nodes, {largest}, has "
        f"{largest.cpus:g} and {largest.gpus:g}"
    )


def trials_that_fit(sizes: Iterable[tuple[float, float]], cpus: float, gpus: float, workers: int) -> int:
    """Trials of `workers` workers that fit on nodes with these (processors, GPUs)."""
    sizes = list(sizes)

    def slots(node: tuple[float, float], taken: float = 0.0) -> int:
        fit = int((node[0] - taken) / cpus + 1e-6)
        if not gpus:
            return fit
        # A share of a GPU lies on one GPU: three times 0.4 need two.
        on_gpus = int(node[1]) * int(1 / gpus + 1e-6) if gpus < 1 else int(node[1] / gpus + 1e-6)
        return min(fit, on_gpus)

    total = sum(map(slots, sizes))
    if workers == 1:
        return total
    # What steers the groups needs a little of some node's processors.
    for groups in range(total // workers, 0, -1):
        for host in sizes:
            if total - slots(host) + slots(host, groups * _STEERING_CPUS) >= groups * workers:
                return groups
    return 0


def check_tracking(uri: str) -> None:
    """Refuses a store in files where several nodes work on a sweep.

    Raises:
        RaystarError: with the command that starts a server.
    """
    if not uri.startswith(("sqlite", "file:")) and "://" in uri:
        return
    count = len(nodes())
    if count > 1:
        store = uri if uri.startswith("sqlite") else "sqlite:///mlflow.db"
        raise RaystarError(
            f"--tracking-uri {uri}: is a file of one machine, and the cluster has {count} nodes; start a server, "
            f"`mlflow server --backend-store-uri {shlex.quote(store)} --host 127.0.0.1 --port 5000`, "
            "and name it: --tracking-uri http://127.0.0.1:5000"
        )


def on_every_node(function: Callable[..., Any], *args: Any, what: str, wait: str = NODE) -> dict[Node, Any]:
    """Runs a module's function once on every node, at the same time and beside whatever runs there.

    Args:
        what: a few words of what is done, for the line that tells of it and for errors.
        wait: the limit of `base.limits` that ends it.

    Raises:
        RaystarError: naming each node on which it failed or did not end in time, and why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = nodes()
    remote = ray.remote(function)
    running = {}
    for node in alive:
        here = NodeAffinitySchedulingStrategy(node.id, soft=False)
        running[remote.options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(*args)] = node
    results: dict[Node, Any] = {}
    failed: dict[Node, str] = {}
    began, shown, timeout_s = time.monotonic(), False, limit(wait)
    while running and time.monotonic() - began < timeout_s:
        for ready in ray.wait(list(running), timeout=0.2)[0]:
            node = running.pop(ready)
            try:
                results[node] = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                failed[node] = in_short(error.cause)
            except ray.exceptions.RayError as error:
                failed[node] = in_short(error)
        if shows() and time.monotonic() - began > _SHOW_AFTER_S and (running or shown):
            shown = True
            print(f"\r{what}: {len(alive) - len(running)} of {len(alive)} nodes", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
    for task, node in running.items():
        ray.cancel(task, force=True)
        failed[node] = f"no answer within {timeout_s:g} s ({wait} sets how long to wait)"
    if failed:
        reasons = "\n  ".join(f"{node}: {reason}" for node, reason in sorted(failed.items(), key=lambda f: f[0].host))
        raise RaystarError(f"{what} failed on {len(failed)} of {len(alive)} nodes:\n  {reasons}")
    return results


# -- the storage -----------------------------------------------------------------------------------


def probe_storage(uri: str) -> None:
    """Has every node write a file into the storage, and read what all the others and this process wrote.

    Raises:
        RaystarError: naming the nodes that cannot, and why.
    """
    storage = Storage(uri)
    folder = f"probe-{secrets.token_hex(4)}"
    where = f"--storage {redact(storage.uri)}"
    try:
        contents = dict([_here(f"writing to {where}", _probe_write, storage.uri, folder)])
        written = on_every_node(_probe_write, storage.uri, folder, what=f"writing to {where}")
        contents |= dict(written.values())
        _here(f"reading from {where}", _probe_read, storage.uri, folder, contents)
        on_every_node(_probe_read, storage.uri, folder, contents, what=f"reading from {where}")
    finally:
        _remove_probe(storage, folder)


def _here(what: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    # Every kind of storage has its own kinds of errors.
    except Exception as error:
        raise RaystarError(f"{what} failed on this machine: {in_short(error)}") from None


def _probe_write(uri: str, folder: str) -> tuple[str, str]:
    name, content = secrets.token_hex(4), secrets.token_hex(8)
    Storage(uri).write(f"{folder}/{name}", content.encode())
    return name, content


def _probe_read(uri: str, folder: str, contents: Mapping[str, str]) -> None:
    storage = Storage(uri)
    for name, content in contents.items():
        try:
            stored = storage.read(f"{folder}/{name}").decode(errors="replace")
        except FileNotFoundError:
            stored = None
        if stored != content:
            raise RaystarError("does not see what other nodes write there; it must be one place for all of them")


def _remove_probe(storage: Storage, folder: str) -> None:
    # Whether the storage can be used has been checked by now.
    with suppress(Exception):
        for name in storage.list(folder):
            storage.delete(f"{folder}/{name}")
        if storage.path is not None:
            (storage.path / folder).rmdir()

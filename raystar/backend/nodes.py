"""Ray, here or on other machines: starting and joining it, what its nodes have, and work that each of them must do.

Nodes come and go while a sweep runs. What is checked here is checked on the nodes of the moment; what trials need is
therefore also within reach of a node that joins later (`ensure_local`).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import json
import logging
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import raystar
from raystar.base.errors import RaystarError
from raystar.base.files import cache_dir as own_cache
from raystar.base.secrets import redact
from raystar.base.storage import Storage
from raystar.config.load import from_mapping
from raystar.config.schema import Config
from raystar.data.bank import Bank, open_bank
from raystar.data.listing import data_root

_OBJECT_STORE_BYTES = 128 * 2**20  # trials exchange nothing but small results
_NAMESPACE = "raystar"
_CONNECT_TIMEOUT_S = 5.0
_JOIN_TIMEOUT_S = 40.0
_SHOW_AFTER_S = 2.0
_STEERING_CPUS = 0.01
"""What the function that steers a group of workers takes beside them."""


# -- starting and joining --------------------------------------------------------------------------


def start(
    address: str | None, *, cpus: int, environment: Mapping[str, str], shared: Mapping[str, str] | None = None
) -> None:
    """Starts Ray on this machine, or joins the cluster at `address`, without a word on the terminal.

    Args:
        address: `HOST:PORT` of a running cluster's head; None starts one here that ends with this process.
        cpus: processors of the one that is started here.
        environment: set in this process before Ray is imported, and in a joined cluster's workers. The workers of a
            Ray that is started here inherit it.
        shared: set in a joined cluster's workers alone.

    Raises:
        RaystarError: Ray cannot be started; nothing answers at `address`, or it is another version, or wants a token.
    """
    for name, value in environment.items():
        if os.environ.get(name) != value:  # threads may be reading
            os.environ[name] = value
    settle_token(create=address is None)
    if address is not None:
        _try_to_join(address)
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": _NAMESPACE}
    if address is None:
        options |= {
            "address": "local",  # a cluster that happens to run on this machine is not meant
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    else:
        code = str(Path(raystar.__file__).resolve().parent)
        variables = {**environment, **(shared or {})}
        options |= {"address": address, "runtime_env": {"py_modules": [code], "env_vars": variables}}
    try:
        ray.init(**options)
    # Ray has no one kind of error for it.
    except Exception as error:
        where = "Ray cannot be started" if address is None else f"--address {address}: cannot be joined"
        raise RaystarError(f"{where}: {(str(error).strip().splitlines() or ['unknown reason'])[0]}") from None
    _silence()


def stop() -> None:
    """Leaves the cluster, or ends the one that `start` started."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def _silence() -> None:
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # When a node is lost, Ray prints forty lines of its log over the table; no option of its own prevents that.
    # Should it rename the function, the lines are merely printed.
    worker: Any = importlib.import_module("ray._private.worker")
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *data, **settings: None


def token_file() -> Path:
    """Where Ray keeps the token that all processes of a cluster share."""
    found = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(found).expanduser() if found else Path.home() / ".ray" / "auth_token"


def settle_token(create: bool) -> None:
    """Switches token authentication on where there is a token, and makes its file private.

    Args:
        create: make one if there is none. Ray would do so itself, readable by everybody.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        return
    path = token_file()
    if not os.environ.get("RAY_AUTH_TOKEN"):
        try:
            if create and not path.exists():
                _make_token(path)
            _make_private(path)
        except OSError as error:
            raise RaystarError(
                f"{path}: Ray's authentication token cannot be kept there ({error.strerror}); name another file in "
                "RAY_AUTH_TOKEN_PATH"
            ) from None
    # A cluster without authentication takes a driver that has a token as well.
    if mode is None and (os.environ.get("RAY_AUTH_TOKEN") or path.exists()):
        os.environ["RAY_AUTH_MODE"] = "token"


def _make_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # Private from its first moment, and whole when it gets its name; who comes second takes the first one's.
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _make_private(path: Path) -> None:
    with suppress(FileNotFoundError):
        found = path.stat()
        if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(0o600)


# Ray tries for a minute, writes to the terminal meanwhile and may end the process that asks: another one asks first.
_JOINING = """
import json, sys
try:
    import ray
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL", namespace="raystar")
except BaseException as error:
    print(json.dumps([type(error).__name__, str(error)]), flush=True)
else:
    print(json.dumps(["", ""]), flush=True)
    ray.shutdown()
"""


def _try_to_join(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        raise RaystarError(f"--address {address}: expected HOST:PORT of the cluster's head, as `ray start` printed it")
    nobody = RaystarError(f"--address {address}: no Ray cluster answers there; start one with: ray start --head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError):
        raise nobody from None
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _JOINING, address],
            env={**os.environ, "RAY_gcs_server_port_wait_time_s": "3"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_JOIN_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise nobody from None
    kind, reason = json.loads((asked.stdout.splitlines() or ['["", "ended"]'])[-1])
    if not reason:
        return
    if kind == "AuthenticationError" or "InvalidAuthToken" in asked.stderr:
        held = os.environ.get("RAY_AUTH_MODE") == "token" and kind != "AuthenticationError"
        source = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(token_file())
        raise RaystarError(
            f"--address {address}: the cluster wants a token, and "
            + (f"{source} holds another one" if held else f"there is none in {source}")
            + f"; copy the head's (`ray get-auth-token` prints it) to {token_file()}, readable by you alone"
        )
    if "Version mismatch" in reason:
        lines = [line.strip() for line in reason.splitlines() if line.strip().startswith(("Ray:", "Python:"))]
        theirs, ours = " and ".join(lines[:2]), " and ".join(lines[2:])
        raise RaystarError(f"--address {address}: the cluster runs {theirs}, this is {ours}; they must be the same")
    raise nobody


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

    found = [
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
    return sorted(found, key=lambda node: (node.host, node.id))


def check_resources(cpus: float, gpus: float, workers: int, where: str) -> int:
    """How many trials the cluster's nodes hold side by side. A worker fits on one node; a group of them may spread.

    Args:
        cpus: processors of each worker.
        gpus: GPUs of each worker, a share of one or whole ones.
        where: what to name in an error, for example `loss.yaml: resources`.

    Raises:
        RaystarError: not a single trial fits.
    """
    there = nodes()
    fit = trials_that_fit([(node.cpus, node.gpus) for node in there], cpus, gpus, workers)
    if fit:
        return fit
    trial = "a trial wants" if workers == 1 else f"{workers} workers want, each,"
    largest = max(there, key=lambda node: (node.gpus, node.cpus) if gpus else (node.cpus, node.gpus))
    raise RaystarError(
        f"{where}: {trial} {cpus:g} processors and {gpus:g} GPUs; the largest of {len(there)} nodes, {largest}, has "
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
    if uri.partition(":")[0] not in ("sqlite", "file") and "://" in uri:
        return
    there = len(nodes())
    if there > 1:
        store = uri if uri.startswith("sqlite:") else "sqlite:///mlflow.db"
        raise RaystarError(
            f"--tracking-uri {uri}: is a file of one machine, and the cluster has {there} nodes; start a server, "
            f"`mlflow server --backend-store-uri {store} --host 127.0.0.1 --port 5000`, "
            "and name it: --tracking-uri http://127.0.0.1:5000"
        )


def on_every_node(function: Callable[..., Any], *args: Any, timeout_s: float, what: str) -> dict[Node, Any]:
    """Runs a module's function once on every node, at the same time and beside whatever runs there.

    Args:
        what: a few words of what is done, for the line that tells of it and for errors.

    Raises:
        RaystarError: naming each node on which it failed or did not end in time, and why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = nodes()
    remote = ray.remote(function)
    running = {}
    for node in there:
        here = NodeAffinitySchedulingStrategy(node.id, soft=False)
        running[remote.options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(*args)] = node
    results: dict[Node, Any] = {}
    failed: dict[Node, str] = {}
    began, shown = time.monotonic(), False
    while running and time.monotonic() - began < timeout_s:
        for ready in ray.wait(list(running), timeout=0.2)[0]:
            node = running.pop(ready)
            try:
                results[node] = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                failed[node] = _in_short(error.cause)
            except ray.exceptions.RayError as error:
                failed[node] = _in_short(error)
        if time.monotonic() - began > _SHOW_AFTER_S and (running or shown):
            shown = True
            print(f"\r{what}: {len(there) - len(running)} of {len(there)} nodes", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
    for task, node in running.items():
        ray.cancel(task, force=True)
        failed[node] = f"no answer within {timeout_s:g} s"
    if failed:
        reasons = "\n  ".join(f"{node}: {reason}" for node, reason in sorted(failed.items(), key=lambda f: f[0].host))
        raise RaystarError(f"{what} failed on {len(failed)} of {len(there)} nodes:\n  {reasons}")
    return results


def _in_short(error: BaseException) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return reason if isinstance(error, RaystarError) else f"{type(error).__name__}: {reason}"


# -- the storage -----------------------------------------------------------------------------------


def probe_storage(uri: str, *, timeout_s: float = 60.0) -> None:
    """Has every node write a file into the storage, and read what all the others and this process wrote.

    Raises:
        RaystarError: naming the nodes that cannot, and why.
    """
    storage = Storage(uri)
    folder = f"probe-{secrets.token_hex(4)}"
    shown = f"--storage {redact(storage.uri)}"
    try:
        wanted = dict([_here(f"writing to {shown}", _probe_write, storage.uri, folder)])
        written = on_every_node(_probe_write, storage.uri, folder, timeout_s=timeout_s, what=f"writing to {shown}")
        wanted |= dict(written.values())
        _here(f"reading from {shown}", _probe_read, storage.uri, folder, wanted)
        on_every_node(_probe_read, storage.uri, folder, wanted, timeout_s=timeout_s, what=f"reading from {shown}")
    finally:
        _remove_probe(storage, folder)


def _here(what: str, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    # Every kind of storage has its own kinds of errors.
    except Exception as error:
        raise RaystarError(f"{what} failed on this machine: {_in_short(error)}") from None


def _probe_write(uri: str, folder: str) -> tuple[str, str]:
    name, content = secrets.token_hex(4), secrets.token_hex(8)
    Storage(uri).write(f"{folder}/{name}", content.encode())
    return name, content


def _probe_read(uri: str, folder: str, wanted: Mapping[str, str]) -> None:
    storage = Storage(uri)
    for name, content in wanted.items():
        try:
            found = storage.read(f"{folder}/{name}").decode(errors="replace")
        except FileNotFoundError:
            found = None
        if found != content:
            raise RaystarError("does not see what other nodes write there; it must be one place for all of them")


def _remove_probe(storage: Storage, folder: str) -> None:
    # Whether the storage can be used has been told by now.
    with suppress(Exception):
        for name in storage.list(folder):
            storage.delete(f"{folder}/{name}")
        if storage.path is not None:
            (storage.path / folder).rmdir()


# -- the data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """Files that every node's cache folder must hold, and where a node that lacks them finds them."""

    storage: str
    """Path or URI of the folder that holds copies."""
    files: tuple[tuple[str, int, str], ...]
    """Name, size and SHA-256 of each."""
    driver_cache: str
    """The driver's cache folder: also a node's, where it sees those files there."""
    named_cache: str | None
    """`data.cache_dir`."""

    def folder(self) -> Path:
        """The cache folder of the node that asks."""
        if self.named_cache is not None:
            return Path(self.named_cache).expanduser()
        driver = Path(self.driver_cache)
        return driver if self.held(driver) else own_cache()

    def held(self, folder: Path) -> bool:
        """Whether a folder holds all files, going by their sizes: each was checked before it got its name."""
        try:
            return all((folder / name).stat().st_size == size for name, size, _ in self.files)
        except OSError:
            return False


def place_data(
    config: Mapping[str, Any], bank: Bank, cache: Path, others: Iterable[Path], storage: Storage, *, timeout_s: float
) -> Placed:
    """Copies the packed latents and other files of the cache into the storage, and has every node take them.

    Args:
        config: the configuration, as a mapping.
        cache: this process's cache folder, where `bank` was opened.
        others: more files in it that must be the same bits on all nodes: the ruler's features.

    Raises:
        RaystarError: a node holds other latents under `data.data_root`, or cannot take the files.
    """
    paths = [cache / f"latents-{bank.key}.npy", cache / f"latents-{bank.key}.json", *others]
    placed = Placed(
        storage.uri,
        tuple((path.name, path.stat().st_size, _sha256(path)) for path in paths),
        str(cache),
        from_mapping(config, "sweep").data.cache_dir,
    )
    for path in paths:
        storage.fill(path.name, functools.partial(shutil.copyfile, path))
    on_every_node(_place_here, placed, config, bank.key, bank.digest, timeout_s=timeout_s, what="placing the latents")
    return placed


def ensure_local(placed: Placed, *, thorough: bool = False) -> Path:
    """The cache folder of this node, which holds all files afterwards; what is missing is copied from the storage.

    Args:
        thorough: read the files that are there, and replace those that are not as they should be.

    Raises:
        RaystarError: what the storage holds is not what was placed there.
    """
    folder = placed.folder()
    if not thorough and placed.held(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # One process of the node copies, the others wait for it.
    with (folder / "placing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, size, digest in placed.files:
            path = folder / name
            there = path.is_file() and path.stat().st_size == size
            if not there or (thorough and _sha256(path) != digest):
                _fetch(Storage(placed.storage), name, digest, path)
    return folder


def _fetch(storage: Storage, name: str, digest: str, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with storage.fetched(name) as source:
            shutil.copyfile(source, temporary)
        found = _sha256(temporary)
        if found != digest:
            raise RaystarError(f"{redact(storage.at(name))}: arrived with SHA-256 {found[:16]}, expected {digest[:16]}")
        os.replace(temporary, path)
    except FileNotFoundError:
        raise RaystarError(f"{redact(storage.at(name))}: is gone from the storage; start again") from None
    finally:
        temporary.unlink(missing_ok=True)


def _place_here(placed: Placed, mapping: Mapping[str, Any], key: str, digest: str) -> str:
    """What each node does in `place_data`; its cache folder."""
    config = from_mapping(mapping, "sweep")
    folder = placed.folder()
    if folder != Path(placed.driver_cache) or not placed.held(folder):
        _check_roots(config, digest, key, folder)
    return str(ensure_local(placed, thorough=True))


def _check_roots(config: Config, digest: str, key: str, folder: Path) -> None:
    """Latents that this node has are the driver's; packed here, they need not be copied."""
    roots = [config.data.data_root, *([config.data.eval_data_root] if config.data.eval_data_root is not None else [])]
    if not all(data_root(root).exists() for root in roots):
        return
    bank = open_bank(config, folder, verbose=False)
    if bank.digest != digest:
        raise RaystarError(
            f"data.data_root: {data_root(roots[0])} holds other latents (digest {bank.digest}) than the driver's "
            f"({digest}); make them the same, or move them away: the driver's are then copied"
        )
    for suffix in ("npy", "json"):
        with suppress(FileExistsError):
            os.link(folder / f"latents-{bank.key}.{suffix}", folder / f"latents-{key}.{suffix}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Ray: started here, or joined where it runs; its token and its silence."""

from __future__ import annotations

import importlib
import json
import logging
import os
import secrets
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import raystar
from raystar.base.errors import RaystarError
from raystar.base.files import home
from raystar.base.limits import JOIN, limit
from raystar.base.scratch import SCRATCH_BYTES, check_scratch, refuses

_OBJECT_STORE_BYTES = 128 * 2**20  # trials exchange nothing but small results
_NAMESPACE = "raystar"
_CONNECT_TIMEOUT_S = 5.0
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of a socket's path; the system takes no more
_LONGEST_SOCKET = "session_2000-01-01_00-00-00_000000_{pid}/sockets/plasma_store"


def check_machine(address: str | None) -> None:
    """Refuses what would keep Ray from starting on this machine, or from joining; starts and leaves nothing.

    Args:
        address: of a running cluster, whose own machines keep sockets and logs; None for a Ray of one's own.

    Raises:
        RaystarError: naming the folder that is full, cannot be written or has too long a path, and the variable that
            names another one.
    """
    check_scratch()
    if address is None:
        _check_folder()
        _check_token()


def _check_folder() -> None:
    """Ray's sockets and logs have a place."""
    # As Ray 2.60 looks for it.
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform.startswith("linux") else ("RAY_TMPDIR",)
    name = next((name for name in names if name in os.environ), None)
    above = os.environ[name] if name is not None else "/tmp"
    folder = os.path.join(above, "ray")
    shown = f"{name}={above}" if name is not None else above
    length = len(os.fsencode(os.path.join(folder, _LONGEST_SOCKET.format(pid=os.getpid()))))
    if length > _SOCKET_BYTES:
        raise RaystarError(
            f"{shown}: Ray's sockets there would have paths of {length} bytes, and the system takes {_SOCKET_BYTES}; "
            "set RAY_TMPDIR to a folder with a short path, for example RAY_TMPDIR=/tmp"
        )
    if (why := refuses(Path(folder), SCRATCH_BYTES)) is not None:
        raise RaystarError(
            f"{shown}: Ray cannot keep its files there ({why}); free some space, or set RAY_TMPDIR to another folder "
            "with a short path"
        )


def start(
    address: str | None, *, cpus: int, environment: Mapping[str, str], shared: Mapping[str, str] | None = None
) -> None:
    """Starts Ray on this machine, or joins the cluster at `address`, silently.

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
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(path).expanduser() if path else home() / ".ray" / "auth_token"


def settle_token(create: bool) -> None:
    """Switches token authentication on where there is a token, and makes its file private.

    Args:
        create: make one if there is none. Ray would do so itself, readable by everybody.
    """
    if not _uses_token():
        return
    path = token_file()
    if not os.environ.get("RAY_AUTH_TOKEN"):
        try:
            if create and not path.exists():
                _make_token(path)
            _make_private(path)
        except OSError as error:
            raise _no_place_for_token(path, error.strerror or str(error)) from None
    # A cluster without authentication takes a driver that has a token as well.
    if os.environ.get("RAY_AUTH_MODE") is None and (os.environ.get("RAY_AUTH_TOKEN") or path.exists()):
        os.environ["RAY_AUTH_MODE"] = "token"


def _uses_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "token").lower() == "token"


def _check_token() -> None:
    """There is a token, or a place for one."""
    if not _uses_token() or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_file()
    try:
        why = None if path.exists() else refuses(path.parent)
    except OSError as error:
        why = error.strerror or str(error)
    if why is not None:
        raise _no_place_for_token(path, why)


def _no_place_for_token(path: Path, why: str) -> RaystarError:
    return RaystarError(
        f"{path}: the token of Ray's processes cannot be kept there ({why}); name a file that can be written in "
        "RAY_AUTH_TOKEN_PATH"
    )


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
        info = path.stat()
        if info.st_uid == os.getuid() and stat.S_IMODE(info.st_mode) & 0o077:
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
            timeout=limit(JOIN),
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


# Read by Ray while it is imported.
RAY_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", ""),  # as raystar/__init__.py or the user has set it
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    # A trial that was given no GPU sees none: with `device: auto` all of them would train on the first at once.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Tune gives a stopped trial's thread two seconds to leave before it reuses the process, and on a busy machine
    # drops the next trial silently when that is too short (LOG.md). It leaves by itself: wait for it.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # The sweep's own journal is what a sweep is resumed from; writing Tune's state costs more with every trial.
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    # For trials of several workers: reports are passed on five times a second, a group waits as long as it must for
    # its processors, and nobody watches for a cloud that takes machines back (one more process a trial).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

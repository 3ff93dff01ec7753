"""Where the MLflow store is, and whether it answers."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from raystar.base.errors import RaystarError
from raystar.base.limits import MLFLOW, limit
from raystar.base.secrets import in_a_line, redact

_SPELLED = "sqlite+pysqlite:///"
STORE = "mlflow.db"
"""Name of the SQLite store in a runs folder."""


def default_uri(out: Path) -> str:
    """MLFLOW_TRACKING_URI, or the SQLite store in the output folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(out.resolve() / STORE)


def sqlite_uri(path: Path) -> str:
    """The tracking URI of a SQLite file, whatever its folders are called.

    SQLAlchemy takes what follows a `?` for options, and `%41` for A, or not, depending on its version. MLflow makes the
    folder of `sqlite:///` as it is written, so what is written otherwise names the driver as well.

    Raises:
        RaystarError: this version of SQLAlchemy cannot be told such a path.
    """
    escaped = quote(os.fsencode(path))
    spellings = (f"sqlite:///{path}", f"{_SPELLED}{escaped}", f"{_SPELLED}file:{escaped}?uri=true")
    for uri in spellings:
        if sqlite_file(uri) == path:
            return uri
    raise RaystarError(f"{path}: the MLflow store cannot be in a folder of this name; choose another --out")


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store's URI; None of another store's."""
    if not uri.startswith(("sqlite:///", _SPELLED)):
        return None
    if not {"?", "%"} & set(uri):
        return Path(uri.partition(":///")[2])
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    file = url.database or ""
    return Path(unquote(file.removeprefix("file:")) if "uri" in url.query else file)


def absolute_uri(uri: str) -> str:
    """A tracking URI that means the same in every working folder; one with options of SQLAlchemy's stays as it is."""
    file = sqlite_file(uri)
    if file is None or file.is_absolute() or uri != sqlite_uri(file):
        return uri
    return sqlite_uri(Path(os.path.abspath(file)))


def check_uri(uri: str, *, writes: bool = True) -> None:
    """Refuses a tracking URI that cannot work, before anything starts.

    Args:
        writes: the store must take records; one that may only be read will do otherwise.

    Raises:
        RaystarError: a scheme that MLflow's tracking does not take here, a file that is no database, an address
            where no MLflow server answers, or one that refuses the credentials.
    """
    scheme = uri.partition(":")[0]
    if scheme in ("http", "https"):
        _check_server(uri)
        return
    if (file := sqlite_file(uri)) is not None:
        _check_sqlite(file, writes)
        return
    if scheme in ("postgresql", "mysql", "mssql") or "+" in scheme:
        return
    raise RaystarError(
        f"--tracking-uri {redact(uri)}: expected sqlite:///FILE, a database URI or http(s)://HOST:PORT; "
        "plain folders are no longer a store of MLflow's"
    )


def _check_sqlite(path: Path, writes: bool) -> None:
    """The file is a SQLite database or, to be written, can become one."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(16) != b"SQLite format 3\0":
                raise RaystarError(f"--tracking-uri: {path}: expected a SQLite database, found another kind of file")
    elif path.is_dir():
        raise RaystarError(f"--tracking-uri: {path}: expected a SQLite database, found a folder")
    if not writes:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RaystarError(f"--tracking-uri: {path.parent}: cannot be made: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RaystarError(f"--tracking-uri: {path}: cannot be written")


def _check_server(uri: str) -> None:
    """An MLflow server answers at `uri`, and lets us in."""
    where = f"--tracking-uri {redact(uri)}"
    try:
        status, body = ask(uri, "version")
    except (OSError, ValueError) as error:
        raise RaystarError(
            f"{where}: nothing answers there ({in_a_line(error)}); start a server, for example "
            "mlflow server --backend-store-uri sqlite:///mlflow.db --port 5000"
        ) from None
    if status == 403 and "host header" in body.lower():
        raise RaystarError(f"{where}: the server refuses this host name; start it with --allowed-hosts, or use its IP")
    if status in (401, 403):
        raise RaystarError(
            f"{where}: the server {'asks for' if status == 401 else 'refuses these'} credentials; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to valid ones"
        )
    if status >= 500:
        raise RaystarError(f"{where}: the server there is out of order (HTTP status {status}); look at its log")
    if status != 200 or not re.fullmatch(r"\d+\.\d+\S*", body.strip()):
        raise RaystarError(f"{where}: what answers there is no MLflow server (HTTP status {status} for /version)")


def ask(uri: str, path: str, params: Mapping[str, str] | None = None, most: int = 500) -> tuple[int, str]:
    """HTTP status and text of what a server has at `path`, asked for as MLflow's own client would ask.

    Args:
        most: bytes that are read.

    Raises:
        OSError, ValueError: nothing answers.
    """
    import requests

    env = os.environ.get
    headers, auth = {}, None
    user, password = env("MLFLOW_TRACKING_USERNAME"), env("MLFLOW_TRACKING_PASSWORD")
    if not user or not password:
        user, password = _credentials_file()
    if user and password:
        auth = (user, password)
    elif env("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {env('MLFLOW_TRACKING_TOKEN')}"
    if urlsplit(uri).username:
        auth = None  # requests takes the URI's
    insecure = (env("MLFLOW_TRACKING_INSECURE_TLS") or "").lower() in ("true", "1")
    verify = False if insecure else env("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    with (
        warnings.catch_warnings(action="ignore"),
        requests.get(  # it warns of what the user asked for
            f"{uri.rstrip('/')}/{path}",
            params,
            headers=headers,
            auth=auth,
            verify=verify,
            timeout=limit(MLFLOW),
            stream=True,
        ) as answer,
    ):
        return answer.status_code, answer.raw.read(most, decode_content=True).decode(errors="replace")


def _credentials_file() -> tuple[str | None, str | None]:
    """User and password that MLflow keeps in the home folder."""
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError):
        parser.read(Path("~/.mlflow/credentials").expanduser())
    user, password = (parser.get("mlflow", f"mlflow_tracking_{key}", fallback=None) for key in ("username", "password"))
    return user, password

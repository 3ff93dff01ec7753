"""Starting and joining Ray, and what every node must do: on two nodes of this machine, with token authentication."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raystar.backend import nodes as cluster
from raystar.backend import placing, ray_start
from raystar.base.console import show
from raystar.base.errors import RaystarError
from raystar.base.storage import Storage
from raystar.config.load import to_mapping
from raystar.data.bank import open_bank, reopen_bank
from tests.kit.cluster import ClusterProcess
from tests.kit.cluster import cluster as running_cluster
from tests.kit.support import ROOT, tiny_config, write_latents

pytestmark = pytest.mark.slow

PROBE_READ = cluster._probe_read
DRIVER = """
import json, os, sys
from raystar.backend import ray_start
from raystar.base.errors import RaystarError
from tests.backend import test_cluster as tests

address, check, *arguments = sys.argv[1:]
try:
    ray_start.start(address or None, cpus=1, environment={"RAYSTAR_TEST_SHARED": "everywhere"})
    print(json.dumps(getattr(tests, check)(*arguments)))
except RaystarError as error:
    print(json.dumps({"error": str(error)}))
finally:
    ray_start.stop()
"""


def drive(address: str, check: str, *arguments: str, **environment: str) -> tuple[Any, str]:
    """What the function `check` of this file gives in a process that has joined a cluster, and what that printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, address, check, *arguments],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *printed, answer = done.stdout.splitlines()
    return json.loads(answer), "\n".join(printed) + done.stderr


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text("0123456789abcdef" * 4)
    return path


@pytest.fixture(scope="module")
def two(token: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    """A cluster of a head with two processors, and a node with three; their processes have different homes."""
    homes = tmp_path_factory.mktemp("homes")
    with running_cluster(token=token) as found:
        found.add(2, {"HOME": str(homes / "first")})
        found.add(3, {"HOME": str(homes / "second"), "RAYSTAR_TEST_NODE": "second"})
        found.homes = homes
        yield found


# -- what runs in the driver, and on the nodes -----------------------------------------------------


def _slow() -> None:
    os.environ["RAYSTAR_NODE_TIMEOUT_S"] = "3"
    try:
        cluster.on_every_node(_slow_on_second, what="being slow")
    finally:
        del os.environ["RAYSTAR_NODE_TIMEOUT_S"]


def look() -> dict[str, Any]:
    show()
    began = time.monotonic()
    found = cluster.on_every_node(_environment, what="looking")
    took = time.monotonic() - began
    tracking = []
    for uri in ("sqlite:///x.db", "file:///mlruns", "mlruns", "http://127.0.0.1:5000", "postgresql://u:p@h/d"):
        tracking.append(_error(lambda uri=uri: cluster.check_tracking(uri)))
    return {
        "nodes": [node.cpus for node in cluster.nodes()],
        "environment": list(found.values()),
        "took": took,
        "failing": _error(lambda: cluster.on_every_node(_fail_on_second, what="failing")),
        "slow": _error(_slow),
        "tracking": tracking,
        "fit": [cluster.check_resources(cpus, 0, workers, "x") for cpus, workers in ((1, 1), (2, 1), (3, 1), (2, 2))],
        "none fits": _error(lambda: cluster.check_resources(4, 0, 1, "space.yaml: resources")),
    }


def probe(folder: str) -> dict[str, Any]:
    cluster.probe_storage(folder)
    found = {
        "left": os.listdir(folder),
        "memory": _error(lambda: cluster.probe_storage("memory://x")),  # every process has its own
        "nowhere": _error(lambda: cluster.probe_storage("/proc/none")),
    }
    cluster._probe_read = _read_but_not_on_second
    found["blind"] = _error(lambda: cluster.probe_storage(folder))
    return found


def _read_but_not_on_second(uri: str, folder: str, wanted: dict[str, str]) -> None:
    """As on a node where another disk is mounted in the same place."""
    PROBE_READ(uri, f"{folder}-elsewhere" if "RAYSTAR_TEST_NODE" in os.environ else folder, wanted)


def place(folder: str) -> dict[str, Any]:
    """Places tiny latents on nodes that share no cache folder; then again without the latents; then with others."""
    root, cache = Path(folder, "latents"), Path(folder, "cache")
    bank = open_bank(tiny_config(root), cache)
    more = cache / "ruler-1.safetensors"
    more.write_bytes(b"the same bits everywhere")

    def put(step: str) -> placing.Placed:
        config = to_mapping(tiny_config(root, data__cache_dir=f"~/{step}"))  # each node has a home of its own
        return placing.place_data(config, bank, cache, [more], Storage(f"{folder}/storage"))

    placed = put("packed")
    root.rename(f"{folder}/elsewhere")
    put("fetched")
    write_latents(root, count=19)
    return {"digest": bank.digest, "files": placed.files, "differs": _error(lambda: put("differs"))}


def nothing() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _error(call: Any) -> str:
    try:
        call()
    except RaystarError as error:
        return str(error)
    return ""


def _environment() -> list[str | None]:
    shipped = [path for path in sys.path if "py_modules" in path and Path(path, "raystar/backend/nodes.py").is_file()]
    return [os.environ.get("RAYSTAR_TEST_NODE"), os.environ.get("RAYSTAR_TEST_SHARED"), *shipped]


def _fail_on_second() -> None:
    if "RAYSTAR_TEST_NODE" in os.environ:
        raise RaystarError("not here")


def _slow_on_second() -> None:
    if "RAYSTAR_TEST_NODE" in os.environ:
        time.sleep(60)


# -- starting and joining --------------------------------------------------------------------------


def test_a_local_ray_has_a_private_token_and_says_nothing(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        node, printed = drive("", "nothing", HOME=str(tmp_path))
    finally:
        os.umask(before)
    assert len(node) == 56
    assert printed == ""
    path = tmp_path / ".ray/auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert re.fullmatch("[0-9a-f]{64}", path.read_text())
    assert os.listdir(path.parent) == ["auth_token"]


@pytest.mark.parametrize("there", [True, False])
def test_settling_the_token(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    if there:
        path.write_text("abc")
        path.chmod(0o644)
    ray_start.settle_token(create=False)
    assert path.exists() == there
    assert os.environ.get("RAY_AUTH_MODE") == ("token" if there else None)
    if there:
        assert path.read_text() == "abc"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    path.unlink(missing_ok=True)
    ray_start.settle_token(create=True)
    assert not path.exists()


@pytest.mark.parametrize("address", ["auto", "ray://host:10001", "host", "127.0.0.1:", "127.0.0.1:99999"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(RaystarError, match="^--address " + re.escape(address)):
        ray_start.start(address, cpus=1, environment={})


def test_nobody_answers() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"  # bound, but nobody listens
        began = time.monotonic()
        with pytest.raises(RaystarError, match=f"--address {address}: no Ray cluster answers there"):
            ray_start.start(address, cpus=1, environment={})
        assert time.monotonic() - began < 6


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of Ray, and is put back afterwards."""
    for name in [name for name in os.environ if name.startswith("RAY")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")  # whoever sets it, it is gone again after the test
    return monkeypatch


def refusal(address: str, capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(RaystarError) as raised:
        ray_start.start(address, cpus=1, environment={})
    assert capfd.readouterr() == ("", "")
    return str(raised.value)


def test_a_wrong_token(
    two: ClusterProcess, clean: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "token"
    path.write_text("f" * 64)
    path.chmod(0o644)
    clean.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert f"the cluster wants a token, and {path} holds another one" in refusal(two.address, capfd)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_missing_token(
    two: ClusterProcess, clean: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    clean.setenv("HOME", str(tmp_path))
    wanted = f"the cluster wants a token, and there is none in {tmp_path}/.ray/auth_token"
    assert wanted in refusal(two.address, capfd)
    assert not (tmp_path / ".ray").exists()


def test_another_version(
    two: ClusterProcess, token: Path, clean: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_VERSION)
    clean.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    clean.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    found = refusal(two.address, capfd)
    assert re.search(r"the cluster runs Ray: [\d.]+ and Python: [\d.]+, this is Ray: 0.0.1 and Python", found)


OTHER_VERSION = """
import sys
from importlib.abc import MetaPathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "ray._private.services":  # Ray is imported as far as its version
            sys.modules["ray"].__version__ = "0.0.1"
        return None

sys.meta_path.insert(0, Finder())
"""


# -- nodes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(two: ClusterProcess, token: Path) -> tuple[dict[str, Any], str]:
    return drive(two.address, "look", RAY_AUTH_TOKEN_PATH=str(token))


def test_every_node_works_once_with_this_code(seen: tuple[dict[str, Any], str]) -> None:
    found, printed = seen
    assert sorted(found["nodes"]) == [2, 3]
    assert sorted(name or "" for name, *_ in found["environment"]) == ["", "second"]
    assert {shared for _, shared, *_ in found["environment"]} == {"everywhere"}
    assert all(len(each) == 3 for each in found["environment"])  # the code was sent, too
    assert "being slow: 1 of 2 nodes" in printed
    assert "failing: " not in printed


def test_failing_nodes_are_named(seen: tuple[dict[str, Any], str]) -> None:
    found, _ = seen
    host = re.escape(socket.gethostname())
    assert re.fullmatch(rf"failing failed on 1 of 2 nodes:\n  {host} \([\d.]+, node \w+\): not here", found["failing"])
    assert re.fullmatch(
        r"being slow failed on 1 of 2 nodes:\n  .*: no answer within 3 s \(RAYSTAR_NODE_TIMEOUT_S .*\)",
        found["slow"],
    )


def test_stores_in_files_are_refused(seen: tuple[dict[str, Any], str]) -> None:
    *refused, server, database = seen[0]["tracking"]
    assert server == database == ""
    assert all("mlflow server --backend-store-uri sqlite:///" in error for error in refused)
    assert "--backend-store-uri sqlite:///x.db" in refused[0]


def test_resources_of_nodes(seen: tuple[dict[str, Any], str]) -> None:
    found, _ = seen
    # A trial lies on one node: of 2 + 3 processors, one each makes five trials, two each two, three each one.
    # Two workers of two: each node holds one, and the second has one processor left for what steers them.
    assert found["fit"] == [5, 2, 1, 1]
    assert "space.yaml: resources: a trial wants 4 processors and 0 GPUs; the largest of 2 nodes" in found["none fits"]
    assert found["none fits"].endswith("has 3 and 0")


@pytest.mark.parametrize(
    ("sizes", "cpus", "gpus", "workers", "fit"),
    [
        ([(4, 0)], 1, 0, 1, 4),
        ([(4, 0), (3, 0)], 2, 0, 1, 3),
        ([(16, 2)], 1, 0.4, 1, 4),  # two on each GPU: a share does not cross over
        ([(16, 2)], 1, 0.5, 1, 4),
        ([(16, 2)], 8, 0.5, 1, 2),
        ([(16, 1), (16, 4)], 1, 2, 1, 2),
        ([(8, 1), (8, 1)], 1, 1, 2, 1),  # a group may spread
        ([(4, 0)], 1, 0, 4, 0),  # nothing is left for what steers the group
        ([(4, 0), (1, 0)], 1, 0, 4, 1),
        ([(4.1, 0)], 1, 0, 2, 2),
        ([(4, 0)], 1, 1, 1, 0),
    ],
)
def test_trials_that_fit(sizes: list[tuple[float, float]], cpus: int, gpus: float, workers: int, fit: int) -> None:
    assert cluster.trials_that_fit(sizes, cpus, gpus, workers) == fit


# -- storage and data ------------------------------------------------------------------------------


def test_the_storage_is_tried_from_every_node(two: ClusterProcess, token: Path, tmp_path: Path) -> None:
    answer, _ = drive(two.address, "probe", str(tmp_path), RAY_AUTH_TOKEN_PATH=str(token))
    assert answer["left"] == []
    assert re.fullmatch(r"writing to --storage /proc/none failed on this machine: .+", answer["nowhere"])
    sees_nothing = "does not see what other nodes write there; it must be one place for all of them"
    assert answer["memory"] == f"reading from --storage memory://x failed on this machine: {sees_nothing}"
    first, one = answer["blind"].split("\n")
    assert first == f"reading from --storage {tmp_path} failed on 1 of 2 nodes:"
    assert one.endswith(f": {sees_nothing}")


def test_data_is_packed_or_fetched_on_every_node(two: ClusterProcess, token: Path, tmp_path: Path) -> None:
    write_latents(tmp_path / "latents")
    answer, _ = drive(two.address, "place", str(tmp_path), RAY_AUTH_TOKEN_PATH=str(token))
    names = sorted(name for name, _, _ in answer["files"])
    assert [name.rpartition(".")[2] for name in names] == ["json", "npy", "safetensors"]
    for step in ("packed", "fetched"):
        for node in ("first", "second"):
            for name in names:
                assert (two.homes / node / step / name).read_bytes() == (tmp_path / "cache" / name).read_bytes()
    assert "placing the latents failed on 2 of 2 nodes" in answer["differs"]
    digests = re.findall(r"\(digest (\w{16})\) than the driver's \((\w{16})\)", answer["differs"])
    assert len(digests) == 2
    assert {driver for _, driver in digests} == {answer["digest"]}
    assert all(own != driver for own, driver in digests)


def test_what_a_node_lacks_is_copied_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(write_latents(tmp_path / "latents"))
    bank = open_bank(config, tmp_path / "cache")
    storage = Storage(str(tmp_path / "storage"))
    files = []
    for suffix in ("npy", "json"):
        name = f"latents-{bank.key}.{suffix}"
        content = (tmp_path / "cache" / name).read_bytes()
        storage.write(name, content)
        files.append((name, len(content), placing._sha256(tmp_path / "cache" / name)))
    monkeypatch.setenv("RAYSTAR_CACHE_DIR", str(tmp_path / "node"))
    placed = placing.Placed(storage.uri, tuple(files), str(tmp_path / "not here"), None)
    assert placing.ensure_local(placed) == tmp_path / "node"
    assert reopen_bank(config, tmp_path / "node", bank.key).digest == bank.digest
    # Damaged on the node: mended when looked at thoroughly.
    array = tmp_path / "node" / files[0][0]
    whole = array.read_bytes()
    array.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    placing.ensure_local(placed, thorough=True)
    assert array.read_bytes() == whole
    # Damaged in the storage: never taken.
    array.unlink()
    storage.write(files[0][0], whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RaystarError, match="arrived with SHA-256"):
        placing.ensure_local(placed)
    assert not array.exists()
    storage.delete(files[0][0])
    with pytest.raises(RaystarError, match="is gone from the storage"):
        placing.ensure_local(placed)
    # The driver's own folder is used where it can be seen, and data.cache_dir wherever it is named.
    assert placing.ensure_local(dataclasses.replace(placed, driver_cache=str(tmp_path / "cache"))) == tmp_path / "cache"
    assert dataclasses.replace(placed, named_cache="~/c").folder() == Path.home() / "c"

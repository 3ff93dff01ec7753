"""A Ray cluster of several nodes on this machine, in a process of its own, that tests can take nodes from and add to.

`python -m tests.cluster SOCKET` is that process: it takes one JSON command a connection and answers it. Ray wants the
main thread of the process that starts nodes, and what joins a cluster should be another process than the one that
ends its nodes: so tests do not start nodes themselves.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.kit.support import ROOT


class ClusterProcess:
    """Speaks to the process that holds the cluster."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.address = ""
        self.nodes: list[str] = []
        self.homes = Path()
        """Of nodes that do not share one, by the test's own names for them."""
        self._folder = tempfile.TemporaryDirectory(prefix="raystar-cluster-")
        self._socket = f"{self._folder.name}/socket"
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.kit.cluster", self._socket],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def add(self, cpus: int, environment: Mapping[str, str] | None = None, **resources: float) -> str:
        """Adds a node, the head first, whose processes see `environment` besides; its id."""
        answer = self._ask(do="add", cpus=cpus, environment=dict(environment or {}), resources=resources)
        self.address = answer["address"]
        self.nodes.append(answer["node"])
        return answer["node"]

    def kill(self, node: str) -> None:
        """Ends all processes of a node at once, as a power cut would."""
        self._ask(do="kill", node=node)
        self.nodes.remove(node)

    def close(self) -> None:
        """Ends the cluster."""
        if self._process.poll() is None:
            self._ask(do="close")
        self._process.wait(timeout=60)
        self._folder.cleanup()

    def _ask(self, **command: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as link:
            while True:
                assert self._process.poll() is None, self._said()
                try:
                    link.connect(self._socket)
                    break
                except (FileNotFoundError, ConnectionRefusedError):  # it is still importing
                    time.sleep(0.05)
            link.sendall(json.dumps(command).encode() + b"\n")
            answer = link.makefile().readline()
        assert answer, self._said()
        return json.loads(answer)

    def _said(self) -> str:
        return f"the cluster's process failed:\n{self._log.read_text()}"


@contextmanager
def cluster(*cpus: int, token: Path | None = None, **environment: str) -> Iterator[ClusterProcess]:
    """A cluster with one node for each number of processors; with token authentication where a token file is named."""
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} if token else {"RAY_AUTH_MODE": "disabled"}
    process = ClusterProcess({**os.environ, **auth, **environment})
    try:
        for number in cpus:
            process.add(number)
        yield process
    finally:
        process.close()


def _serve(path: str) -> None:
    """Carries out commands until it is told to close, or whoever started it is gone."""
    from ray.cluster_utils import Cluster

    parent = os.getppid()
    held = Cluster(shutdown_at_exit=True)
    nodes: dict[str, Any] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        server.settimeout(1.0)
        try:
            while os.getppid() == parent:
                try:
                    link, _ = server.accept()
                except TimeoutError:
                    continue
                link.settimeout(None)
                with link, link.makefile("rw") as file:
                    command = json.loads(file.readline())
                    if command["do"] == "close":
                        held.shutdown()
                    print(json.dumps(_carry_out(command, held, nodes)), file=file, flush=True)
                if command["do"] == "close":
                    return
        finally:
            held.shutdown()


def _carry_out(command: dict[str, Any], held: Any, nodes: dict[str, Any]) -> dict[str, Any]:
    if command["do"] == "kill":
        held.remove_node(nodes.pop(command["node"]), allow_graceful=False)
    if command["do"] != "add":
        return {}
    before = dict(os.environ)
    os.environ.update(command["environment"])
    try:
        node = held.add_node(num_cpus=command["cpus"], resources=command["resources"], include_dashboard=False)
    finally:
        os.environ.clear()
        os.environ.update(before)
    nodes[node.node_id] = node
    return {"address": held.address, "node": node.node_id}


if __name__ == "__main__":
    _serve(sys.argv[1])

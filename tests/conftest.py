"""What many tests need: no usage statistics, one thread per process, W&B offline, free ports."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

# Set before any test module imports torch or ray, which read them once.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", WANDB_MODE="offline", OMP_NUM_THREADS="1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # tests of the token set it themselves
# Ray's own value of 15 lets any other process of this machine, such as the tests beside, starve its workers.
os.environ.setdefault("RAY_worker_niceness", "0")
for _name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(_name, None)

@pytest.fixture
def free_port() -> int:
    """A TCP port on which nothing listens."""
    return find_free_port()


def find_free_port() -> int:
    """A port that nobody listens on, below those that outgoing connections are given: such a one may be gone in a moment."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # Ray gives its workers 10002 to 19999
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@functools.cache
def lane(file: str) -> str:
    """The tests of a lane run one after another: a file's, since they share fixtures, and all that start Ray, since of two
    clusters at once on two cores each loses nodes and workers that the other starves."""
    return "ray" if "pytest.mark.ray" in (Path(__file__).parents[1] / file).read_text() else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the lane that takes longest first
        items.sort(key=lambda item: lane(item.nodeid.partition("::")[0]) != "ray")
    if not os.environ.get("GRAFT_MULTINODE"):
        for item in items:
            if item.get_closest_marker("multinode"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; make multinode runs it"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Lanes, in the order of collection, for `pytest -n`."""
    from xdist.scheduler import LoadFileScheduling

    class Lanes(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return lane(nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return Lanes(config, log)

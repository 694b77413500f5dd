"""What many tests need: no usage statistics, one thread per process, W&B offline, free ports."""

from __future__ import annotations

import os
import socket

import pytest

# Set before any test module imports torch or ray, which read them once.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", WANDB_MODE="offline", OMP_NUM_THREADS="1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # tests of the token set it themselves
for _name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(_name, None)


@pytest.fixture
def free_port() -> int:
    """A TCP port on which nothing listens."""
    return find_free_port()


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port

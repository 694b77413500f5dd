"""Ray for the length of a `with` block: started on this machine, or joined where a cluster runs already.

On this machine Ray gets its own folder, its own access token and a stated number of CPUs, and is gone at the end. On a
cluster graft's code goes along as a small package, and a run's folders must be visible from every node.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("cluster", "tune_spaces", "training", "data_shards", "recipes")
CODE_SUFFIXES = (".py", ".j2", ".yaml")
TOKEN_SOURCES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
INSIDE_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
SHORT_PATH = 40  # bytes; Ray puts sockets 60 bytes below its folder, and the system allows 107
OBJECT_STORE_BYTES = 128 << 20
CONNECT_TIMEOUT_S = 10.0
NODE_TIMEOUT_S = 90.0


@contextlib.contextmanager
def ray_session(address: str | None = None, *, cpus: int | None = None, folder: str | Path | None = None,
                shards: Sequence[str | Path] = (), dashboard: bool = False) -> Iterator[None]:
    """Ray, initialised; every process that it started is gone afterwards.

    Args:
        address: a running cluster's address, `auto` for the one that this machine is a node of; None is `RAY_ADDRESS`
            and, without it, a Ray of our own on this machine.
        cpus: CPUs of a Ray of our own; None is what this process may use.
        folder: the run's folder, which every node of a joined cluster must be able to write.
        shards: folders of shards that every node must read.
        dashboard: whether a Ray of our own needs its dashboard (nested Train runs and the Jobs API do).

    Raises:
        UserError: when there is no cluster at the address, or a node cannot see a folder.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address and address != "local":
        with _joined(address) as ray:
            check_visible(ray, folder, shards)
            yield
    else:
        with _started(cpus or len(os.sched_getaffinity(0)), dashboard):
            yield


@contextlib.contextmanager
def _started(cpus: int, dashboard: bool) -> Iterator[Any]:
    home = _short_folder()
    changes: dict[str, str | None] = {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": None,
        # Workers import graft from this checkout even where it is not installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
    }
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        # A token of this session's own: Ray would otherwise write one into the home folder, which may be read-only.
        token = home / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        changes |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(token)}
    try:
        with _environment(changes) as ray:
            try:
                ray.init(address="local", num_cpus=cpus, include_dashboard=dashboard, _temp_dir=str(home),
                         object_store_memory=OBJECT_STORE_BYTES, log_to_driver=False, logging_level=logging.ERROR)
                yield ray
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def _joined(address: str) -> Iterator[Any]:
    if "://" in address:
        raise UserError(f"{address} is not a Ray cluster that this machine can join; use HOST:6379 on one of its nodes,"
                        " or `graft submit RECIPE --address http://HOST:8265` from outside.")
    if address != "auto":
        check_reachable(address, "no Ray cluster", "start one with `ray start --head`, or leave --address out")
    with _environment({"RAY_USAGE_STATS_ENABLED": "0", **token_mode()}) as ray, contextlib.ExitStack() as stack:
        environment: dict[str, Any] = {}
        if INSIDE_JOB not in os.environ:  # a submitted job has brought its code along already
            code = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graft-code-")))
            environment = runtime_env(code)
        try:
            ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
        except ray.exceptions.AuthenticationError as error:
            raise UserError(f"the Ray cluster at {address} refuses this token; set RAY_AUTH_MODE=token and "
                            "RAY_AUTH_TOKEN_PATH to a file with the cluster's token.") from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"cannot join Ray at {address} from this machine ({_first_line(error)}); run graft on one "
                            "of its nodes, or `graft submit` to its dashboard.") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def runtime_env(folder: Path, recipe: Path | None = None) -> dict[str, Any]:
    """Copy graft's code (and `recipe`) into `folder`, print its size, and return the environment that ships it."""
    files, size = stage_code(folder, recipe)
    print(f"code package: {files} files, {size / 1000:.0f} kB", flush=True)
    return {"working_dir": str(folder)}


def stage_code(folder: Path, recipe: Path | None = None) -> tuple[int, int]:
    """Copy what a cluster needs of this checkout: packages and recipes, no data, runs, tests or environment.

    Returns:
        The number of files and their bytes.
    """
    sources = {file.relative_to(PROJECT): file for name in CODE_FOLDERS for file in sorted((PROJECT / name).rglob("*"))
               if file.suffix in CODE_SUFFIXES and file.is_file() and "__pycache__" not in file.parts}
    if recipe is not None:
        sources[staged_recipe(recipe)] = recipe
    for relative, file in sources.items():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / relative)
    return len(sources), sum(file.stat().st_size for file in sources.values())


def staged_recipe(recipe: Path) -> Path:
    """Where `recipe` lies in the package: in its own place when it is graft's, and in `submitted/` when it is not."""
    resolved = recipe.resolve()
    inside = resolved.is_relative_to(PROJECT / "recipes")
    return resolved.relative_to(PROJECT) if inside else Path("submitted") / resolved.name


def preflight(needs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Refuse what the cluster could never schedule, before anything waits for it.

    Args:
        needs: for each part of the run, the resources of all processes that it needs at one time, such as
            `{"pretraining": [{"CPU": 1}, {"CPU": 1}]}`.

    Raises:
        UserError: naming the part, what it asks for, and what the nodes have.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for part, processes in needs.items():
        if not fits(processes, nodes):
            wanted = Counter(_amounts(process) for process in processes)
            asked = " + ".join(f"{count} x ({amounts})" for amounts, count in wanted.items())
            have = "; ".join(_amounts({key: node[key] for key in ("CPU", "GPU") if key in node}) or "nothing"
                             for node in nodes)
            raise UserError(f"{part} asks for {asked} and the {len(nodes)} node(s) of this Ray cluster have {have}; "
                            "lower the recipe's workers or add nodes.")


def fits(processes: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether all `processes` find a place on empty `nodes` (first fit, largest first)."""
    free = [dict(node) for node in nodes]
    for process in sorted(processes, key=lambda need: sorted(need.values(), reverse=True), reverse=True):
        for node in free:
            if all(node.get(key, 0.0) + 1e-9 >= amount for key, amount in process.items()):
                for key, amount in process.items():
                    node[key] = node.get(key, 0.0) - amount
                break
        else:
            return False
    return True


def check_visible(ray: Any, folder: str | Path | None, shards: Sequence[str | Path] = ()) -> None:
    """Check that every alive node can write where this process writes the run, and reads the same shards.

    Raises:
        UserError: naming the folder, the nodes, and the remedy.
    """
    for place in dict.fromkeys(map(str, shards)):
        if "://" not in place:  # a store is the same from everywhere
            _ask_nodes(ray, Path(place).absolute(), "manifest.json", written=False)
    if folder is not None and "://" not in str(folder):
        path = Path(folder).absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path, prefix=".graft-visible-") as probe:
                probe.write(secrets.token_bytes(16))
                probe.flush()
                _ask_nodes(ray, path, Path(probe.name).name, written=True)
        except OSError as error:
            raise UserError(f"cannot write in {path} ({error.strerror}); choose another --out.") from error


def _ask_nodes(ray: Any, folder: Path, name: str, *, written: bool) -> None:
    """Raise `UserError` unless `folder / name` has the same content on every node, and the folder is writable there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    wanted = _digest(str(folder / name))
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    answers = {look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
               .remote(str(folder / name), wanted, written): host for node, host in nodes.items()}
    done, _ = ray.wait(list(answers), num_returns=len(answers), timeout=NODE_TIMEOUT_S)
    blind = sorted(host for answer, host in answers.items() if answer not in done or not ray.get(answer))
    if blind:
        what = "--out" if written else "data.root"
        raise UserError(f"{folder} cannot be {'written' if written else 'seen'} from {', '.join(blind)}; put {what} on "
                        f"storage that all {len(nodes)} node(s) of the cluster share.")


def _look(file: str, wanted: str, written: bool) -> bool:
    """On a node: whether `file` is there with the driver's content; a network file system may need a moment."""
    deadline = time.monotonic() + 5
    while _digest(file) != wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return not written or os.access(os.path.dirname(file), os.W_OK)


def _digest(file: str) -> str:
    """The sha256 of a file, empty where there is none."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return ""


def check_reachable(address: str, what: str, remedy: str, default_port: int = 6379) -> None:
    """Raise `UserError` unless something listens at HOST:PORT; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":") if ":" in address else (address, "", str(default_port))
    if not port.isdigit():
        raise UserError(f"{address!r} is not an address; write HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"there is {what} at {address} ({_first_line(error)}); {remedy}.") from error


def listens(address: str) -> bool:
    """Whether something takes connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def token_mode() -> dict[str, str | None]:
    """The change of the environment that uses a token which the user has named."""
    named = any(os.environ.get(source) for source in TOKEN_SOURCES)
    return {"RAY_AUTH_MODE": "token"} if named and "RAY_AUTH_MODE" not in os.environ else {}


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[Any]:
    """`import ray` under changed environment variables (None removes one), which are put back afterwards."""
    names = {*changes, "RAY_AUTH_MODE"}  # ray.init sets this one itself
    before = {name: os.environ.get(name) for name in names}
    _set_environment(changes)
    try:
        import ray

        _reread_authentication()
        yield ray
    finally:
        _set_environment(before)
        _reread_authentication()


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _reread_authentication() -> None:
    """Ray reads mode and token once per process; make it read them again."""
    if "ray" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _short_folder() -> Path:
    """A fresh folder whose path is short enough for Ray's sockets."""
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) > SHORT_PATH - len("/graft-12345678"):
        base = Path("/tmp")
    return Path(tempfile.mkdtemp(prefix="graft-", dir=base))


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {key}" for key, amount in resources.items())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

"""W&B logging: one W&B run per pretraining or trial, offline unless an API key is known; no other file imports wandb.

Three promises: nothing waits for the network beyond the two timeouts below; nothing secret is handed over; no failure
of W&B ends training. The last one makes this the one place that catches every ``Exception``: W&B raises its own errors,
protobuf's, socket's and pydantic's, and none of them is worth an hour of training. Each becomes one warning line, and
the run's logger is quiet from then on. The numbers themselves are in the run folder's events.jsonl.
"""

from __future__ import annotations

import glob
import importlib
import io
import logging
import netrc
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL import Image

from data_shards.errors import UserError
from training.config import Config, operational

INIT_TIMEOUT_S = 10.0
FINISH_TIMEOUT_S = 15.0
REQUEST_TIMEOUT_S = 5.0  # of a request that is tried twice; W&B's own defaults wait behind an alert for ever
FINISH_GRACE_S = 20.0  # beyond the limit on uploads, for requests that are still being tried
STEPS_PER_ATTEMPT = 1_000_000  # W&B's own step of attempt k starts here times k, so that it never runs backwards
REDACTED = "[redacted]"

_SECRET_NAME = re.compile(r"(key|token|secret|passw(or)?d|credential)s?$", re.IGNORECASE)
_URL_USERINFO = re.compile(r"([a-z][a-z0-9+.-]*://)[^\s/?#]*@", re.IGNORECASE)
_URL_QUERY_SECRET = re.compile(
    r"([?&][^=&\s]*(?:key|token|secret|passw(?:or)?d|signature|sig)=)[^&#\s]+", re.IGNORECASE)

_log = logging.getLogger(__name__)
_online_failed = False  # once a connection failed, later runs of this process go straight to offline


class WandbConfig(Config):
    mode: Literal["auto", "online", "offline", "disabled"] = operational(
        "auto", "auto is online where an API key is known, and offline otherwise")
    project: str = operational("graft", "W&B project")
    entity: str | None = operational(None, "W&B user or team; null is the key's own")


class WandbRun:
    """One W&B run, or a stand-in that does nothing (mode disabled, or after a failure)."""

    def __init__(self, run: Any = None, first_step: int = 0) -> None:
        self._run = run
        self._step = first_step
        self._images = 0

    @property
    def url(self) -> str | None:
        """The page of an online run."""
        return None if self._run is None else self._run.url

    def log(self, metrics: Mapping[str, float], images: int) -> None:
        """One row of scalars; ``images`` (real images seen) is the axis they are drawn over."""
        self._images = images
        self._row(lambda wandb: dict(metrics))

    def log_image(self, key: str, picture: Path | bytes) -> None:
        """A picture file, or a PNG's bytes, copied into W&B's folder, at the images seen of the last ``log``."""
        self._row(lambda wandb: {key: wandb.Image(
            str(picture) if isinstance(picture, Path) else Image.open(io.BytesIO(picture), formats=("PNG",)))})

    def log_table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table, one sequence per row; secrets in its text are redacted."""
        self._row(lambda wandb: {key: wandb.Table(columns=list(columns), data=[redact(list(row)) for row in rows])})

    def alert(self, title: str, text: str) -> None:
        """A message to the run's owner, sent when the server is next reached."""
        run = self._run
        if run is not None:
            _guarded("alert", lambda: run.alert(title=title, text=redact(text), level="WARN"))

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, waiting at most FINISH_TIMEOUT_S for uploads; what is left goes with `wandb sync`, which is said."""
        run, self._run = self._run, None
        if run is None:
            return
        folder = Path(run.dir).parent
        if run.offline:
            _guarded("finish", lambda: run.finish(exit_code=exit_code))
        elif not _finished_in_time(run, exit_code) or _lost(folder):
            _log.warning("W&B did not take all of this run, send it later with `wandb sync %s`.",
                         folder)

    def _row(self, make: Callable[[Any], dict[str, Any]]) -> None:
        run = self._run
        if run is None:
            return
        step, self._step = self._step, self._step + 1

        def write() -> bool:
            run.log({**make(importlib.import_module("wandb")), "images": self._images}, step=step, commit=True)
            return True

        if not _guarded("log", write):
            self._run = None
            _guarded("finish", lambda: run.finish(exit_code=1), quiet=True)

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.finish(exit_code=0 if kind is None else 1)


def open_run(
    config: WandbConfig,
    *,
    folder: Path,
    group: str,
    job_type: str,
    run_id: str,
    name: str,
    settings: Mapping[str, Any],
) -> WandbRun:
    """Open the W&B run ``run_id`` below ``folder``/wandb, or go on with it; call on rank 0 only.

    Several runs one after another in one process share W&B's service process, so only the first pays for its start.

    Args:
        folder: the graft run's folder.
        group: the graft run's name.
        job_type: the stage (pretrain, meta, search, final).
        run_id: the trial's id; the same id again continues the same W&B run.
        settings: the resolved recipe or the trial's hyper-parameters; secrets in it are redacted.

    Raises:
        UserError: when wandb is not installed, or mode is online and no API key is known.
    """
    global _online_failed
    mode = choose_mode(config.mode)
    if mode == "disabled":
        return WandbRun()
    root = folder.resolve()
    _keep_below(root / "wandb")
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(f"wandb.mode = {config.mode!r} but the package wandb is not installed: "
                        "install it (pip install wandb) or set wandb.mode=disabled.") from error
    if mode == "online" and _online_failed:
        mode = "offline"
    attempts = glob.glob(f"*run-*-{glob.escape(run_id)}*", root_dir=root / "wandb")
    first_step = STEPS_PER_ATTEMPT * len(attempts)

    def start(chosen: str) -> Any:
        return wandb.init(
            project=config.project,
            entity=config.entity,
            id=run_id,
            name=redact(name),
            group=redact(group),
            job_type=job_type,
            resume="allow",
            reinit="create_new",
            config=redact(dict(settings)),
            settings=wandb.Settings(
                mode=chosen,
                root_dir=str(root),
                use_dot_wandb=False,
                symlink=False,  # parallel trials would fight over `latest-run`
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                x_graphql_timeout_seconds=REQUEST_TIMEOUT_S,
                x_graphql_retry_max=1,
                x_graphql_retry_wait_max_seconds=1,
                disable_git=True,
                disable_code=True,
                save_code=False,
                label_disable=True,
                x_disable_meta=True,  # argv, host, environment
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    run = None
    if mode == "online":
        run = _guarded(f"connect, so this process logs offline; send it later with `wandb sync {root / 'wandb'}/offline-run-*`",
                       lambda: start("online"))
        _online_failed = run is None
        if _online_failed:
            _guarded("shut down", wandb.teardown, quiet=True)  # its service process still holds the run's id
    if run is None:
        run = _guarded("start", lambda: start("offline"))
    if run is None:
        _guarded("shut down", wandb.teardown, quiet=True)  # so that the next run gets a fresh service process
        return WandbRun()
    _guarded("define its axis", lambda: (run.define_metric("images"), run.define_metric("*", step_metric="images")))
    return WandbRun(run, first_step=max(first_step, run.step))


def _finished_in_time(run: Any, exit_code: int) -> bool:
    """Finish an online run. W&B's own limit is for uploads alone: behind another request that it tries again and again it
    waits for ever, here and once more at exit. The limits on requests prevent that where they hold; where they do not, its
    service process is ended, and with it what it had not written yet."""
    global _online_failed
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(bool(_guarded(
        "finish", lambda: (run.finish(exit_code=exit_code), True), quiet=True))), daemon=True)
    thread.start()
    thread.join(FINISH_TIMEOUT_S + FINISH_GRACE_S)
    if thread.is_alive():
        _online_failed = True
        for pid in _services():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        thread.join(FINISH_GRACE_S)
        _guarded("shut down", importlib.import_module("wandb").teardown, quiet=True)
        _log.warning("W&B's service did not end in time and was killed: its last rows are in the run's events.jsonl only.")
        return False
    return ended == [True]


def _services() -> list[int]:
    """W&B's service processes among this process's children."""
    found = []
    for status in glob.glob("/proc/[0-9]*/stat"):
        with suppress(OSError):
            head, _, tail = Path(status).read_text().rpartition(")")
            pid, _, name = head.partition(" (")
            if name.startswith("wandb-core") and int(tail.split()[1]) == os.getpid():
                found.append(int(pid))
    return found


def _lost(folder: Path) -> bool:
    """Whether W&B's service gave up on sending the run in ``folder``: it says so only in its own log."""
    log = folder / "logs" / "debug-internal.log"
    return log.is_file() and "filestream: fatal error" in log.read_text(errors="replace")


def choose_mode(mode: str) -> str:
    """Resolve ``auto``: WANDB_MODE where it is set, else online when an API key is known, else offline.

    Raises:
        UserError: for ``online`` without an API key; W&B itself would ask for one and wait.
    """
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "")
        mode = wanted if wanted in ("offline", "disabled") else "online" if api_key_known() else "offline"
    elif mode == "online" and not api_key_known():
        raise UserError("wandb.mode = 'online' but no W&B API key is known on this machine: "
                        "set WANDB_API_KEY, run `wandb login`, or set wandb.mode=auto.")
    return mode


def api_key_known() -> bool:
    """Whether the environment or the netrc file holds a key for the W&B server in use; nothing is contacted."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    candidates = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [
        Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]
    for path in candidates:
        if not path.is_file():
            continue
        try:
            login = netrc.netrc(path).authenticators(host)
        except (netrc.NetrcParseError, OSError) as error:
            _log.warning("W&B: %s cannot be read as a netrc file (%s), so its keys are not used.", path, error)
            continue
        if login and login[2]:
            return True
    return False


def redact(value: Any) -> Any:
    """A copy of a JSON-like value without secrets.

    Redacted are values of keys that end like KEY, TOKEN, SECRET or PASSWORD, URL userinfo, signatures in URL queries.
    """
    if isinstance(value, Mapping):
        return {str(key): REDACTED if _SECRET_NAME.search(str(key)) and item not in (None, "") else redact(item)
                for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    if isinstance(value, str | os.PathLike):
        text = _URL_USERINFO.sub(rf"\1{REDACTED}@", str(value))
        return _URL_QUERY_SECRET.sub(rf"\1{REDACTED}", text)
    return value


def _keep_below(folder: Path) -> None:
    """Point W&B's staging, cache and artifacts into the run: an offline table would be lost with ~/.local."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports cost 20 s at exit where no network answers
    for name in ("data", "cache", "artifact"):
        os.environ[f"WANDB_{name.upper()}_DIR"] = str(folder / name)


def _guarded(what: str, call: Callable[[], Any], *, quiet: bool = False) -> Any:
    """The call's result, or None after one warning line: see the top of this file for why everything is caught."""
    try:
        return call()
    except Exception as error:
        if not quiet:
            reason = redact(" ".join(str(error).split())) or "no reason given"
            _log.warning("W&B could not %s (%s: %s); training goes on.", what, type(error).__name__, reason)
        return None

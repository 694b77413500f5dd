"""Send a run to a Ray cluster through its Jobs API, and follow, list, stop what was sent.

A job is `python -m cluster run RECIPE` on the cluster with graft's code as its working folder. Its command line,
environment and metadata are readable by everyone who reaches the dashboard, so no secret is ever put there: keys for
W&B or storage belong into the environment or the key files of the cluster's nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import JobFailed
from cluster.session import _environment, check_reachable, runtime_env, staged_recipe, token_mode
from data_shards.errors import UserError
from training.config import content_id, parse_overrides
from training.recipe import find_recipe, read_recipe

ADDRESS_SOURCES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
DASHBOARD_PORT = 8265
POLL_S = 1.0
PATIENCE_S = 60.0  # how long `wait` bears a dashboard that does not answer
FINAL = ("SUCCEEDED", "FAILED", "STOPPED")
USERINFO = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def submit(recipe: str, *, address: str | None, to: str = "ray", overrides: Sequence[str] = (), out: str | None = None,
           python: str | None = None, wait: bool = False, dry_run: bool = False) -> str:
    """Send `graft run RECIPE` to the cluster whose dashboard is at `address`.

    Args:
        recipe: a path, or a name in `recipes/`; a file from elsewhere travels along.
        address: http(s)://HOST:PORT of the dashboard; None is RAY_API_SERVER_ADDRESS, then RAY_ADDRESS.
        to: kind of cluster; `ray` is the only one.
        overrides: KEY=VALUE texts as `--set` takes them.
        out: the run's folder on the cluster; a relative one is taken from here, as on shared storage.
        python: interpreter on the head node.
        wait: follow the log until the job ends.
        dry_run: print what would be sent and contact nobody.

    Returns:
        The job's id.

    Raises:
        UserError: for a wrong recipe or override, an unreachable cluster, or a wrong token.
        JobFailed: when `wait` saw it end otherwise than well.
    """
    if to != "ray":
        raise UserError(f"--to {to!r} is unknown; graft submits to: ray.")
    url = dashboard_url(address)
    path, name, identity, folder, settings = _resolve(recipe, overrides, out)
    words = ["run", str(staged_recipe(path)), "--out", folder, *(word for text in settings for word in ("--set", text))]
    job = send(words, job=f"{name}-{identity}", url=url, recipe=path, python=python, dry_run=dry_run,
               metadata={"graft_recipe": name, "graft_out": folder})
    if wait and not dry_run:
        jobs_wait(job, address=url, follow=True)
    return job


def send(words: Sequence[str], *, job: str, url: str, recipe: Path | None = None, python: str | None = None,
         metadata: Mapping[str, str] | None = None, dry_run: bool = False) -> str:
    """Send `graft WORDS` with this checkout's code (and `recipe`); returns the job's id, `job` with the time."""
    refuse_secrets(words)
    entrypoint = f"{python_command(url, python)} -m cluster {shlex.join(words)}"
    job = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', job)}-{time.strftime('%Y%m%d-%H%M%S')}"
    with tempfile.TemporaryDirectory(prefix="graft-submit-") as code:
        environment = runtime_env(Path(code), recipe)
        print(f"job {job} -> {url}\n  {entrypoint}", flush=True)
        if dry_run:
            print("dry run: nothing was sent")
            return job
        with jobs_client(url) as client:
            client.submit_job(entrypoint=entrypoint, submission_id=job, runtime_env=environment,
                              metadata=dict(metadata or {}))
    print(f"submitted; follow it: graft jobs logs {job} --follow --address {url}", flush=True)
    return job


def jobs_list(*, address: str | None) -> list[dict[str, Any]]:
    """The jobs that were submitted to this cluster, newest first: id, status, start, seconds, message."""
    with jobs_client(dashboard_url(address)) as client:
        details = [job for job in client.list_jobs() if job.submission_id]
    now = time.time() * 1000
    return [{"job": job.submission_id, "status": str(job.status.value), "start": (job.start_time or 0) / 1000,
             "seconds": ((job.end_time or now) - (job.start_time or now)) / 1000, "message": job.message or ""}
            for job in sorted(details, key=lambda job: job.start_time or 0, reverse=True)]


def jobs_logs(job: str, *, address: str | None, follow: bool = False) -> None:
    """Print a job's log, and with `follow` go on until it ends."""
    with jobs_client(dashboard_url(address), job) as client:
        client.get_job_info(job)  # says so when there is no such job
        if follow:
            asyncio.run(_tail(client, job))
        else:
            print(client.get_job_logs(job), end="", flush=True)


def jobs_stop(job: str, *, address: str | None, timeout_s: float = 60.0) -> str:
    """Stop a job and wait until it has ended; returns its status, which is its old one when it had ended before."""
    with jobs_client(dashboard_url(address), job) as client:
        client.stop_job(job)
        deadline = time.monotonic() + timeout_s
        while (status := client.get_job_status(job).value) not in FINAL and time.monotonic() < deadline:
            time.sleep(POLL_S)
    return str(status)


def jobs_wait(job: str, *, address: str | None, follow: bool = False, timeout_s: float | None = None) -> None:
    """Wait for a job's end, with its log where `follow` is set.

    Raises:
        JobFailed: when it ended otherwise than well, or `timeout_s` have passed.
    """
    url = dashboard_url(address)
    started = heard = time.monotonic()
    if follow:
        with contextlib.suppress(ConnectionError, RuntimeError):  # the status below tells what came of it
            jobs_logs(job, address=url, follow=True)
    while True:
        try:
            with jobs_client(url, job) as client:
                info = client.get_job_info(job)
            heard = time.monotonic()
            if info.status.value in FINAL:
                break
        except Unreachable:
            if time.monotonic() - heard > PATIENCE_S:
                raise
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            raise JobFailed(f"job {job} has not ended within {timeout_s:g} s; it goes on.")
        time.sleep(POLL_S)
    if info.status.value != "SUCCEEDED":
        reason = (info.message or "").strip().splitlines()[:1]
        raise JobFailed(f"job {job} ended as {info.status.value}{': ' + reason[0] if reason else ''}; "
                        f"its log: graft jobs logs {job} --address {url}")


class Unreachable(UserError):
    """Nothing answers at the address; `jobs_wait` bears this for a while."""


@contextlib.contextmanager
def jobs_client(url: str, job: str = "") -> Iterator[Any]:
    """Ray's client for the dashboard at `url`; its errors become one sentence each."""
    parts = urlsplit(url)
    try:
        check_reachable(f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}",
                        "no Ray dashboard", "check --address and that the cluster is up")
    except UserError as error:
        raise Unreachable(str(error)) from error
    # Ray prefers these two variables to the address that it is given.
    with _environment({**dict.fromkeys(ADDRESS_SOURCES), **token_mode()}) as ray:
        logging.getLogger("ray").setLevel(logging.WARNING)
        import requests
        from ray.job_submission import JobSubmissionClient

        try:
            yield JobSubmissionClient(url)
        except ray.exceptions.AuthenticationError as error:
            raise UserError(f"the Ray cluster at {url} refuses the access token, or none was sent; set RAY_AUTH_MODE="
                            "token and RAY_AUTH_TOKEN_PATH to a file with the cluster's token.") from error
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise Unreachable(f"what listens at {url} does not answer as a Ray dashboard; its port is usually "
                              f"{DASHBOARD_PORT}.") from error
        except RuntimeError as error:
            raise _explained(error, url, job) from error


def _explained(error: RuntimeError, url: str, job: str) -> Exception:
    text = str(error)
    if job and ("status code 404" in text or "does not exist" in text):
        return UserError(f"there is no job {job!r} at {url}; `graft jobs list` shows those there are.")
    if "already" in text and "submission" in text.lower():
        return UserError(f"a job with this id exists at {url} already; submit again in a second.")
    if "status code 404" in text:
        return Unreachable(f"what listens at {url} has no Jobs API; start Ray with its dashboard (ray[default]).")
    return error


def dashboard_url(address: str | None) -> str:
    """`http://HOST:PORT` from an address with or without scheme; raises `UserError` with the remedy."""
    address = address or next((os.environ[name] for name in ADDRESS_SOURCES if os.environ.get(name)), None)
    if not address:
        raise UserError("no cluster is named; give --address http://HOST:8265 (its dashboard), or set RAY_ADDRESS.")
    url = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise UserError(f"{address!r} is not a dashboard's address; write http://HOST:{DASHBOARD_PORT}.")
    return url if port or parts.scheme == "https" else f"{url}:{DASHBOARD_PORT}"


def python_command(url: str, python: str | None = None) -> str:
    """The interpreter of the job: `python` of the head node, and for a cluster on this machine first the one in use.

    A Ray that was started as `.venv/bin/ray start` has no environment activated, and its `python` may lack Ray.
    """
    if python:
        return shlex.quote(python)
    if urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1"):
        return f'"$(command -v {shlex.quote(sys.executable)} || command -v python)"'
    return "python"


def refuse_secrets(argv: Sequence[str]) -> None:
    """Raise `UserError` when a word of a job's command line holds a password: the dashboard would show it."""
    for word in argv:
        if USERINFO.search(word):
            shown = USERINFO.sub("://***@", word)
            raise UserError(f"{shown} holds a password, which everyone who sees the job could read; leave it out and "
                            "put it into the environment of the cluster's nodes.")


async def _tail(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def _resolve(recipe: str, overrides: Sequence[str], out: str | None) -> tuple[Path, str, str, str, list[str]]:
    """The recipe's file, name and content id, the run's folder, and the overrides with absolute folders.

    The job runs in a folder of Ray's own, so what the recipe means relative to here is made absolute.
    """
    from cluster.recipe import Recipe

    path = find_recipe(recipe)
    resolved = read_recipe(Recipe, recipe, parse_overrides(overrides))
    settings = list(overrides)
    root = resolved.data.root
    if not Path(root).is_absolute() and "://" not in root:
        settings.append(f"data.root={Path(root).absolute()}")
    folder = out or f"runs/{resolved.name}"
    if "://" not in folder:
        folder = str(Path(folder).absolute())
    return path, resolved.name, content_id(resolved.model_dump(mode="json"), length=6), folder, settings

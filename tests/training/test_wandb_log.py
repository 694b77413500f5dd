"""W&B without a server: offline runs are read back with W&B's own reader, `wandb leet inspect`."""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from data_shards.errors import UserError
from training import wandb_log
from training.wandb_log import REDACTED, STEPS_PER_ATTEMPT, api_key_known, choose_mode, open_run, redact

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no W&B variable of the machine, and the environment restored afterwards."""
    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(variable, "false")  # registered, so that what open_run sets is undone
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr(wandb_log, "_online_failed", False)
    yield


def config(mode: str = "offline") -> Any:
    return SimpleNamespace(mode=mode, project="graft-test", entity=None)


def start(folder: Path, run_id: str = "a1b2c3", mode: str = "offline", **settings: Any) -> wandb_log.WandbRun:
    return open_run(config(mode), folder=folder, group="demo", job_type="search", run_id=run_id,
                    name=f"trial {run_id}", settings={"lr": 2e-4, "nested": {"r1": 1.0}, **settings})


@functools.cache  # of finished runs only
def records(run_folder: Path) -> list[dict[str, Any]]:
    """Every record of one offline run, by W&B's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return [json.loads(line) for line in text.splitlines()]


def items(run_folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records(run_folder) if record["type"] == kind]


def fragments(folder: Path, run_id: str) -> list[Path]:
    return sorted((folder / "wandb").glob(f"*run-*-{run_id}*"))


def test_an_offline_run_holds_config_group_job_type_and_history_keyed_by_images(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "samples.png")
    with start(tmp_path) as run:
        for images in (0, 4096, 8192):
            run.log({"generator/adversarial": 0.5 + images, "selection_kid": 0.1}, images)
        run.log_image("samples", tmp_path / "samples.png")
        run.log_image("drawn", (tmp_path / "samples.png").read_bytes())
        run.log_table("leaderboard", ["domain", "kid"], [["cat", 0.25], ["dog", None]])
    (folder,) = fragments(tmp_path, "a1b2c3")
    (header,) = items(folder, "run")
    assert (header["run_id"], header["run_group"], header["job_type"]) == ("a1b2c3", "demo", "search")
    assert header["project"] == "graft-test" and header["display_name"] == "trial a1b2c3"
    assert header["config"]["update"]["lr"] == 2e-4 and header["config"]["update"]["nested"] == {"r1": 1.0}
    history = [entry["item"] for entry in items(folder, "history")]
    assert [(row["images"], row["generator/adversarial"]) for row in history[:3]] == [
        (0, 0.5), (4096, 4096.5), (8192, 8192.5)]
    assert history[3]["images"] == 8192 and history[3]["samples._type"] == "image-file"
    assert history[4]["drawn._type"] == "image-file"
    assert history[5]["leaderboard.nrows"] == 2
    axes = {metric.get("glob_name"): metric.get("step_metric") for metric in items(folder, "metric")}
    assert axes["*"] == "images"
    assert items(folder, "exit")[0].get("exit_code", 0) == 0
    media = list(folder.rglob("media/images/*.png"))
    assert len(media) == 2 and all(Image.open(path).size == (8, 8) for path in media)
    staged = [entry["local_path"] for artifact in items(folder, "artifact")
              for entry in artifact["manifest"]["contents"]]
    assert staged and all(Path(path).is_relative_to(tmp_path) for path in staged), "an offline table left the run"


def test_several_runs_follow_each_other_in_one_process(tmp_path: Path) -> None:
    for run_id in ("one", "two"):
        with start(tmp_path, run_id) as run:
            run.log({"kid": 1.0}, 16)
    for run_id in ("one", "two"):
        (folder,) = fragments(tmp_path, run_id)
        assert [entry["item"]["kid"] for entry in items(folder, "history")] == [1.0]


def test_a_resumed_run_has_the_same_id_and_steps_that_only_grow(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        for images in (0, 100, 200, 300):
            run.log({"loss": float(images)}, images)
    with start(tmp_path) as run:  # from the checkpoint at 200: images go back, W&B's own step does not
        run.log({"loss": 200.5}, 200)
    first, second = fragments(tmp_path, "a1b2c3")
    rows = [entry["item"] for folder in (first, second) for entry in items(folder, "history")]
    assert [row["images"] for row in rows] == [0, 100, 200, 300, 200]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS_PER_ATTEMPT
    assert {items(folder, "run")[0]["run_id"] for folder in (first, second)} == {"a1b2c3"}


def test_an_error_in_the_block_closes_the_run_as_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="diverged"), start(tmp_path) as run:
        run.log({"loss": 1.0}, 1)
        raise RuntimeError("diverged")
    assert items(fragments(tmp_path, "a1b2c3")[0], "exit")[0]["exit_code"] == 1


def test_no_secret_is_found_anywhere_below_the_wandb_folder(tmp_path: Path) -> None:
    canary = "canary" + "0123456789" * 4
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests.training.test_wandb_log import start
        secrets = dict(
            api_key={canary!r}, AWS_SECRET={canary!r}, login={{"password": {canary!r}}}, list=["s3://{canary}@bucket/x"],
            shards="https://user:{canary}@example.org/a.tar?token={canary}&part=1")
        with start(Path({str(tmp_path / 'run')!r}), **secrets) as run:
            run.log({{"loss": 1.0}}, 1)
            run.log_table("t", ["checkpoint"], [["https://{canary}@example.org/x"]])
    """)
    work = tmp_path / "work"
    work.mkdir()
    subprocess.run(["git", "init", "-q", str(work)], check=True)
    remote = f"https://{canary}@example.org/r.git"
    subprocess.run(["git", "-C", str(work), "remote", "add", "origin", remote], check=True)
    environment = {**os.environ, "WANDB_API_KEY": canary, "HF_TOKEN": canary}
    command = [sys.executable, "-c", script, f"--password={canary}"]
    subprocess.run(command, check=True, cwd=work, env=environment, timeout=300)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if canary.encode() in path.read_bytes()] == []


def test_redaction_keeps_what_is_no_secret() -> None:
    assert redact({"lr": 1e-4, "tokens": 512, "keyboard": "qwerty", "wandb_api_key": None, "HF_TOKEN": "x"}) == {
        "lr": 1e-4, "tokens": REDACTED, "keyboard": "qwerty", "wandb_api_key": None, "HF_TOKEN": REDACTED}
    assert redact(["https://example.org/a@b?x=1", "ssh://me:p@ss@host/x"]) == [
        "https://example.org/a@b?x=1", f"ssh://{REDACTED}@host/x"]
    assert redact("https://h/x?X-Signature=abc&part=2") == f"https://h/x?X-Signature={REDACTED}&part=2"


def test_disabled_writes_nothing_and_does_not_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with start(tmp_path, mode="disabled") as run:
        run.log({"loss": 1.0}, 1)
        run.log_image("samples", tmp_path / "missing.png")
        run.log_table("t", ["a"], [[1]])
    assert run.url is None and list(tmp_path.iterdir()) == []


def test_wandb_missing_is_one_sentence_unless_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install wandb.*wandb.mode=disabled"):
        start(tmp_path)
    start(tmp_path, mode="disabled").finish()


def test_auto_is_online_only_where_a_key_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mode("auto") == "offline"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + "k" * 40)
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode("auto") == "offline", "a key for another server"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert choose_mode("auto") == "offline", "WANDB_MODE decides under auto"


def test_online_without_a_key_is_refused_instead_of_asking() -> None:
    with pytest.raises(UserError, match="set WANDB_API_KEY"):
        choose_mode("online")


def test_a_broken_netrc_is_said_and_not_used(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "netrc").write_text("nonsense here")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not api_key_known()
    assert "cannot be read as a netrc file" in caplog.text


def test_a_failure_while_logging_is_one_warning_and_then_silence(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), start(tmp_path) as run:
        run.log_image("samples", tmp_path / "missing.png")
        run.log_image("samples", tmp_path / "missing.png")
        run.log({"loss": 1.0}, 1)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == wandb_log.__name__]
    assert "W&B could not log" in warning and "training goes on" in warning and "\n" not in warning


def test_a_killed_service_process_ends_neither_this_run_nor_the_next(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start(tmp_path, "first")
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    service = [int(line.split()[0]) for line in children.stdout.splitlines() if "wandb-core" in line]
    assert service, "W&B's service process was not found"
    for pid in service:
        os.kill(pid, signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        for images in range(5):
            run.log({"loss": 1.0}, images)
        run.finish()
        assert any("W&B could not" in record.getMessage() for record in caplog.records)
        start(tmp_path, "second").finish()  # may be lost as well, but must not raise
    with start(tmp_path, "third") as run:
        run.log({"loss": 1.0}, 1)
    assert [entry["item"]["loss"] for entry in items(fragments(tmp_path, "third")[0], "history")] == [1.0]


def test_a_server_that_never_answers_costs_one_timeout_and_the_run_goes_offline(
        tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        script = textwrap.dedent(f"""
            import sys, time
            sys.path.insert(0, {str(ROOT)!r})
            from pathlib import Path
            from training import wandb_log
            from tests.training.test_wandb_log import start
            wandb_log.INIT_TIMEOUT_S = wandb_log.FINISH_TIMEOUT_S = 1.0
            for run_id in ("one", "two"):
                began = time.monotonic()
                with start(Path({str(tmp_path)!r}), run_id, mode="auto") as run:
                    run.log({{"loss": 1.0}}, 1)
                print(run_id, time.monotonic() - began)
        """)
        environment = {**os.environ, "WANDB_API_KEY": "k" * 40, "WANDB_ERROR_REPORTING": "false",
                       "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B could not connect") == 1, done.stderr
    for run_id in ("one", "two"):
        (offline,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}")
        assert [entry["item"]["loss"] for entry in items(offline, "history")] == [1.0]
    seconds = dict(line.split() for line in done.stdout.splitlines() if line.split()[0] in ("one", "two"))
    assert float(seconds["two"]) < 5.0, "the second run waited for the network again"


@pytest.mark.parametrize(("at_start", "later"), [
    ("refuse", "refuse"), ("401", "401"), ("500", "500"), ("hang", "hang"),
    ("well", "die"), ("well", "500"), ("well", "401"), ("well", "hang"), ("well", "well")])
def test_a_server_that_misbehaves_neither_stalls_nor_ends_the_run_and_nothing_is_lost(
        tmp_path: Path, at_start: str, later: str) -> None:
    command = [sys.executable, "-m", "tests.training.wandb_server", str(tmp_path), at_start, later]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    started, logged, finished = (float(word) for word in done.stdout.split()[1:])
    assert started < 30 and logged < 10 and finished < 40, "timeouts of 3 s and two requests of 5 s, on a busy machine"
    pattern = "run-*-a1b2c3" if at_start == "well" else "offline-run-*-a1b2c3"
    (kept,) = (tmp_path / "wandb").glob(pattern)
    assert [entry["item"]["loss"] for entry in items(kept, "history")] == [float(row) for row in range(30)]
    said = [line for line in done.stderr.splitlines() if line.startswith("WARNING ") and "wandb sync" in line]
    if later == "well":
        assert said == []
    else:
        (sentence,) = said
        place = str(kept) if at_start == "well" else f"{tmp_path / 'wandb'}/offline-run-*"
        assert f"`wandb sync {place}`" in sentence

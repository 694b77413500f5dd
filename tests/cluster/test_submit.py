"""Submission against a real Ray cluster with token authentication, and what needs no cluster to be checked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import session, submit
from cluster.errors import JobFailed
from cluster.session import CODE_FOLDERS, check_visible, fits, preflight, ray_session, stage_code, staged_recipe
from data_shards.errors import UserError
from tests.conftest import find_free_port
from tests.toy import toy_set, toy_tree

TOKEN = "5e" * 32
CANARY = "canary-7f3a9b"


@pytest.fixture(scope="module")
def cluster_home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
    (home / "token").write_text(TOKEN)
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def head(cluster_home: Path) -> Iterator[dict[str, str]]:
    """`ray start --head` with a token on free ports; stopped by the process ids that belong to it."""
    ports = {name: find_free_port() for name in (
        "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
        "metrics-export-port", "runtime-env-agent-port")}
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster_home / "token"),
                   "WANDB_API_KEY": CANARY}
    with (cluster_home / "start.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
             "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--object-store-memory=100000000",
             f"--temp-dir={cluster_home}/ray", *(f"--{name}={port}" for name, port in ports.items())],
            env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
    url = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            _use_token(patch, cluster_home / "token")
            _wait_until_up(url, process, cluster_home / "start.log")
        yield {"url": url, "gcs": f"127.0.0.1:{ports['port']}"}
    finally:
        _stop(process, cluster_home)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            submit.jobs_list(address=url)
            return
        except (UserError, RuntimeError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"Ray did not start: {error}\n{log.read_text()[-3000:]}") from error
            time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes], home: Path) -> None:
    ours = []
    if process.poll() is None:
        ours = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(ours, timeout=20)
    for straggler in alive:
        straggler.kill()
    psutil.wait_procs(alive, timeout=10)
    left = [found.info for found in psutil.process_iter(["pid", "cmdline"])
            if any(str(home) in word for word in found.info["cmdline"] or ())]
    assert not left, left


def _use_token(patch: pytest.MonkeyPatch, file: Path) -> None:
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(file))


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, cluster_home: Path) -> None:
    _use_token(monkeypatch, cluster_home / "token")


@pytest.mark.ray
@pytest.mark.usefixtures("token")
def test_a_job_runs_and_is_followed_waited_for_and_listed(
        head: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine here.yaml"
    recipe.write_text("# a recipe that lies outside the checkout\n")
    job = submit.send(["version"], job="tiny job", url=head["url"], recipe=recipe, metadata={"graft_recipe": "tiny"})
    assert job.startswith("tiny-job-")
    sent = capsys.readouterr().out
    assert "code package:" in sent and "kB" in sent and f"graft jobs logs {job}" in sent
    submit.jobs_wait(job, address=head["url"], follow=True, timeout_s=120)
    assert "\ngraft " in capsys.readouterr().out
    listed = {row["job"]: row for row in submit.jobs_list(address=head["url"])}
    assert listed[job]["status"] == "SUCCEEDED"
    with submit.jobs_client(head["url"], job) as client:
        seen = str(client.get_job_info(job)) + client.get_job_logs(job)
    assert TOKEN not in seen and CANARY not in seen


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("token")
def test_the_whole_job_runs_on_the_cluster(head: dict[str, str], tmp_path: Path) -> None:
    """The same run as at home: sets, two workers, trials, page; through the Jobs API, joined with the cluster's token."""
    toy_set(tmp_path / "source")
    toy_set(tmp_path / "near", train=24, reference=24, seed=5)
    tree = toy_tree(tmp_path, engine={"kind": "deepspeed", "zero": 1}) | {"cluster": {"workers": 2}, "fanout": {
        "targets": [{"set": "near"}], "methods": ["scratch", "finetune"], "candidates": 1, "rungs": 1, "seeds": 2}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    job = submit.submit(str(tmp_path / "mine.yaml"), address=head["url"], out=str(tmp_path / "run"))
    assert job
    submit.jobs_wait(job, address=head["url"], timeout_s=600)
    board = json.loads((tmp_path / "run" / "leaderboard.json").read_text())
    assert sorted(row["seed"] for row in board["rows"] if row["phase"] == "final") == [1, 1, 2, 2]
    assert (tmp_path / "run" / "report" / "index.html").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("token")
def test_a_sleeping_job_is_stopped_and_a_failed_one_is_said(head: dict[str, str]) -> None:
    with submit.jobs_client(head["url"]) as client:
        sleeping = client.submit_job(entrypoint="sleep 600")
        while client.get_job_status(sleeping).value == "PENDING":
            time.sleep(0.2)
    assert submit.jobs_stop(sleeping, address=head["url"]) == "STOPPED"
    with pytest.raises(JobFailed, match="STOPPED"):
        submit.jobs_wait(sleeping, address=head["url"], timeout_s=30)
    failing = submit.send(["run", "no-such-recipe"], job="failing", url=head["url"])
    with pytest.raises(JobFailed, match="FAILED"):
        submit.jobs_wait(failing, address=head["url"], timeout_s=120)


@pytest.mark.ray
@pytest.mark.usefixtures("token")
def test_an_unknown_job_is_one_sentence(head: dict[str, str]) -> None:
    for ask in (submit.jobs_stop, submit.jobs_logs, submit.jobs_wait):
        with pytest.raises(UserError, match="there is no job 'nobody'"):
            ask("nobody", address=head["url"])


@pytest.mark.ray
@pytest.mark.parametrize("mode", ["wrong", "missing"])
def test_a_wrong_token_and_a_missing_one_are_one_sentence(
        head: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "wrong":
        (tmp_path / "token").write_text("ab" * 32)
        _use_token(monkeypatch, tmp_path / "token")
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH") as refused:
        submit.jobs_list(address=head["url"])
    assert "\n" not in str(refused.value)


@pytest.mark.ray
@pytest.mark.usefixtures("token")
def test_a_cluster_is_joined_and_its_limits_are_said(head: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    with ray_session(head["gcs"], folder=tmp_path / "out", shards=[tmp_path / "set"]):
        import ray

        assert (tmp_path / "out").is_dir() and not list((tmp_path / "out").iterdir())
        preflight({"pretraining": [{"CPU": 1}, {"CPU": 1}]})
        with pytest.raises(UserError, match="pretraining asks for 3 x"):
            preflight({"pretraining": [{"CPU": 1}] * 3})
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write"):
            check_visible(ray, tmp_path / "file")
        seen_elsewhere = session._digest(str(tmp_path / "set" / "manifest.json"))
        with pytest.MonkeyPatch.context() as patch:  # the driver's own copy differs from what the nodes see
            patch.setattr(session, "_digest", lambda file: seen_elsewhere[::-1])
            with pytest.raises(UserError, match=r"cannot be seen from .*; put data\.root on storage"):
                check_visible(ray, None, [tmp_path / "set"])
    assert not ray.is_initialized()


def test_an_address_where_nothing_listens_is_one_sentence(free_port: int) -> None:
    with pytest.raises(UserError, match="there is no Ray dashboard"):
        submit.jobs_list(address=f"127.0.0.1:{free_port}")
    with pytest.raises(UserError, match="there is no Ray cluster"), ray_session(f"127.0.0.1:{free_port}"):
        pass
    for address in ("http://head:8265", "ray://head:10001"):
        with pytest.raises(UserError, match="graft submit"), ray_session(address):
            pass


def test_the_dashboards_address_is_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert submit.dashboard_url("head") == "http://head:8265"
    assert submit.dashboard_url("head:9000/") == "http://head:9000"
    assert submit.dashboard_url("https://head/") == "https://head"
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    assert submit.dashboard_url(None) == "http://other:8265"
    for wrong in ("ray://head:10001", "http://head:port", "http://user:secret@head:8265", "http://"):
        with pytest.raises(UserError):
            submit.dashboard_url(wrong)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="--address"):
        submit.dashboard_url(None)


def test_a_password_on_the_command_line_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError) as refused:
        submit.send(["run", "demo", "--out", f"s3://key:{CANARY}@bucket/run"], job="x", url="http://127.0.0.1:1")
    assert CANARY not in str(refused.value)


def test_words_reach_the_job_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "a b.yaml", "--set", "name=x; touch PWN $(id)"]
    submit.send(words, job="a/b;c", url="http://head:8265", dry_run=True)
    printed = capsys.readouterr().out
    assert "python -m cluster run 'a b.yaml' --set 'name=x; touch PWN $(id)'" in printed
    assert "job a-b-c-" in printed and "nothing was sent" in printed


def test_the_package_is_small_and_holds_only_code_and_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\n")
    files, size = stage_code(tmp_path / "code", recipe)
    staged = [path.relative_to(tmp_path / "code") for path in (tmp_path / "code").rglob("*") if path.is_file()]
    assert len(staged) == files and size < 2_000_000
    assert {path.parts[0] for path in staged} <= {*CODE_FOLDERS, "submitted"}
    assert {path.suffix for path in staged} <= {".py", ".j2", ".yaml"}
    assert staged_recipe(recipe) == Path("submitted/mine.yaml") in staged
    ran = subprocess.run([sys.executable, "-P", "-c", "import sys; sys.path.insert(0, '.'); import cluster.cli as c;"
                          "print(c.__file__); sys.exit(c.main(['version']))"], cwd=tmp_path / "code",
                         capture_output=True, text=True, check=True)
    assert str(tmp_path) in ran.stdout


needs = st.lists(st.sampled_from([{"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5}]), max_size=6)


@settings(deadline=None)
@given(needs, st.lists(st.sampled_from([{"CPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}]), max_size=4))
def test_what_fits_never_exceeds_the_nodes(processes: list[dict[str, float]], nodes: list[dict[str, float]]) -> None:
    if fits(processes, nodes):
        for key in ("CPU", "GPU"):
            assert sum(need.get(key, 0) for need in processes) <= sum(node.get(key, 0) for node in nodes)
        assert fits(processes, [*nodes, {"CPU": 1.0}])
    elif processes:
        roomy = {key: sum(need.get(key, 0) for need in processes) for key in ("CPU", "GPU")}
        assert fits(processes, [roomy])


def test_a_process_larger_than_any_node_does_not_fit() -> None:
    assert not fits([{"CPU": 3}], [{"CPU": 2}, {"CPU": 2}])
    assert fits([{"CPU": 2}, {"CPU": 1}, {"CPU": 1}], [{"CPU": 2}, {"CPU": 2}])

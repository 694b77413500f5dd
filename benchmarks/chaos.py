"""A two-rank pretraining that is killed at random moments until it ends: `python -m benchmarks.chaos`.

A run that is never killed comes first. The same run is then killed, by SIGKILL to one rank or to all, at random steps and, for
every other kill, while a checkpoint is being written; after each it is started again. Checked: after each kill every checkpoint
in the folder is byte for byte that of the first run, so none was half-written and none was chosen that was; at the end weights,
averages, moments, metrics log and data order are the first run's; no process, port, shared memory or temporary file is left.

What a kill wasted, steps executed less steps kept, is counted outside of the trainer, by a file that grows by a line whenever
a rank draws a batch. Kills in the middle of writing a checkpoint waste a whole interval by design, so the bound of half an
interval and 5 steps is for those at random steps. SIGTERM is counted separately.

Goodput under one kill per `--kill-every-s` is computed: 1 - (restart + wasted steps x step time) / kill interval, where wasted
is half of the recipe's interval plus what writing took beyond that here, and restart the measured time from starting the
processes to their first step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from training.checkpoint import checkpoint_problem, images_of, latest_valid, read_state, steps
from training.events import read_events
from training.recipe import TrainingRecipe, read_recipe

PROJECT = Path(__file__).resolve().parent.parent
BATCH = 8
TIMED = ("images_per_second", "data_wait", "cost/")
Aim = Literal["step", "writing", "sigterm"]


@dataclass
class Attempt:
    """One start of the run, until it was killed or ended."""

    aim: Aim
    executed: int  # steps that rank 0 began
    kept: int  # steps by which the newest checkpoint moved on
    in_writing: bool  # the kill left a half-written checkpoint behind
    restart_s: float  # from starting the processes to the first step

    @property
    def wasted(self) -> int:
        return self.executed - self.kept


@dataclass
class Setting:
    folder: Path
    ranks: int
    zero: int
    interval: int  # steps between two checkpoints
    steps: int
    step_s: float  # steps are slowed down to this
    rng: random.Random
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def counter(self) -> Path:
        return self.folder / "steps.txt"


def write_recipe(setting: Setting) -> Path:
    """A toy set, and a recipe over it whose reports fall between its checkpoints."""
    from tests.toy import toy_set, toy_tree

    toy_set(setting.folder / "source")
    kind = {"kind": "torch"} if setting.zero == 0 else {"kind": "deepspeed", "zero": setting.zero}
    tree = toy_tree(setting.folder, images=setting.steps * BATCH, batch=BATCH, engine=kind,
                    report_every_images=5 * BATCH, snapshot_every_images=setting.interval * BATCH)
    path = setting.folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(setting: Setting, recipe: Path, run: Path, *more: str) -> list[subprocess.Popen[bytes]]:
    """One process for each rank, as a launcher starts them, each the leader of its session."""
    port = free_port()
    processes = []
    for rank in range(setting.ranks):
        environment = {
            **os.environ, "PYTHONPATH": str(PROJECT), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port),
            "WORLD_SIZE": str(setting.ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
            "TMPDIR": str(setting.folder / "tmp")}
        command = [sys.executable, "-m", "benchmarks.chaos", "--rank-of", str(setting.counter), "--step-ms",
                   str(1000 * setting.step_s), str(recipe), "--out", str(run), *more]
        with (setting.folder / f"rank-{rank}.log").open("ab") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
    return processes


def rank_main(counter: Path, step_s: float, arguments: list[str]) -> int:
    """What each rank runs: pretraining, with a line in ``counter`` for each batch that it draws."""
    import training.pretrain
    from training.__main__ import main

    real, rank = vars(training.pretrain)["batches"], os.environ["RANK"]

    def counted(*positional: Any, **named: Any) -> Iterator[Any]:
        feed = real(*positional, **named)
        if "rank" not in named:  # not the training's own feed
            yield from feed
        began = time.monotonic()
        file = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for number, batch in enumerate(feed):
            time.sleep(max(0.0, began + step_s - time.monotonic()))
            began = time.monotonic()
            images = named["images_seen"] + number * named["batch"]
            os.write(file, f"{rank} {images} {zlib.crc32(batch.images.numpy().tobytes())}\n".encode())
            yield batch

    vars(training.pretrain)["batches"] = counted
    return main(arguments)


def lines_of(setting: Setting) -> list[tuple[int, int, int]]:
    """(rank, images seen before it, checksum) of every batch that was drawn."""
    found = []
    for line in setting.counter.read_text().splitlines():
        rank, images, checksum = line.split()
        found.append((int(rank), int(images), int(checksum)))
    return found


def attempt(setting: Setting, recipe: Path, run: Path, aim: Aim) -> Attempt | None:
    """Start the run and kill it as ``aim`` says; None when it ended before."""
    parent = run / "pretrain"
    first = position(parent)
    begun = executed(setting)
    target = setting.rng.randrange(1, 2 * setting.interval) if aim != "writing" else setting.interval
    spawned = time.monotonic()
    processes = start(setting, recipe, run)
    first_step_s = 0.0
    try:
        while True:
            done = executed(setting) - begun
            first_step_s = first_step_s or (time.monotonic() - spawned if done else 0.0)
            if all(process.poll() is not None for process in processes):
                assert all(process.returncode == 0 for process in processes), log_of(setting)
                return None
            assert time.monotonic() - spawned < 120, log_of(setting)
            if done >= target and (aim != "writing" or list(parent.glob(".step-*.partial"))):
                break
            time.sleep(0.0005 if done >= target else 0.003)
        if aim == "writing":
            time.sleep(setting.rng.uniform(0, 0.01))
        victims = processes if aim == "sigterm" or setting.rng.random() < 0.5 else [setting.rng.choice(processes)]
        for victim in victims:
            victim.send_signal(signal.SIGTERM if aim == "sigterm" else signal.SIGKILL)
        in_writing = bool(list(parent.glob(".step-*.partial")))
        if aim == "sigterm":
            assert [process.wait(60) for process in processes] == [1] * setting.ranks, log_of(setting)
    finally:
        end(processes)
    return Attempt(aim, executed(setting) - begun, (position(parent) - first) // BATCH, in_writing, first_step_s)


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """What a launcher does when a rank has died: the others get a moment, and are killed."""
    until = time.monotonic() + 1.0
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.01)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def executed(setting: Setting) -> int:
    if not setting.counter.exists():
        return 0
    return sum(line.startswith(b"0 ") for line in setting.counter.read_bytes().splitlines())


def position(parent: Path) -> int:
    newest = latest_valid(parent)
    return images_of(newest) if newest else 0


def log_of(setting: Setting) -> str:
    return "\n".join((setting.folder / f"rank-{rank}.log").read_text()[-2000:] for rank in range(setting.ranks))


def metrics_log(run: Path) -> list[dict[str, Any]]:
    """The log without its time fields."""
    return [{"images": event["images"], **{k: v for k, v in event["metrics"].items() if not k.startswith(TIMED)}}
            for event in read_events(run / "pretrain" / "events.jsonl")]


def check_checkpoints(killed: Path, whole: Path) -> None:
    """Every checkpoint there is has the bytes of the run that was never killed."""
    for name in steps(killed / "pretrain"):
        folder = killed / "pretrain" / name
        assert checkpoint_problem(folder) is None, (name, checkpoint_problem(folder))
        expected = read_state(whole / "pretrain" / name) if (whole / "pretrain" / name).exists() else None
        # A checkpoint that SIGTERM asked for stands between those of the other run.
        assert expected is None or read_state(folder)["files"] == expected["files"], name


def free_port() -> int:
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def chaos(setting: Setting, kills: int, sigterms: int, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The figures of the module's docstring; raises `AssertionError` where a promise is broken."""
    (setting.folder / "tmp").mkdir(parents=True)
    shared = set(os.listdir("/dev/shm"))
    recipe, whole, killed = write_recipe(setting), setting.folder / "whole", setting.folder / "killed"
    reference = start(setting, recipe, whole, "--set", "training.keep_checkpoints=100000")
    assert [process.wait(1200) for process in reference] == [0] * setting.ranks, log_of(setting)
    expected = sorted(set(lines_of(setting)))
    assert len(expected) == setting.steps * setting.ranks
    setting.counter.unlink()
    usual = set(os.listdir(setting.folder / "tmp"))  # torch's own cache

    aims: list[Aim] = ["writing" if number % 2 else "step" for number in range(kills)] + ["sigterm"] * sigterms
    for number, aim in enumerate(aims):
        one = attempt(setting, recipe, killed, aim)
        assert one, f"the run ended after {number} of {len(aims)} kills: give it more steps"
        setting.attempts.append(one)
        check_checkpoints(killed, whole)
        if number % 10 == 9:
            say(f"{number + 1} of {len(aims)} kills, {position(killed / 'pretrain') // BATCH} of {setting.steps} steps")
    last = start(setting, recipe, killed)
    assert [process.wait(1200) for process in last] == [0] * setting.ranks, log_of(setting)

    check_checkpoints(killed, whole)
    final = latest_valid(killed / "pretrain")
    assert final and read_state(final)["files"] == read_state(whole / "pretrain" / final.name)["files"]
    assert images_of(final) == setting.steps * BATCH
    assert metrics_log(killed) == metrics_log(whole), "the metrics log differs"
    assert sorted(set(lines_of(setting))) == expected, "the data order differs"
    assert not list((killed / "pretrain").glob(".*")), "temporary files are left in the run's folder"
    assert not set(os.listdir(setting.folder / "tmp")) - usual, set(os.listdir(setting.folder / "tmp")) - usual
    left = stays(set(os.listdir("/dev/shm")) - shared)
    assert not left, f"shared memory is left: {left}"
    assert not alive(str(setting.folder)), alive(str(setting.folder))
    total = executed(setting)
    assert total - setting.steps == sum(one.wasted for one in setting.attempts), "executed - kept, counted twice"
    return figures(setting, kills)


def stays(names: set[str], seconds: float = 60) -> set[str]:
    """Those of ``names`` in /dev/shm that nobody takes away: what another program is using now is none of ours."""
    until = time.monotonic() + seconds
    while (names := names & set(os.listdir("/dev/shm"))) and time.monotonic() < until:
        time.sleep(0.1)
    return names


def alive(text: str) -> list[int]:
    """Processes, other than this one, whose command line holds ``text``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if text in command and "--rank-of" in command:
                found.append(int(folder.name))
    return found


def figures(setting: Setting, kills: int) -> dict[str, Any]:
    wasted = {aim: [one.wasted for one in setting.attempts if one.aim == aim] for aim in ("step", "writing", "sigterm")}
    return {
        "kills": kills, "ranks": setting.ranks, "zero": setting.zero, "interval_steps": setting.interval,
        "steps": setting.steps, "step_ms": 1000 * setting.step_s,
        "left_a_half_written_checkpoint": sum(one.in_writing for one in setting.attempts if one.aim != "sigterm"),
        "bound_on_wasted_steps": setting.interval / 2 + 5,
        **{f"wasted_steps_{aim}": {"mean": round(statistics.mean(some), 2), "largest": max(some)}
           for aim, some in wasted.items() if some},
        "restart_s": round(statistics.median(one.restart_s for one in setting.attempts if one.restart_s), 2)}


def goodput(recipe: TrainingRecipe, step_s: float, restart_s: float, late_steps: float, kill_every_s: float) -> float:
    """The share of time that goes into steps that are kept."""
    interval = recipe.training.snapshot_every_images / recipe.training.batch
    return 1 - (restart_s + (interval / 2 + late_steps) * step_s) / kill_every_s


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--sigterms", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, default=2, help="DeepSpeed's ZeRO stage; 0 is the plain engine")
    parser.add_argument("--interval", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--step-ms", type=float, default=40.0, help="steps are slowed down to this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--goodput-recipe", default="demo")
    parser.add_argument("--goodput-step-s", type=float, default=0.11, help="seconds of a step of that recipe")
    parser.add_argument("--kill-every-s", type=float, default=300.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if options.rank_of:
        return rank_main(options.rank_of, options.step_ms / 1000, rest)
    folder = Path(tempfile.mkdtemp(prefix="graft-chaos-"))
    try:
        setting = Setting(folder, options.ranks, options.zero, options.interval, steps_for(options.kills, options.interval),
                          options.step_ms / 1000, random.Random(options.seed))
        found = chaos(setting, options.kills, options.sigterms)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    recipe = read_recipe(TrainingRecipe, options.goodput_recipe)
    late = max(0.0, found["wasted_steps_step"]["mean"] - options.interval / 2) * options.step_ms / 1000
    found["goodput"] = {
        "recipe": options.goodput_recipe, "step_s": options.goodput_step_s, "kill_every_s": options.kill_every_s,
        "value": round(goodput(recipe, options.goodput_step_s, found["restart_s"], late / options.goodput_step_s,
                               options.kill_every_s), 3)}
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    for aim, bound in (("step", found["bound_on_wasted_steps"]), ("sigterm", 5)):
        if found.get(f"wasted_steps_{aim}", {"mean": 0})["mean"] > bound:
            print(f"wasted steps per kill ({aim}) are over {bound}", file=sys.stderr)
            return 1
    return 0


def steps_for(kills: int, interval: int) -> int:
    """Steps that a run needs for so many kills: each lets it on by about an interval at most."""
    return interval * (kills + 8)


if __name__ == "__main__":
    sys.exit(main())

"""The fan-out: one Tune experiment of plain function trials, driven by the plan of `tune_spaces`.

Each Tune trial is one job (a candidate up to its next rung, or a winner under one seed). What has been reported lies in the
run's folder; a run that was killed replays it and goes on, and Tune's own storage is scratch.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.progress import Show, progress
from cluster.recipe import Recipe
from data_shards.errors import UserError
from data_shards.files import write_json
from training.events import append_event, read_events
from training.source import rooted
from training.trial import Trial, empty_row, read_row, run_trial, trial_folder
from tune_spaces.plan import Job, Named, Race, chosen, count_jobs, final_trials, ready_jobs, search_reports


class Board:
    """What the driver knows: the races, and every row read or reported so far. It alone writes the run's `events.jsonl`."""

    def __init__(self, recipe: Recipe, run: Path, races: list[Race]) -> None:
        self.recipe, self.run, self.races = recipe, run, races
        self.rows: dict[str, dict[str, Any]] = {}
        self.running: set[tuple[str, int]] = set()
        for race in races:
            self._read(race.search)
            self._read(final_trials(race, self.rows))  # which these are is known once the search is read
        self._catch_up()

    def _read(self, trials: Iterable[Named]) -> None:
        for trial, identity in trials:
            row = read_row(trial_folder(self.run, trial, identity))
            if row:
                self.rows[identity] = row

    def _catch_up(self) -> None:
        """Record what trials had written, and decisions that were due, when the driver was killed before it could."""
        events = [event for event in read_events(self.run / "events.jsonl") if event["stage"] == "fanout"]
        recorded = {(event["trial"], event["images"]) for event in events}
        decided = {(event["metrics"]["domain"], event["metrics"]["method"]) for event in events
                   if "decision" in event["metrics"]}  # the stage's own time has no trial either
        for race in self.races:
            for trial, identity in (*race.search, *final_trials(race, self.rows)):
                row = self.rows.get(identity)
                if row and (identity, row["images_seen"]) not in recorded:
                    rung = race.budgets.index(row["images_seen"]) if row["images_seen"] in race.budgets else -1
                    self._record(race, identity, rung if trial.phase == "search" else -1)
            if (race.domain, race.method) not in decided:
                self._decide(race)
            elif any(row and row["status"] != "failed" and row["checkpoint"]
                     for row in (self.rows.get(identity) for _, identity in race.search)):
                self._close(race)

    def next_job(self) -> Job | None:
        for race in self.races:
            for job in ready_jobs(race, self.rows):
                if (job.identity, job.until) not in self.running:
                    return job
        return None

    def finished(self) -> bool:
        return not self.running and self.next_job() is None

    def total(self) -> int:
        return sum(count_jobs(race) for race in self.races)

    def reported(self) -> int:
        """Jobs whose result is known."""
        return sum(len(search_reports(race, self.rows)) + sum(
            self.rows.get(identity, {}).get("status") in ("finished", "failed")
            for _, identity in final_trials(race, self.rows)) for race in self.races)

    def plan_rows(self) -> list[dict[str, Any]]:
        """Every row in the order of the plan, whatever the order in which the trials ended."""
        trials = [named for race in self.races for named in (*race.search, *final_trials(race, self.rows))]
        return [self.rows[identity] for _, identity in trials if identity in self.rows]

    def report(self, job: Job, row: dict[str, Any]) -> None:
        """Take a job's row in; when that closes a search, write the decision down and stop the losers."""
        race = next(race for race in self.races if (race.domain, race.method) == (job.trial.domain, job.trial.method))
        self.rows[job.identity] = row
        self._record(race, job.identity, job.rung)
        if job.rung >= 0:
            self._decide(race)

    def _record(self, race: Race, identity: str, rung: int) -> None:
        row = self.rows[identity]
        append_event(self.run / "events.jsonl", stage="fanout", trial=identity, images=row["images_seen"], metrics={
            "domain": race.domain, "method": race.method, "rung": rung, "selection_kid": row["selection_kid"],
            "kid": row["kid"], "status": row["status"]})

    def _decide(self, race: Race) -> None:
        best = chosen(race, self.rows)
        if best is None:
            return
        append_event(self.run / "events.jsonl", stage="fanout", images=race.budgets[-1], metrics={
            "decision": "winner", "domain": race.domain, "method": race.method,
            "hyperparameters": dict(race.search[best].trial.hyperparameters),
            "scores": {f"candidate {c}, rung {r}": score if math.isfinite(score) else "failed"
                       for (c, r), score in search_reports(race, self.rows).items()}})
        self._close(race)

    def _close(self, race: Race) -> None:
        """The search is over: only the finals' weights will be kept."""
        for trial, identity in race.search:
            row = self.rows.get(identity)
            if row and row["status"] != "failed":
                folder = trial_folder(self.run, trial, identity)
                row["status"] = "finished" if row["images_seen"] >= race.budgets[-1] else "stopped"
                row["checkpoint"] = None
                write_json(folder / "row.json", row)
                shutil.rmtree(folder / "best", ignore_errors=True)

    def fail(self, job: Job, reason: str) -> dict[str, Any]:
        """The row of a job whose process was lost more often than the recipe allows."""
        folder = trial_folder(self.run, job.trial, job.identity)
        row = read_row(folder) or empty_row(job.trial, job.identity, self.recipe.adaptation)
        row |= {"status": "failed", "reason": reason}
        write_json(folder / "row.json", row)
        return row


def trainable(config: Mapping[str, Any]) -> None:
    """One Tune trial: run the job; its row goes to the run's folder, not through Tune."""
    from ray import tune

    try:
        row = run_trial(Trial(**config["trial"]), Recipe.model_validate(config["recipe"]), Path(config["run"]),
                        until=config["until"])
    except UserError as error:  # settings that cannot work: a retry would not help
        tune.report({"images_seen": 0, "refused": str(error)})
    else:
        tune.report({"images_seen": row["images_seen"], "refused": ""})


def fan_out(recipe: Recipe, run: Path, races: list[Race]) -> Board:
    """Run what is left of the plan on the joined Ray; returns the board with every row.

    Raises:
        KeyboardInterrupt: when Ctrl-C ended it before.
    """
    board = Board(recipe, run, races)
    if not board.finished():
        with progress("fan-out", board.total(), "trials") as show:
            _tune(recipe, run, board, show)
        if not board.finished():  # Tune's answer to Ctrl-C, which would pass for the end of the plan
            raise KeyboardInterrupt
    return board


def _tune(recipe: Recipe, run: Path, board: Board, show: Show) -> None:
    import ray
    from ray import tune

    from cluster.plan_search import PlanSearch

    def suggest() -> tuple[Job, dict[str, Any]] | None:
        job = board.next_job()
        if job is None:
            return None
        board.running.add((job.identity, job.until))
        trial = {**vars(job.trial), "hyperparameters": dict(job.trial.hyperparameters)}
        return job, {"trial": trial, "until": job.until, "recipe": sent, "run": str(run)}

    def complete(job: Job, refused: str) -> None:
        board.running.discard((job.identity, job.until))
        row = read_row(trial_folder(run, job.trial, job.identity))
        if refused or row is None or (row["status"] != "failed" and row["images_seen"] < job.until):
            row = board.fail(job, refused or "its process ended more often than fanout.max_failures allows")
        board.report(job, row)
        value = row["selection_kid"] if row["kid"] is None else row["kid"]
        score = f"KID {value:.4g}" if value is not None else f"{row['status']}: {row['reason']}"
        show(board.reported(), f"{row['domain']} {row['method']} {row['phase']} seed {row['seed']} "
                               f"{row['images_seen']} images: {score}")

    sent = rooted(recipe).model_dump(mode="json")
    available, needs = ray.cluster_resources(), recipe.cluster.trial_resources
    at_once = max(1, min(int(available.get(name, 0) // need) for name, need in needs.items()))
    storage = Path(tempfile.mkdtemp(prefix="graft-tune-"))
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints a header even at verbose=0
    try:
        tune.Tuner(
            tune.with_resources(trainable, needs),
            tune_config=tune.TuneConfig(search_alg=PlanSearch(suggest, complete), num_samples=-1, reuse_actors=True,
                                        max_concurrent_trials=at_once, metric="images_seen", mode="max"),
            run_config=tune.RunConfig(
                name=f"{recipe.name}-{uuid.uuid4().hex[:8]}", storage_path=str(storage), verbose=0,
                failure_config=tune.FailureConfig(max_failures=recipe.fanout.max_failures)),
        ).fit()
    finally:
        with suppress(OSError):
            shutil.rmtree(storage)

"""The plan of `tune_spaces` as a Tune searcher: Tune asks for the next trial, the plan answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from tune_spaces.plan import Job

Suggest = Callable[[], tuple[Job, dict[str, Any]] | None]
Complete = Callable[[Job, str], None]
"""(job, why its settings were refused, or "")"""


class PlanSearch(Searcher):
    """``suggest()`` gives the next job and its Tune config, or None while the open rungs are still running."""

    def __init__(self, suggest: Suggest, complete: Complete) -> None:
        super().__init__(metric="images_seen", mode="max")
        self._next, self._complete = suggest, complete
        self._jobs: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> Any:
        found = self._next()
        if found is None:
            return None if self._jobs else Searcher.FINISHED
        self._jobs[trial_id], config = found
        return config

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._complete(self._jobs.pop(trial_id), (result or {}).get("refused", ""))

    # Tune pickles and saves its searcher for a restore that graft never does: a search is rebuilt from the run's folder.

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass

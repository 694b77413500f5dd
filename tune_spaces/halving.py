"""Successive halving as pure functions: from what has been reported, which trials may run now, and who won.

Scores are KID, smaller is better. A candidate that failed has the score infinity. The state is the set of reports and nothing
else, so a search is rebuilt by replaying them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Reports = Mapping[tuple[int, int], float]
"""(candidate, rung) -> score."""


@dataclass(frozen=True)
class Ladder:
    """``candidates`` start on rung 0; one in ``reduction`` climbs from each rung to the next."""

    candidates: int
    rungs: int
    reduction: int

    def budget(self, rung: int, images: int, batch: int) -> int:
        """Images seen at the end of a rung: the whole budget on the last, a ``reduction``-th less on each below."""
        if rung == self.rungs - 1:
            return images
        share = images / self.reduction ** (self.rungs - 1 - rung)
        return max(batch, round(share / batch) * batch)

    def size(self, rung: int) -> int:
        """How many candidates a closed search has on ``rung``."""
        return max(1, self.candidates // self.reduction**rung)


def _ranked(reports: Reports, rung: int) -> list[int]:
    """Candidates that reported on ``rung``, best first; ties go to the earlier candidate, failures last."""
    return sorted((c for c, r in reports if r == rung), key=lambda c: (_finite(reports[c, rung]), c))


def _finite(score: float) -> float:
    return score if math.isfinite(score) else math.inf


def halving(ladder: Ladder, reports: Reports) -> list[tuple[int, int]]:
    """(candidate, rung) that may run: the lowest rung that is not closed, its members being the best of the rung below."""
    members = list(range(ladder.candidates))
    for rung in range(ladder.rungs):
        missing = [c for c in members if (c, rung) not in reports]
        if missing:
            return [(c, rung) for c in missing]
        if rung + 1 < ladder.rungs:
            best = [c for c in _ranked(reports, rung) if c in members and math.isfinite(reports[c, rung])]
            members = best[:ladder.size(rung + 1)]
    return []


def asha(ladder: Ladder, reports: Reports) -> list[tuple[int, int]]:
    """Asynchronous halving (Li et al. 2020, algorithm 2): whoever is in the top 1/reduction of a rung so far climbs at once."""
    ready = []
    for rung in reversed(range(ladder.rungs - 1)):
        ranked = [c for c in _ranked(reports, rung) if math.isfinite(reports[c, rung])]
        everyone = sum(1 for _, r in reports if r == rung) == ladder.candidates or rung > 0
        top = ranked[:max(len(ranked) // ladder.reduction, 1 if everyone and ranked else 0)]
        ready += [(c, rung + 1) for c in top if (c, rung + 1) not in reports]
    return ready + [(c, 0) for c in range(ladder.candidates) if (c, 0) not in reports]


SCHEDULERS: dict[str, Callable[[Ladder, Reports], list[tuple[int, int]]]] = {"halving": halving, "asha": asha}


def winner(ladder: Ladder, reports: Reports) -> int | None:
    """The best candidate of the highest rung that anyone finished; None when all failed."""
    for rung in reversed(range(ladder.rungs)):
        ranked = [c for c in _ranked(reports, rung) if math.isfinite(reports[c, rung])]
        if ranked:
            return ranked[0]
    return None

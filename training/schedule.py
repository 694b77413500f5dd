"""Everything that varies over training is one function of images seen."""

from __future__ import annotations

import itertools

Schedule = float | list[tuple[float, float]]
"""A constant, or knots ``[[images, value], ...]`` joined by straight lines and held beyond both ends."""


def value_at(schedule: Schedule, images: float) -> float:
    """The schedule's value after ``images`` images."""
    if not isinstance(schedule, list):
        return float(schedule)
    before = schedule[0]
    for knot in schedule:
        if images < knot[0]:
            if knot is before:
                return float(knot[1])
            share = (images - before[0]) / (knot[0] - before[0])
            return float(before[1] + share * (knot[1] - before[1]))
        before = knot
    return float(before[1])


def last_value(schedule: Schedule) -> float:
    """Where the schedule ends."""
    return value_at(schedule, float("inf"))


def largest_value(schedule: Schedule) -> float:
    """The schedule's largest value, which one of its knots has."""
    return max(value for _, value in schedule) if isinstance(schedule, list) else float(schedule)


def check_schedule(schedule: Schedule) -> Schedule:
    """Refuse negative values and knots out of order (pydantic turns the ValueError into the user's sentence)."""
    if not isinstance(schedule, list):
        if not 0 <= schedule < float("inf"):
            raise ValueError("give a finite number that is not negative")
        return schedule
    if not schedule:
        raise ValueError("give at least one [images, value] knot")
    for (earlier, _), (later, _) in itertools.pairwise(schedule):
        if later <= earlier:
            raise ValueError("the knots' images must increase")
    if any(value < 0 for _, value in schedule):
        raise ValueError("values must not be negative")
    return schedule

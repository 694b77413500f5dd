"""KanjiVG's characters as sequences of pen movements: a sample is uint8 (3, 1, 64), of which a step is (pen, x, y).

pen is 1 where a stroke begins and 2 where it goes on to; 0 ends the character and fills up what is left. x and y lie on a grid
of 64 by 64. A stroke's Bezier curves are thinned out to the points that hold its shape to 0.8 of a grid cell (Ramer, Douglas
and Peucker); the few characters of more than 64 points are left out.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.datasets.kanjivg import ARCHIVE, LICENCE, SOURCE, codes_of, read_svg
from data_shards.datasets.plan import SetPlan
from data_shards.errors import UserError
from data_shards.sources.made import Sample

__all__ = ["ARCHIVE", "SETS", "VERSION", "sets", "stroke_steps"]

VERSION = 1
SHARD_SAMPLES = 1024
SETS = 1
STEPS, GRID, BOX = 64, 64, 109  # BOX: the drawing's own side
HELD_OUT = 500
TOLERANCE = 0.8  # of a grid cell
CURVE_POINTS = 16  # of a Bezier curve before it is thinned out

_STROKE = re.compile(r'<path[^>]* d="([^"]*)"')
_TOKEN = re.compile(r"[A-Za-z]|-?(?:\d+\.?\d*|\.\d+)")
_POINTS = {"m": 1, "c": 3, "s": 2}  # of a command of SVG's path language, those that KanjiVG has


def sets(archive: Path) -> Iterator[SetPlan]:
    """One set: 500 characters as its split "reference", chosen by seed 0, and all the others to train on."""
    with zipfile.ZipFile(archive) as wheel:
        found = {code: stroke_steps(read_svg(wheel, code)) for code in codes_of(wheel)}
    drawn = {code: steps for code, steps in found.items() if steps is not None}
    codes = sorted(drawn)
    order = [codes[number] for number in np.random.RandomState(0).permutation(len(codes)).tolist()]
    splits = {"train": sorted(order[HELD_OUT:]), "reference": sorted(order[:HELD_OUT])}
    yield SetPlan("kanjivg-strokes/source", partial(_samples, drawn, splits), (), LICENCE, SOURCE, shape=(3, 1, STEPS),
                  shard_samples=SHARD_SAMPLES)


def stroke_steps(svg: str) -> np.ndarray | None:
    """One character's strokes as uint8 (3, 1, 64), None if they have more than 64 points."""
    steps: list[tuple[int, int, int]] = []
    for path in _STROKE.findall(svg):
        cells = np.clip(np.round(thinned(points_of(path) * (GRID / BOX), TOLERANCE)), 0, GRID - 1).astype(int)
        moved = [True, *(cells[1:] != cells[:-1]).any(1)]
        steps += [(1 if number == 0 else 2, x, y) for number, (x, y) in enumerate(cells[moved].tolist())]
    if len(steps) > STEPS:
        return None
    found = np.zeros((3, 1, STEPS), np.uint8)
    found[:, 0, : len(steps)] = np.array(steps).reshape(-1, 3).T
    return found


def points_of(path: str) -> np.ndarray:
    """Points (N, 2) along a path of the commands m, c and s, absolute and relative, each of which may repeat.

    Raises:
        UserError: for any other command.
    """
    tokens = _TOKEN.findall(path)
    at, handle = np.zeros(2), np.zeros(2)
    points: list[np.ndarray] = []
    command, place = "", 0
    share = np.linspace(0, 1, CURVE_POINTS + 1)[1:, None]
    while place < len(tokens):
        if tokens[place].isalpha():
            command, place = tokens[place], place + 1
        if command.lower() not in _POINTS:
            raise UserError(f"{ARCHIVE.filename} has a stroke with the command {command!r}; remove it and fetch it again")
        count = 2 * _POINTS[command.lower()]
        given = np.array(tokens[place : place + count], float).reshape(-1, 2) + (at if command.islower() else 0)
        place += count
        if command.lower() == "m":
            at = handle = given[0]
            points.append(at)
            continue
        first, second, end = given if len(given) == 3 else (2 * at - handle, *given)
        points.extend((1 - share) ** 3 * at + 3 * (1 - share) ** 2 * share * first
                      + 3 * (1 - share) * share**2 * second + share**3 * end)  # fmt: skip
        at, handle = end, second
    return np.array(points)


def thinned(points: np.ndarray, tolerance: float) -> np.ndarray:
    """The fewest of the points (N, 2), found by Ramer's, Douglas' and Peucker's halving, from whose lines none is farther
    than ``tolerance``."""
    if len(points) < 3:
        return points
    chord, offsets = points[-1] - points[0], points - points[0]
    length = np.hypot(*chord)
    away = np.abs(chord[0] * offsets[:, 1] - chord[1] * offsets[:, 0]) / length if length else np.hypot(*offsets.T)
    middle = int(away.argmax())
    if away[middle] <= tolerance:
        return points[[0, -1]]
    return np.concatenate([thinned(points[: middle + 1], tolerance)[:-1], thinned(points[middle:], tolerance)])


def _samples(drawn: dict[str, np.ndarray], splits: dict[str, list[str]]) -> Iterator[Sample]:
    for split, codes in splits.items():
        for code in codes:
            yield Sample(f"u{code}", drawn[code], split=split)

"""The report: one self-contained page about a run, read from nothing but the run's folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from PIL import Image, UnidentifiedImageError

from cluster.report_charts import Point, Series, key, line_chart
from cluster.report_text import (
    SYMBOLS,
    Row,
    caveat,
    compared_with,
    count,
    decimals,
    duration,
    finite,
    gain_decimals,
    headline,
    leaderboard_table,
    leaderboard_text,
    method_name,
    metric_name,
    number,
    order_methods,
    percent,
    signed,
    state_of,
)
from data_shards.errors import UserError
from training.cost import cost_line
from training.events import read_events
from training.health import story
from training.recipe import TrainingConfig

GRID_COLUMNS = 8
SMALL_CHART = 360  # width in units of the view box, where three stand side by side
SUPPORTED_SCHEMA = 1

__all__ = ["build_report", "leaderboard_table", "leaderboard_text"]


def build_report(run: Path) -> Path:
    """Write ``run/report/index.html`` from what the run's folder holds so far; returns its path.

    Raises:
        UserError: when the folder is missing, or its leaderboard cannot be read.
    """
    if not run.is_dir():
        raise UserError(f"{run} is not a run's folder; give the --out of a `graft run`.")
    environment = Environment(loader=PackageLoader("cluster", "."), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters.update(number=number, signed=signed, duration=duration, count=count, method=method_name,
                               percent=percent)
    page = environment.get_template("report_template.html.j2").render(collect(run))
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script, "the template has one script"
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    target = run / "report" / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page.replace("SCRIPT_SHA256", digest, 1), encoding="utf-8")
    return target


def collect(run: Path) -> dict[str, Any]:
    """Everything the template shows; a stage that has not run is None or empty."""
    board = read_leaderboard(run / "leaderboard.json")
    rows: list[Row] = board.get("rows") or []
    verdicts: list[Row] = board.get("verdicts") or []
    found = [path.name for path in sorted((run / "domains").glob("*")) if path.is_dir()]
    named = [str(row.get("domain")) for row in [*verdicts, *rows]]
    domains = list(dict.fromkeys(named)) or found
    methods = order_methods(row.get("method") for row in [*verdicts, *rows])
    recipe = run / "recipe.yaml"
    lines = read_lines(run / "pretrain" / "events.jsonl")
    latest = max((line["time"] for line in [*lines, *read_lines(run / "events.jsonl")]
                  if isinstance(line.get("time"), int | float)), default=None)
    places = {name: decimals(row.get(name) for row in rows) for name in ("kid", "fd", "fid", "selection_kid", "intra_distance")}
    parts = [domain_part(run, domain, rows, methods) for domain in domains]
    training = training_config(run)
    numbers = [{**line, "metrics": {name: value for name, value in line["metrics"].items() if finite(value)}} for line in lines]
    return {
        "title": run.resolve().name,
        "latest": datetime.fromtimestamp(latest, UTC).strftime("%Y-%m-%d %H:%M UTC") if latest else None,
        "headline": headline(verdicts, methods), "caveat": caveat(rows, verdicts), "verdicts": verdicts, "methods": methods,
        "cells": {(str(v.get("domain")), str(v.get("method"))): {**v, "state": state_of(v)} for v in verdicts},
        "seeds": sorted({v["seeds"] for v in verdicts if v.get("seeds") is not None}),
        "rows": sorted(rows, key=lambda row: (row.get("phase") == "search", domains.index(str(row.get("domain"))),
                                              methods.index(str(row.get("method"))), row.get("seed") or 0)),
        "searches": sum(row.get("phase") == "search" for row in rows),
        "has_fid": any(finite(row.get("fid")) for row in rows),
        "places": {**places, "gain": gain_decimals(verdicts)},
        "robustness": robustness_charts(verdicts, methods),
        "domains": parts, "searching": any(part["searching"] for part in parts),
        "samples": picture(run, "pretrain/samples.png"), "reals": picture(run, "pretrain/reals.png"),
        "pretrain_images": max((line["images"] for line in lines), default=None),
        "pretrain_charts": pretrain_charts(lines), "cost_line": cost_line(numbers, training.batch),
        "health_charts": health_charts(numbers), "health": story(numbers, training.health),
        "meta": {path.parent.name: meta_charts(read_lines(path))
                 for path in sorted((run / "meta").glob("*/events.jsonl"))},
        "contract": board.get("contract") or {}, "costs": board.get("costs") or {},
        "recipe": recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
        "over_domains": board.get("methods") or [],
        "compared_with": {method: said for method in methods if (said := compared_with(method))},
        "symbols": SYMBOLS, "key": {method: key(style) for style, method in enumerate(methods)},
    }


def read_leaderboard(path: Path) -> dict[str, Any]:
    """The leaderboard, empty where no fan-out has finished yet.

    Raises:
        UserError: when it is not JSON, or a newer graft wrote it.
    """
    if not path.is_file():
        return {}
    try:
        board = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it and run `graft run` again.") from error
    if not isinstance(board, dict):
        raise UserError(f"{path} holds no leaderboard; remove it and run `graft run` again.")
    version = board.get("schema_version", SUPPORTED_SCHEMA)
    if version != SUPPORTED_SCHEMA:
        raise UserError(f"{path} has schema_version {version!r} and this graft reads {SUPPORTED_SCHEMA}; update graft.")
    return board


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The events that have the documented shape; a log is untrusted text."""
    return [line for line in read_events(path) if isinstance(line, dict) and isinstance(line.get("metrics"), dict)
            and isinstance(line.get("images"), int | float)]


# ---- a domain


def domain_part(run: Path, domain: str, rows: Sequence[Row], methods: Sequence[str]) -> dict[str, Any]:
    """Pictures and curves of one domain, of the final trials, or of the search where a method has no final yet."""
    folder = f"domains/{domain}"
    series, shown, searching = [], [], False
    for style, method in enumerate(methods):
        trials = [row for row in rows if str(row.get("domain")) == domain and str(row.get("method")) == method]
        finals = [row for row in trials if row.get("phase") != "search"]
        chosen = finals or trials
        searching = searching or bool(trials and not finals)
        folders = [f"{folder}/{row.get('trial')}" for row in chosen]
        logs = [read_lines(run / name / "events.jsonl") for name in folders if inside(run, name)]
        series.append(Series(method_name(method), style, mean_over_seeds(logs, "selection_kid")))
        if chosen:
            first = min(chosen, key=lambda row: row.get("seed") or 0)
            shown.append({"method": method, "row": first,
                          "samples": picture(run, f"{folder}/{first.get('trial')}/samples.png"),
                          "nearest": picture(run, f"{folder}/{first.get('trial')}/nearest.png")})
    return {"name": domain, "shown": shown, "searching": searching, "support": picture(run, f"{folder}/support.png"),
            "reference": picture(run, f"{folder}/reference.png"),
            "chart": line_chart(series, title=f"KID over images seen on {domain}", y_label="selection KID")}


def robustness_charts(verdicts: Sequence[Row], methods: Sequence[str]) -> list[Any]:
    """Gain against the share of the support pool that was corrupted, one chart for each target that has more than one share."""
    charts = []
    spoilt = {(str(v["target"]), str(v["corruption"].get("kind"))) for v in verdicts if isinstance(v.get("corruption"), dict)
              and v.get("target")}
    for target, kind in sorted(spoilt):
        series = []
        for style, method in enumerate(methods):
            points = []
            for v in verdicts:
                corruption = v.get("corruption") or {"kind": kind, "share": 0.0}
                interval = v.get("gain_ci95")
                if (v.get("target"), corruption.get("kind"), v.get("method")) == (target, kind, method) and interval \
                        and all(map(finite, [*interval, v.get("gain_over_scratch"), corruption.get("share")])):
                    points.append(Point(100 * corruption["share"], v["gain_over_scratch"], interval[0], interval[1]))
            series.append(Series(method_name(method), style, sorted(points, key=lambda point: point.x)))
        charts.append(line_chart(series, title=f"gain against {kind} on {target}", y_label=f"gain on {target}",
                                 x_label=f"{kind}: % of the support pool"))
    return [chart for chart in charts if chart]


def mean_over_seeds(logs: Iterable[Sequence[Row]], metric: str) -> list[Point]:
    """Mean, lowest and highest value at each count of images seen, over the trials that report it there."""
    values: dict[float, list[float]] = defaultdict(list)
    for log in logs:
        at = {line["images"]: line["metrics"][metric] for line in log if finite(line["metrics"].get(metric))}
        for images, value in at.items():  # the last line at a count wins: a resumed trial writes it again
            values[images].append(value)
    return [Point(x, statistics.fmean(ys), min(ys), max(ys)) for x, ys in sorted(values.items())]


def pretrain_charts(lines: Sequence[Row]) -> list[Any]:
    """Losses, penalties and speed of the pretraining, of whatever family; what it has none of is not drawn."""
    groups = [("evidence lower bound, nats an image", {"generator/elbo": "ELBO"}),
              ("reconstruction, nats an image", {"generator/reconstruction": "reconstruction"}),
              ("divergence from the prior, nats an image", {"generator/kl": "KL"}),
              ("adversarial loss", {"generator/adversarial": "generator",
                                    "discriminator/adversarial": "discriminator"}),
              ("penalty on D's gradient", {"discriminator/r1": "R1 (real)", "discriminator/r2": "R2 (generated)"}),
              ("images per second", {"images_per_second": "all workers"})]
    return [chart for title, names in groups if (chart := metric_chart(lines, names, title))]


def health_charts(lines: Sequence[Row]) -> list[Any]:
    """What the rules of health read, with the stretches in which one raised the alarm shaded."""
    groups = [("distances, generated / real", {"health/distance_ratio": "all pairs", "health/nearest_ratio": "to the nearest"},
               ["collapse"]),
              ("r_v, overfitting of D", {"health/r_v": "r_v"}, ["overfitting"]),
              ("gradient norm", {"generator/grad_norm": "generator", "discriminator/grad_norm": "discriminator"},
               ["generator_explosion", "discriminator_explosion"])]
    return [chart for title, names, rules in groups
            if (chart := metric_chart(lines, names, title, alarms=alarm_stretches(lines, rules)))]


def alarm_stretches(lines: Sequence[Row], rules: Iterable[str]) -> list[tuple[float, float]]:
    """From where to where, in images seen, one of the rules raised the alarm without a break."""
    found: list[tuple[float, float]] = []
    before = False
    for line in lines:
        now = any(line["metrics"].get(f"health/{rule}") for rule in rules)
        if now and before:
            found[-1] = (found[-1][0], line["images"])
        elif now:
            found.append((line["images"], line["images"]))
        before = now
    return found


def training_config(run: Path) -> TrainingConfig:
    """The run's training section; the defaults where its recipe cannot be read."""
    try:
        return TrainingConfig.model_validate(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["training"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError):
        return TrainingConfig(images=1)


def meta_charts(lines: Sequence[Row]) -> list[Any]:
    """One chart per metric of a meta-training."""
    names = sorted({name for line in lines for name in line["metrics"]})
    return [chart for name in names if (chart := metric_chart(lines, {name: "mean of tasks"}, metric_name(name)))]


def metric_chart(lines: Sequence[Row], names: Mapping[str, str], title: str,
                 alarms: Sequence[tuple[float, float]] = ()) -> Any:
    series = [Series(label, style, mean_over_seeds([lines], name))
              for style, (name, label) in enumerate(names.items(), 1)]
    return line_chart(series, title=title, y_label=title, width=SMALL_CHART, alarms=alarms)


# ---- pictures


def inside(run: Path, name: str) -> bool:
    """Whether the path stays within the run's folder: names in a leaderboard are untrusted."""
    return (run / name).resolve().is_relative_to(run.resolve())


def picture(run: Path, name: str) -> dict[str, Any] | None:
    """A PNG as data URI with its size and a row's height in pixels; None for no file, a note for a broken one."""
    path = run / name
    if not inside(run, name) or not path.is_file():
        return None
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()
            width, height = image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {"broken": name}
    gap = next((g for g in (0, 1, 2) if (width - g * (GRID_COLUMNS - 1)) % GRID_COLUMNS == 0), 0)
    cell = (width - gap * (GRID_COLUMNS - 1)) // GRID_COLUMNS
    return {"uri": "data:image/png;base64," + base64.b64encode(data).decode(), "width": width, "height": height,
            "row": min(height, cell) or height}

"""`leaderboard.json`: the rows of all trials, the verdicts over them, the contract under which they may be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from cluster.recipe import Recipe
from data_shards.errors import UserError
from data_shards.files import write_json
from training.events import read_events
from training.methods import METHODS, Method
from training.metrics.score import same_contract
from training.metrics.verdict import Gain, judge, paired_gain

SCHEMA_VERSION = 1
PER_DOMAIN = ("n_reference", "reference_hash")  # the contract's fields that differ between domains


def build_leaderboard(recipe: Recipe, run: Path, rows: Sequence[Mapping[str, Any]],
                      costs: Mapping[str, float]) -> dict[str, Any]:
    """Put rows, verdicts, contract and costs together and write them to ``run/leaderboard.json``."""
    contract = contract_of(rows)
    verdicts = verdicts_over(rows, 1 - recipe.fanout.confidence)
    judged = [dict(row) for row in rows]
    for row in judged:
        row.pop("contract", None)
        found = next((v for v in verdicts if (v["domain"], v["method"]) == (row["domain"], row["method"])), None)
        row |= {key: found[key] if found and row["phase"] == "final" else None
                for key in ("gain_over_scratch", "gain_ci95", "seeds", "verdict", "detectable_gain")}
    board = {"schema_version": SCHEMA_VERSION, "contract": contract, "rows": judged, "verdicts": verdicts,
             "methods": over_domains(verdicts, rows, costs, recipe.fanout.confidence),
             "costs": {**costs, "pays_from_domains": _pays_from(run, rows, verdicts, costs)}}
    write_json(run / "leaderboard.json", board)
    return board


def contract_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The one contract of all final rows; what differs by nature between domains stands under "domains".

    Raises:
        UserError: when rows were scored under unlike contracts.
    """
    common: dict[str, Any] = {}
    domains: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not row.get("contract"):
            continue
        shared = {key: value for key, value in row["contract"].items() if key not in PER_DOMAIN}
        own = {key: row["contract"][key] for key in PER_DOMAIN}
        same_contract(common or shared, shared)
        same_contract(domains.setdefault(row["domain"], own), own)
        common = shared
    return {**common, "domains": domains} if common else {}


def verdicts_over(rows: Sequence[Mapping[str, Any]], alpha: float) -> list[dict[str, Any]]:
    """One per domain and method over the seeds that both the method and the control finished."""
    finals: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["phase"] == "final" and row["kid"] is not None:
            finals.setdefault((row["domain"], row["method"]), {})[row["seed"]] = row
    gains: dict[tuple[str, str], Gain] = {}
    for (domain, method), by_seed in finals.items():
        control = finals.get((domain, "scratch"), {})
        seeds = sorted(by_seed.keys() & control.keys())
        if method != "scratch" and len(seeds) >= 2:
            gains[domain, method] = paired_gain([control[s]["kid"] for s in seeds], [by_seed[s]["kid"] for s in seeds],
                                                level=1 - alpha)
    judged = judge({key: gain for key, gain in gains.items() if METHODS[key[1]].judged}, alpha=alpha)
    verdicts = []
    for (domain, method), by_seed in finals.items():
        gain, found = gains.get((domain, method)), judged.get((domain, method))
        scored = list(by_seed.values())
        verdicts.append({
            "domain": domain, "target": scored[0].get("target", domain), "corruption": scored[0].get("corruption"),
            "method": method, "kid_mean": fmean(row["kid"] for row in scored),
            "coverage_mean": fmean(row["coverage"] for row in scored),
            "intra_distance_mean": fmean(row["intra_distance"] for row in scored)
            if all(row.get("intra_distance") is not None for row in scored) else None,
            "copy_rate_mean": fmean(row["copy_rate"] for row in scored),
            "disqualified": sum(bool(row["disqualified"]) for row in scored),
            "seeds": gain.seeds if gain else len(scored),
            "gain_over_scratch": gain.gain if gain else None, "gain_ci95": list(gain.ci95) if gain else None,
            "p_value": gain.p_value if gain else None, "p_adjusted": found.p_holm if found else None,
            "detectable_gain": gain.detectable_gain if gain else None, "verdict": found.verdict if found else None})
    return verdicts


def over_domains(verdicts: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], costs: Mapping[str, float],
                 confidence: float) -> list[dict[str, Any]]:
    """Each method over all its domains: its mean gain with a t interval over the domains, how often it helped and hurt, and
    what it cost; best gain first.

    A domain counts once, whatever its number of seeds. ``seconds`` is the mean of a final trial, ``shared_seconds`` what was
    paid once for all domains.
    """
    found = []
    for method in dict.fromkeys(verdict["method"] for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict["method"] == method]
        gains = [verdict["gain_over_scratch"] for verdict in own if verdict["gain_over_scratch"] is not None]
        spent = [row["seconds"] for row in rows
                 if (row["method"], row["phase"], row["status"]) == (method, "final", "finished")]
        states = Counter("disqualified" if verdict["disqualified"] else verdict["verdict"] for verdict in own)
        diversity = [verdict["intra_distance_mean"] for verdict in own if verdict["intra_distance_mean"] is not None]
        found.append({
            "method": method, "domains": len(own), "gain_mean": fmean(gains) if gains else None,
            "gain_ci95": _interval(gains, confidence),
            **{state: states[state] for state in ("positive", "neutral", "negative", "disqualified")},
            "kid_mean": fmean(verdict["kid_mean"] for verdict in own),
            "copy_rate_mean": fmean(verdict["copy_rate_mean"] for verdict in own),
            "coverage_mean": fmean(verdict["coverage_mean"] for verdict in own),
            "intra_distance_mean": fmean(diversity) if diversity else None,
            "seconds": round(fmean(spent), 2) if spent else None, "shared_seconds": _shared(METHODS[method], costs)})
    return sorted(found, key=lambda each: (each["gain_mean"] is None, -(each["gain_mean"] or 0.0)))


def _interval(values: Sequence[float], confidence: float) -> list[float] | None:
    """The t interval of their mean; None for fewer than two."""
    if len(values) < 2:
        return None
    half = float(stdtrit(len(values) - 1, 0.5 + confidence / 2)) * stdev(values) / len(values) ** 0.5
    return [fmean(values) - half, fmean(values) + half]


def _shared(method: Method, costs: Mapping[str, float]) -> float:
    """Seconds that a method owes to what is done once for all domains."""
    if method.start == "scratch":
        return 0.0
    meta = costs.get(f"meta_{method.rule}_seconds", 0.0) if method.rule else 0.0
    return round(costs.get("pretrain_seconds", 0.0) + meta, 1)


def _pays_from(run: Path, rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]],
               costs: Mapping[str, float]) -> dict[str, float | None]:
    """Per method that shares a cost: from how many domains it is earned back, null where nothing is saved.

    What a domain saves is the time its scratch trials spent beyond the point where the method was already as good: the
    method's first evaluation whose mean selection KID is at most scratch's last, as a share of the budget.
    """
    paid: dict[str, float | None] = {}
    for method in {row["method"] for row in rows}:
        if METHODS[method].start == "scratch" or not METHODS[method].judged:
            continue
        saved = []
        for domain in {verdict["domain"] for verdict in verdicts}:
            control, ours = _curve(run, rows, domain, "scratch"), _curve(run, rows, domain, method)
            seconds = sum(row["seconds"] for row in rows if (row["domain"], row["method"]) == (domain, "scratch"))
            if control and ours:
                goal, budget = control[max(control)], max(control)
                reached = [images for images in sorted(ours) if ours[images] <= goal]
                saved.append(seconds * (1 - reached[0] / budget) if reached else 0.0)
        mean = fmean(saved) if saved else 0.0
        paid[method] = round(_shared(METHODS[method], costs) / mean, 1) if mean > 0 else None
    return paid


def _curve(run: Path, rows: Sequence[Mapping[str, Any]], domain: str, method: str) -> dict[int, float]:
    """Images -> mean selection KID over the final trials."""
    points: dict[int, list[float]] = {}
    for row in rows:
        if (row["domain"], row["method"], row["phase"], row["status"]) == (domain, method, "final", "finished"):
            for event in read_events(run / "domains" / domain / row["trial"] / "events.jsonl"):
                points.setdefault(event["images"], []).append(event["metrics"]["selection_kid"])
    return {images: fmean(values) for images, values in points.items()}


def read_leaderboard(run: Path) -> dict[str, Any]:
    """The leaderboard of a run.

    Raises:
        UserError: when there is none yet, or a newer graft wrote it.
    """
    import json

    path = run / "leaderboard.json"
    if not path.exists():
        raise UserError(f"{run} has no leaderboard.json; finish the run with `graft run`.")
    board: dict[str, Any] = json.loads(path.read_text())
    if board["schema_version"] > SCHEMA_VERSION:
        raise UserError(f"{path} has schema {board['schema_version']}, newer than {SCHEMA_VERSION}; upgrade graft.")
    return board

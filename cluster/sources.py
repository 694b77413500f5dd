"""`graft sources rank`: which source suits a target, by distance and a short fine-tuning, and if that foretold the gain."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.evaluate import read_run_recipe
from cluster.leaderboard import read_leaderboard
from cluster.progress import progress
from cluster.recipe import Recipe
from data_shards import ShardSet, open_set
from data_shards.errors import UserError
from data_shards.files import write_json
from training.checkpoint import checkpoint_hash, latest_valid
from training.config import apply_overrides
from training.metrics.features import load_feature_net
from training.metrics.score import same_contract
from training.ranking import mean_ranks, rank_correlation, set_distance
from training.recipe import resolve
from training.source import set_place
from training.trial import Trial, run_trial
from training.world import device

SCHEMA_VERSION = 1
PROBE_SHOTS = 10


@dataclass(frozen=True)
class Source:
    """A set of images, and the run that was pretrained on it if one was named."""

    name: str
    images: ShardSet
    run: Path | None = None
    recipe: Recipe | None = None


def rank_sources(target: str, among: Sequence[str], *, nets: Sequence[str], limit: int = 2000, seed: int = 0,
                 probe_images: int = 0, probe_seeds: int = 2, out: Path | None = None) -> dict[str, Any]:
    """Rank sources for the target set, nearest first; JSON-ready, and written to ``out`` if that is given.

    Args:
        target: a set's folder or URL.
        among: sets, or folders of runs, whose source is meant and whose pretrained networks can be probed.
        nets: feature nets; each gives a KID and a Frechet distance.
        limit: most images of a set that are compared.
        probe_images: images seen by a probe: the run's newest pretrained networks are fine-tuned on 10 images of the target and
            scored against the rest of its support pool, in the first net; 0 leaves it out.
        probe_seeds: seeds of each probe.
        out: a JSON file.

    Raises:
        UserError: for a place that is neither set nor run, fewer than two sources, or the probe of a mere set.
    """
    if len(among) < 2:
        raise UserError(f"--among names {len(among)} source and a ranking needs two; name more.")
    wanted, sources = open_set(target), [_source(place) for place in among]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"two sources are called {next(n for n in names if names.count(n) > 1)!r}; name each once.")
    if probe_images and (bare := [source.name for source in sources if source.run is None]):
        raise UserError(f"{bare[0]} is a set and no run, so there are no networks to probe; name the folder of a run that was "
                        "pretrained on it, or leave --probe out.")
    found: dict[str, dict[str, Any]] = {name: {"source": name, "distances": {}} for name in names}
    steps = len(sources) * (len(nets) + bool(probe_images))
    with progress("rank", steps, "steps") as show:
        done = 0
        for net in nets:
            loaded = load_feature_net(net, None, device())
            for source in sources:
                show(done, f"{net}: {source.name}")
                found[source.name]["distances"][net] = set_distance(source.images, wanted, loaded, limit=limit, seed=seed)
                done += 1
        for source in sources if probe_images else ():
            show(done, f"probe: {source.name}")
            found[source.name]["probe_kid"] = _probe(source, target, wanted, nets[0], probe_images, probe_seeds, seed)
            done += 1
        show(steps, "done")
    measures = {f"kid ({net})": {name: found[name]["distances"][net]["kid"] for name in names} for net in nets}
    measures |= {f"fd ({net})": {name: found[name]["distances"][net]["fd"] for name in names} for net in nets}
    if probe_images:
        measures["probe"] = {name: found[name]["probe_kid"] for name in names}
    ranks = mean_ranks(measures)
    gains = _real_gains(sources, wanted)
    for name in names:
        found[name] |= {"mean_rank": ranks[name], "gain_over_scratch": gains.get(name)}
    known = [name for name in names if name in gains]
    report = {"schema_version": SCHEMA_VERSION, "target": wanted.manifest.name, "limit": limit, "seed": seed,
              "probe": {"images": probe_images, "seeds": probe_seeds, "shots": PROBE_SHOTS} if probe_images else None,
              "sources": sorted(found.values(), key=lambda row: row["mean_rank"]),
              "rank_correlation": {measure: rank_correlation([values[name] for name in known], [gains[name] for name in known])
                                   for measure, values in measures.items()}}
    if out:
        write_json(out, report)
    return report


def _source(place: str) -> Source:
    if (Path(place) / "recipe.yaml").is_file():
        recipe = read_run_recipe(Path(place))
        return Source(Path(place).name, open_set(set_place(recipe.data, recipe.data.source)), Path(place).resolve(), recipe)
    images = open_set(place)
    return Source(images.manifest.name, images)


def _probe(source: Source, place: str, target: ShardSet, net: str, images: int, seeds: int, seed: int) -> float:
    """Mean selection KID of short fine-tunings of the run's pretrained networks, the least that a trial can tell."""
    assert source.run and source.recipe
    checkpoint = latest_valid(source.run / "pretrain")
    if checkpoint is None:
        raise UserError(f"{source.run} has no finished checkpoint to probe; go on with `graft pretrain`, or leave --probe out.")
    recipe = resolve(Recipe, apply_overrides(source.recipe.model_dump(mode="json"), {
        "adaptation.images": images, "adaptation.batch": min(source.recipe.adaptation.batch, images),
        "adaptation.shots": PROBE_SHOTS, "evaluation.net": net, "wandb.mode": "disabled"}), where="probe")
    values = []
    with tempfile.TemporaryDirectory(prefix="graft-probe-") as folder:
        for number in range(seed, seed + seeds):
            trial = Trial(target.manifest.name.replace("/", "-"), place, "finetune", number, "search", "pretrain",
                          str(checkpoint), checkpoint_hash(checkpoint))
            row = run_trial(trial, recipe, Path(folder), until=images)
            if row["status"] == "failed":
                raise UserError(f"the probe of {source.run} failed: {row['reason']} Lower adaptation.lr in its recipe.")
            values.append(row["selection_kid"])
    return sum(values) / len(values)


def _real_gains(sources: Sequence[Source], target: ShardSet) -> dict[str, float]:
    """The mean gain of fine-tuning over scratch on this target, of the runs that have measured it under one contract."""
    gains: dict[str, float] = {}
    contracts: list[Mapping[str, Any]] = []
    for source in sources:
        if source.run is None or not (source.run / "leaderboard.json").is_file():
            continue
        board = read_leaderboard(source.run)
        domains = [name for name, own in board["contract"].get("domains", {}).items()
                   if own["reference_hash"] == target.manifest.sha256]
        verdict = next((each for each in board["verdicts"] if each["domain"] in domains and each["method"] == "finetune"
                        and each["gain_over_scratch"] is not None), None)
        if verdict:
            contract = {key: value for key, value in board["contract"].items() if key != "domains"}
            for other in contracts:
                same_contract(other, contract)
            contracts.append(contract)
            gains[source.name] = verdict["gain_over_scratch"]
    return gains


def ranking_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    rows = report["sources"]
    nets = list(rows[0]["distances"])
    head = ["rank", "source", *(f"{kind} {net}" for net in nets for kind in ("KID", "FD")), "probe KID", "gain"]
    table = [head]
    for number, row in enumerate(rows, 1):
        distances = [f"{row['distances'][net][kind]:.4g}" for net in nets for kind in ("kid", "fd")]
        table.append([str(number), row["source"], *distances, *(
            "-" if row.get(key) is None else f"{row[key]:.4g}" for key in ("probe_kid", "gain_over_scratch"))])
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    known = {name: value for name, value in report["rank_correlation"].items() if value is not None}
    if known:
        lines.append("rank correlation of nearness with the real gain: "
                     + ", ".join(f"{name} {value:+.2f}" for name, value in known.items()))
    else:
        lines.append("No rank correlation with the real gain: it needs three runs that have fine-tuned to this target, under "
                     "one contract (`graft run`, then `graft evaluate`).")
    return "\n".join(lines)

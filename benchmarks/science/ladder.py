"""Gain against distance: does a nearer source help a target more, and does `graft sources rank` see it beforehand?

    python -m benchmarks.science.ladder [gray|colour] [--images N ...] [--probe N] [--workers N] [--set KEY=VALUE]...
                                        [--data DIR] [--out DIR]
    python -m benchmarks.science.ladder --target SET --sources SET SET SET ...

One target, several sources, near ones to far ones. Each rung is an ordinary `graft run` in a folder of its own: pretraining of
the same budget on the source, then scratch against fine-tuning under 5 seeds at each of some equal budgets (--images), scored
in a net that belongs to none of the sources. The control's trials are the same in all runs, so that gains differ by the source
alone. Then `graft sources rank` measures the distance from each source to the target's support pool, and a short fine-tuning
with --probe.

Written to DIR: ladder.json, table.md, and gain-MEASURE-IMAGES.svg with each gain and its interval over the distance. A ladder
that was stopped goes on. About 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.leaderboard import read_leaderboard
from cluster.recipe import Recipe
from cluster.report_charts import Point, Series, line_chart
from cluster.run import run
from cluster.sources import rank_sources
from data_shards.errors import UserError
from data_shards.files import write_json
from training.config import apply_overrides, parse_overrides
from training.ranking import rank_correlation
from training.recipe import resolve
from training.source import set_place

LIMIT = 1000  # images of a set that are compared
COLOURS = ("#0072b2", "#c4500a", "#00805c", "#a3438a", "#8a6d00", "#4a57c4")  # the report page's, on white
STYLE = "".join([
    "<style>svg{background:#fff}text{font:11.5px system-ui,'Liberation Sans',sans-serif;fill:#5a6068}.grid{stroke:#dde0e4}",
    *(f".s{style} *{{fill:{colour};stroke:{colour}}}" for style, colour in enumerate(COLOURS)),
    ".series text{stroke:none;font-weight:600}.series line{stroke-width:1.4}.series .leader{fill:none;stroke-width:.8}",
    "</style>"])


@dataclass(frozen=True)
class Ladder:
    """A target set, and sources of its size and channels, by their names below the data root or their paths."""

    target: str
    sources: tuple[str, ...]


LADDERS = {
    "gray": Ladder("kanjivg/target", ("kanjivg/source", "quickdraw/source", "mnist/source", "fashion-mnist/source")),
    "colour": Ladder("emoji/twitter-target", ("emoji/google", "cifar10/animals", "histology/tcga")),
}


def recipe_of(ladder: Ladder, source: str, images: int, root: Path, workers: int, overrides: Mapping[str, Any]) -> Recipe:
    """The demo's settings with smaller networks, trials of ``images``; nothing but the source differs between rungs."""
    adam = {"channels": 16, "lr": [[0, 1e-3], [43_008, 1e-3], [61_440, 2e-4]]}
    tree = {
        "name": slug(source), "data": {"source": source, "root": str(root)},
        "training": {"images": 61_440, "batch": 32, "generator": {"latent_dim": 64, **adam}, "discriminator": adam,
                     "objective": {"r1": 5.0, "r2": 5.0}},
        "adaptation": {"shots": 10, "batch": 10, "images": images, "lr": 5e-4, "r1": 5.0, "r2": 5.0,
                       "ema_halflife_images": images / 4},
        "evaluation": {"net": "efficientnet-lite0", "samples": 200},
        "fanout": {"targets": [{"set": ladder.target}], "methods": ["scratch", "finetune"], "candidates": 1, "rungs": 1,
                   "seeds": 5},
        "cluster": {"workers": workers}, "wandb": {"mode": "disabled"}}
    return resolve(Recipe, apply_overrides(tree, overrides), where="the ladder's recipe", overrides=overrides)


def slug(name: str) -> str:
    """The name of a set's run."""
    return name.strip("/").replace("/", "-")


def climb(ladder: Ladder, root: Path, out: Path, budgets: Sequence[int], *, workers: int = 1, probe: int = 0,
          overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run every rung under every budget in ``out``, or go on there, and measure how far each source is from the target.

    Returns:
        The sources as `rank_sources` ranks them, and for each of the budgets, in images of a trial, by its name: the verdict of
        fine-tuning and the control's KID by source, and how each measure's nearness correlates with the gains.
    """
    runs = [str(out / slug(source)) for source in ladder.sources]
    found: dict[str, Any] = {}
    for images in budgets:
        rungs = {}
        for source in ladder.sources:
            recipe = recipe_of(ladder, source, images, root, workers, overrides or {})
            run(recipe, out / slug(source))
            verdicts = {verdict["method"]: verdict for verdict in read_leaderboard(out / slug(source))["verdicts"]}
            rungs[slug(source)] = {"finetune": verdicts["finetune"], "scratch": verdicts["scratch"]}
        found[str(images)] = {"rungs": rungs}
    ranked = rank_sources(set_place(recipe.data, ladder.target), runs, nets=[recipe.evaluation.net], limit=LIMIT,
                          probe_images=probe)
    report = {"target": ranked["target"], "probe": ranked["probe"], "budgets": found,
              "sources": [{key: row[key] for key in row if key != "gain_over_scratch"} for row in ranked["sources"]]}
    for budget in found.values():
        budget["rank_correlation"] = {
            measure: rank_correlation([values[name] for name in budget["rungs"]],
                                      [rung["finetune"]["gain_over_scratch"] for rung in budget["rungs"].values()])
            for measure, values in measures(report).items()}
    return report


def measures(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Measure -> source -> its value."""
    found: dict[str, dict[str, float]] = {}
    for row in report["sources"]:
        for net, distance in row["distances"].items():
            for kind in ("kid", "fd"):
                found.setdefault(f"{kind} ({net})", {})[row["source"]] = distance[kind]
        if "probe_kid" in row:
            found.setdefault("probe", {})[row["source"]] = row["probe_kid"]
    return found


def table(report: Mapping[str, Any], images: str) -> str:
    """Markdown for one budget: a line a source, nearest first, and how each measure orders the gains."""
    measured, budget = measures(report), report["budgets"][images]
    lines = [f"| source | {' | '.join(measured)} | KID scratch | KID fine-tuned | gain [95 %] | verdict |",
             "|" + "---|" * (5 + len(measured))]
    for row in report["sources"]:
        rung = budget["rungs"][row["source"]]
        verdict = rung["finetune"]
        low, high = verdict["gain_ci95"]
        cells = [row["source"], *(f"{values[row['source']]:.3g}" for values in measured.values()),
                 f"{rung['scratch']['kid_mean']:.3f}", f"{verdict['kid_mean']:.3f}",
                 f"{verdict['gain_over_scratch']:+.3f} [{low:.3f}, {high:.3f}]", verdict["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    said = ", ".join(f"{name} {value:+.2f}" for name, value in budget["rank_correlation"].items() if value is not None)
    return "\n".join([f"{images} images a trial, {report['target']}:", "", *lines, "",
                      f"Rank correlation of nearness with gain: {said or 'none'}."])


def chart(report: Mapping[str, Any], images: str, measure: str) -> str:
    """An SVG for one budget: each source's gain and interval over its distance, named."""
    values, rungs = measures(report)[measure], report["budgets"][images]["rungs"]
    gains = {name: (rung["finetune"]["gain_over_scratch"], *rung["finetune"]["gain_ci95"]) for name, rung in rungs.items()}
    series = [Series(row["source"].removesuffix("-source"), style % len(COLOURS),
                     [Point(values[row["source"]], *gains[row["source"]])])
              for style, row in enumerate(report["sources"])]
    drawn = str(line_chart(series, title=f"gain over {measure}, {images} images a trial", y_label="gain over scratch, KID",
                           x_label=f"{measure} from source to {report['target']}"))
    return drawn.replace('<svg class="chart"', '<svg xmlns="http://www.w3.org/2000/svg" class="chart"', 1).replace(
        ">", f">{STYLE}", 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ladder", nargs="?", choices=LADDERS, default="gray", help="a ladder by name (default: gray)")
    parser.add_argument("--target", help="the target set of another ladder")
    parser.add_argument("--sources", nargs="+", default=[], help="its sources")
    parser.add_argument("--images", type=int, nargs="+", default=[400, 1600], help="budgets of a trial (default: 400 1600)")
    parser.add_argument("--probe", type=int, default=0, help="images of a short fine-tuning, a further measure; 0 for none")
    parser.add_argument("--workers", type=int, default=2, help="processes of each pretraining")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of every recipe")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where sets are, or are fetched to")
    parser.add_argument("--out", type=Path, help="folder of runs and results (default runs/science/ladder-NAME)")
    chosen = parser.parse_args(arguments)
    try:
        if bool(chosen.target) != bool(chosen.sources):
            raise UserError("--target and --sources make a ladder together; give both, or neither.")
        ladder = Ladder(chosen.target, tuple(chosen.sources)) if chosen.target else LADDERS[chosen.ladder]
        out = chosen.out or Path("runs/science") / f"ladder-{slug(chosen.target or chosen.ladder)}"
        report = climb(ladder, chosen.data.resolve(), out.resolve(), chosen.images, workers=chosen.workers, probe=chosen.probe,
                       overrides=parse_overrides(chosen.set))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    write_json(out / "ladder.json", report)
    tables = "\n\n".join(table(report, images) for images in report["budgets"])
    (out / "table.md").write_text(tables + "\n")
    for measure in measures(report):
        name = slug(measure.replace(" ", "-").replace("(", "").replace(")", ""))
        for images in report["budgets"]:
            (out / f"gain-{name}-{images}.svg").write_text(chart(report, images, measure))
    print(f"\n{tables}\n\nwritten to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Ten drawings of an unseen class: every method on meta-validation classes, then the chosen one, once, on meta-test classes.

    python -m benchmarks.science.fewshot [--out DIR] [--part validation|test|both] [--seeds N N] [--classes N]
                                        [--steps N ...] [--set KEY=VALUE ...]

Meta-validation (recipes/quickdraw-fewshot.yaml, 50 steps, and the starts that are compared again at 10 steps) chooses one
method, and settings for all, by mean gain. Meta-test reports that one method on all 60 classes with those settings, at 50 and
at 10 steps: one claim, so that Holm's correction is over its 60 classes. Then the best meta-learned start, the plain pretrained
one and the source as it is stand beside it. Each part goes on from where it was, and leaves its leaderboard and page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.recipe import Recipe
from cluster.report_text import leaderboard_text
from cluster.run import run
from data_shards import fetch
from training.config import parse_overrides
from training.methods import METHODS
from training.metrics.verdict import paired_gain
from training.recipe import read_recipe

RECIPE = "quickdraw-fewshot"
LEARNED = tuple(name for name, method in METHODS.items() if method.rule)
Board = Mapping[str, Any]


def at_steps(steps: int, batch: int) -> dict[str, Any]:
    """A trial of so many steps; its average forgets in a sixth of them, as in the recipe."""
    return {"adaptation.images": steps * batch, "adaptation.ema_halflife_images": steps * batch / 6}


def choose(board: Board) -> str:
    """The judged method with the largest mean gain among those that were disqualified nowhere.

    Raises:
        ValueError: when all were.
    """
    clean = [each["method"] for each in board["methods"]
             if METHODS[each["method"]].judged and each["gain_mean"] is not None and not each["disqualified"]]
    if not clean:
        raise ValueError("every method was disqualified on some domain; lower adaptation.images.")
    return str(clean[0])


def usual_settings(board: Board, method: str) -> dict[str, Any]:
    """What the searches of a method chose most often over the domains, by field of `adaptation`."""
    chosen = Counter(json.dumps(row["hyperparameters"], sort_keys=True) for row in board["rows"]
                     if row["method"] == method and row["phase"] == "final")
    most = json.loads(chosen.most_common(1)[0][0])
    return {name.removeprefix("adaptation."): value for name, value in most.items()}


def against(board: Board, ours: str, theirs: str) -> dict[str, Any]:
    """By how much the KID of ``ours`` is below that of ``theirs``, paired by domain, with a t interval over the domains."""
    kids = {(verdict["domain"], verdict["method"]): verdict["kid_mean"] for verdict in board["verdicts"]}
    domains = [domain for domain, method in kids if method == ours and (domain, theirs) in kids]
    found = paired_gain([kids[domain, theirs] for domain in domains], [kids[domain, ours] for domain in domains])
    return {"ours": ours, "theirs": theirs, "better_by": found.gain, "ci95": list(found.ci95), "p_value": found.p_value,
            "won": sum(kids[domain, ours] < kids[domain, theirs] for domain in domains), "domains": len(domains)}


def stage(out: Path, name: str, overrides: Mapping[str, Any]) -> Board:
    """Run the recipe with ``overrides`` in ``out``, and keep its leaderboard and page as ``name``."""
    print(f"== {name}", flush=True)
    run(read_recipe(Recipe, RECIPE, overrides), out)
    for source, kept in ((out / "leaderboard.json", f"{name}.json"), (out / "report" / "index.html", f"{name}.html")):
        shutil.copy(source, out / kept)
    return read(out, name)


def read(out: Path, name: str) -> Board:
    board: Board = json.loads((out / f"{name}.json").read_text())
    return board


def validation(out: Path, overrides: Mapping[str, Any], steps: Sequence[int]) -> None:
    """All methods at the first count of steps; at the others the chosen one and the starts that are compared."""
    batch = read_recipe(Recipe, RECIPE, overrides).adaptation.batch
    board = stage(out, f"validation-{steps[0]}", {**overrides, **at_steps(steps[0], batch)})
    few = sorted({"scratch", "unadapted", "finetune", *LEARNED, choose(board)}, key=list(METHODS).index)
    for fewer in steps[1:]:
        stage(out, f"validation-{fewer}", {**overrides, **at_steps(fewer, batch), "fanout.methods": few})


def test(out: Path, overrides: Mapping[str, Any], steps: Sequence[int], seeds: Sequence[int], classes: int) -> None:
    """One report on the meta-test classes, by what meta-validation chose: the claim, then the starts beside it."""
    recipe = read_recipe(Recipe, RECIPE, overrides)
    targets = sorted(name for name in fetch("quickdraw", recipe.data.root).sets if name.startswith("quickdraw/test/"))[:classes]
    chosen = choose(read(out, f"validation-{steps[0]}"))
    for count in steps:
        seen = read(out, f"validation-{count}")
        learned = next(each["method"] for each in seen["methods"] if each["method"] in LEARNED)
        settings = {each["method"]: usual_settings(seen, each["method"]) for each in seen["methods"]
                    if METHODS[each["method"]].hyperparameters}
        beside = {chosen, learned, "unadapted", "finetune"}
        for part, methods, number in (("test", {chosen}, seeds[0]), ("starts", beside, seeds[1])):
            stage(out, f"{part}-{count}", {
                **overrides, **at_steps(count, recipe.adaptation.batch), "fanout.targets": [{"set": name} for name in targets],
                "fanout.methods": sorted({"scratch", *methods}, key=list(METHODS).index), "fanout.settings": settings,
                "fanout.space": {}, "fanout.candidates": 1, "fanout.rungs": 1, "fanout.seeds": number})


def summary(out: Path, names: Sequence[str]) -> list[str]:
    """What is to be told of the parts that are there."""
    lines = []
    for name in names:
        if not (out / f"{name}.json").exists():
            continue
        board = read(out, name)
        methods = [each["method"] for each in board["methods"]]
        seeds = sorted({verdict["seeds"] for verdict in board["verdicts"]})
        lines += [f"## {name} steps, {board['methods'][0]['domains']} classes, {seeds[0]} to {seeds[-1]} seeds", "",
                  leaderboard_text({"methods": board["methods"]}, 140).strip("\n"), ""]
        for method in methods:
            if method != "finetune" and "finetune" in methods and METHODS[method].judged:
                pair = against(board, method, "finetune")
                lines.append(f"{method} against finetune: KID lower by {pair['better_by']:.3f} "
                             f"[{pair['ci95'][0]:.3f}, {pair['ci95'][1]:.3f}], on {pair['won']} of {pair['domains']} domains")
        settings = {method: usual_settings(board, method) for method in methods if METHODS[method].hyperparameters}
        lines += [f"settings: {json.dumps(settings)}", f"seconds: {json.dumps(board['costs'])}",
                  f"mean KID: {json.dumps({each['method']: round(each['kid_mean'], 3) for each in board['methods']})}", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / RECIPE)
    parser.add_argument("--part", choices=("validation", "test", "both"), default="both")
    parser.add_argument("--seeds", type=int, nargs=2, default=[10, 5], help="of each class in meta-test: for the claim, and "
                                                                            "for the comparison of starts")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 10], help="of a trial, most first")
    parser.add_argument("--classes", type=int, default=60, help="of meta-test, the first by name")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="changes the recipe")
    options = parser.parse_args()
    overrides, steps = parse_overrides(options.changes), options.steps
    if options.part != "test":
        validation(options.out, overrides, steps)
    if options.part != "validation":
        test(options.out, overrides, steps, options.seeds, options.classes)
    text = "\n".join(summary(options.out, [f"{part}-{count}" for part in ("validation", "test", "starts") for count in steps]))
    (options.out / "fewshot.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

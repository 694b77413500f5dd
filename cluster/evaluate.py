"""Score a run's final trials again in another feature net, from their checkpoints; nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.leaderboard import SCHEMA_VERSION, contract_of, read_leaderboard, verdicts_over
from cluster.progress import progress
from cluster.recipe import Recipe
from data_shards.errors import UserError
from data_shards.files import write_json
from training.source import set_place
from training.trial import rescore


def read_run_recipe(run: Path) -> Recipe:
    """The resolved recipe that a run was made with.

    Raises:
        UserError: when the folder is not a run.
    """
    path = run / "recipe.yaml"
    if not path.exists():
        raise UserError(f"{run} has no recipe.yaml, so it is not a run's folder; give the --out of a `graft run`.")
    return Recipe.model_validate(yaml.safe_load(path.read_text()))


def evaluate(run: Path, *, net: str, samples: int | None = None, seeds: int | None = None,
             domains: Sequence[str] = ()) -> Path:
    """Score the final trials of ``domains`` (all when empty) on their first ``seeds`` seeds (all when None).

    Writes ``run/evaluations/<net>.json`` with rows, verdicts and the contract they were scored under; returns its path.

    Raises:
        UserError: for an unknown net or domain, or a run without finished final trials.
    """
    recipe = read_run_recipe(run)
    rows = [row for row in read_leaderboard(run)["rows"] if row["phase"] == "final" and row["checkpoint"]]
    known = sorted({row["domain"] for row in rows})
    for name in domains:
        if name not in known:
            raise UserError(f"the run has no domain {name!r} with finished trials; it has {', '.join(known) or 'none'}.")
    chosen = sorted({row["seed"] for row in rows})[:seeds]
    rows = [row for row in rows if row["seed"] in chosen and (not domains or row["domain"] in domains)]
    if not rows:
        raise UserError(f"{run} has no finished final trial to score; finish it with `graft run`.")
    sets = {target.domain: set_place(recipe.data, target.set) for target in recipe.fanout.targets}
    if lost := sorted({row["domain"] for row in rows} - sets.keys()):
        raise UserError(f"{run} has trials of {', '.join(lost)}, which its recipe.yaml no longer lists; run on it the recipe "
                        "that has them.")
    scored: list[dict[str, Any]] = []
    with progress(f"evaluate ({net})", len(rows), "trials") as show:
        for row in rows:
            again = rescore(row, recipe, run, set_path=sets[row["domain"]], net=net, samples=samples)
            scored.append(again)
            fid = f"  FID {again['fid']:.4g}" if again["fid"] is not None else ""
            show(len(scored), f"{row['domain']} {row['method']} seed {row['seed']}: KID {again['kid']:.4g}{fid}")
    path = run / "evaluations" / f"{net}.json"
    contract = contract_of(scored)
    write_json(path, {"schema_version": SCHEMA_VERSION, "contract": contract,
                      "rows": [{k: v for k, v in row.items() if k != "contract"} for row in scored],
                      "verdicts": verdicts_over(scored, 1 - recipe.fanout.confidence)})
    return path

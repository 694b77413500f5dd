"""Scores after the fact: a run's final trials again in another feature net, or one generator against a set."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from cluster.leaderboard import SCHEMA_VERSION, contract_of, read_leaderboard, verdicts_over
from cluster.progress import progress
from cluster.recipe import Recipe
from data_shards.errors import UserError
from data_shards.files import write_json
from training.checkpoint import is_checkpoint, latest_valid
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
    sets = {domain.name: set_place(recipe.data, domain.set) for domain in recipe.fanout.domains()}
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


def evaluate_against(target: Path, against: str, *, net: str | None = None, scores: Sequence[str] = (),
                     samples: int | None = None, seed: int = 0, limit: int | None = None, out: Path | None = None,
                     address: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Score a checkpoint, a run's newest pretrained one, or a folder of images against the set ``against``.

    Writes the scores as JSON and the nearest training images beside it as PNG; returns the JSON's path and content.

    Args:
        target: a checkpoint's folder, a run's folder, or images as `graft shards pack` takes them.
        against: path or URL of a set, or its name below the run's data.root.
        net: a feature net; None is the encoder of the run around the target, and the FID Inception where there is none.
        scores: keys of `SCORES`; all that can be computed when empty.
        samples: generated images; None is the recipe's number, or all there are in a folder.
        seed: of latents and scores.
        limit: most images of a split that are compared (see `training.evaluation.evaluate`); None is its default.
        out: the JSON file; None is below the run, or beside the target.
        address: a Ray cluster over which the set's features are computed.

    Raises:
        UserError: for a target that is neither, and as `training.evaluation.evaluate`.
    """
    from cluster.session import ray_session
    from data_shards import open_set
    from training import evaluation
    from training.metrics.catalogue import check_names
    from training.metrics.features import load_feature_net
    from training.world import device

    check_names(scores)
    if not target.exists():
        raise UserError(f"there is no run, checkpoint or folder of images at {target}; check the path.")
    target = target.resolve()
    run = next((folder for folder in (target, *target.parents) if (folder / "recipe.yaml").exists()
                and (folder / "pretrain").is_dir()), None)
    recipe = read_run_recipe(run) if run else None
    if not (Path(against) / "manifest.json").exists() and "://" not in against and recipe:
        against = set_place(recipe.data, against)
    shards = open_set(against)
    encoder = run / "encoder.safetensors" if run else None
    chosen = net or ("encoder" if encoder and encoder.exists() else "inception")
    if chosen == "encoder" and not (encoder and encoder.exists()):
        raise UserError(f"{target} lies in no run that has trained an encoder; give --net the path of one, such as "
                        "RUN/encoder.safetensors, or another net.")
    checkpoint = _checkpoint_of(target, run)
    loaded = load_feature_net(chosen, encoder if chosen == "encoder" else None, device())
    with progress(f"evaluate ({chosen})", 100, "%") as show:
        show(0, "images")
        if checkpoint:
            fakes = evaluation.of_checkpoint(checkpoint, samples or (recipe.evaluation.samples if recipe else 1000), seed)
        else:
            fakes = evaluation.of_images(target, shards.manifest.image_shape, samples, seed)
        path = out or _default_out(checkpoint or target, run if checkpoint else None, shards.manifest.name, chosen)
        path.parent.mkdir(parents=True, exist_ok=True)
        with ray_session(address) if address else nullcontext():
            report = evaluation.evaluate(
                fakes, shards, loaded, scores=scores, seed=seed, limit=limit or evaluation.LIMIT,
                map_fn=ray_map if address else map, gallery=path.with_name(f"{path.stem}-nearest.png"),
                progress=lambda share, what: show(100 * share, what))
    write_json(path, report)
    return path, report


def ray_map(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` over the joined Ray cluster, in order, a few results ahead of what is taken; a GPU each where there are any."""
    import ray

    resources = ray.cluster_resources()
    remote = ray.remote(num_cpus=1, num_gpus=1 if resources.get("GPU") else 0)(function)
    pending: deque[Any] = deque()
    for item in items:
        pending.append(remote.remote(item))
        if len(pending) > 2 * resources.get("CPU", 1):
            yield ray.get(pending.popleft())
    while pending:
        yield ray.get(pending.popleft())


def scores_text(report: dict[str, Any]) -> str:
    """The scores as a table for the terminal, and what was left out and why."""
    contract, against = report["contract"], report["against"]
    lines = [f"{report['of']['path']} against {against['set']} ({against['split']}), {contract['features']}, "
             f"{contract['n_fake']} generated and {contract['n_reference']} real images"]
    width = max(map(len, [*report["scores"], *report["skipped"]]))
    for name, value in report["scores"].items():
        shown = ("[" + ", ".join(f"{part:.4g}" for part in value) + "]" if isinstance(value, list)
                 else f"{value:.4g}" if isinstance(value, float) else "-" if value in (None, "") else str(value))
        lines.append(f"  {name:<{width}}  {shown}")
    lines += [f"  {name:<{width}}  left out: {reason}" for name, reason in report["skipped"].items()]
    return "\n".join(lines)


def _checkpoint_of(target: Path, run: Path | None) -> Path | None:
    """The checkpoint that is meant, None for a folder of images.

    Raises:
        UserError: for a run that has none yet.
    """
    if is_checkpoint(target):
        return target
    if run != target:
        return None
    newest = latest_valid(target / "pretrain")
    if newest is None:
        raise UserError(f"{target} has no whole checkpoint in pretrain/ yet; make one with `graft pretrain`.")
    return newest


def _default_out(target: Path, run: Path | None, against: str, net: str) -> Path:
    name = "-".join([*(target.relative_to(run).parts if run else [target.name]), *against.split("/"), Path(net).stem])
    return run / "evaluations" / f"{name}.json" if run else target.parent / f"{name}.json"

"""The command line. Every command imports what it needs when it runs, so that `graft --help` is instant."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli_shards import Address, DryRun, Overwrite, shards

if TYPE_CHECKING:
    from data_shards import ShardSet

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(name="graft", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Pretrain one generative model, adapt it to many small domains in parallel, and say which way worked.",
                  epilog="Example: graft run recipes/smoke.yaml")
jobs = typer.Typer(no_args_is_help=True, help="Jobs that were sent to a Ray cluster.",
                   epilog="Example: graft jobs list --address http://head:8265")
sources = typer.Typer(no_args_is_help=True, help="Sources for a target: which one suits it.",
                      epilog="Example: graft sources rank data/kanjivg/target --among data/quickdraw/source data/mnist/source")
recipes = typer.Typer(no_args_is_help=True, help="Recipes: list them, print one resolved, print every key.",
                      epilog="Example: graft recipes show demo")
app.add_typer(shards, name="shards")
app.add_typer(sources, name="sources")
app.add_typer(jobs, name="jobs")
app.add_typer(recipes, name="recipes")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Path of a recipe, or its name in recipes/.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; repeatable.")]
Out = Annotated[str | None, typer.Option("--out", help="The run's folder; runs/<recipe name> by default.")]
Dashboard = Annotated[str | None, typer.Option("--address", help="The cluster's dashboard, http://HOST:8265.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, as `graft submit` printed it.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 the caller's mistake in one sentence, 1 anything else."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="graft")
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            print("graft: interrupted; the same command goes on from where it was", file=sys.stderr)
            return 1
        if leaving.code == signal.SIGTERM:  # Ray's handler in a driver
            print("graft: stopped by SIGTERM; the same command goes on from where it was", file=sys.stderr)
            return 1
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        print(f"graft: {' '.join(str(known).split())}", file=sys.stderr)
        return 2 if isinstance(known, ValueError) else 1
    return 0


def _known(error: BaseException) -> BaseException | None:
    """The error that needs no traceback, also when a Ray process raised it; None for any other."""
    from data_shards.errors import Failure, UserError

    cause = getattr(error, "cause", None)  # Ray wraps what a remote process raised
    return next((one for one in (cause, error) if isinstance(one, UserError | Failure)), None)


# ---- a run and its stages


def _run(recipe: str, sets: list[str] | None, out: str | None, address: str | None, dry_run: bool,
         stages: tuple[str, ...] | None) -> None:
    from cluster.recipe import Recipe as Model
    from cluster.run import run as run_stages
    from training.config import parse_overrides
    from training.recipe import read_recipe

    resolved = read_recipe(Model, recipe, parse_overrides(sets or []))
    folder = _folder(f"runs/{resolved.name}" if out is None else out)
    run_stages(resolved, folder, stages=stages, address=address, dry_run=dry_run)


@app.command(epilog="Example: graft run recipes/demo.yaml --set training.images=50000 --out runs/short")
def run(recipe: Recipe, sets: Sets = None, out: Out = None, address: Address = None, dry_run: DryRun = False) -> None:
    """Everything: shards, pretraining, meta-training, fan-out, report. The same command again resumes."""
    _run(recipe, sets, out, address, dry_run, None)


@app.command(epilog="Example: graft pretrain demo --set training.engine.zero=1")
def pretrain(recipe: Recipe, sets: Sets = None, out: Out = None, address: Address = None,
             dry_run: DryRun = False) -> None:
    """Shards and the pretraining of the source model."""
    _run(recipe, sets, out, address, dry_run, ("shards", "pretrain"))


@app.command(epilog="Example: graft metatrain demo --set meta.steps=100")
def metatrain(recipe: Recipe, sets: Sets = None, out: Out = None, address: Address = None,
              dry_run: DryRun = False) -> None:
    """Shards, pretraining, and meta-training from the pretrained weights."""
    _run(recipe, sets, out, address, dry_run, ("shards", "pretrain", "metatrain"))


@app.command(epilog="Example: graft adapt demo --set adaptation.shots=5 --out runs/demo")
def adapt(recipe: Recipe, sets: Sets = None, out: Out = None, address: Address = None, dry_run: DryRun = False) -> None:
    """The fan-out over the target domains, from a pretrained run."""
    _run(recipe, sets, out, address, dry_run, ("shards", "encoder", "fanout"))


@app.command(epilog="Example: graft evaluate runs/demo --net inception; "
                    "graft evaluate runs/demo/pretrain/step-000000081920 --against data/quickdraw/validation/sun")
def evaluate(target: Annotated[Path, typer.Argument(metavar="TARGET", help="A run's folder, a checkpoint's, or a folder of "
                                                    "images.")],
             against: Annotated[str | None, typer.Option(metavar="SHARDS", help="Set to score one generator against; without "
                                                         "it a run's final trials are scored again.")] = None,
             net: Annotated[str | None, typer.Option(help="Feature net: encoder, inception, efficientnet-lite0, or a "
                                                     ".safetensors, .pt or .onnx file. The last two are programs and are "
                                                     "run.")] = None,
             scores: Annotated[str, typer.Option(help="Only these, with commas between: see docs/SCORES.md.")] = "",
             samples: Annotated[int | None, typer.Option(min=8, help="Pictures per score; the recipe's, or all.")] = None,
             seed: Annotated[int, typer.Option(min=0, help="Seed of latents and scores.")] = 0,
             seeds: Annotated[int | None, typer.Option(min=1, help="Of a run's trials only the first so many seeds.")] = None,
             domain: Annotated[list[str] | None, typer.Option(help="Of a run's trials only this domain; repeatable.")] = None,
             limit: Annotated[int | None, typer.Option(min=8, help="Most real images of a split that are compared.")] = None,
             out: Annotated[Path | None, typer.Option("--out", help="JSON file of the scores against a set.")] = None,
             address: Address = None) -> None:
    """Score generated images against a set of shards, or a run's final trials again in another feature net."""
    from data_shards.errors import UserError

    if against is None:
        folder = _existing_run(target)
        if scores or out or limit or address:
            raise UserError("--scores, --out, --limit and --address go with --against SHARDS; add it, or leave them out.")
        from cluster.evaluate import evaluate as score

        print(score(folder, net=net or "inception", samples=samples, seeds=seeds, domains=domain or ()))
        return
    if seeds or domain:
        raise UserError("--seeds and --domain choose among a run's trials; leave them out with --against.")
    from cluster.evaluate import evaluate_against, scores_text

    names = [name.strip() for name in scores.split(",") if name.strip()]
    path, found = evaluate_against(target, against, net=net, scores=names, samples=samples, seed=seed, limit=limit, out=out,
                                   address=address)
    print(scores_text(found))
    print(path)


@sources.callback()
def _sources() -> None:
    """So that `rank` stays a command's name while there is one."""


@sources.command(epilog="Example: graft sources rank data/kanjivg/target --among data/quickdraw/source data/mnist/source")
def rank(target: Annotated[str, typer.Argument(metavar="TARGET", help="The target's set: folder or URL.")],
         among: Annotated[list[str], typer.Option("--among", metavar="SOURCE", help="A set, or a run that was pretrained on "
                                                  "one; repeatable.")],
         more: Annotated[list[str] | None, typer.Argument(metavar="[SOURCE]...", help="More of --among.")] = None,
         net: Annotated[list[str] | None, typer.Option(help="Feature net; repeatable. efficientnet-lite0 and "
                                                       "inception by default.")] = None,
         limit: Annotated[int, typer.Option(min=8, help="Most images of a set that are compared.")] = 2000,
         probe: Annotated[int, typer.Option(min=0, help="Also fine-tune each run's networks over so many images.")] = 0,
         seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
         out: Annotated[Path | None, typer.Option("--out", help="JSON file of the ranking.")] = None) -> None:
    """Which source suits a target: distances in several feature nets, and a short fine-tuning of each."""
    from cluster.sources import rank_sources, ranking_text

    found = rank_sources(target, [*among, *(more or ())], nets=net or ["efficientnet-lite0", "inception"], limit=limit,
                         seed=seed, probe_images=probe, out=out)
    print(ranking_text(found))


@app.command(epilog="Example: graft report runs/demo")
def report(run: Run) -> None:
    """Make the page of a run again."""
    folder = _existing_run(run)
    from cluster.report import build_report

    print(build_report(folder))


@app.command(epilog="Example: graft sample runs/demo --count 64; graft sample runs/demo --count 10000 --shards data/synthetic; "
                    "graft sample runs/cycle --from mnist/source --shards data/translated")
def sample(target: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a checkpoint's.")],
           out: Annotated[Path | None, typer.Option("--out", help="PNG file, and a text file beside it where samples are "
                                                    "text; RUN/grid-<stage or trial>.png, or beside the checkpoint.")] = None,
           source: Annotated[str | None, typer.Option("--from", metavar="SET", help="Of a translator (cyclegan): the set whose "
                                                      "training images are translated, shown above their translation.")] = None,
           reverse: Annotated[bool, typer.Option("--reverse", help="With --from: from domain B to domain A.")] = False,
           to_shards: Annotated[str | None, typer.Option("--shards", metavar="DST", help="Pack them as a set in this folder "
                                                         "or store instead, with where they come from.")] = None,
           stage: Annotated[str, typer.Option(help="Whose generator: pretrain, meta, or meta:RULE.")] = "pretrain",
           trial: Annotated[str | None, typer.Option(help="Id of a trial instead of a stage.")] = None,
           count: Annotated[int | None, typer.Option(min=1, help="Number of pictures; 64, or with --from and --shards all of "
                                                     "the set.")] = None,
           seed: Annotated[int, typer.Option(min=0, help="Seed of the latents.")] = 0,
           truncation: Annotated[float | None, typer.Option(help="With styles: psi, 1 leaves them and 0 is their mean; "
                                                            "else cut latents off at +- so many deviations.")] = None,
           overwrite: Overwrite = False) -> None:
    """Generated or translated pictures: a grid, or a set of shards that is a source like any other."""
    from data_shards.errors import UserError

    if out is not None and to_shards is not None:
        raise UserError("--out is for a grid and --shards for a set; give one of them.")
    if source is None and reverse:
        raise UserError("--reverse is the direction of a translation; add --from SET.")
    if source is not None and (truncation is not None or seed):
        raise UserError("--truncation and --seed are of pictures made from noise; leave them out with --from.")
    from cluster.progress import counting
    from training.checkpoint import is_checkpoint
    from training.sample import sample_grid, sample_shards, translate_grid, translate_shards

    if is_checkpoint(target):
        checkpoint, out = target, out or target.with_name(f"grid-{target.name}.png")
    else:
        checkpoint, out = _checkpoint(_existing_run(target), stage, trial), out or target / f"grid-{trial or stage}.png"
    images = None if source is None else _named_set(source, checkpoint)
    if to_shards is None:
        if images is None:
            readable = sample_grid(checkpoint, out, count or 64, seed, truncation)
            print(*dict.fromkeys((out, readable)), sep="\n")  # text lies beside its picture
        else:
            print(translate_grid(checkpoint, images, out, count or 64, reverse=reverse))
        return
    with counting("sample") as show:
        def shown(done: int, total: int, _size: int) -> None:
            show(done, total)

        if images is None:
            made = sample_shards(checkpoint, to_shards, count or 64, seed, truncation, overwrite=overwrite, progress=shown,
                                 say=print)
        else:
            made = translate_shards(checkpoint, images, to_shards, count, reverse=reverse, overwrite=overwrite, progress=shown,
                                    say=print)
    print(f"{to_shards}: {len(made)} images in {len(made.manifest.shards)} shards, made by {checkpoint}")


# ---- clusters


@app.command(epilog="Example: graft submit demo --to ray --address http://head:8265 --out /shared/runs/demo --wait")
def submit(recipe: Recipe, address: Dashboard = None, sets: Sets = None, out: Out = None,
           to: Annotated[str, typer.Option("--to", help="Kind of cluster: ray.")] = "ray",
           python: Annotated[str | None, typer.Option(help="Python of the cluster's head node.")] = None,
           wait: Annotated[bool, typer.Option("--wait", help="Follow the log until the end.")] = False,
           dry_run: DryRun = False) -> None:
    """Send `graft run RECIPE` to a Ray cluster through its Jobs API."""
    from cluster.submit import submit as send

    send(recipe, to=to, address=address, overrides=sets or (), out=out, python=python, wait=wait, dry_run=dry_run)


@jobs.command("list", epilog="Example: graft jobs list --address http://head:8265")
def list_jobs(address: Dashboard = None) -> None:
    """The cluster's jobs, newest first."""
    import time

    from cluster.submit import jobs_list

    found = jobs_list(address=address)
    for job in found:
        start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["start"]))
        print(f"{job['job']}  {job['status']:9}  {start}  {job['seconds']:8.0f} s")
    if not found:
        print("no jobs", file=sys.stderr)


@jobs.command("logs", epilog="Example: graft jobs logs demo-1a2b3c-20260101-120000 --follow")
def job_logs(job: Job, address: Dashboard = None,
             follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False) -> None:
    """What a job has printed."""
    from cluster.submit import jobs_logs

    jobs_logs(job, address=address, follow=follow)


@jobs.command("stop", epilog="Example: graft jobs stop demo-1a2b3c-20260101-120000")
def stop_job(job: Job, address: Dashboard = None) -> None:
    """Stop a job; submitted again, the run goes on from its last checkpoint."""
    from cluster.submit import jobs_stop

    print(f"{job} {jobs_stop(job, address=address)}")


@jobs.command("wait", epilog="Example: graft jobs wait demo-1a2b3c-20260101-120000 --follow")
def wait_job(job: Job, address: Dashboard = None,
             follow: Annotated[bool, typer.Option("--follow", help="Print the log meanwhile.")] = False,
             timeout_s: Annotated[float | None, typer.Option(help="Give up waiting after so many seconds.")] = None,
             ) -> None:
    """Wait for a job's end; exit code 0 when it succeeded, 1 when not."""
    from cluster.submit import jobs_wait

    jobs_wait(job, address=address, follow=follow, timeout_s=timeout_s)
    print(f"{job} SUCCEEDED")


# ---- recipes and the installation


@recipes.command("list", epilog="Example: graft recipes list")
def list_recipes() -> None:
    """The recipes that come with graft, each with the first sentence of its file."""
    from training.recipe import RECIPES_FOLDER

    for path in sorted(RECIPES_FOLDER.glob("*.yaml"), key=lambda path: path.stem):
        comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        sentence, end, _ = " ".join(line.lstrip("# ") for line in comment).partition(". ")
        print(f"{path.stem:32} {sentence}{end}".rstrip())


@recipes.command(epilog="Example: graft recipes show demo --set training.batch=32")
def show(name: Recipe, sets: Sets = None) -> None:
    """A recipe with every default written out, as YAML with a description beside each value."""
    from cluster.recipe import Recipe as Model
    from cluster.recipe_text import as_yaml
    from training.config import parse_overrides
    from training.recipe import read_recipe

    print(as_yaml(read_recipe(Model, name, parse_overrides(sets or []))), end="")


@recipes.command(epilog="Example: graft recipes schema > recipe.schema.json")
def schema(markdown: Annotated[bool, typer.Option("--markdown", help="A page for people.")] = False) -> None:
    """Every key a recipe can have, as a JSON schema or as Markdown."""
    from cluster.recipe import Recipe as Model
    from cluster.recipe_text import as_markdown

    print(as_markdown(Model) if markdown else json.dumps(Model.model_json_schema(), indent=2))


@app.command(epilog="Example: graft doctor")
def doctor() -> None:
    """What graft finds on this machine, one line each."""
    from cluster.doctor import checks

    for name, state, text in checks():
        print(f"{state:5} {name:10} {text}", flush=True)


@app.command(epilog="Example: graft version")
def version() -> None:
    """graft's version."""
    from importlib import metadata

    try:
        print(f"graft {metadata.version('graft-gan')}")
    except metadata.PackageNotFoundError:  # a checkout on a cluster's node
        print("graft (from a checkout)")


# ---- helpers


def _folder(text: str) -> Path:
    from data_shards.errors import UserError
    from training.folders import run_folder

    if "://" in text:
        raise UserError(f"--out {text} is a URL, to which only `python -m training RECIPE` writes so far; give a local or "
                        "shared path, such as runs/demo.")
    run_folder(text)
    return Path(text)


def _existing_run(folder: Path) -> Path:
    from data_shards.errors import UserError

    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not a run's folder (it has no recipe.yaml); make one with `graft run RECIPE "
                        f"--out {folder}`.")
    return folder


def _named_set(name: str, checkpoint: Path) -> ShardSet:
    """A set by its path or URL, or by its name below the data.root that a checkpoint's recipe has."""
    from data_shards import open_set
    from training.checkpoint import load_checkpoint
    from training.recipe import DataConfig
    from training.source import set_place

    if "://" in name or (Path(name) / "manifest.json").exists():
        return open_set(name)
    _, state = load_checkpoint(checkpoint, ("generator_ema",))
    return open_set(set_place(DataConfig.model_validate(state["recipe"]["data"]), name))


def _checkpoint(run: Path, stage: str, trial: str | None) -> Path:
    from data_shards.errors import UserError
    from training.checkpoint import latest_valid

    if trial is not None:
        known = {path.parent.name: path for path in sorted(run.glob("domains/*/*/best"))}
        if trial not in known:
            raise UserError(f"run {run} has no trial {trial!r}; its trials: {', '.join(known) or 'none yet'}.")
        return known[trial]
    parents = {"pretrain": [run / "pretrain"], "meta": sorted(run.glob("meta/*"))}
    parents |= {f"meta:{rule}": sorted(run.glob(f"meta/{rule}-*")) for rule in sorted({path.name.partition("-")[0]
                                                                                       for path in parents["meta"]})}
    if stage not in parents:
        raise UserError(f"--stage {stage!r} is unknown; choose one of {', '.join(parents)}.")
    for parent in parents[stage]:
        if (found := latest_valid(parent)) is not None:
            return found
    command = "pretrain" if stage == "pretrain" else "metatrain"
    raise UserError(f"run {run} has no checkpoint of {stage} yet; make one with `graft {command} RECIPE --out {run}`.")

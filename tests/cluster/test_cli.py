"""The command line: exit codes, one sentence for a mistake, an example in every help, and every recipe dry-runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cluster import cli, doctor
from cluster.cli import main
from cluster.errors import JobFailed
from data_shards.errors import UserError
from tests.toy import toy_set
from training.config import field_paths
from training.recipe import RECIPES_FOLDER, read_recipe

RECIPES = sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in sorted(getattr(group, "commands", {}).items()):
        yield from commands(command, (*path, name))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder outside the checkout, so that nothing lands in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence that `graft WORDS` says on stderr; asserts exit code 2 and no traceback."""
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("graft: ") and "Traceback" not in said
    return said


@pytest.mark.parametrize("path", list(commands(typer.main.get_command(cli.app))), ids=" ".join)
def test_every_help_has_an_example(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, [*path, "--help"])
    assert result.exit_code == 0
    assert f"Example: graft {' '.join(path)}".rstrip() in " ".join(result.output.split())


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = ("import sys; from cluster.cli import main; main(['run', '--help']);"
            "print({'torch', 'ray', 'numpy', 'webdataset', 'deepspeed'} & set(sys.modules), file=sys.stderr)")
    started = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "set()"
    assert time.monotonic() - started < 20


def test_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("graft ")
    assert main(["no-such-command"]) == 2
    assert main(["run"]) == 2
    assert main(["run", "demo", "--no-such-option"]) == 2

    def raising(error: BaseException) -> None:
        def checks() -> Iterator[Any]:
            raise error

        monkeypatch.setattr(doctor, "checks", checks)

    capsys.readouterr()
    raising(KeyboardInterrupt())
    assert main(["doctor"]) == 1
    assert "same command" in capsys.readouterr().err
    raising(JobFailed("job x ended as FAILED"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "graft: job x ended as FAILED\n"
    remote = RuntimeError("a traceback\nof many lines")
    remote.cause = UserError("a mistake that a worker found;\n fix it.")  # type: ignore[attr-defined]
    raising(remote)
    assert mistake(capsys, "doctor") == "graft: a mistake that a worker found; fix it.\n"
    raising(RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):  # the interpreter prints it and exits 1
        main(["doctor"])


def test_an_unknown_recipe_names_the_known_ones(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "run", "no-such-recipe", "--dry-run")
    assert "'no-such-recipe'" in said and all(name in said for name in RECIPES)
    assert not list(elsewhere.iterdir())


def test_a_wrong_key_names_the_nearest_right_one(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "run", "smoke", "--set", "training.generator.lrr=1", "--dry-run")
    assert "training.generator.lrr" in said and "'training.generator.lr'" in said
    said = mistake(capsys, "recipes", "show", "smoke", "--set", "fanuot.seeds=3")
    assert "'fanout" in said
    assert "'training.batch'" not in mistake(capsys, "run", "smoke", "--set", "training.batch=0", "--dry-run")
    assert "KEY=VALUE" in mistake(capsys, "run", "smoke", "--set", "training.batch", "--dry-run")
    said = mistake(capsys, "run", "smoke", "--set", "seed=1", "--set", "training.batch=0", "--dry-run")
    assert said.startswith("graft: --set training.batch: training.batch = 0 is refused") and "smoke.yaml" not in said
    said = mistake(capsys, "run", "smoke", "--set", "adaptation.batch=4000", "--dry-run")
    assert "smoke.yaml with --set adaptation.batch: adaptation.images = 64" in said
    assert not list(elsewhere.iterdir())


def test_broken_yaml_is_one_sentence_with_its_line(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "mine.yaml").write_text("data:\n  source: x\n training: {images: 3\nseed: 1\n")
    said = mistake(capsys, "run", "mine.yaml", "--dry-run")
    assert said.startswith("graft: mine.yaml, line 3, column ") and len(said) < 150 and "^" not in said


def test_a_dry_run_says_which_sets_would_be_fetched(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "smoke", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "quickdraw/source, quickdraw/validation/sun not in data; would be fetched (quickdraw)" in said
    toy_set(elsewhere / "data" / "quickdraw" / "source")
    toy_set(elsewhere / "data" / "quickdraw" / "validation" / "sun", seed=1)
    assert main(["run", "smoke", "--dry-run"]) == 0
    assert "all sets are in data" in capsys.readouterr().out
    assert "no set at" in mistake(capsys, "run", "smoke", "--set", "data.source=mine", "--dry-run")


def test_folders_that_do_not_fit_are_one_sentence(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "empty").mkdir()
    assert "missing" in mistake(capsys, "shards", "pack", "missing", "--out", "packed")
    assert "empty" in mistake(capsys, "shards", "pack", "empty", "--out", "packed")
    assert "missing" in mistake(capsys, "shards", "info", "missing")
    assert "missing" in mistake(capsys, "shards", "verify", "missing")
    assert "empty" in mistake(capsys, "shards", "index", "empty")
    assert "nothing-so" in mistake(capsys, "shards", "fetch", "nothing-so")
    for command in (["report", "empty"], ["evaluate", "empty"], ["sample", "empty", "--out", "grid.png"]):
        assert "not a run's folder" in mistake(capsys, *command)
    assert "URL" in mistake(capsys, "run", "smoke", "--out", "s3://bucket/run", "--dry-run")
    assert not (elsewhere / "packed").exists() and not (elsewhere / "grid.png").exists()


def test_a_sample_names_the_trials_there_are(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "run" / "domains" / "apple" / "abc123" / "best").mkdir(parents=True)
    (elsewhere / "run" / "recipe.yaml").touch()
    assert "abc123" in mistake(capsys, "sample", "run", "--out", "grid.png", "--trial", "xyz")
    assert "graft pretrain" in mistake(capsys, "sample", "run", "--out", "grid.png")
    assert "pretrain, meta" in mistake(capsys, "sample", "run", "--out", "grid.png", "--stage", "fanout")
    (elsewhere / "run" / "meta" / "fomaml-0123").mkdir(parents=True)
    assert "pretrain, meta, meta:fomaml" in mistake(capsys, "sample", "run", "--out", "grid.png", "--stage", "meta:maml")
    assert "graft metatrain" in mistake(capsys, "sample", "run", "--out", "grid.png", "--stage", "meta:fomaml")


def test_a_sample_without_out_lies_in_the_run(elsewhere: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    import training.sample

    (elsewhere / "run" / "domains" / "apple" / "abc123" / "best").mkdir(parents=True)
    (elsewhere / "run" / "recipe.yaml").touch()
    monkeypatch.setattr(training.sample, "sample_grid", lambda checkpoint, out, count, seed, truncation: out.touch() or out)
    assert main(["sample", "run", "--trial", "abc123"]) == 0
    assert capsys.readouterr().out.strip() == "run/grid-abc123.png"
    assert (elsewhere / "run" / "grid-abc123.png").exists()


def test_a_folder_is_packed_described_and_verified(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    (elsewhere / "photos" / "red").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (9, 7), (200, number, 0)).save(elsewhere / "photos" / "red" / f"{number}.png")
    assert main(["shards", "pack", "photos", "--out", "packed", "--size", "8", "--reference", "0.5"]) == 0
    assert "4 images in 1 shards, 0 left out" in capsys.readouterr().out
    assert main(["shards", "info", "packed"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == {"red": 4}
    assert main(["shards", "verify", "packed"]) == 0
    shard = next((elsewhere / "packed").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert shard.name in mistake(capsys, "shards", "verify", "packed")


@pytest.mark.parametrize(("command", "stages"), [
    ("run", None),
    ("pretrain", ("shards", "pretrain")),
    ("metatrain", ("shards", "pretrain", "metatrain")),
    ("adapt", ("shards", "encoder", "fanout")),
])
def test_each_command_runs_its_stages(command: str, stages: tuple[str, ...] | None,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    import cluster.run

    seen: list[Any] = []
    monkeypatch.setattr(cluster.run, "run", lambda *args, **named: seen.append((args, named)))
    assert main([command, "smoke", "--set", "training.generator.lr=1e-4", "--address", "auto", "--dry-run"]) == 0
    ((recipe, out), named), = seen
    assert recipe.training.generator.lr == 1e-4 and out == Path("runs/smoke")
    assert named == {"stages": stages, "address": "auto", "dry_run": True}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_dry_runs_and_leaves_nothing(name: str, elsewhere: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", name, "--dry-run"]) == 0
    assert capsys.readouterr().out.strip()
    assert not [path for path in elsewhere.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_shown_reads_as_the_same_recipe(name: str, elsewhere: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.recipe import Recipe

    assert main(["recipes", "show", name]) == 0
    shown = capsys.readouterr().out
    assert "seed of every random draw" in shown and yaml.safe_load(shown)["name"] == name
    (elsewhere / "shown.yaml").write_text(shown)
    assert read_recipe(Recipe, "shown.yaml") == read_recipe(Recipe, name)


def test_the_recipes_are_listed_and_every_key_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.recipe import Recipe

    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == RECIPES and all(line.endswith(".") for line in listed)
    assert main(["recipes", "schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(Recipe.model_fields)
    assert main(["recipes", "schema", "--markdown"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    keys = {row[0].strip("| `"): row for row in rows}
    paths = list(field_paths(Recipe))
    leaves = {key for key in paths if not any(other.startswith(f"{key}.") for other in paths)}
    leaves |= {"cluster.workers", "data.corruption", "fanout.corruption"}  # a number or nothing, or a section
    assert set(keys) == leaves
    assert not [key for key, row in keys.items() if not row[-1].strip(" |")]


@pytest.mark.parametrize("name", RECIPES)
def test_a_submission_is_shown_with_absolute_folders(name: str, elsewhere: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", name, "--address", "http://head:8265", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"python -m cluster run recipes/{name}.yaml --out {elsewhere}/runs/{name}" in shown
    assert f"--set data.root={elsewhere}/" in shown and "code package:" in shown
    assert "slurm" in mistake(capsys, "submit", name, "--to", "slurm", "--address", "http://head:8265", "--dry-run")


def test_the_doctor_says_one_line_for_each_check(capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Finding:
        raise OSError("no such disk")

    monkeypatch.setitem(doctor.CHECKS, "disk", broken)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == list(doctor.CHECKS)
    assert all(line.startswith(("ok ", "warn ")) for line in lines)
    assert "no such disk" in next(line for line in lines if " disk " in line)

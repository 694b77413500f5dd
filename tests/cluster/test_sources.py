"""`graft sources rank`: sets and runs, the probe, and the correlation with gains that runs have measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.recipe import Recipe
from data_shards import load_images, open_set
from tests.toy import stroke_set, toy_set, toy_tree
from training.metrics.encoder import save_encoder, train_encoder
from training.pretrain import pretrain
from training.world import World


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set "target", three runs on "near" and "strokes", and an encoder."""
    root = tmp_path_factory.mktemp("sources")
    near, _ = toy_set(root / "near", train=96, reference=48), stroke_set(root / "strokes", train=96)
    toy_set(root / "target", train=40, reference=24, seed=5)
    for name, source in (("run-near", "near"), ("run-strokes", "strokes")):
        tree = toy_tree(root)
        recipe = Recipe.model_validate({**tree, "data": {"source": source, "root": str(root)}, "cluster": {"workers": 1}})
        pretrain(recipe, open_set(root / source), root / name, World())
        (root / name / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    shutil.copytree(root / "run-near", root / "run-again")
    images, labels = load_images(near, near.indices("train"))
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=1024, threads=1), root / "net.safetensors")
    return root


def ranked(root: Path, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["sources", "rank", str(root / "target"), *words, "--net", str(root / "net.safetensors"), "--limit", "40",
                 "--out", str(root / "found.json")])
    found = json.loads((root / "found.json").read_text()) if code == 0 else {"sources": []}
    return code, {row["source"]: row for row in found["sources"]} | {"whole": found}


def test_sets_are_ranked_by_distance(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = ranked(root, "--among", str(root / "strokes"), str(root / "near"))
    assert code == 0 and list(rows)[:2] == ["near", "strokes"]
    text = capsys.readouterr().out.splitlines()
    table = next(i for i, line in enumerate(text) if line.startswith("rank  source"))
    assert text[table + 1].split()[:2] == ["1", "near"] and "needs three runs" in text[-1]


def write_board(run: Path, target: Path, gain: float, net: str = "a") -> None:
    """The leaderboard of a run that has fine-tuned to the target with this gain."""
    domains = {"target": {"n_reference": 24, "reference_hash": open_set(target).manifest.sha256}}
    verdicts = [{"domain": "target", "method": "finetune", "gain_over_scratch": gain}]
    board = {"schema_version": 1, "contract": {"net_hash": net, "domains": domains}, "rows": [], "verdicts": verdicts}
    (run / "leaderboard.json").write_text(json.dumps(board))


def test_runs_are_probed_and_their_gains_correlated(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [root / name for name in ("run-near", "run-strokes", "run-again")]
    for run, gain in zip(runs, (0.3, -0.1, 0.2), strict=True):
        write_board(run, root / "target", gain)
    code, rows = ranked(root, "--among", *map(str, runs), "--probe", "8")
    assert code == 0
    assert rows["run-near"]["probe_kid"] == rows["run-again"]["probe_kid"] != rows["run-strokes"]["probe_kid"]
    assert [rows[run.name]["gain_over_scratch"] for run in runs] == [0.3, -0.1, 0.2]
    assert set(rows["whole"]["rank_correlation"]) == {f"kid ({root}/net.safetensors)", f"fd ({root}/net.safetensors)", "probe"}
    assert "rank correlation of nearness with the real gain: kid" in capsys.readouterr().out
    write_board(runs[0], root / "target", 0.3, net="b")
    assert ranked(root, "--among", *map(str, runs))[0] == 2
    assert "cannot stand in one table: net_hash" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "expected"), [
    (["--among", "near"], "a ranking needs two"), (["--among", "near", "near"], "two sources are called 'near'"),
    (["--among", "near", "run-near", "--probe", "8"], "near is a set and no run"), (["--among", "near", "gone"], "gone")])
def test_what_cannot_be_ranked_is_refused(root: Path, words: list[str], expected: str,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(root / word) if word[0] not in "-8" else word for word in words]
    assert ranked(root, *given)[0] == 2 and expected in capsys.readouterr().err

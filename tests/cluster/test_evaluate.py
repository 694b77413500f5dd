"""`graft evaluate TARGET --against SHARDS`: runs, checkpoints and folders; and scores beside a pretraining on Ray."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cluster.cli import main
from cluster.recipe import Recipe
from data_shards import load_images, open_set
from tests.toy import SIZE, toy_set, toy_tree
from training.checkpoint import checkpoint_hash, latest_valid
from training.events import read_events
from training.metrics.encoder import save_encoder, train_encoder
from training.pretrain import pretrain
from training.world import World


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets "source" and "near", and a run of one pretraining with its encoder."""
    root = tmp_path_factory.mktemp("evaluate")
    source = toy_set(root / "source", train=96, reference=48)
    toy_set(root / "near", train=40, reference=40, seed=5)
    recipe, run = Recipe.model_validate({**toy_tree(root), "cluster": {"workers": 1}}), root / "run"
    pretrain(recipe, source, run, World())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    images, labels = load_images(source, source.indices())
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=1024, threads=1), run / "encoder.safetensors")
    return root


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, Path]:
    """What the command printed, and the file that its last line names."""
    assert main(["evaluate", *words]) == 0
    text = capsys.readouterr().out
    return text, Path(text.strip().splitlines()[-1])


def test_a_checkpoint_a_run_and_a_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = root / "run" / "pretrain" / "step-000000000032"
    text, path = said(capsys, str(checkpoint), "--against", str(root / "near"), "--scores", "kid, prdc,path_length")
    found = json.loads(path.read_text())
    assert path == root / "run" / "evaluations" / "pretrain-step-000000000032-near-encoder.json"
    assert {"kid", "kid_ci95", "coverage", "path_length"} <= set(found["scores"]) and "fd" not in found["scores"]
    assert found["contract"]["net"] == "encoder" and found["of"]["images_seen"] == 32
    assert f"{found['scores']['kid']:.4g}" in text and "100/100" in text
    assert Image.open(path.with_name(f"{path.stem}-nearest.png")).height == 2 * SIZE + 1

    _, path = said(capsys, str(root / "run"), "--against", "near", "--samples", "40")
    newest = json.loads(path.read_text())
    assert newest["of"]["images_seen"] == 64 and newest["contract"]["n_fake"] == 40
    assert "left out" in text or newest["skipped"]

    images, _ = load_images(open_set(root / "near"), open_set(root / "near").indices("train"))
    (tmp_path / "made").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "made" / f"{i}.png")
    encoder = str(root / "run" / "encoder.safetensors")
    text, path = said(capsys, str(tmp_path / "made"), "--against", str(root / "near"), "--net", encoder, "--scores",
                      "copying,kid", "--out", str(tmp_path / "scores.json"))
    found = json.loads(path.read_text())
    assert path == tmp_path / "scores.json"
    assert found["of"]["kind"] == "folder" and found["of"]["path"] == str(tmp_path / "made")
    assert found["scores"]["copy_rate"] == 1.0 and found["scores"]["disqualified"], "the set's own training images"
    assert found["contract"]["net_hash"] == newest["contract"]["net_hash"]


@pytest.mark.parametrize(("words", "expected"), [
    (["run", "--against", "near", "--scores", "kidd"], "no score 'kidd'"),
    (["run", "--against", "gone"], "gone"),
    (["gone", "--against", "near"], "no run, checkpoint or folder"),
    (["near", "--against", "near"], "near"),
    (["run", "--against", "near", "--net", "incpetion"], "no feature net 'incpetion'"),
    (["run", "--against", "near", "--domain", "x"], "leave them out"),
    (["run", "--scores", "kid"], "--against"),
    (["near"], "not a run's folder")])
def test_mistakes_are_one_sentence(words: list[str], expected: str, root: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(root)
    assert main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and error.startswith("graft: ")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_checkpoints_are_scored_while_pretraining_goes_on(root: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    """The newest checkpoint has scores, they are those of `graft evaluate`, and the training is that of one without."""
    from cluster.evaluate import evaluate_against, ray_map
    from cluster.pretrain import pretrain_on_ray
    from cluster.session import ray_session
    from training.metrics.extraction import set_moments
    from training.metrics.features import load_feature_net

    tree = toy_tree(root, images=512, snapshot_every_images=64)
    tree["evaluation"] = {**tree["evaluation"], "during_pretraining": 128, "during_scores": ["kid", "collapse"]}  # type: ignore[dict-item]
    recipe = Recipe.model_validate({**tree, "cluster": {"workers": 1}})
    run, source = tmp_path / "run", open_set(root / "source")
    run.mkdir()
    (run / "encoder.safetensors").write_bytes((root / "run" / "encoder.safetensors").read_bytes())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    net = load_feature_net("encoder", run / "encoder.safetensors")
    with ray_session(cpus=1):
        checkpoint = pretrain_on_ray(recipe, source, run)
        over_ray = set_moments(str(root / "source"), source.indices(), net, ray_map)
    events = read_events(run / "evaluation" / "events.jsonl")
    images = [event["images"] for event in events]
    assert images[-1] == 512 and images == sorted(set(images))
    assert all(later - earlier >= 128 for earlier, later in pairwise(images))
    assert not any("error" in event["metrics"] for event in events)
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["events.jsonl"]
    _, again = evaluate_against(checkpoint, "source", scores=["kid", "collapse"])
    last = events[-1]["metrics"]
    assert last["kid"] == pytest.approx(again["scores"]["kid"], rel=1e-5) and last["contract"] == again["contract"]
    assert last["collapse_alarm"] is False or len(events) >= 3

    alone = pretrain(Recipe.model_validate({**toy_tree(root, images=512, snapshot_every_images=64), "cluster": {"workers": 1}}),
                     source, tmp_path / "alone", World())
    assert checkpoint_hash(checkpoint) == checkpoint_hash(alone)

    here = set_moments(str(root / "source"), source.indices(), net)
    assert over_ray.images == here.images
    for ours, theirs in ((over_ray.mean, here.mean), (over_ray.scatter, here.scatter)):
        assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max()) + 1e-12


def test_a_pruned_checkpoint_is_kept_while_it_is_scored(tmp_path: Path) -> None:
    from cluster.meanwhile import _keep

    made, kept = tmp_path / "step-1", tmp_path / "evaluation" / "checkpoint"
    made.mkdir()
    (made / "state.json").write_text("{}")
    assert _keep(made, kept) and _keep(made, kept), "also over what a killed driver left"
    shutil.rmtree(made)
    assert (kept / "state.json").read_text() == "{}"
    assert not _keep(made, kept)


def test_the_newest_checkpoint_is_due(tmp_path: Path) -> None:
    from cluster.meanwhile import _due

    assert _due(tmp_path, 1) is None
    for images in (32, 64):
        (tmp_path / f"step-{images:012d}").mkdir()
    (tmp_path / "step-000000000032" / "state.json").touch()
    assert _due(tmp_path, 1) == tmp_path / "step-000000000032", "the other has no state.json yet"
    (tmp_path / "step-000000000064" / "state.json").touch()
    assert _due(tmp_path, 65) is None and _due(tmp_path, 64) == tmp_path / "step-000000000064"
    assert latest_valid(tmp_path) is None

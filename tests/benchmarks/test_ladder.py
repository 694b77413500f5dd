"""The ladder: its table and picture on a report made by hand, and three rungs run for real on toy sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.science.ladder import LADDERS, chart, main, measures, recipe_of, table
from data_shards import DATASETS, load_images
from data_shards.datasets.download import get_archive
from tests.toy import stroke_set, toy_set
from training.metrics.encoder import save_encoder, train_encoder

NET = "net"
SVG = "{http://www.w3.org/2000/svg}"


def row(source: str, distance: float, probe: float) -> dict[str, Any]:
    return {"source": source, "distances": {NET: {"kid": distance, "fd": 10 * distance}}, "probe_kid": probe}


def rung(gain: float, half: float, verdict: str) -> dict[str, Any]:
    return {"scratch": {"kid_mean": 3.0}, "finetune": {"kid_mean": 3 - gain, "gain_over_scratch": gain,
                                                       "gain_ci95": [gain - half, gain + half], "verdict": verdict}}


REPORT = {"target": "t/x", "sources": [row("near", 0.5, -1.0), row("middle", 1.0, 0.0), row("far", 2.0, 2.0)],
          "budgets": {"400": {"rank_correlation": {f"kid ({NET})": 1.0, f"fd ({NET})": 1.0, "probe": None},
                              "rungs": {"far": rung(-1.0, 0.25, "negative"), "near": rung(2.0, 0.5, "positive"),
                                        "middle": rung(1.0, 1.5, "neutral")}}}}


def test_every_measure_is_read_from_the_report() -> None:
    assert measures(REPORT) == {
        f"kid ({NET})": {"near": 0.5, "middle": 1.0, "far": 2.0}, f"fd ({NET})": {"near": 5.0, "middle": 10.0, "far": 20.0},
        "probe": {"near": -1.0, "middle": 0.0, "far": 2.0}}


def test_the_table_says_distance_gain_and_order() -> None:
    lines = table(REPORT, "400").splitlines()
    assert lines[0] == "400 images a trial, t/x:"
    assert lines[4] == "| near | 0.5 | 5 | -1 | 3.000 | 1.000 | +2.000 [1.500, 2.500] | positive |"
    assert all(line.count("|") == lines[2].count("|") for line in lines[2:7])
    assert lines[-1] == f"Rank correlation of nearness with gain: kid ({NET}) +1.00, fd ({NET}) +1.00."


def test_the_picture_stands_alone_and_puts_gains_over_distances() -> None:
    root = ElementTree.fromstring(chart(REPORT, "400", f"kid ({NET})"))
    assert root.tag == f"{SVG}svg" and root[0].tag == f"{SVG}style"
    groups = [group for group in root if (group.get("class") or "").startswith("series")]
    names = [group.findtext(f"{SVG}text") for group in groups]
    lines = [group.find(f"{SVG}line") for group in groups]
    assert names == ["near", "middle", "far"] and None not in lines
    x, low, high = ([float(line.get(key) or 0) for line in lines if line is not None] for key in ("x1", "y1", "y2"))
    assert (x[2] - x[1]) == pytest.approx(2 * (x[1] - x[0]), abs=0.2)  # distances 0.5, 1 and 2
    unit = (low[1] - high[1]) / 3
    assert unit > 0  # gains grow upwards
    assert low[0] - high[0] == pytest.approx(unit, abs=0.2) and low[2] - low[0] == pytest.approx(2.75 * unit, abs=0.2)
    colours = root[0].text or ""
    assert all(f".s{style} *" in colours for style in range(3))


def test_half_a_ladder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--target", "mnist/3"])
    assert stopped.value.code == 2 and "--target and --sources make a ladder together" in capsys.readouterr().err


@pytest.mark.parametrize("name", LADDERS)
def test_rungs_differ_by_their_source_alone(name: str) -> None:
    recipes = [recipe_of(LADDERS[name], source, 400, Path("data"), 2, {}).model_dump() for source in LADDERS[name].sources]
    for recipe in recipes:
        recipe["name"] = recipe["data"]["source"] = ""
    assert len(recipes) >= 3 and all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.network
@pytest.mark.parametrize("dataset", sorted({name.partition("/")[0] for each in LADDERS.values()
                                            for name in (each.target, *each.sources)}))
def test_the_sets_of_a_ladder_are_those_of_their_datasets(dataset: str) -> None:
    plans = {plan.name for plan in DATASETS[dataset].sets(get_archive(DATASETS[dataset].archive))}
    named = {name for each in LADDERS.values() for name in (each.target, *each.sources) if name.startswith(f"{dataset}/")}
    assert named and named <= plans


@pytest.mark.slow
def test_three_rungs_are_runs_with_one_control(tmp_path: Path) -> None:
    near = toy_set(tmp_path / "near", train=96, reference=48)
    stroke_set(tmp_path / "strokes", train=96)
    toy_set(tmp_path / "other", train=96, reference=48, seed=9)
    toy_set(tmp_path / "target", train=24, reference=24, seed=5)
    images, labels = load_images(near, near.indices("train"))
    save_encoder(train_encoder(images, labels, classes=2, seed=0, images_budget=512, threads=1), tmp_path / "net.safetensors")
    small = {"training.images": 64, "training.batch": 8, "training.generator.channels": 4, "training.discriminator.channels": 4,
             "adaptation.batch": 4, "adaptation.shots": 5, "evaluation.samples": 32,
             "evaluation.net": tmp_path / "net.safetensors", "fanout.seeds": 2}
    arguments = ["--target", "target", "--sources", "near", "strokes", "other", "--data", str(tmp_path), "--workers", "1",
                 "--images", "32", "48", "--out", str(tmp_path / "out")]
    for key, value in small.items():
        arguments += ["--set", f"{key}={value}"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert {each["source"] for each in report["sources"]} == {"near", "strokes", "other"}
    seen = []
    for budget in report["budgets"].values():
        assert len({rung["scratch"]["kid_mean"] for rung in budget["rungs"].values()}) == 1
        seen += [rung["finetune"]["gain_over_scratch"] for rung in budget["rungs"].values()]
        assert set(budget["rank_correlation"]) == set(measures(report))
        assert all(abs(value) <= 1 for value in budget["rank_correlation"].values())
    assert list(report["budgets"]) == ["32", "48"] and len(set(seen)) == 6
    controls = []
    for name in ("near", "strokes", "other"):
        board = json.loads((tmp_path / "out" / name / "leaderboard.json").read_text())
        controls.append([each["kid"] for each in board["rows"] if each["method"] == "scratch" and each["phase"] == "final"])
    assert controls[0] == controls[1] == controls[2] and len(set(controls[0])) == 2
    pictures = sorted((tmp_path / "out").glob("gain-*.svg"))
    assert len(pictures) == 4 and all("near" in picture.read_text() for picture in pictures)

"""Known truth: the sets and the null are what they are called; in short form, the verdicts of a near source and of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from benchmarks.science.known_truth import FRESH, TRUTH, Form, coins, fresh_pair, make_sets, recipe_of, run, turned, wrong
from data_shards import Sample, ShardSet, fetch, load_images, open_set, pack_images

# The networks, the rates and the trials' budget of the long form.
SHORT = Form(degrees=(30,), source=6000, encoder=6000, encoder_images=10_000, pool=250, reference=250, pretraining=14_336,
             samples=100, seeds=5)
TINY = Form(degrees=(90, 180), source=300, encoder=300, encoder_images=320, pool=150, reference=150, channels=4, pretraining=64,
            images=48, shots=20, samples=32, seeds=3)


def small_digits(folder: Path) -> ShardSet:
    """The handwritten digits that come with scikit-learn (UCI), 8 px, at twice their size."""
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    samples = [Sample(f"{i:05d}", image[None], int(label), "train")
               for i, (image, label) in enumerate(zip(images, digits.target, strict=True))]
    return pack_images(samples, folder, name="digits", shape=(1, 16, 16), classes=[str(digit) for digit in range(10)])


def test_a_right_angle_turns_pixels_and_another_keeps_the_middle() -> None:
    images = np.random.RandomState(0).randint(0, 256, (3, 1, 16, 16)).astype(np.uint8)
    assert np.array_equal(turned(images, 90), np.rot90(images, axes=(2, 3)))
    bar = np.zeros((1, 1, 16, 16), np.uint8)
    bar[..., 7:9, 2:14] = 255  # lies, and rises to the right when it is turned counterclockwise
    rows, columns = np.nonzero(turned(bar, 30)[0, 0] > 127)
    slope = np.polyfit(columns, rows, 1)[0]
    assert slope == pytest.approx(-np.tan(np.pi / 6), abs=0.1)


def test_coins_are_fair_and_independent() -> None:
    pixels = coins(2000, (1, 16, 16)).reshape(2000, -1)
    assert set(np.unique(pixels)) == {0, 255}
    correlations = np.corrcoef(pixels.T)[np.triu_indices(256, 1)]
    assert np.abs(pixels.mean(0) / 255 - 0.5).max() < 0.06 and np.abs(correlations).max() < 0.15


def test_no_digit_is_in_two_sets(tmp_path: Path) -> None:
    digits, root = small_digits(tmp_path / "all"), tmp_path / "sets"
    make_sets(digits, root, TINY)
    upright, _ = load_images(open_set(root / "digits"), np.arange(300))
    seen = {image.numpy().tobytes() for image in upright}
    for degrees in TINY.degrees:
        target = open_set(root / f"turned-{degrees}")
        assert (len(target.indices("train")), len(target.indices("reference"))) == (150, 150)
        back = turned(load_images(target, np.arange(300))[0].numpy(), -degrees)
        seen |= {image.tobytes() for image in back}
    every = {image.numpy().tobytes() for image in load_images(digits, np.arange(len(digits)))[0]}
    assert len(every) == len(digits) and len(seen) == 900 and seen <= every


def test_fresh_weights_differ_from_the_control_by_their_seed_alone(tmp_path: Path) -> None:
    make_sets(small_digits(tmp_path / "all"), tmp_path / "sets", TINY)
    recipe = recipe_of(TINY, tmp_path / "sets", "digits", 0)
    target = recipe.fanout.targets[0]
    control, same = fresh_pair(recipe, tmp_path / "same", target, 1, 0)
    assert (control["method"], same["method"]) == ("scratch", "finetune") and control["trial"] != same["trial"]
    assert control["kid"] == same["kid"] and control["coverage"] == same["coverage"]
    again, other = fresh_pair(recipe, tmp_path / "other", target, 1, FRESH)
    assert again["kid"] == control["kid"] != other["kid"]


def test_every_source_is_judged_on_every_domain_against_one_control(tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    digits, out = small_digits(tmp_path / "all"), tmp_path / "out"
    net = out / "sets" / "encoder.safetensors"
    found = run(digits, out, TINY, 1, again=str(net))
    assert [(each["source"], each["net"] == "encoder", each["domain"]) for each in found] == [
        (source, own, f"turned-{degrees}") for source in TRUTH for own in (True, False) for degrees in TINY.degrees]
    for own, again in zip(found[0::4] + found[1::4], found[2::4] + found[3::4], strict=True):
        assert own["gain_over_scratch"] == pytest.approx(again["gain_over_scratch"], rel=1e-6)
    assert all(len({each["kid_scratch"] for each in found if each["domain"] == name and each["net"] == "encoder"}) == 1
               for name in ("turned-90", "turned-180"))
    assert len({each["kid_mean"] for each in found[0::4]}) == 3
    said = capsys.readouterr().out.splitlines()
    trained = {path: path.stat().st_mtime_ns for path in out.rglob("row.json")}
    assert run(digits, out, TINY, 1) == [each for each in found if each["net"] == "encoder"]
    assert trained == {path: path.stat().st_mtime_ns for path in out.rglob("row.json")} and len(said) == len(found)


def judged(source: str, verdict: str) -> dict[str, Any]:
    return {"source": source, "seed": 0, "domain": "turned-30", "net": "n", "truth": TRUTH[source], "verdict": verdict}


def test_a_wrong_verdict_is_named_and_some_false_ones_are_allowed() -> None:
    right = [judged("digits", "positive"), judged("noise", "negative"), *[judged("fresh", "neutral")] * 10]
    assert wrong(right) == []
    assert wrong([*right, judged("noise", "neutral")]) == ["noise, seed 0, turned-30, n: neutral, not negative."]
    assert wrong([*right, *[judged("fresh", "positive")] * 2]) == []
    assert wrong([*right, *[judged("fresh", "negative")] * 5]) == ["5 of 15 fresh sources have a verdict, where 5 % may."]


@pytest.mark.slow
@pytest.mark.network
def test_near_source_noise_and_nothing_get_the_verdicts_they_deserve(tmp_path: Path) -> None:
    digits = fetch("mnist", tmp_path, only={"mnist/source"}).sets["mnist/source"]
    found = run(digits, tmp_path / "out", SHORT, 1)
    assert {each["source"]: each["verdict"] for each in found} == TRUTH
    assert [each["seeds"] for each in found] == [5, 5, 5] and wrong(found) == []

"""How the few-shot benchmark chooses and what it claims, by hand; and its short form on real drawings, by every method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.science.fewshot import against, choose, summary, usual_settings
from training.methods import METHODS


def board() -> dict[str, Any]:
    """Two domains, three seeds: reptile gains most, cdc copies, unadapted is not judged."""
    kid = {"scratch": 9.0, "unadapted": 1.0, "finetune": 4.0, "reptile": 2.0, "cdc": 1.5}
    rows = [{"domain": domain, "method": method, "phase": "final", "seed": seed, "kid": value + 0.1 * seed**2 + shift,
             "coverage": 0.5, "copy_rate": 0.0, "disqualified": method == "cdc" and domain == "sun", "status": "finished",
             "hyperparameters": {"adaptation.lr": 1e-3 if domain == "sun" or method == "reptile" else 5e-4}}
            for domain, shift in (("sun", 0.0), ("shoe", 0.5), ("bat", 0.2)) for method, value in kid.items()
            for seed in range(3)]
    verdicts = [{"domain": domain, "method": method, "kid_mean": value + shift, "seeds": 3}
                for domain, shift in (("sun", 0.0), ("shoe", 0.5), ("bat", 0.2)) for method, value in kid.items()]
    methods = [{"method": method, "gain_mean": 9.0 - value if method != "scratch" else None, "kid_mean": value,
                "disqualified": int(method == "cdc")} for method, value in sorted(kid.items(), key=lambda item: item[1])]
    return {"rows": rows, "verdicts": verdicts, "methods": methods, "costs": {}}


def test_the_chosen_method_gained_most_and_copied_nowhere() -> None:
    assert choose(board()) == "reptile"
    with pytest.raises(ValueError, match="every method was disqualified"):
        choose({"methods": [each | {"disqualified": 1} for each in board()["methods"]]})


def test_settings_are_those_chosen_most_often() -> None:
    assert usual_settings(board(), "finetune") == {"lr": 5e-4}
    assert usual_settings(board(), "reptile") == {"lr": 1e-3}


def test_two_methods_are_compared_domain_by_domain() -> None:
    found = board()
    next(v for v in found["verdicts"] if (v["domain"], v["method"]) == ("bat", "reptile"))["kid_mean"] = 4.4
    pair = against(found, "reptile", "finetune")
    assert (pair["won"], pair["domains"]) == (2, 3)
    assert pair["better_by"] == pytest.approx((2 + 2 - 0.2) / 3)
    assert pair["ci95"][0] < 0 < pair["ci95"][1]


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_short_form_by_every_method_on_real_drawings(tmp_path: Path) -> None:
    settings = {
        "training.images": 1024, "training.generator": "{channels: 8, latent_dim: 16}",
        "training.discriminator": "{channels: 8}", "training.snapshot_every_images": 512,
        "data.root": str(tmp_path / "data"), "evaluation.samples": 40,
        "evaluation.encoder_images": 1024, "evaluation.encoder_threads": 1, "meta.steps": 2, "meta.inner_steps": 2,
        "meta.tasks": 2, "meta.also": "{fomaml: {}, maml: {inner_optimizer: sgd}}", "adaptation.batch": 12, "fanout.seeds": 2,
        "adaptation.ewc.samples": 8, "fanout.targets": "[{set: quickdraw/validation/sun}, {set: quickdraw/validation/bat}]",
        "fanout.candidates": 1, "fanout.space": "{}", "cluster.workers": 1}
    command = [sys.executable, "-m", "benchmarks.science.fewshot", "--out", str(tmp_path / "run"), "--seeds", "3", "2",
               "--classes", "2", "--steps", "4", "2", *(word for key, value in settings.items()
                                                        for word in ("--set", f"{key}={value}"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first = json.loads((tmp_path / "run" / "validation-4.json").read_text())
    wanted = {name for name in METHODS if name != "newclass"}
    assert {row["method"] for row in first["rows"]} == wanted == {each["method"] for each in first["methods"]}
    assert {row["status"] for row in first["rows"]} == {"finished"}, [row["reason"] for row in first["rows"] if row["reason"]]
    assert next(each for each in first["methods"] if each["method"] == "copier")["disqualified"] == 2
    chosen = choose(first)
    claimed, starts = (json.loads((tmp_path / "run" / f"{part}-2.json").read_text()) for part in ("test", "starts"))
    classes = {path.name for path in sorted((tmp_path / "data" / "quickdraw" / "test").iterdir())[:2]}
    for board, methods, seeds in ((claimed, {"scratch", chosen}, 3), (starts, {"scratch", "unadapted", "finetune", chosen}, 2)):
        assert {row["domain"] for row in board["rows"]} == classes
        assert {row["method"] for row in board["rows"]} >= methods
        assert {verdict["seeds"] for verdict in board["verdicts"]} == {seeds}
    ids = {row["trial"] for row in claimed["rows"] if row["phase"] == "final"}
    assert len({row["trial"] for row in starts["rows"] if row["method"] in ("scratch", chosen)} & ids) == 8, "trials are shared"
    said = "\n".join(summary(tmp_path / "run", ["validation-4", "validation-2", "test-4", "test-2", "starts-2"]))
    assert "## test-4 steps, 2 classes, 3 to 3 seeds" in said and "against finetune: KID lower by" in said

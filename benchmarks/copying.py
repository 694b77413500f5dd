"""Does the copy rate rise where a generator is trained until it copies? Full fine-tuning on 10 images for ever more steps.

    python -m benchmarks.copying [OUT]      # runs/copying; some minutes on 2 cores, and goes on from where it was

The demo's networks, pretrained on 40,960 drawings, then batch 16, lr 1e-3, r1 = r2 = 1, seed 1, one trial for each budget.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.recipe import Recipe
from cluster.run import train_run_encoder
from cluster.sets import ready_sets
from training.checkpoint import checkpoint_hash
from training.pretrain import finished_pretraining, pretrain
from training.recipe import read_recipe
from training.source import set_place
from training.trial import Trial, run_trial
from training.world import World

STEPS = (50, 100, 200, 400, 1000, 2000)
SETTINGS = {"training.images": 40960, "training.engine.kind": "torch", "wandb.mode": "disabled", "adaptation.batch": 16,
            "adaptation.lr": 1e-3, "adaptation.r1": 1.0, "adaptation.r2": 1.0}


def main(out: Path) -> None:
    recipe = read_recipe(Recipe, "demo", SETTINGS)
    source = ready_sets(recipe)
    start = finished_pretraining(recipe, source, out / "pretrain") or pretrain(recipe, source, out, World())
    train_run_encoder(recipe, source, out)
    print(f"{'domain':8} {'steps':>5} {'KID':>6} {'coverage':>8} {'copies':>7} {'AuthPct':>7}  disqualified")
    for target in [t for t in recipe.fanout.targets if t.domain in ("sun", "mnist-3")]:
        trial = Trial(target.domain, set_place(recipe.data, target.set), "finetune", 1, "final", "pretrain", str(start),
                      checkpoint_hash(start))
        for steps in STEPS:
            images = 16 * steps
            row = run_trial(trial, read_recipe(Recipe, "demo", {**SETTINGS, "adaptation.images": images}), out, until=images)
            print(f"{row['domain']:8} {steps:5} {row['kid']:6.2f} {row['coverage']:8.2f} {100 * row['copy_rate']:5.1f} % "
                  f"{row['auth_pct']:7.0f}  {row['disqualified']}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/copying"))

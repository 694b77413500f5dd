"""Reptile (Nichol, Achiam and Schulman 2018, algorithm 1; for GANs FIGR, Clouatre and Demers 2019): the shared weights move
towards where the tasks' inner loops end.

With the outer optimizer sgd it is the paper's phi <- phi + epsilon mean_i(phi_i - phi); with adam, and sgd inside, FIGR's.
"""

from __future__ import annotations

from training.meta.rule import Inner, Metrics, Rule, Weights, adapt, trainable


def gradients(inner: Inner) -> tuple[Weights, Metrics]:
    """phi - phi~, which the outer optimizer takes for a gradient (section 3); 0 for what the inner loop leaves out."""
    weights = trainable(inner.networks)
    before = {name: {key: p.detach().clone() for key, p in named.items()} for name, named in weights.items()}
    metrics = adapt(inner)
    return {name: {key: before[name][key] - p.detach() for key, p in named.items()} for name, named in weights.items()}, metrics


RULE = Rule(gradients)

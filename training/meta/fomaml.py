"""First-order MAML (Finn, Abbeel and Levine 2017, section 5.2): the query loss's gradient at the adapted weights, applied to
the shared ones, as if they were the same. Each network has the gradient of its own loss."""

from __future__ import annotations

from training.meta.rule import Inner, Metrics, Rule, Weights, adapt, query_batch, query_gradients


def gradients(inner: Inner) -> tuple[Weights, Metrics]:
    """grad L_query(phi~), of all weights, also of those that the inner loop leaves out."""
    metrics = adapt(inner)
    found, queried = query_gradients(inner.networks, inner.phases, query_batch(inner))
    return found, metrics | queried


RULE = Rule(gradients, queries=True)

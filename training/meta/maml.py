"""MAML (Finn, Abbeel and Levine 2017, equation 1 and algorithm 1), second order and exact: the query loss after the inner loop
is differentiated with respect to the weights before it.

The networks of a family are adapted together, in the order of its phases, each step by plain gradient descent, so that phi~ of
one network depends on phi of all. The meta-gradient of a network is the whole derivative of its own query loss, through its own
inner steps and through those of the others. All inner steps are held in memory at once: for small networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from data_shards.errors import UserError
from training.families import FAMILIES, Batch, Networks, Phase, Terms
from training.loop import drawn
from training.meta.rule import Inner, Metrics, Rule, Weights, add, chosen, query_batch, trainable
from training.schedule import value_at


class _Losses(nn.Module):
    """Calls a phase's loss with networks whose weights `functional_call` has exchanged, whatever of theirs the loss calls."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, loss: Callable[[Mapping[str, nn.Module], Batch], Terms], batch: Batch) -> Terms:
        return loss({name: self.networks[name] for name in self.networks}, batch)


def meta_gradients(networks: Networks, phases: Sequence[Phase], support: Sequence[Batch], query: Batch, *,
                   lr: Mapping[str, float], adapted: Mapping[str, Sequence[str]],
                   second_order: bool = True) -> tuple[Weights, Metrics]:
    """d L_query(phi~) / d phi with phi~ the end of phi <- phi - lr grad L_support(phi), a step for each batch and phase.

    Args:
        lr: of the inner steps, by network.
        adapted: names of the parameters that they change, by network.
        second_order: False takes the inner gradients for constants, which is FOMAML.

    Returns:
        The gradients of all trainable parameters, the networks' own being untouched; and the means of the inner steps' terms.
    """
    losses = _Losses(networks)
    shared = trainable(networks)
    current: Weights = {name: dict(named) for name, named in shared.items()}

    def terms_of(phase: Phase, batch: Batch, weights: Weights) -> Terms:
        exchanged = {f"networks.{name}.{key}": value for name, named in weights.items() for key, value in named.items()}
        terms: Terms = functional_call(losses, exchanged, (phase.loss, replace(batch, through=True)))
        return terms

    sums: dict[str, list[float]] = {}
    for batch in support:
        for phase in phases:
            own, names = current[phase.network], adapted[phase.network]
            if not names:
                continue
            # Views, so that the gradient is the partial one: phi of this network may have moved the others before.
            held = {name: {key: value.view_as(value) for key, value in named.items()} for name, named in current.items()}
            terms = terms_of(phase, batch, held)
            gradients = torch.autograd.grad(terms["total"], [held[phase.network][key] for key in names],
                                            create_graph=second_order, materialize_grads=True)
            own |= {key: own[key] - lr[phase.network] * gradient for key, gradient in zip(names, gradients, strict=True)}
            for term, value in terms.items():
                sums.setdefault(f"{phase.network}/{term}", []).append(value.item())
    metrics = {name: sum(values) / len(values) for name, values in sums.items()}

    found: Weights = {name: {} for name in shared}
    for phase in phases:
        loss: Tensor = terms_of(phase, query, current)["total"]
        gradients = torch.autograd.grad(loss, list(shared[phase.network].values()), retain_graph=True, materialize_grads=True)
        add(found[phase.network], dict(zip(shared[phase.network], gradients, strict=True)))
        metrics[f"{phase.network}/query"] = metrics.get(f"{phase.network}/query", 0.0) + loss.item()
    return found, metrics


def gradients(inner: Inner) -> tuple[Weights, Metrics]:
    """`meta_gradients` of a task, in float32 whatever the precision of training."""
    plan = inner.plan
    support = [drawn(next(inner.support), inner.phases, plan, at=at) for at in range(0, plan.until, plan.batch)]
    lr = {name: value_at(rate, 0) for name, rate in plan.lr.items()}
    return meta_gradients(inner.networks, inner.phases, support, query_batch(inner), lr=lr,
                          adapted=chosen(inner.networks, inner.parts))


def refuse(family: str, networks: Networks) -> None:
    """Refuse losses that are not differentiable functions of the networks' parameters alone.

    Raises:
        UserError: naming the family or the network.
    """
    if not FAMILIES[family].differentiable:
        raise UserError(f"meta.rule = maml cannot differentiate through the inner steps of the family {family}, whose losses "
                        "stop gradients on their way; use fomaml.")
    for name, network in networks.items():
        if any(isinstance(module, nn.RNNBase) for module in network.modules()):
            raise UserError(f"meta.rule = maml cannot differentiate through the inner steps of the {name}, since torch's "
                            "recurrent layers keep their weights to themselves; use fomaml.")
        if buffer := next((key for key, _ in network.named_buffers()), ""):
            raise UserError(f"meta.rule = maml cannot differentiate through the inner steps of the {name}, whose {buffer} "
                            "changes with each pass beside the weights, as spectral norms do; use fomaml.")


RULE = Rule(gradients, queries=True, inner_optimizers=("sgd",), refuse=refuse)

"""Training that a method does by itself before the trial's own begins, on the same support set and counted in its budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from training.engines import Engine, EngineConfig, make_engine
from training.families import Batch, Networks, Phase, Terms
from training.loop import State
from training.methods.method import Adaptation
from training.objectives import PENALTIES
from training.world import World


def whole_batches(adaptation: Adaptation, share: float) -> int:
    """The images of ``share`` of the trial's budget, in whole batches, at least one."""
    config = adaptation.recipe.adaptation
    return max(round(share * config.images / config.batch), 1) * config.batch


def train_stage(networks: Mapping[str, nn.Module], adaptation: Adaptation, images: int) -> int:
    """Train what of the networks is not frozen, by the family's own phases, from image 0 on; returns the images seen.

    Raises:
        NonFinite: as `training.loop.train`.
    """
    engines = _engines(networks, adaptation)
    state = State(engines, {})
    adaptation.train(state, adaptation.phases, images)
    for engine in engines.values():
        engine.close()
    return state.images


def squared_gradients(networks: Mapping[str, nn.Module], adaptation: Adaptation, start: int,
                      images: int) -> dict[str, dict[str, Tensor]]:
    """E[(dL/dtheta)^2] of each weight that is not frozen, shaped as it, by network and name: the diagonal of the empirical
    Fisher information of the family's losses, penalties left out, over the images from ``start`` to ``images``.

    Gradients are those of one image each; of a pack or a group, where D judges several together. No weight moves.
    """
    config, training = adaptation.recipe.adaptation, adaptation.recipe.training
    together = training.objective.pack * max(training.discriminator.minibatch_std, 1)
    engines = _engines(networks, adaptation)
    sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
    hooks = []
    for network, module in networks.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                total = sums[network][name] = torch.zeros_like(parameter)

                def add(gradient: Tensor, total: Tensor = total) -> None:
                    total.add_(gradient.detach().square())

                hooks.append(parameter.register_hook(add))
    state = State(engines, {}, images=start)
    adaptation.train(state, [_unpenalised(phase) for phase in adaptation.phases], images, lr=dict.fromkeys(networks, 0.0),
                     every={}, accumulation=config.batch // together)
    for hook in hooks:
        hook.remove()
    for engine in engines.values():
        engine.close()
    count = (images - start) // together
    return {network: {name: total / count for name, total in named.items()} for network, named in sums.items()}


def _unpenalised(phase: Phase) -> Phase:
    def loss(networks: Networks, batch: Batch) -> Terms:
        weights = {name: weight for name, weight in batch.weights.items() if name not in PENALTIES}
        return phase.loss(networks, replace(batch, weights=weights))

    return replace(phase, loss=loss)


def _engines(networks: Mapping[str, nn.Module], adaptation: Adaptation) -> dict[str, Engine]:
    batch, optimizers = adaptation.recipe.adaptation.batch, adaptation.recipe.trial_optimizers()
    return {name: make_engine(name, network, optimizers[name], EngineConfig(kind="torch"), World(), batch=batch)
            for name, network in networks.items()}

"""What a generator's blocks make, for terms that compare it with the source's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from data_shards.errors import UserError
from training.families import Batch, Networks
from training.methods.method import Adaptation


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """While inside, each call of a module adds its output to the list, of several the first."""
    found: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _module, _inputs, out: found.append(out[0] if isinstance(out, tuple) else out))
             for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(generator: nn.Module) -> nn.ModuleList:
    """A generator's blocks from the latent's side; an autoencoder's are those of its decoder."""
    blocks = getattr(generator, "decoder", generator).blocks
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def check_blocks(generator: nn.Module, adaptation: Adaptation, method: str) -> None:
    """Refuse a generator without blocks.

    Raises:
        UserError: naming the family.
    """
    if not isinstance(getattr(getattr(generator, "decoder", generator), "blocks", None), nn.ModuleList):
        raise UserError(f"the method {method} compares what a generator's blocks make, which the family "
                        f"{adaptation.recipe.training.family} has none of; leave it out of fanout.methods.")


def block_outputs(generator: nn.Module, z: Tensor, labels: Tensor | None) -> list[Tensor]:
    """What each block makes of the latents z (N, latent_dim): (N, C, H, W) or (N, units), float32."""
    with outputs_of(blocks_of(generator)) as found:
        generator(z, labels)
    return [features.float() for features in found]


def target_and_source(networks: Networks, source: Networks, batch: Batch,
                      z: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """The blocks' outputs of the generator that trains and of the frozen source, for the same latents: the generator's of this
    step, or ``z``."""
    z = batch.latents["generator"] if z is None else z
    with torch.no_grad():
        theirs = block_outputs(source["generator"], z, batch.labels)
    return block_outputs(networks["generator"], z, batch.labels), theirs


def grouped(x: Tensor, group: int) -> Tensor:
    """(N, ...) -> (N / group, group, ...): entries N / group apart, which stay together in every split of a batch over ranks
    and micro-batches (`training.world.World.slice`)."""
    return x.unflatten(0, (group, -1)).transpose(0, 1)

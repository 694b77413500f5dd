"""What every family of generative models is made of: phases, run in their order in each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from training.world import World

Networks = Mapping[str, nn.Module]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step: what a phase may use."""

    images: Tensor  # float32 NCHW in [-1, 1]
    labels: Tensor  # int64 (N,), -1 where there is none
    latents: Mapping[str, Tensor]  # one independent draw per phase, (N, latent_dim)
    weights: Mapping[str, float]  # scheduled weights at this point of training
    uniforms: Mapping[str, Tensor] = field(default_factory=dict)  # "<network> <purpose>": U[0, 1), float64 (N, count), CPU
    images_b: Tensor | None = None  # as images, of the set data.translate_to
    prepared: Mapping[str, Tensor] = field(default_factory=dict)  # what a phase's ``prepare`` made, (N, ...)
    through: bool = False  # whether a loss is differentiated in all networks' weights (MAML); else in those of its own only

    def parts(self, count: int) -> Iterator[Batch]:
        """``count`` micro-batches, strided as the ranks' shares are: entry k of the batch is in part k mod ``count``, so that
        entries N / g apart, which form the groups of layers over several images, stay together."""
        for i in range(count):
            yield self if count == 1 else replace(
                self, images=self.images[i::count], labels=self.labels[i::count],
                images_b=None if self.images_b is None else self.images_b[i::count],
                latents={name: z[i::count] for name, z in self.latents.items()},
                uniforms={name: u[i::count] for name, u in self.uniforms.items()},
                prepared={name: made[i::count] for name, made in self.prepared.items()})


@dataclass(frozen=True)
class Phase:
    """One network's step: ``loss`` returns named scalars, the first of which, "total", is what goes backward. Each is a mean
    over the images given, so that the mean over parts and ranks is that of the whole batch. ``uniforms`` says how many numbers
    of U[0, 1) the loss needs for each image, by purpose.

    ``prepare`` gives the batch that the step's micro-batches are cut from. Unlike a loss it may change the networks' buffers,
    and may be a collective: what depends on the whole global batch is done there."""

    network: str
    loss: Callable[[Networks, Batch], Terms]
    uniforms: Mapping[str, int] = field(default_factory=dict)
    prepare: Callable[[Networks, Batch, World], Batch] | None = None

    def prepared(self, networks: Networks, batch: Batch, world: World) -> Batch:
        """The batch to take the step on. A collective where there is a ``prepare``."""
        return self.prepare(networks, batch, world) if self.prepare else batch

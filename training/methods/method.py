"""What a method of transfer is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from data_shards import Batch as Images
from data_shards.errors import UserError
from training.families import Batch, Networks, Phase, Terms

if TYPE_CHECKING:
    from training.loop import State
    from training.recipe import TrainingRecipe

Extra = Callable[[Networks, Batch], Tensor]
"""A term of a loss: a mean over the images given, so that the mean over micro-batches is that of the batch."""


class Train(Protocol):
    """Trains a state from its images on to ``until``, by the trial's plan with ``changes``, on the support set."""

    def __call__(self, state: State, phases: Sequence[Phase], until: int, **changes: Any) -> None: ...


def _no_training(state: State, phases: Sequence[Phase], until: int, **changes: Any) -> None:
    raise AssertionError("this adaptation has no support set to train on")


def _no_images(images: int) -> Iterator[Images]:
    raise AssertionError("this adaptation has no support set to read")


@dataclass(frozen=True)
class Adaptation:
    """The trial that a method works for."""

    recipe: TrainingRecipe  # with the trial's hyper-parameters and the method's settings
    source: Networks  # the networks as they begin, frozen; fresh ones from scratch
    support: Tensor  # uint8 (shots, C, H, W)
    seed: int
    phases: Sequence[Phase]  # the family's own
    train: Train = _no_training
    resumed: bool = False  # whether what `prepare` makes of the networks gets the weights of a trial that goes on
    rehearsed: bool = False  # whether nothing will be trained: fresh networks, to see if the method can serve them
    feed: Callable[[int], Iterator[Images]] = _no_images  # the support set's batches after so many images


@dataclass(frozen=True)
class Method:
    """A way to reach a target domain.

    Args:
        start: whose weights it begins with.
        rule: of meta-learning, by whose weights it begins where ``start`` is "meta".
        prepare: changes the networks before their engines are made: freezes weights, gives them another parameterisation
            (`torch.nn.utils.parametrize`), which a finished trial's checkpoint has no more, or puts another network in the
            place of one that only helps to train. It may add a frozen one, which a search trial's checkpoint then keeps. It
            may train, and then returns the images that it has seen (`stage.train_stage`): they are the first of the trial's
            budget.
        batches: what the steps see in the place of the support set's batches, which it is given from any position on
            (`Images.images_seen`), with the networks as they are prepared.
        reads: what it reads beside the start and the support set, as recipe sections for a trial's id.
        phases: what a step runs, made of the family's own.
        settings: recipe values, by dotted key, that the method comes with.
        derived: likewise, as they follow from the recipe.
        hyperparameters: fields of the recipe's ``adaptation`` section that a search may vary for it.
        judged: whether it is a way of transfer, and gets verdicts; the rows of the others are there to compare with.

    `prepare` and `phases` may raise UserError for a setting or a family that the method cannot serve.
    """

    start: Literal["scratch", "pretrain", "meta"]
    prepare: Callable[[dict[str, nn.Module], Adaptation], int | None] = lambda networks, adaptation: None
    batches: Callable[[Adaptation, Networks, Iterator[Images]], Iterator[Images]] = lambda adaptation, networks, feed: feed
    reads: Callable[[TrainingRecipe], Mapping[str, Any]] = lambda recipe: {}
    phases: Callable[[Adaptation], Sequence[Phase]] = lambda adaptation: adaptation.phases
    settings: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[TrainingRecipe], Mapping[str, Any]] = lambda recipe: {}
    hyperparameters: tuple[str, ...] = ("lr", "r1")
    rule: str = ""
    judged: bool = True

    @property
    def weights(self) -> str:
        """What it begins with, by name: "scratch", "pretrain" or the rule."""
        return self.rule or self.start


def with_term(phases: Sequence[Phase], network: str, name: str, weight: float, extra: Extra) -> list[Phase]:
    """The phases, that of ``network`` with ``weight`` times a further term, reported as ``name``."""

    def added(phase: Phase) -> Phase:
        def loss(networks: Networks, batch: Batch) -> Terms:
            terms = phase.loss(networks, batch)
            term = extra(networks, batch)
            return {**terms, "total": terms["total"] + weight * term, name: term.detach()}

        return replace(phase, loss=loss)

    return [added(phase) if phase.network == network and weight else phase for phase in phases]


def discriminator_of(networks: Networks, adaptation: Adaptation, does: str) -> nn.Module:
    """The discriminator, one with ``features()`` as those of `training.models` have them.

    Args:
        does: what the method does with it, the beginning of the sentence that refuses.

    Raises:
        UserError: for a family without one.
    """
    network = networks.get("discriminator")
    if network is None or not hasattr(network, "features"):
        raise UserError(f"{does} a discriminator of whole images, which the family {adaptation.recipe.training.family} has "
                        "none of; leave it out of fanout.methods.")
    return network

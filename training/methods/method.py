"""What a method of transfer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from training.families import Networks

if TYPE_CHECKING:
    from training.recipe import AdaptationConfig


@dataclass(frozen=True)
class Method:
    """A way to reach a target domain.

    ``start`` says whose weights it begins with; ``prepare`` changes the networks before their engines are made (freezing,
    say) and may raise UserError for a setting that the networks cannot meet; ``hyperparameters`` are the fields of the
    recipe's ``adaptation`` section that a search may vary for it.
    """

    start: Literal["scratch", "pretrain", "meta"]
    prepare: Callable[[Networks, AdaptationConfig], None]
    hyperparameters: tuple[str, ...] = ("lr", "r1")


def train_everything(networks: Networks, config: AdaptationConfig) -> None:
    """Leave every weight trainable."""

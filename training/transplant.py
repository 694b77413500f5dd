"""Weights into a network that is not quite the one they come from: other classes, none, or some where there were none.

Only tensors that have a row for each class may differ, and a miner may be new; everything else is strict unless the caller says
otherwise. What happened to each tensor is reported, so that no half-loaded network passes for a loaded one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_shards.errors import UserError

CLASS_TABLE = "class_embedding"
"""In the name of every tensor that has a row per class."""
MINER = "miner."
"""Beginning of the names of a miner's tensors, which starts as the identity where the source has none."""
POWER_ITERATION = ("._u", "._v")
"""Ends of the names of spectral normalisation's vectors, which for another table start anew."""


@dataclass(frozen=True)
class Transplant:
    """What became of each tensor, by name."""

    loaded: tuple[str, ...]  # taken over whole
    by_class: tuple[str, ...]  # rows of classes of the same name taken over, the others set to the mean of the source's rows
    fresh: tuple[str, ...]  # left as it was initialised: the source has none, or one of another shape
    skipped: tuple[str, ...]  # in the source only
    kept_classes: tuple[str, ...]  # classes whose rows were taken over
    new_classes: tuple[str, ...]  # classes that start at the mean of the source's

    def __str__(self) -> str:
        """One sentence; tensors are named where they were not taken over."""
        said = [f"{len(self.loaded)} tensors taken over"]
        if self.by_class:
            said.append(f"{len(self.by_class)} class tables with the rows of {', '.join(self.kept_classes) or 'no class'} "
                        f"taken over and {', '.join(self.new_classes) or 'no class'} at the mean of the source's classes")
        said += [f"{word}: {', '.join(names)}" for word, names in (("new", self.fresh), ("left out", self.skipped)) if names]
        return "; ".join(said) + "."


@torch.no_grad()
def transplant(network: nn.Module, weights: Mapping[str, Tensor], *, what: str, classes: Sequence[str] = (),
               source_classes: Sequence[str] = (), strict: bool = True) -> Transplant:
    """Load ``weights`` into ``network`` and say, tensor by tensor, what was done.

    A conditional network that takes unconditional weights keeps its class tables as they are made, at zero: it starts as what
    the source is. An unconditional one leaves the source's tables out. Between two sets of classes the rows go by the
    classes' names.

    Args:
        what: the source, for the error.
        classes: names of the network's classes in the order of their labels; none for an unconditional one.
        source_classes: likewise of the weights.
        strict: refuse any other difference; else such tensors are left out, or as they were initialised.

    Raises:
        UserError: naming the first tensor that does not fit, or a table whose rows are not as many as the names.
    """
    own = network.state_dict()
    loaded: list[str] = []
    by_class: list[str] = []
    fresh: list[str] = []
    skipped: list[str] = []
    kept = tuple(name for name in classes if name in source_classes)
    for name in sorted(own.keys() | weights.keys()):
        table = CLASS_TABLE in name
        if name in own and name in weights and table and name.endswith(POWER_ITERATION):
            fresh.append(name)
        elif name in own and name in weights and table:
            _fill_rows(own[name], weights[name], classes, source_classes, f"{what}: {name}")
            by_class.append(name)
        elif name in own and name in weights and own[name].shape == weights[name].shape:
            own[name].copy_(weights[name])
            loaded.append(name)
        elif strict and not table and not (name.startswith(MINER) and name not in weights):
            raise UserError(f"{what} does not fit this recipe's network: {name} is {_shape(weights, name)} there and "
                            f"{_shape(own, name)} here; use the recipe it was trained with.")
        else:
            (fresh if name in own else skipped).append(name)
            if name in own and name in weights:
                skipped.append(name)
    return Transplant(tuple(loaded), tuple(by_class), tuple(fresh), tuple(skipped), kept if by_class else (),
                      tuple(name for name in classes if name not in kept) if by_class else ())


def _fill_rows(own: Tensor, source: Tensor, classes: Sequence[str], source_classes: Sequence[str], what: str) -> None:
    for rows, names, side in ((own, classes, "here"), (source, source_classes, "there")):
        if len(rows) != len(names) or len(set(names)) != len(names):
            raise UserError(f"{what} has {len(rows)} rows {side}, and the classes named for them are "
                            f"{', '.join(names) or 'none'}; name each class once.")
    if own.shape[1:] != source.shape[1:]:
        raise UserError(f"{what} has rows of {tuple(source.shape[1:])} there and of {tuple(own.shape[1:])} here; use the "
                        "recipe it was trained with.")
    own.copy_(source.mean(0, keepdim=True).expand_as(own))
    for row, name in enumerate(classes):
        if name in source_classes:
            own[row].copy_(source[source_classes.index(name)])


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "not"

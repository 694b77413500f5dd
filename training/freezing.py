"""Weights that stay as they are, chosen by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from data_shards.errors import UserError


def named_weights(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """``("<network>.<parameter>", it)``; what a parametrized weight is made of has the name of that weight."""
    for network, module in networks.items():
        for name, parameter in module.named_parameters():
            plain = re.sub(r"parametrizations[.]([^.]+)[.].*", r"\1", name)
            yield f"{network}.{plain}", parameter


def freeze_matching(networks: Mapping[str, nn.Module], patterns: Sequence[str], known: Mapping[str, nn.Module]) -> None:
    """Freeze the weights of ``networks`` whose names match one of the shell patterns, such as ``generator.blocks.0.*``.

    Args:
        known: the networks before a method changed them; a pattern must match a weight of theirs.

    Raises:
        UserError: for a pattern that matches none, with the nearest names, or when a network has nothing left to train.
    """
    names = [name for name, _ in named_weights(known)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            groups = {".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)}
            near = difflib.get_close_matches(pattern, sorted({*names, *groups}), n=3, cutoff=0.5)
            raise UserError(f"adaptation.frozen = {pattern!r} matches no weight; near it are "
                            f"{', '.join(near or [f'{network}.*' for network in known])}.")
    trained = [name for name, network in networks.items() if any(p.requires_grad for p in network.parameters())]
    for name, parameter in named_weights(networks):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    for name in trained:
        if not any(p.requires_grad for p in networks[name].parameters()):
            raise UserError(f"adaptation.frozen = {list(patterns)} leaves nothing of the {name} to train; freeze less of it.")

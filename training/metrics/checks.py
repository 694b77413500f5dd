"""What every score asks of a feature matrix before it computes anything."""

import torch
from torch import Tensor

from data_shards.errors import UserError


def as_features(features: Tensor, name: str, *, at_least: int = 1) -> Tensor:
    """Return `features` as a float64 (N, d) tensor on the CPU's or the device's own memory.

    A score computed from a NaN is a NaN that spreads into a leaderboard without a word, so it is refused here.

    Args:
        features: (N, d), any floating type.
        name: what to call the set in an error, e.g. "fake".
        at_least: the smallest N that the caller's formula is defined for.

    Raises:
        UserError: not two-dimensional, fewer than `at_least` rows, no columns, or a non-finite value.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise UserError(
            f"The {name} features have shape {tuple(features.shape)}; give one row of features per image, shape (N, d)."
        )
    if features.shape[0] < at_least:
        raise UserError(
            f"The {name} set holds {features.shape[0]} images and this score needs at least {at_least}; add images."
        )
    features = features.detach().to(torch.float64)
    bad_rows = int((~torch.isfinite(features)).any(dim=1).sum())
    if bad_rows:
        raise UserError(
            f"The {name} features hold NaN or infinity in {bad_rows} of {features.shape[0]} rows; "
            "look at the generator's output for non-finite pixels before scoring it."
        )
    return features


def as_pair(a: Tensor, b: Tensor, names: tuple[str, str], *, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Check two feature matrices (N, d) and (M, d) with `as_features`, and that both have the same d.

    Raises:
        UserError: as `as_features`, or the two come from different feature nets (unlike d).
    """
    a = as_features(a, names[0], at_least=at_least)
    b = as_features(b, names[1], at_least=at_least)
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"The {names[0]} features have {a.shape[1]} columns and the {names[1]} features {b.shape[1]}; "
            "extract both with the same feature net."
        )
    return a, b.to(a.device)

"""Methods of transfer by name: a file and a line each."""

from __future__ import annotations

from training.methods import density, finetune, fomaml, freezed, maml, reptile, scratch
from training.methods.method import Adaptation, Method

__all__ = ["METHODS", "Adaptation", "Method"]

METHODS: dict[str, Method] = {
    "scratch": scratch.METHOD,
    "finetune": finetune.METHOD,
    "freezed": freezed.METHOD,
    "reptile": reptile.METHOD,
    "fomaml": fomaml.METHOD,
    "maml": maml.METHOD,
    "density": density.METHOD,
}

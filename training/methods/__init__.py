"""Methods of transfer by name: a file and a line each."""

from __future__ import annotations

from training.methods import (
    bss,
    density,
    distill,
    ewc,
    finetune,
    fomaml,
    freezed,
    freezeg,
    l2sp,
    maml,
    projected,
    reptile,
    scratch,
    structure,
)
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
    "freezeg": freezeg.METHOD,
    "l2sp": l2sp.METHOD,
    "ewc": ewc.METHOD,
    "bss": bss.METHOD,
    "distill": distill.METHOD,
    "projected": projected.METHOD,
    "structure": structure.METHOD,
}

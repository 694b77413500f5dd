"""Methods of transfer by name: a file and a line each."""

from __future__ import annotations

from training.methods import (
    adam,
    bsa,
    bss,
    cdc,
    converter,
    copier,
    density,
    distill,
    ewc,
    finetune,
    fomaml,
    freezed,
    freezeg,
    fsgan,
    l2sp,
    lora,
    maml,
    minegan,
    newclass,
    projected,
    reptile,
    rssa,
    scratch,
    structure,
    unadapted,
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
    "unadapted": unadapted.METHOD,
    "copier": copier.METHOD,
    "newclass": newclass.METHOD,
    "freezeg": freezeg.METHOD,
    "l2sp": l2sp.METHOD,
    "ewc": ewc.METHOD,
    "bss": bss.METHOD,
    "distill": distill.METHOD,
    "projected": projected.METHOD,
    "structure": structure.METHOD,
    "bsa": bsa.METHOD,
    "fsgan": fsgan.METHOD,
    "lora": lora.METHOD,
    "adam": adam.METHOD,
    "minegan": minegan.METHOD,
    "cdc": cdc.METHOD,
    "rssa": rssa.METHOD,
    "converter": converter.METHOD,
}

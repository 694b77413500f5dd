"""Pictures of a generator."""

from __future__ import annotations

import torch

from tests.training.models.make import latents, small_gan, stir
from training.pictures import generate, to_uint8


def test_classes_come_in_turn_unless_they_are_named() -> None:
    g, _ = small_gan("dcgan", classes=3)
    stir(g, scale=0.1)
    z = latents(7)
    in_turn = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    assert torch.equal(generate(g, z, batch=2), generate(g, z, in_turn))
    assert torch.equal(generate(g, z), to_uint8(g(z, in_turn)))
    assert not torch.equal(generate(g, z), generate(g, z, in_turn.flip(0).roll(1)))


def test_pictures_are_made_in_evaluation_mode_and_the_mode_is_kept() -> None:
    g, _ = small_gan("style", generator={"style": {"mixing": 1.0}})
    stir(g, scale=0.3)
    z = latents(4)
    assert torch.equal(generate(g, z), to_uint8(g.eval()(z)))
    g.train()
    assert not torch.equal(generate(g, z), to_uint8(g(z)))  # styles are mixed in training alone
    assert g.training

"""Recurrent encoder and decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.models.make import latents, parameters
from training.models.sequence import SequenceDecoder, SequenceEncoder, characters, shifted

STEPS = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))


def networks() -> tuple[SequenceEncoder, SequenceDecoder]:
    torch.manual_seed(0)
    return SequenceEncoder(4, 10, 6), SequenceDecoder(4, 5, 10, 6)


def test_shapes_and_parameters() -> None:
    encoder, decoder = networks()
    mean, log_variance = encoder(STEPS)
    assert mean.shape == log_variance.shape == (3, 6)
    assert decoder(mean, shifted(STEPS)).shape == (3, 7, 5)
    gru = 3 * 10 * (4 + 10 + 2)
    assert parameters(encoder) == 2 * gru + 21 * 12
    assert parameters(decoder) == 3 * 10 * (4 + 6 + 10 + 2) + 7 * 10 + 11 * 5


def test_the_gru_is_the_papers_recursion() -> None:
    """r, u (z in the paper), n: h' = (1 - u) n + u h (Cho et al. 2014, equations 5 to 8), step by step."""
    encoder, _ = networks()
    gru, h = encoder.forwards, torch.zeros(3, 10)
    weights = gru.state_dict()
    for t in range(7):
        x = STEPS[:, t] @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
        y = h @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]
        (xr, xu, xn), (hr, hu, hn) = x.chunk(3, 1), y.chunk(3, 1)
        r, u = torch.sigmoid(xr + hr), torch.sigmoid(xu + hu)
        h = (1 - u) * torch.tanh(xn + r * hn) + u * h
    torch.testing.assert_close(gru(STEPS)[0][:, -1], h)


def test_padding_has_no_effect() -> None:
    encoder, _ = networks()
    lengths = torch.tensor([7, 3, 5])
    padded = STEPS.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 99.0
    mean, log_variance = encoder(padded, lengths)
    for row, length in enumerate(lengths):
        alone = encoder(STEPS[row:row + 1, :length])
        torch.testing.assert_close(mean[row], alone[0][0])
        torch.testing.assert_close(log_variance[row], alone[1][0])


def test_the_decoder_sees_no_step_before_its_time() -> None:
    _, decoder = networks()
    z, before = latents(3), shifted(STEPS)
    assert not before[:, 0].any()
    assert torch.equal(before[:, 1:], STEPS[:, :-1])
    changed = before.clone()
    changed[:, 4] += 1
    difference = (decoder(z, before) - decoder(z, changed)).abs().amax((0, 2))
    assert not difference[:4].any()
    assert difference[4:].all()


def test_generation_feeds_back_what_was_chosen() -> None:
    """Free-running steps are what teacher forcing on them predicts."""
    _, decoder = networks()
    z = latents(3)

    def choose(parameters_: Tensor, t: int) -> Tensor:
        return parameters_[:, :4] + 0.1 * t

    steps = decoder.generate(z, 7, choose)
    forced = decoder(z, shifted(steps))[:, :, :4] + 0.1 * torch.arange(7)[None, :, None]
    torch.testing.assert_close(steps, forced)


def test_characters_and_weights(tmp_path: Path) -> None:
    tokens = torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(characters(tokens, 3).argmax(2), tokens)
    for network, other in zip(networks(), (SequenceEncoder(4, 10, 6), SequenceDecoder(4, 5, 10, 6)), strict=True):
        save_file(network.state_dict(), tmp_path / "w.safetensors")
        other.load_state_dict(load_file(tmp_path / "w.safetensors"))
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))

"""Recurrent encoder and decoder of sequences (Bowman et al. 2016; for strokes Ha and Eck 2018, without their mixture output):
GRUs (Cho et al. 2014) over characters or over vectors such as pen movements."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot


class SequenceEncoder(nn.Module):
    """steps (N, T, D) -> mean and log-variance of q(z | x), each (N, latent_dim), from a GRU's last states in both directions.

    Sequences of ``lengths`` (N,) below T are read up to there; what follows is padding and has no effect.
    """

    def __init__(self, inputs: int, units: int, latent_dim: int) -> None:
        super().__init__()
        self.forwards, self.backwards = nn.GRU(inputs, units, batch_first=True), nn.GRU(inputs, units, batch_first=True)
        self.moments = nn.Linear(2 * units, 2 * latent_dim)
        nn.init.normal_(self.moments.weight, std=0.1 * (2 * units) ** -0.5)
        nn.init.zeros_(self.moments.bias)

    def forward(self, steps: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count, longest = steps.shape[:2]
        if lengths is None:
            lengths = torch.full((count,), longest, device=steps.device)
        last = (lengths - 1).clamp(min=0)
        place = torch.arange(longest, device=steps.device).expand(count, -1)
        reverse = torch.where(place <= last[:, None], last[:, None] - place, place)  # turned round within each one's length
        rows = torch.arange(count, device=steps.device)
        ends = [gru(read)[0][rows, last] for gru, read in
                ((self.forwards, steps), (self.backwards, steps[rows[:, None], reverse]))]
        mean, log_variance = self.moments(torch.cat(ends, 1)).chunk(2, dim=1)
        return mean, log_variance


class SequenceDecoder(nn.Module):
    """z (N, latent_dim) and the steps before each one (N, T, D) -> parameters of each step's distribution, (N, T, outputs).

    z sets the first state and is seen at every step.
    """

    def __init__(self, inputs: int, outputs: int, units: int, latent_dim: int) -> None:
        super().__init__()
        self.inputs, self.latent_dim = inputs, latent_dim
        self.start = nn.Linear(latent_dim, units)
        self.gru = nn.GRU(inputs + latent_dim, units, batch_first=True)
        self.output = nn.Linear(units, outputs)

    def forward(self, z: Tensor, before: Tensor) -> Tensor:
        return self._run(z, before, torch.tanh(self.start(z)))[0]

    def _run(self, z: Tensor, before: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([before, z[:, None].expand(-1, before.shape[1], -1)], 2)
        states, last = self.gru(x, state[None].contiguous())
        return self.output(states), last[0]

    @torch.no_grad()
    def generate(self, z: Tensor, length: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """(N, length, D): step t is ``choose(parameters (N, outputs), t)`` (N, D), fed back; the step before the first is 0.

        All randomness is in ``choose``.
        """
        state, step = torch.tanh(self.start(z)), z.new_zeros(len(z), 1, self.inputs)
        steps = []
        for t in range(length):
            parameters, state = self._run(z, step, state)
            step = choose(parameters[:, 0], t)[:, None]
            steps.append(step)
        return torch.cat(steps, 1)


def shifted(steps: Tensor) -> Tensor:
    """The step before each one, (N, T, D): a zero step, then all but the last."""
    return torch.cat([torch.zeros_like(steps[:, :1]), steps[:, :-1]], 1)


def characters(tokens: Tensor, count: int) -> Tensor:
    """Characters (N, T) int64 as one-hot steps (N, T, count), float32."""
    return one_hot(tokens, count).float()

"""Recurrent encoder and decoder of sequences (Bowman et al. 2016; for strokes Ha and Eck 2018, without their mixture output):
GRUs (Cho et al. 2014) over characters or over vectors such as pen movements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, one_hot

from data_shards.errors import UserError
from training.models.noise import uniform

STREAM = 1  # of the numbers that are hashed from a latent


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


class Chained(nn.Linear):
    """What a step's values add to the logits of its later ones, (N, T, D) one-hot -> (N, T, D): the chain rule within a step,
    by a matrix that is masked (Germain et al. 2015) to let each block of values see those before it."""

    mask: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__(sum(levels), sum(levels), bias=False)
        block = torch.arange(len(levels)).repeat_interleave(torch.tensor(levels))
        self.register_buffer("mask", (block[:, None] > block[None]).float(), persistent=False)
        nn.init.zeros_(self.weight)

    def forward(self, steps: Tensor) -> Tensor:
        return linear(steps, self.weight * self.mask)


class SequenceGenerator(nn.Module):
    """z (N, latent_dim) -> samples (N, C, 1, T) in [-1, 1], with the encoder that trains it.

    A sample is T steps of C numbers, byte b standing as b / 127.5 - 1. The first number of a step is 0 where the sequence has
    ended, and all that follows is 0; the others have ``levels`` values each, from 0 on. A step's numbers are drawn from the
    decoder's distribution one after another, by random numbers hashed from z: so a sample is a function of z, and one of the
    model's own distribution where z is one of N(0, I).

    Args:
        levels: number of values of each of the C numbers.
        temperature: that logits are divided by before sampling; below 1 takes likelier values more often.
    """

    def __init__(self, length: int, levels: Sequence[int], units: int, latent_dim: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.length, self.levels, self.latent_dim, self.temperature = length, tuple(levels), latent_dim, temperature
        self.encoder = SequenceEncoder(sum(levels), units, latent_dim)
        self.decoder = SequenceDecoder(sum(levels), sum(levels), units, latent_dim)
        self.chained = Chained(levels)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        count = len(self.levels)
        draws = uniform(z, STREAM, self.length * count).double().view(-1, self.length, count)
        going = torch.ones(len(z), dtype=torch.bool, device=z.device)

        def choose(logits: Tensor, t: int) -> Tensor:
            nonlocal going
            step = torch.zeros_like(logits)
            for c, part in enumerate(self.parts(step)):
                chosen = self.parts(logits + self.chained(step))[c].double() / self.temperature
                below = draws[:, t, c, None] >= chosen.softmax(1).cumsum(1)
                value = below.sum(1).clamp(max=self.levels[c] - 1) * going
                if c == 0:
                    going = value > 0
                part.copy_(one_hot(value, self.levels[c]))
            return step

        steps = self.decoder.generate(z.float(), self.length, choose)
        values = torch.stack([part.argmax(2) for part in self.parts(steps)], 1)
        return (values / 127.5 - 1)[:, :, None]

    def parts(self, steps: Tensor) -> tuple[Tensor, ...]:
        """Views of the last dimension, one for each of a step's numbers."""
        return steps.split(self.levels, dim=-1)

    def values(self, samples: Tensor) -> Tensor:
        """Samples (N, C, 1, T) in [-1, 1] as int64 (N, T, C).

        Raises:
            UserError: when a number is not below its level.
        """
        values = ((samples[:, :, 0] + 1) * 127.5).round().long().mT
        if not values.is_meta and bool((values >= torch.tensor(self.levels, device=values.device)).any()):
            raise UserError(f"the set has samples whose numbers reach {values.amax((0, 1)).tolist()}, where training.sequence "
                            f"has {list(self.levels)} values from 0 on; give the alphabet or the grid that the set has.")
        return values

    def one_hot(self, values: Tensor) -> Tensor:
        """Numbers (N, T, C) as one-hot steps (N, T, sum of levels), float32."""
        return torch.cat([one_hot(value, level) for value, level in zip(values.unbind(2), self.levels, strict=True)], 2).float()

    def posterior(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), each (N, latent_dim)."""
        return self.encoder(self.one_hot(values), steps_of(values))

    def logits(self, values: Tensor, z: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits (N, T, sum of levels) of each number given z and the numbers before it.

        Args:
            kept: (N, T), 0 where the decoder is not told the step before (Bowman et al. 2016, word dropout).
        """
        steps = self.one_hot(values)
        before = shifted(steps)
        logits: Tensor = self.decoder(z, before if kept is None else before * kept[..., None])
        return logits + self.chained(steps)

    def log_likelihood(self, values: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each number that is there, in nats, (N, T, C), 0 for padding; and where one is, the same shape."""
        counted = torch.arange(values.shape[1], device=values.device) < steps_of(values)[:, None]
        there = torch.stack([counted, *[counted & (values[..., 0] > 0)] * (values.shape[2] - 1)], 2)
        each = [-cross_entropy(part.float().mT, value, reduction="none")
                for part, value in zip(self.parts(logits), values.unbind(2), strict=True)]
        return torch.stack(each, 2) * there, there


def steps_of(values: Tensor) -> Tensor:
    """Steps (N,) of sequences (N, T, C) up to their end, the end included; all T where there is none."""
    ended = (values[..., 0] == 0).long()
    return torch.where(ended.amax(1) > 0, ended.argmax(1) + 1, values.shape[1])

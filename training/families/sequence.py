"""Sequences: a recurrent variational autoencoder (Bowman et al. 2016; for strokes Ha and Eck 2018, with categorical steps)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from data_shards.errors import UserError
from training.augment import AugmentConfig
from training.config import Config
from training.drawings import draw_strokes, draw_text, to_lines
from training.families.family import Family
from training.families.phase import Batch, Networks, Phase, Terms
from training.models.layers import Shape
from training.models.noise import uniform
from training.models.sequence import SequenceGenerator
from training.objectives.variational import Posterior, gaussian_kl, sample_posterior
from training.schedule import Schedule, check_schedule

if TYPE_CHECKING:
    from training.recipe import TrainingConfig


DROPOUT_STREAM = 2  # of the numbers that are hashed from the noise


class SequenceConfig(Config):
    alphabet: str = Field("", max_length=254, description="characters of a text, which a sample's bytes 1, 2, ... stand for, "
                                                          "where 0 ends it; empty: samples are pen movements")
    grid: int = Field(64, ge=2, le=256, description="side of the grid on which a pen moves")
    kl_weight: Schedule = Field(1.0, description="weight of the divergence KL(q(z | x) || N(0, I)) in the bound; a schedule "
                                                 "warms it up")
    token_dropout: float = Field(0.0, ge=0, lt=1, description="share of steps that the decoder is not told, so that it asks z")
    temperature: float = Field(1.0, gt=0, description="of the decoder's distribution when samples are drawn; below 1 likelier "
                                                      "ones come more often")

    _schedule = field_validator("kl_weight")(check_schedule)

    @field_validator("alphabet")
    @classmethod
    def _once_each(cls, alphabet: str) -> str:
        if len(set(alphabet)) < len(alphabet) or "\n" in alphabet:
            raise ValueError("give each character once, and no line break")
        return alphabet

    @property
    def levels(self) -> tuple[int, ...]:
        """Values that each number of a step may have: of a character, or of pen (up, drawing, ended), x and y."""
        return (1 + len(self.alphabet),) if self.alphabet else (3, self.grid, self.grid)


def make_sequence(config: TrainingConfig, shape: Shape) -> dict[str, nn.Module]:
    """The autoencoder for samples of ``shape`` (C, 1, T); its GRUs have ``generator.channels`` units.

    Raises:
        UserError: for samples that are no sequences of the kind that the recipe describes.
    """
    levels = config.sequence.levels
    if shape[:2] != (len(levels), 1):
        kind = "characters" if config.sequence.alphabet else "pen movements"
        raise UserError(f"the family sequence with {kind} (training.sequence.alphabet) needs samples of shape ({len(levels)}, "
                        f"1, steps), and the set's are {tuple(shape)}; use a set such as words/source.")
    return {"generator": SequenceGenerator(shape[2], levels, config.generator.channels, config.generator.latent_dim,
                                           config.sequence.temperature)}


def bound(network: SequenceGenerator, samples: Tensor, noise: Tensor, kept: Tensor | None = None) -> Terms:
    """Of each sequence (N, C, 1, T), (N,): ``reconstruction``, -log p(x | z) in nats with z = mean + deviation * ``noise``;
    ``kl``, KL(q(z | x) || N(0, I)); how many of its numbers were the likeliest, ``right``, of how many, ``count``."""
    values = network.values(samples)
    posterior = Posterior(*(moment.float() for moment in network.posterior(values)))
    logits = network.logits(values, sample_posterior(posterior, noise), kept)
    log_likelihood, there = network.log_likelihood(values, logits)
    likeliest = torch.stack([part.argmax(2) for part in network.parts(logits)], 2)
    return {"reconstruction": -log_likelihood.sum((1, 2)),
            "kl": gaussian_kl(posterior).sum(1),
            "right": ((likeliest == values) & there).sum((1, 2)), "count": there.sum((1, 2))}


def sequence_phases(config: TrainingConfig, augmentation: AugmentConfig) -> list[Phase]:
    """One step on the bound -ELBO = reconstruction + kl, with the weight "kl" of the batch on the divergence.

    Beside the loss it reports the ELBO in nats per sequence, and ``accuracy``, the share of a sequence's numbers, each given
    z and all before it, of which the model's likeliest value is the right one.
    """
    dropout = config.sequence.token_dropout

    def loss(networks: Networks, batch: Batch) -> Terms:
        network = networks["generator"]
        assert isinstance(network, SequenceGenerator)
        noise = batch.latents["generator"]
        kept = (uniform(noise, DROPOUT_STREAM, network.length) >= dropout).float() if dropout else None
        terms = bound(network, batch.images, noise, kept)
        reconstruction, kl = terms["reconstruction"].mean(), terms["kl"].mean()
        return {"total": reconstruction + batch.weights["kl"] * kl, "reconstruction": reconstruction.detach(),
                "kl": kl.detach(), "elbo": -(reconstruction + kl).detach(),
                "accuracy": (terms["right"] / terms["count"]).mean()}

    return [Phase("generator", loss)]


SEQUENCE = Family(
    names=("generator",),
    networks=make_sequence,
    models={},
    phases=sequence_phases,
    differentiable=False,  # torch's recurrent layers keep their weights to themselves
    drawn=lambda config, samples: (draw_text(to_lines(samples, config.sequence.alphabet)) if config.sequence.alphabet
                                   else draw_strokes(samples, config.sequence.grid)),
    written=lambda config, samples: to_lines(samples, config.sequence.alphabet) if config.sequence.alphabet else [],
    shown={"ELBO": "generator/elbo", "KL": "generator/kl", "accuracy": "generator/accuracy"})

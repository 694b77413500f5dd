"""The sequence family: its distribution against sums over all sequences, its bound, its samples, and what it learns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from cluster.recipe import Recipe
from data_shards import Sample, ShardSet, UserError, load_images, open_set, pack_images
from data_shards.datasets.words import to_steps
from tests.ranks import run_ranks
from training.augment import NO_AUGMENTATION
from training.checkpoint import load_checkpoint
from training.config import apply_overrides
from training.drawings import draw_strokes, draw_text, to_lines
from training.draws import latents
from training.evaluation import of_checkpoint
from training.events import read_events
from training.families import Batch
from training.families.sequence import bound, make_sequence, sequence_phases
from training.loop import to_signed
from training.models.sequence import SequenceGenerator, steps_of
from training.pictures import generate
from training.pretrain import pretrain
from training.recipe import TrainingRecipe
from training.sample import averaged_generator, sample_grid, sample_shards
from training.world import World

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ONSETS, VOWELS, CODAS = ("b", "d", "st", "tr"), ("a", "o", "ee"), ("n", "ck", "sh")


def tiny(levels: tuple[int, ...], length: int, *, seed: int = 0, temperature: float = 1.0) -> SequenceGenerator:
    torch.manual_seed(seed)
    network = SequenceGenerator(length, levels, 8, 3, temperature)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network


def words(count: int, seed: int) -> list[str]:
    """Made of one to three syllables of 36: their letters depend on each other."""
    rng, found = np.random.default_rng(seed), set[str]()
    while len(found) < count:
        found.add("".join(rng.choice(part) for _ in range(rng.integers(1, 4)) for part in (ONSETS, VOWELS, CODAS))[:15])
    return sorted(found)


def word_set(folder: Path, *, train: int = 600, reference: int = 150) -> ShardSet:
    found = words(train + reference, 0)
    order = np.random.default_rng(1).permutation(len(found))
    return pack_images([Sample(found[k], to_steps(found[k]), split="train" if i < train else "reference")
                        for i, k in enumerate(order.tolist())], folder, name=folder.name, shape=(1, 1, 16), shard_samples=200)


def tree(root: Path, **training: Any) -> dict[str, Any]:
    return apply_overrides({
        "name": "toy", "data": {"source": "source", "root": str(root)}, "wandb": {"mode": "disabled"},
        "training": {"family": "sequence", "images": 192, "batch": 24, "engine": {"kind": "torch"}, "precision": "fp32",
                     "generator": {"channels": 16, "latent_dim": 4, "lr": 5e-3}, "sequence": {"alphabet": ALPHABET},
                     "ema_halflife_images": 100, "report_every_images": 96, "snapshot_every_images": 96}},
        {f"training.{key}": value for key, value in training.items()})


def recipe_of(root: Path, **training: Any) -> TrainingRecipe:
    return TrainingRecipe.model_validate(tree(root, **training))


def every_sequence(levels: tuple[int, ...], length: int) -> Tensor:
    """All that the model can make, (N, T, C)."""
    steps = [(0,) * len(levels), *itertools.product(range(1, levels[0]), *map(range, levels[1:]))]
    whole = [line for line in itertools.product(steps, repeat=length)
             if all(after[0] == 0 for before, after in itertools.pairwise(line) if before[0] == 0)]
    return torch.tensor(whole)


@pytest.mark.parametrize("levels", [(4,), (3, 2, 3)])
def test_the_probabilities_of_all_sequences_sum_to_one(levels: tuple[int, ...]) -> None:
    """So the end, the padding after it and the chain rule within a step are all in the likelihood."""
    network, values = tiny(levels, 3), every_sequence(levels, 3)
    network.chained.weight.data.normal_()
    z = latents(0, "test", 0, 1, 3).expand(len(values), -1)
    log_likelihood, there = network.log_likelihood(values, network.logits(values, z).detach())
    assert float(log_likelihood.double().sum((1, 2)).exp().sum()) == pytest.approx(1, abs=1e-5)
    assert not log_likelihood[~there].any()


@pytest.mark.parametrize(("levels", "temperature"), [((4,), 1.0), ((3, 2, 3), 1.0), ((4,), 0.5)])
def test_samples_come_as_often_as_the_model_says(levels: tuple[int, ...], temperature: float) -> None:
    """Over latents that differ by nothing to speak of, the hashed numbers alone decide."""
    network, values = tiny(levels, 2, temperature=temperature), every_sequence(levels, 2)
    network.chained.weight.data.normal_()
    count = 20_000
    z = latents(0, "test", 0, 1, 3) + 1e-4 * latents(1, "test", 0, count, 3)
    drawn = network.values(network(z))
    rows = (drawn[:, None] == values[None]).all(3).all(2)
    assert (rows.sum(1) == 1).all()
    logits = network.logits(values, z[:1].expand(len(values), -1)) / temperature
    expected = network.log_likelihood(values, logits)[0].sum((1, 2)).exp()
    error = (expected * (1 - expected) / count).sqrt()
    assert ((rows.float().mean(0) - expected).abs() < 4.5 * error + 1e-4).all()


def test_a_sample_is_a_function_of_its_latent_alone() -> None:
    network, z = tiny((27,), 6), latents(0, "test", 0, 9, 3)
    torch.manual_seed(1)
    first = generate(network, z)
    torch.manual_seed(2)
    assert torch.equal(first, torch.cat([generate(network, z[4:]), generate(network, z[:4])]).roll(4, 0))
    assert len({tuple(sample.flatten().tolist()) for sample in first}) > 5


def test_the_bound_is_the_sum_by_hand() -> None:
    network, noise = tiny((3, 4, 4), 5), latents(0, "test", 0, 3, 3)
    values = torch.tensor([[[1, 0, 3], [2, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
                           [[1, 2, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]],
                           [[1, 0, 0], [2, 3, 3], [2, 0, 1], [1, 1, 1], [2, 2, 2]]])
    assert steps_of(values).tolist() == [3, 2, 5]
    samples = (values.mT / 127.5 - 1)[:, :, None]
    terms = {name: term.detach() for name, term in bound(network, samples, noise).items()}
    mean, log_variance = (moment.detach() for moment in network.posterior(values))
    posterior = Normal(mean, (log_variance / 2).exp())
    torch.testing.assert_close(terms["kl"], kl_divergence(posterior, Normal(0.0, 1.0)).sum(1))
    logits = network.logits(values, mean + posterior.stddev * noise).detach()
    for row, steps in enumerate((2, 1, 5)):
        by_hand = sum(float(part[row, t].log_softmax(0)[values[row, t, c]]) for c, part in enumerate(network.parts(logits))
                      for t in range(steps))
        if steps < 5:
            by_hand += float(network.parts(logits)[0][row, steps].log_softmax(0)[0])  # the end, which has no place
        assert float(terms["reconstruction"][row]) == pytest.approx(-by_hand, rel=1e-5)
    assert terms["count"].tolist() == [7, 4, 15]


def test_the_loss_weighs_the_divergence_and_drops_what_the_decoder_is_told(tmp_path: Path) -> None:
    samples = to_signed(torch.from_numpy(np.stack([to_steps(word) for word in words(24, 0)])))
    noise = latents(0, "generator", 0, 24, 4)
    network = make_sequence(recipe_of(tmp_path).training, (1, 1, 16))
    totals = {}
    for name, dropout, weight in (("plain", 0.0, 1.0), ("light", 0.0, 0.25), ("deaf", 0.999999, 1.0)):
        config = recipe_of(tmp_path, **{"sequence.token_dropout": dropout}).training
        (phase,) = sequence_phases(config, NO_AUGMENTATION)
        terms = phase.loss(network, Batch(samples, torch.full((24,), -1), {"generator": noise}, {"kl": weight}))
        torch.testing.assert_close(terms["total"], terms["reconstruction"] + weight * terms["kl"])
        torch.testing.assert_close(terms["elbo"], -terms["reconstruction"] - terms["kl"])
        totals[name] = float(terms["reconstruction"])
    assert totals["plain"] == totals["light"] != totals["deaf"]
    # A decoder that is told nothing gives each step the same distribution, whatever came before.
    generator = network["generator"]
    assert isinstance(generator, SequenceGenerator)
    values = generator.values(samples)
    deaf = generator.logits(values, noise, torch.zeros(24, 16))
    torch.testing.assert_close(deaf, generator.logits(torch.zeros_like(values), noise, torch.zeros(24, 16)))


def test_strokes_and_text_are_drawn() -> None:
    strokes = torch.zeros(2, 3, 1, 6, dtype=torch.uint8)
    strokes[0, :, 0, :2] = torch.tensor([[1, 2], [2, 29], [16, 16]])  # one horizontal line
    strokes[1, :, 0, :4] = torch.tensor([[1, 2, 1, 2], [4, 4, 28, 28], [4, 28, 4, 28]])  # two vertical ones, not joined
    pictures = draw_strokes(strokes, 32)
    assert pictures.shape == (2, 1, 32, 32)
    assert pictures[0, 0, 16, 4:28].min() > 100 and not pictures[0, 0, :14].any() and not pictures[0, 0, 19:].any()
    assert pictures[1, 0, 6:26, 4].min() > 100 and pictures[1, 0, 6:26, 28].min() > 100 and not pictures[1, 0, :, 8:24].any()
    lines = to_lines(torch.from_numpy(np.stack([to_steps("zebra"), to_steps("")])), ALPHABET)
    assert lines == ["zebra", ""]
    pictures = draw_text(lines)
    assert pictures.shape[:2] == (2, 1) and pictures[0].any() and not pictures[1].any()


def test_pretraining_leaves_text_that_can_be_read(tmp_path: Path) -> None:
    source = word_set(tmp_path / "source")
    recipe = recipe_of(tmp_path, **{"health.every_images": 96, "health.images": 16})
    checkpoint = pretrain(recipe, source, tmp_path / "run", World())
    log = read_events(tmp_path / "run" / "pretrain" / "events.jsonl")
    named = {"generator/elbo", "generator/kl", "generator/accuracy", "health/distance_ratio"}
    assert named <= log[-1]["metrics"].keys()
    text = sample_grid(checkpoint, tmp_path / "grid.png", 9)
    lines = text.read_text().splitlines()
    assert text == tmp_path / "grid.txt" and len(lines) == 9 and set("".join(lines)) <= set(ALPHABET)
    assert Image.open(tmp_path / "grid.png").size[1] > 3 * 11
    assert Image.open(tmp_path / "run" / "pretrain" / "reals.png").size[0] > 8 * 6 * 10  # letters, not bytes
    made = sample_shards(checkpoint, str(tmp_path / "made"), 9)
    assert made.manifest.image_shape == (1, 1, 16)


def test_a_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    source = word_set(tmp_path / "source")
    pretrain(recipe_of(tmp_path, images=96), source, tmp_path / "run", World())
    halves = load_checkpoint(pretrain(recipe_of(tmp_path), source, tmp_path / "run", World()))[0]
    whole = load_checkpoint(pretrain(recipe_of(tmp_path), source, tmp_path / "other", World()))[0]
    assert all(torch.equal(value, halves[stem][name]) for stem, named in whole.items() for name, value in named.items())


def _pretrained(world: World, root: str, engine: dict[str, Any]) -> list[Tensor]:
    recipe = recipe_of(Path(root), engine=engine, images=72, **{"sequence.token_dropout": 0.3, "generator.name": "sgd"})
    checkpoint = pretrain(recipe, open_set(Path(root) / "source"), Path(root) / f"run-{engine}-{world.size}", world)
    return [value for _, value in sorted(load_checkpoint(checkpoint)[0]["generator"].items())]


@pytest.mark.parametrize("engine", [{"kind": "torch"}, {"kind": "deepspeed", "zero": 2}, {"kind": "deepspeed", "zero": 3}],
                         ids=["torch", "ZeRO 2", "ZeRO 3"])
def test_two_ranks_learn_what_one_does(tmp_path: Path, engine: dict[str, Any]) -> None:
    word_set(tmp_path / "source")
    torch.set_num_threads(1)
    one = _pretrained(World(), str(tmp_path), {"kind": "torch"})
    two, _ = run_ranks(_pretrained, 2, str(tmp_path), engine)
    norm = torch.cat([value.flatten() for value in one]).norm()
    assert torch.cat([(a - b).flatten() for a, b in zip(one, two, strict=True)]).norm() < 1e-6 * norm


def test_it_learns_far_more_than_the_letters_frequencies(tmp_path: Path) -> None:
    """On words that it has not seen: the bound on the likelihood, in nats per letter, and the share of letters that it guesses,
    against those of the letters' own frequencies."""
    source = word_set(tmp_path / "source")
    recipe = recipe_of(tmp_path, images=24_000, batch=48, **{
        "generator.channels": 48, "generator.betas": [0.9, 0.999], "report_every_images": 8000, "snapshot_every_images": 24_000,
        "sequence.kl_weight": [[0, 0.0], [12_000, 1.0]], "ema_halflife_images": 1000})
    network, _, _ = averaged_generator(pretrain(recipe, source, tmp_path / "run", World()))
    assert isinstance(network, SequenceGenerator)
    held_out = load_images(source, source.indices("reference"))[0]
    with torch.no_grad():
        terms = bound(network, to_signed(held_out), latents(0, "test", 0, len(held_out), 4))
    letters = terms["count"].sum()
    nats, right = (terms["reconstruction"] + terms["kl"]).sum() / letters, terms["right"].sum() / letters
    seen = network.values(to_signed(load_images(source, source.indices("train"))[0]))
    frequencies = seen[network.log_likelihood(seen, torch.zeros(*seen.shape[:2], 27))[1]].bincount(minlength=27).float()
    frequencies /= frequencies.sum()
    values = network.values(to_signed(held_out))
    counted = values[network.log_likelihood(values, torch.zeros(*values.shape[:2], 27))[1]]
    unigram_nats, unigram_right = -frequencies.log()[counted].mean(), (counted == frequencies.argmax()).float().mean()
    assert nats < 0.6 * unigram_nats, (float(nats), float(unigram_nats))
    assert right > 3 * unigram_right, (float(right), float(unigram_right))
    # What it makes is made of the same syllables.
    lines = to_lines(generate(network, latents(0, "test", 1, 200, 4)), ALPHABET)
    syllables = {onset + vowel + coda for onset in ONSETS for vowel in VOWELS for coda in CODAS}
    known = [word for word in lines if any(word.startswith(syllable) for syllable in syllables)]
    assert len(known) > 0.8 * len(lines), lines[:20]


def test_what_is_of_pictures_is_refused(tmp_path: Path) -> None:
    source = word_set(tmp_path / "source")
    for change in ({"fanout": {"targets": [{"set": "target"}]}}, {"evaluation": {"during_pretraining": 96}}):
        with pytest.raises(ValueError, match="the family sequence makes no pictures"):
            Recipe.model_validate({**tree(tmp_path), **change})
    checkpoint = pretrain(recipe_of(tmp_path, images=24), source, tmp_path / "run", World())
    with pytest.raises(UserError, match="no scores"):
        of_checkpoint(checkpoint, 16, 0)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sequence.alphabet": ""}, r"shape \(3, 1, steps\)"), ({"sequence.alphabet": "abc"}, "alphabet has 3"),
        ({"engine": {"kind": "torch", "checkpoint_activations": True}}, "block by block")]
    for change, said in refused:
        with pytest.raises(UserError, match=said):
            pretrain(recipe_of(tmp_path, **change), source, tmp_path / "other", World())
    with pytest.raises(ValueError, match="augmentation"):
        recipe_of(tmp_path, augmentation={"kind": "diffaugment", "p": 1.0})
    with pytest.raises(ValueError, match="each character once"):
        recipe_of(tmp_path, **{"sequence.alphabet": "aa"})

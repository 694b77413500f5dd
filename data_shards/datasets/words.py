"""English words as sequences of characters, from the npm package word-list: a sample is uint8 (1, 1, 16), a letter a step.

a is 1, z is 26, and 0 ends the word and fills up what is left.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data_shards.datasets.download import Archive
from data_shards.datasets.plan import SetPlan
from data_shards.errors import UserError
from data_shards.sources.made import Sample

ARCHIVE = Archive(
    registry="npm",
    package="word-list",
    version="4.1.0",
    filename="word-list-4.1.0.tgz",
    sha256="c0cd6e2a112392204960e9998d79347a8ae1571dab5e3fdbfa685ef5977faedb",
)
VERSION = 1
LICENCE = "MIT (word-list, Sindre Sorhus; words of the game Letterpress)"
SOURCE = "npm word-list@4.1.0"
SHARD_SAMPLES = 2000
STEPS = 16  # 15 letters at most, and an end
TRAIN, HELD_OUT = 20_000, 2_000  # of the words that are short enough, by seed 0
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SETS = 1


def sets(archive: Path) -> Iterator[SetPlan]:
    """One set: 20,000 words to train on and 2,000 others as its split "reference"."""
    with tarfile.open(archive, "r:gz") as tar:
        member = next((member for member in tar if member.name == "package/words.txt"), None)
        stream = tar.extractfile(member) if member else None
        if stream is None:
            raise UserError(f"{archive} lacks the file 'package/words.txt'; remove it and fetch it again")
        words = [word for word in stream.read().decode("ascii").split() if len(word) < STEPS and set(word) <= set(ALPHABET)]
    order = np.random.RandomState(0).permutation(len(words))[: TRAIN + HELD_OUT]
    chosen = [words[number] for number in order.tolist()]
    plan = partial(SetPlan, classes=(), licence=LICENCE, source=SOURCE, shape=(1, 1, STEPS), shard_samples=SHARD_SAMPLES)
    yield plan("words/source", partial(_samples, {"train": chosen[:TRAIN], "reference": chosen[TRAIN:]}))


def to_steps(word: str) -> np.ndarray:
    """A word of at most 15 letters a-z as uint8 (1, 1, 16)."""
    steps = np.zeros((1, 1, STEPS), np.uint8)
    steps[0, 0, : len(word)] = [1 + ALPHABET.index(letter) for letter in word]
    return steps


def _samples(splits: dict[str, list[str]]) -> Iterator[Sample]:
    for split, words in splits.items():
        for word in words:
            yield Sample(word, to_steps(word), split=split)

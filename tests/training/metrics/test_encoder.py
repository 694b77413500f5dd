"""The encoder learns a visible task, is deterministic, and survives the disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.encoder import Encoder, encoder_hash, load_encoder, save_encoder, to_unit, train_encoder


def bars(n: int, seed: int, classes: int = 4, size: int = 28) -> tuple[Tensor, Tensor]:
    """Noisy images with a bar whose direction is the label: horizontal, vertical, and the two diagonals."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    images = torch.randint(0, 60, (n, 1, size, size), generator=generator)
    at = torch.arange(size)
    for i, label in enumerate(labels.tolist()):
        place = int(torch.randint(8, size - 8, (1,), generator=generator))
        rows, columns = [(at * 0 + place, at), (at, at * 0 + place), (at, at), (at, size - 1 - at)][label]
        images[i, 0, rows, columns] = 255
    return images.to(torch.uint8), labels


def train(seed: int = 0, budget: int = 2560) -> Encoder:
    images, labels = bars(400, 0)
    return train_encoder(images, labels, classes=4, seed=seed, images_budget=budget, threads=1)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return train()


def test_learns_and_standardises(encoder: Encoder) -> None:
    images, labels = bars(200, 1)
    assert float((encoder.logits(to_unit(images)).argmax(1) == labels).double().mean()) > 0.9
    features = encoder(to_unit(bars(400, 0)[0]))
    assert features.shape == (400, 96) and features.dtype == torch.float32
    assert features.mean(0).abs().max() < 0.01
    torch.testing.assert_close(features.std(0), torch.ones(96), rtol=0.01, atol=0.01)


def test_same_seed_same_weights_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    first = train(budget=256)
    torch.manual_seed(2)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert encoder_hash(train(budget=256)) == encoder_hash(first) != encoder_hash(train(seed=1, budget=256))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_a_feature_does_not_depend_on_the_batch(encoder: Encoder) -> None:
    images = to_unit(bars(8, 3)[0])
    torch.testing.assert_close(encoder(images)[:1], encoder(images[:1]), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "encoder.safetensors"
    fingerprint = save_encoder(encoder, path)
    loaded = load_encoder(path)
    assert encoder_hash(loaded) == fingerprint == encoder_hash(encoder)
    images = to_unit(bars(4, 3)[0])
    assert torch.equal(loaded(images), encoder(images))
    first = path.read_bytes()
    save_encoder(encoder, path)
    assert path.read_bytes() == first


def test_a_damaged_file_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder, path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_encoder(path)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(path)
    with pytest.raises(UserError, match="no encoder at"):
        load_encoder(tmp_path / "absent.safetensors")


def test_progress_is_told() -> None:
    images, labels = bars(64, 0)
    seen: list[int] = []
    train_encoder(
        images, labels, classes=4, seed=0, images_budget=320, threads=1, flip=True, progress=lambda n, _: seen.append(n)
    )
    assert seen[-1] == 320 and seen == sorted(seen)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "budget", "words"),
    [
        (torch.zeros(4, 1, 28, 28), torch.zeros(4).long(), 2, 64, "uint8"),
        (torch.zeros(4, 1, 28, 30).byte(), torch.zeros(4).long(), 2, 64, "square"),
        (torch.zeros(4, 1, 8, 8).byte(), torch.zeros(4).long(), 2, 64, "16 to 128"),
        (torch.zeros(4, 1, 28, 28).byte(), torch.zeros(3).long(), 2, 64, "one int64 label"),
        (torch.zeros(4, 1, 28, 28).byte(), torch.full((4,), 2), 2, 64, "span 2..2"),
        (torch.zeros(4, 1, 28, 28).byte(), torch.zeros(4).long(), 2, 1, "below one batch"),
    ],
)
def test_errors(images: Tensor, labels: Tensor, classes: int, budget: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_encoder(images, labels, classes=classes, seed=0, images_budget=budget)

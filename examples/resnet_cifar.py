"""ResNets for 32-pixel images, with parameter-free shortcuts ("option A"): He et al. 2016, section 4.2.

The names are the usual ones of CIFAR checkpoints: `conv1, bn1, layerK.N.convM, layerK.N.bnM, linear`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: the input, or each second pixel with zeros around its channels."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.stride = stride
        self.extra = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.extra:
            before = self.extra // 2
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        y: Tensor = self.relu(out + x)
        return y


class CifarResNet(nn.Module):
    """`(images, 3, 32, 32)` to `(images, classes)` logits; 6 * blocks + 2 layers."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)
        # The shortcut puts stage k's channel j on channel j + 8 (or 16) of the next stage, so the streams'
        # widths stay.
        self.fixed_layers = ["conv1", *(name for name, _ in self.named_modules() if name.endswith(".conv2"))]

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(Block(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def resnet20(classes: int = 10) -> nn.Module:
    return CifarResNet(3, classes)


def resnet56(classes: int = 10) -> nn.Module:
    return CifarResNet(9, classes)

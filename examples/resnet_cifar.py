"""ResNets for 32-pixel images, with parameter-free shortcuts ("option A"): He et al. 2016, section 4.2.

The names are the usual ones of CIFAR checkpoints: `conv1, bn1, layerK.N.convM, layerK.N.bnM, linear`.

A shortcut between two stages puts its channels in the middle and zeros on both sides. So one channel of the
first stage is one channel of all three, and what a stage adds on its left and right belongs to it and the
stages behind. `CifarResNet.traceable` writes this down for a pruner, which may then narrow the stages too, by
as many channels on the left as on the right: the zeros can then still be told from the widths alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, relu

from objectives.task import Traceable


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

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        x = each_second_pixel(x, self.stride)
        extra = out.shape[1] - x.shape[1]
        if extra:
            nothing = x.new_zeros(len(x), extra // 2, *x.shape[2:])
            x = torch.cat((nothing, x, nothing), 1)
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

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(adaptive_avg_pool2d(x, 1).flatten(1))
        return logits

    def traceable(self, example: Tensor) -> Traceable:
        """A copy that keeps the parts of the stream apart which different stages begin.

        Args:
            example: one input.
        """
        twin = copy.deepcopy(self).eval().requires_grad_(True)
        aliases: dict[str, tuple[str, int]] = {}
        tied: list[tuple[str, ...]] = []
        parts = [self.conv1.out_channels]  # widths of the stream's parts, left to right
        for name, block in twin.named_modules():
            if not isinstance(block, Block):
                continue
            added = (block.conv2.out_channels - sum(parts)) // 2
            if added:
                parts = [added, *parts, added]
                tied.append((f"{name}.conv2.0", f"{name}.conv2.{len(parts) - 1}"))
            if len(parts) == 1:
                continue
            starts = [sum(parts[:i]) for i in range(len(parts))]
            aliases |= {
                f"{name}.{part}.{i}": (f"{name}.{part}", start)
                for part in ("conv2", "bn2")
                for i, start in enumerate(starts)
            }
            block.conv2, block.bn2 = _apart(block.conv2, block.bn2, parts)  # type: ignore[assignment]
        twin.forward = functools.partial(_forward_in_parts, twin)  # type: ignore[method-assign]
        return Traceable(twin, example, aliases, tied)


def each_second_pixel(x: Tensor, stride: int) -> Tensor:
    """`x[:, :, ::stride, ::stride]`, as a pooling that every runtime knows."""
    return avg_pool2d(x, 1, stride) if stride > 1 else x


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(Block(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def _apart(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, widths: Sequence[int]
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Convolutions and batch norms that compute `widths` channels each, one after the other."""
    convs, norms, start = nn.ModuleList(), nn.ModuleList(), 0
    for width in widths:
        rows = slice(start, start + width)
        start += width
        part = nn.Conv2d(conv.in_channels, width, 3, padding=1, bias=False)
        part_norm = nn.BatchNorm2d(width, eps=norm.eps)
        with torch.no_grad():
            part.weight.copy_(conv.weight[rows])
            for name, tensor in part_norm.state_dict().items():
                if tensor.ndim:
                    tensor.copy_(norm.state_dict()[name][rows])
        convs.append(part.to(conv.weight.dtype))
        norms.append(part_norm.to(conv.weight.dtype).eval())
    return convs, norms


def _forward_in_parts(model: CifarResNet, x: Tensor) -> Tensor:
    """The forward pass of a traceable copy: the stream is a list of tensors."""
    parts = [relu(model.bn1(model.conv1(x)))]
    for block in [*model.layer1, *model.layer2, *model.layer3]:
        inner = relu(block.bn1(block.conv1(torch.cat(parts, 1) if len(parts) > 1 else parts[0])))
        if isinstance(block.conv2, nn.ModuleList):
            new = [norm(conv(inner)) for conv, norm in zip(block.conv2, block.bn2, strict=True)]
        else:
            new = [block.bn2(block.conv2(inner))]
        added = (len(new) - len(parts)) // 2
        old = [each_second_pixel(part, block.stride) for part in parts]
        middle = [a + b for a, b in zip(new[added : len(new) - added], old, strict=True)]
        parts = [relu(part) for part in [*new[:added], *middle, *new[len(new) - added :]]]
    logits: Tensor = model.linear(adaptive_avg_pool2d(torch.cat(parts, 1), 1).flatten(1))
    return logits


def resnet20(classes: int = 10) -> nn.Module:
    return CifarResNet(3, classes)


def resnet56(classes: int = 10) -> nn.Module:
    return CifarResNet(9, classes)

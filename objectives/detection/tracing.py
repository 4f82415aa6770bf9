"""Forms of YOLO's blocks that a tracer can follow: splits, attention and box decoding replaced on a copy."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.block import C2PSA, Attention, C2f
from ultralytics.nn.modules.head import Detect

from ..task import Traceable


def traceable_copy(model: nn.Module, input_shape: tuple[int, int, int, int]) -> Traceable:
    """A copy without the three things a tracer stumbles on: split outputs, attention, and box decoding."""
    twin: Any = copy.deepcopy(model).eval()
    aliases: dict[str, tuple[str, int]] = {}
    tied: list[tuple[str, ...]] = []
    fixed: set[str] = set()
    extra: list[Tensor] = []
    for name, module in list(twin.named_modules()):
        if isinstance(module, (C2f, C2PSA)):
            halves = _split_in_halves(module.cv1)
            module.cv1 = nn.ModuleList(halves)
            module.forward = types.MethodType(
                _c2psa_halves if isinstance(module, C2PSA) else _c2f_halves, module
            )
            width = halves[0].conv.out_channels
            for i in range(2):
                for part in ("conv", "bn"):
                    aliases[f"{name}.cv1.{i}.{part}"] = (f"{name}.cv1.{part}", i * width)
            tied.append((f"{name}.cv1.0.conv", f"{name}.cv1.1.conv"))
        elif isinstance(module, Attention):
            module.forward = functools.partial(_attention_without_mixing, module, extra)
            fixed |= {f"{name}.{part}.conv" for part in ("qkv", "pe", "proj")}
        elif isinstance(module, Detect):
            heads = [
                (f"{name}.{attribute}", getattr(module, attribute))
                for attribute in ("cv2", "cv3", "one2one_cv2", "one2one_cv3")
                if getattr(module, attribute, None) is not None
            ]
            branches = [head for _, head in heads]
            module.forward = functools.partial(_raw_maps, branches)
            fixed |= {f"{path}.{i}.{len(head[i]) - 1}" for path, head in heads for i in range(module.nl)}
            fixed.add(f"{name}.dfl.conv")
    forward = twin.forward

    def traced(x: Tensor) -> list[Tensor]:
        extra.clear()
        return [*forward(x), *extra]

    twin.forward = traced
    return Traceable(twin, torch.zeros(input_shape), aliases, tied, frozenset(fixed))


def _split_in_halves(block: Any) -> tuple[Any, Any]:
    """Two convolution blocks that compute the first and the second half of `block`'s channels."""
    halves = []
    width = block.conv.out_channels // 2
    for i in range(2):
        half = copy.deepcopy(block)
        rows = slice(i * width, (i + 1) * width)
        half.conv = nn.Conv2d(
            block.conv.in_channels,
            width,
            block.conv.kernel_size,
            block.conv.stride,
            block.conv.padding,
            bias=False,
        )
        half.bn = nn.BatchNorm2d(width, eps=block.bn.eps, momentum=block.bn.momentum)
        with torch.no_grad():
            half.conv.weight.copy_(block.conv.weight[rows])
            for part in ("weight", "bias", "running_mean", "running_var"):
                getattr(half.bn, part).copy_(getattr(block.bn, part)[rows])
        halves.append(half.eval())
    return halves[0], halves[1]


def _attention_without_mixing(block: Any, extra: list[Tensor], x: Tensor) -> Tensor:
    """An attention block's convolutions without what lies between them, which no channel index survives."""
    extra.append(block.qkv(x))
    out: Tensor = block.proj(block.pe(x))
    return out


def _raw_maps(branches: list[Any], x: list[Tensor]) -> list[Tensor]:
    """A head's raw outputs, undecoded."""
    return [branch[i](x[i]) for branch in branches for i in range(len(branch))]


def _c2f_halves(self: Any, x: Tensor) -> Tensor:
    y = [self.cv1[0](x), self.cv1[1](x)]
    y.extend(m(y[-1]) for m in self.m)
    out: Tensor = self.cv2(torch.cat(y, 1))
    return out


def _c2psa_halves(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.cv2(torch.cat((self.cv1[0](x), self.m(self.cv1[1](x))), 1))
    return out

"""What a model costs by counting: parameters, multiply-accumulates, bytes of weights.

Counts depend on the architecture alone; nothing here runs on a device or knows a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def count_params(module: nn.Module) -> int:
    """Number of parameters, each shared one once; batch norm's running statistics are no parameters."""
    return sum(p.numel() for p in module.parameters())


def model_size_bytes(module: nn.Module) -> int:
    """Bytes of the state dict's tensors, parameters and buffers, each shared one once."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def count_macs(module: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of one image through the convolutions and linear layers that the module runs.

    The convention of the pruning literature, and of published ResNet figures: one multiply-accumulate is one,
    where "FLOPs" counts two; bias, batch norm, activations, pooling and matrix products inside attention
    count nothing; padding is counted like any other input. A layer that runs twice counts twice.

    Args:
        module: any module that takes one image tensor; left in the mode it was in.
        input_shape: `(batch, channels, height, width)` or `(channels, height, width)`; the batch is taken as
        1.

    Raises:
        ValueError: the shape has neither three nor four numbers.
    """
    shape = tuple(int(n) for n in input_shape)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"input_shape must be (batch, channels, height, width) or without batch, got {shape}"
        )
    shape = (1, *shape[-3:])
    macs = 0

    def of_convolution(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        # Each output value is one product with a filter; a transposed filter is spread from each input value
        # instead.
        values = inputs[0] if isinstance(layer, _Transposed) else output
        macs += values.numel() * layer.weight[0].numel()

    def of_linear(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * layer.in_features

    hooks = []
    training = {m: m.training for m in module.modules()}
    parameter = next(module.parameters(), None)
    example = torch.zeros(shape) if parameter is None else parameter.new_zeros(shape)
    try:
        for layer in module.modules():
            if isinstance(layer, _Convolution + _Transposed):
                hooks.append(layer.register_forward_hook(of_convolution))
            elif isinstance(layer, nn.Linear):
                hooks.append(layer.register_forward_hook(of_linear))
        # In training mode the pass would shift batch norm's statistics, and fail on 1x1 maps.
        module.eval()
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, mode in training.items():
            layer.training = mode
    return macs

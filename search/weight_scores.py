"""Scores that need no data: size of filters, scale of batch norms, distance to the other filters, chance.

Knows no device and no plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .groups import ChannelGroups

if TYPE_CHECKING:
    from torch import Tensor, nn

FloatArray = NDArray[np.float64]


def l1(model: nn.Module) -> dict[str, FloatArray]:
    """Sum of the absolute weights of each filter.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", ICLR, arXiv 1608.08710: the sum over a
    filter's kernels, without its bias. Published to choose inside a layer: a filter that reads more channels
    has a larger sum.

    Returns:
        Layer name to `(channels,)` float64, for every convolution and linear layer.
    """
    return {name: filters.abs().sum(1).cpu().numpy() for name, filters in _filters(model)}


def fpgm(model: nn.Module) -> dict[str, FloatArray]:
    """Sum of the Euclidean distances of each filter to all filters of its layer.

    Source: He et al. 2019, "Filter Pruning via Geometric Median", CVPR, arXiv 1811.00250, equation (4) with
    the median restricted to the layer's own filters: the filter with the smallest sum is the nearest to the
    layer's geometric median, and what it does the others do as well.

    Filters are compared over a layer of the model as it is. The halves of a split layer read the same input
    and are one layer here.

    Returns:
        Layer name to `(channels,)` float64, for every convolution and linear layer.
    """
    import torch

    return {name: torch.cdist(filters, filters).sum(1).cpu().numpy() for name, filters in _filters(model)}


def bn(model: nn.Module, batchnorms: Mapping[str, str]) -> dict[str, FloatArray]:
    """`|gamma|`: the scale of the batch norm that follows the layer.

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", ICCV,
    doi 10.1109/ICCV.2017.298.

    The criterion has nothing to say of a layer that no batch norm with a scale follows. All channels of such
    a layer get the largest score of the network, so that it is among the last to lose any.

    Args:
        batchnorms: layer name to the name of the batch norm that alone reads it, see
            `objectives.wiring.batchnorms`.

    Returns:
        Layer name to `(channels,)` float64, for every convolution and linear layer.

    Raises:
        ValueError: no batch norm with a scale follows any layer.
    """
    found = {}
    for layer, norm in batchnorms.items():
        gamma = getattr(model.get_submodule(norm), "weight", None)
        if gamma is not None:
            found[layer] = gamma.detach().double().abs().cpu().numpy()
    if not found:
        raise ValueError(
            "criterion bn reads the scales of batch norms, but no batch norm follows a layer of this model; "
            "choose another criterion, such as taylor or l1"
        )
    largest = max(float(values.max()) for values in found.values())
    return {
        name: found[name] if name in found else np.full(len(filters), largest)
        for name, filters in _filters(model)
    }


def random(model: nn.Module, groups: ChannelGroups, seed: int) -> dict[str, FloatArray]:
    """Uniform random numbers in [0, 1): what every other criterion has to beat.

    A group's score is the sum of its members', and a sum of many random numbers is hardly random. So one
    number is drawn for each channel of a *group* and shared out evenly among its members.

    Args:
        groups: which channels can only go together.
        seed: the same seed gives the same scores.

    Returns:
        Layer name to `(channels,)` float64, for every convolution and linear layer.
    """
    rng = np.random.default_rng(seed)
    scores = {name: rng.random(len(filters)) for name, filters in _filters(model)}
    for group, weight in zip(groups.groups, groups.weights, strict=True):
        drawn = rng.random(group.channels)
        for member in group.weighted:
            scores[member.layer][member.index] = drawn[:, None] / weight
    return scores


def _filters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and filters `(channels, weights of one filter)` of every convolution and linear layer, float64."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            yield name, module.weight.detach().double().flatten(1)

"""Scores by the rank of feature maps. Needs images, no labels, no gradients; knows no device and no plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .activations import ActivationMaps

if TYPE_CHECKING:
    from torch import Tensor, nn

FloatArray = NDArray[np.float64]


def hrank(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, FloatArray]:
    """The rank of a channel's map as a matrix `(height, width)`, mean over images.

    Source: Lin et al. 2020, "HRank: Filter Pruning using High-Rank Feature Map", CVPR,
    doi 10.1109/CVPR42600.2020.00160. A map is taken behind batch norm and activation, as for `taylor`. A map
    of one pixel, and an output of a linear layer, has rank 1 where it is not zero: the score is then the
    share of images on which the channel fires.

    The rank is at most the map's smaller side, so layers with small maps score low as a whole; the published
    method compares inside a layer only.

    Args:
        model: in eval mode, parameters on any device.
        batches: what `forward` takes.
        forward: runs the model on one batch; what it returns is ignored.
        on_batch: called with the number of batches done.

    Returns:
        Layer name to `(channels,)` float64, for layers that ran.

    Raises:
        ValueError: there were no batches.
    """
    import torch
    from torch import nn

    model.eval()
    names: dict[nn.Module, str] = {
        m: n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    totals: dict[str, FloatArray] = {}
    images: dict[str, int] = {}
    done = 0
    with torch.no_grad():
        for batch in batches:
            with ActivationMaps(model, names) as maps:
                forward(model, batch)
            for name, map_ in maps.items():
                totals[name] = totals.get(name, 0.0) + _ranks(map_).sum(0).double().cpu().numpy()
                images[name] = images.get(name, 0) + len(map_)
            done += 1
            on_batch(done)
    if not done:
        raise ValueError("scores need at least one calibration image, got none")
    return {name: totals[name] / images[name] for name in names.values() if name in totals}


def _ranks(map_: Tensor) -> Tensor:
    """`(images, channels)` ranks of `(images, channels, height, width)`, or `(images, ..., channels)` of a
    linear layer's outputs.
    """
    import torch

    if map_.ndim == 4 and min(map_.shape[2:]) > 1:
        # A GPU takes matrices of this size one after the other: minutes for 64 images.
        ranks: Tensor = torch.linalg.matrix_rank(map_.float().cpu())
        return ranks
    if map_.ndim == 4:
        return (map_ != 0).flatten(2).any(2)
    return (map_ != 0).reshape(len(map_), -1, map_.shape[-1]).any(1)

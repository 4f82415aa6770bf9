"""Budgets: what "remove 30%" is 30% of. Channels as the paper counts them, or predicted latency, MACs or
parameters.

Turns removed counts per group into a share; everything is a matrix product over the cached profile, no model
is touched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from profiles.latency_profile import LatencyProfile

from .groups import ChannelGroups

IntArray = NDArray[np.int64]
BUDGETS = ("channels", "latency", "macs", "params")


def share_removed(
    ratio_of: str, groups: ChannelGroups, profile: LatencyProfile
) -> Callable[[IntArray], float]:
    """A function from removed channels per group, `(groups,)`, to the share of the budget that saves.

    Args:
        ratio_of: one of `BUDGETS`. `channels` is a share of the prunable layer channels (the paper), the
            others are shares of the whole model's total.

    Raises:
        ValueError: an unknown budget.
    """
    if ratio_of == "channels":
        total = groups.prunable_channels
        weights = groups.weights
        return lambda removed: float(removed @ weights) / total
    if ratio_of not in BUDGETS:
        raise ValueError(f"ratio_of must be one of {', '.join(BUDGETS)}, got {ratio_of!r}")
    layers = [layer.layer for layer in profile.layers]
    into, out = groups.incidence(layers)
    width_in = np.array([layer.in_channels for layer in profile.layers], dtype=np.float64)
    width_out = np.array([layer.out_channels for layer in profile.layers], dtype=np.float64)
    if ratio_of == "latency":

        def cost(removed: IntArray) -> float:
            return float(
                profile.predict_many((width_in - into @ removed)[None], (width_out - out @ removed)[None])[0]
            )

    else:
        pixels = np.array(
            [float(np.prod(layer.output_hw)) if ratio_of == "macs" else 1.0 for layer in profile.layers]
        )
        factor = pixels * np.array([float(np.prod(layer.kernel)) / layer.groups for layer in profile.layers])
        # A depthwise layer's channels cancel: in x out / groups is its width, whatever the width is.
        depthwise = np.array([1 < layer.groups == layer.in_channels for layer in profile.layers])
        factor[depthwise] *= np.array([layer.groups for layer in profile.layers])[depthwise]

        def cost(removed: IntArray) -> float:
            kept_in = np.where(depthwise, 1.0, width_in - into @ removed)
            return float((factor * kept_in * (width_out - out @ removed)).sum())

    whole = cost(np.zeros(len(groups.groups), dtype=np.int64))
    return lambda removed: 1.0 - cost(removed) / whole

"""Budgets: what "remove 30%" is 30% of. Channels as the paper counts them, or predicted latency, MACs,
parameters or memory.

Turns removed counts per group into a share. Knows no scores and touches no model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .costs import QUANTITIES, WidthCost
from .groups import ChannelGroups

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BUDGETS = ("channels", *QUANTITIES)

#: Share of a budget that removing channels saves: counts `(n, groups)` to `(n,)` in [0, 1].
ShareRemoved = Callable[[IntArray], FloatArray]


def channels_removed(groups: ChannelGroups) -> ShareRemoved:
    """Share of the prunable layer channels, as the paper counts them."""
    total, weights = groups.prunable_channels, groups.weights.astype(np.float64)
    return lambda removed: np.asarray(removed @ weights / total)


def cost_removed(cost: WidthCost) -> ShareRemoved:
    """Share of the whole network's cost."""
    whole = float(cost.total(np.zeros((1, cost.out.shape[1])))[0])
    return lambda removed: 1.0 - cost.total(removed) / whole

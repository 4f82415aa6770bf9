"""Allocation: from group scores to the channels that go, until a given share of a budget is gone.

`rank` is the paper's rule: all channels of the network in one ascending order. Knows no device beyond the
function that says what share a choice removes, and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .groups import ChannelGroups

ALLOCATIONS = ("rank",)
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: Share of the budget that removing `(groups,)` channel counts saves, in [0, 1]; must not fall when a count
#: rises.
ShareRemoved = Callable[[IntArray], float]


@dataclass(frozen=True)
class Widths:
    """Which kept widths are allowed.

    Attributes:
        round_to: a group that loses channels keeps a multiple of this.
        min_channels: no group keeps fewer (nor fewer than `round_to`); a smaller group keeps all.
    """

    round_to: int = 1
    min_channels: int = 8

    def __post_init__(self) -> None:
        for name, value in (("round_to", self.round_to), ("min_channels", self.min_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def settle(self, kept: IntArray, channels: IntArray) -> IntArray:
        """Nearest allowed kept counts, `(units,)`; ties go up, towards keeping."""
        floor = np.maximum(self.round_to, -(-self.min_channels // self.round_to) * self.round_to)
        rounded = np.floor(kept / self.round_to + 0.5).astype(np.int64) * self.round_to
        rounded = np.maximum(rounded, floor)
        return np.where((rounded >= channels) | (kept >= channels), channels, rounded)


def rank(
    groups: ChannelGroups, scores: Sequence[FloatArray], ratio: float, share: ShareRemoved, widths: Widths
) -> dict[str, IntArray]:
    """Remove the lowest-scored channels of the whole network until `ratio` of the budget is gone.

    Tied groups lose their i-th lowest channels together, with the sum of both scores. Widths are settled for
    every candidate cut of the ranking, so the share that is reached is the share asked for as nearly as
    allowed widths permit, not what rounding happens to leave of it.

    Args:
        scores: one `(channels,)` array per group.
        ratio: share of the budget to remove, in [0, 1).

    Returns:
        Group name to sorted channel indices.

    Raises:
        ValueError: ratio outside [0, 1).
    """
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
    if ratio == 0.0:
        return {}
    order = [np.argsort(s, kind="stable") for s in scores]
    units = groups.units
    channels = np.array([groups.channels[unit[0]] for unit in units])
    unit_scores = [
        sum((scores[i][order[i]] for i in unit), np.zeros(channels[u])) for u, unit in enumerate(units)
    ]
    owner = np.repeat(np.arange(len(units)), channels)
    ranking = owner[np.argsort(np.concatenate(unit_scores), kind="stable")]

    def removed_by_group(cut: int) -> IntArray:
        taken = np.bincount(ranking[:cut], minlength=len(units))
        removed = channels - widths.settle(channels - taken, channels)
        counts = np.zeros(len(groups.groups), dtype=np.int64)
        for u, unit in enumerate(units):
            counts[list(unit)] = removed[u]
        return counts

    low, high = 0, len(ranking)
    while low < high:  # the smallest cut that reaches the share; the share does not fall with the cut
        middle = (low + high) // 2
        if share(removed_by_group(middle)) >= ratio:
            high = middle
        else:
            low = middle + 1
    best = removed_by_group(low)
    if low > 0:
        before = removed_by_group(low - 1)
        if ratio - share(before) < share(best) - ratio:
            best = before
    return {group.name: np.sort(order[i][: best[i]]) for i, group in enumerate(groups.groups) if best[i] > 0}

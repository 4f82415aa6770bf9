"""Allocation: how many channels each group loses until a given share of a budget is gone, and which.

Every rule decides over units, groups that must lose equal numbers. Most are an order in which units lose one
channel after the other (`rank`: the paper's global ranking; `uniform`; `complexity`: drawn at random), cut
where the share is reached; `knapsack` chooses all widths at once. Within a group the lowest scores go first.
Knows no model, and of the device only the function that says what share a choice removes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from .budget import ShareRemoved
from .groups import ChannelGroups

ALLOCATIONS = ("rank", "uniform", "knapsack", "sensitivity", "complexity")
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


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

    @property
    def floor(self) -> int:
        """The smallest kept count."""
        return max(self.round_to, -(-self.min_channels // self.round_to) * self.round_to)

    def settle(self, kept: IntArray, channels: IntArray) -> IntArray:
        """Nearest allowed kept counts, `(units,)`; ties go up, towards keeping."""
        rounded = (2 * kept + self.round_to) // (2 * self.round_to) * self.round_to
        rounded = np.maximum(rounded, self.floor)
        return np.where((rounded >= channels) | (kept >= channels), channels, rounded)

    def options(self, channels: int) -> IntArray:
        """Every allowed number of channels to remove from a unit, ascending from 0."""
        kept = np.arange(self.floor, channels, self.round_to, dtype=np.int64)
        return np.concatenate([[0], channels - kept[::-1]])


def unit_scores(groups: ChannelGroups, scores: Sequence[FloatArray]) -> list[FloatArray]:
    """Per unit what its i-th removal costs: tied groups lose their i-th lowest channels together."""
    return _by_unit(groups, [np.sort(values) for values in scores])


def _by_unit(groups: ChannelGroups, ascending: Sequence[FloatArray]) -> list[FloatArray]:
    return [reduce(np.add, [ascending[i] for i in unit]) for unit in groups.units]


@dataclass(frozen=True, eq=False)
class Demand:
    """What an allocation is asked for.

    Attributes:
        groups: G groups in U units.
        scores: one `(channels,)` array per group; the lowest go first within it.
        ratio: share of the budget to remove, in [0, 1).
        share: the budget: share that removing `(n, G)` counts saves; must not fall when a count rises.
        widths: allowed widths.

    Raises:
        ValueError: ratio outside [0, 1).
    """

    groups: ChannelGroups
    scores: Sequence[FloatArray]
    ratio: float
    share: ShareRemoved
    widths: Widths

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")

    @cached_property
    def _orders(self) -> list[IntArray]:
        """Per group its channels from the lowest score up."""
        return [values.argsort(kind="stable") for values in self.scores]

    def unit_scores(self) -> list[FloatArray]:
        """See `unit_scores`."""
        ascending = [values[order] for values, order in zip(self.scores, self._orders, strict=True)]
        return _by_unit(self.groups, ascending)

    def pick(self, counts: IntArray) -> dict[str, IntArray]:
        """Group name to sorted indices of its lowest-scored channels, for `(U,)` counts; none, no entry."""
        removed = {}
        for u, unit in enumerate(self.groups.units):
            for i in unit:
                if counts[u] > 0:
                    removed[self.groups.groups[i].name] = np.sort(self._orders[i][: counts[u]])
        return removed


def rank(demand: Demand) -> IntArray:
    """The channels with the lowest scores in the whole network, whichever group they are in; `(U,)` counts.

    The paper's rule. Widths are settled for every candidate cut of the ranking, so the share that is reached
    is the share asked for as nearly as allowed widths permit, not what rounding happens to leave of it.
    """
    scores = demand.unit_scores()
    owner = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    return cut(demand, owner[np.argsort(np.concatenate(scores), kind="stable")])


def uniform(demand: Demand) -> IntArray:
    """The same share of every group, as nearly as widths permit; `(U,)` counts."""
    channels = demand.groups.unit_channels
    owner = np.repeat(np.arange(len(channels)), channels)
    depth = np.concatenate([(np.arange(c) + 0.5) / c for c in channels])
    return cut(demand, owner[np.argsort(depth, kind="stable")])


def complexity(demand: Demand, shares: FloatArray, seed: int) -> IntArray:
    """Channels drawn one by one, each from a unit chosen with probability proportional to its share of the
    network's complexity; `(U,)` counts.

    Source: Zawish et al., complexity-driven pruning, whose PA, FA and MA are shares of parameters, MACs and
    memory. Their filters are random too: give random scores for that.

    Args:
        shares: `(U,)`, not negative; what each unit's own layers cost.
        seed: of the draw; a larger ratio continues the draw of a smaller one.
    """
    channels = demand.groups.unit_channels
    probability = np.maximum(shares, 0.0)
    probability = probability / probability.sum()
    # The order of draws without replacement, by exponential races: each unit's next channel arrives after an
    # exponential time at the unit's rate, which has the same distribution as drawing one after the other.
    rng = np.random.default_rng(seed)
    arrivals = [
        np.cumsum(rng.exponential(1.0, c)) / max(float(p), 1e-12)
        for c, p in zip(channels, probability, strict=True)
    ]
    owner = np.repeat(np.arange(len(channels)), channels)
    return cut(demand, owner[np.argsort(np.concatenate(arrivals), kind="stable")])


def cut(demand: Demand, order: IntArray) -> IntArray:
    """Follow an order of removals, unit by unit, until the share is reached; `(U,)` settled counts."""
    groups, widths = demand.groups, demand.widths
    channels = groups.unit_channels
    if demand.ratio == 0.0:
        return np.zeros(len(channels), dtype=np.int64)

    def counts_at(start: int, step: int, n: int) -> IntArray:
        """Settled counts `(n, U)` after `start` removals, `step` more, and so on."""
        part = order[start : start + step * (n - 1)]
        first = np.arange(len(part)) // step + 1  # the first row that a removal counts in
        taken = np.bincount(first * len(channels) + part, minlength=n * len(channels)).reshape(n, -1)
        taken[0] = np.bincount(order[:start], minlength=len(channels))
        return channels - widths.settle(channels - taken.cumsum(axis=0), channels)

    def reaches(counts: IntArray) -> tuple[int, FloatArray]:
        """The first row that saves the share, the last where none does, and what each saves."""
        shares = demand.share(groups.spread(counts))
        enough = shares >= demand.ratio
        return int(np.argmax(enough)) if enough.any() else len(shares) - 1, shares

    # The smallest cut that reaches the share, which does not fall with the cut: every so many of them are
    # looked at, all at once, then all between two of those.
    step = math.isqrt(len(order)) + 1
    found, _ = reaches(counts_at(0, step, -(-len(order) // step) + 1))
    counts = counts_at(max(found - 1, 0) * step, 1, step + 1)
    found, shares = reaches(counts)
    # The one before may come nearer, by how widths are rounded.
    if found > 0 and demand.ratio - shares[found - 1] < shares[found] - demand.ratio:
        found -= 1
    result: IntArray = counts[found]
    return result

"""Allocation by loss curves: what a network's loss really becomes when a group loses more and more channels.

The record of the curves, which `loss_curves` measures, and the widths of least measured loss. Knows no
network and no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .allocation import Demand, cut
from .budget import ShareRemoved, cost_removed
from .costs import WidthCost
from .hull import hull_below
from .knapsack import cheapest

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

FORMAT_VERSION = 2
#: Shares of the MACs removed at which the curves are measured again.
DEPTHS = (0.0, 0.35, 0.6, 0.8)
#: Weight of the first-order scores beside the measured curve: they decide where the curve is flat or noisy.
_FIRST_ORDER = 0.05
#: How often a choice is made again around what it came to.
_ROUNDS = 3


@dataclass(frozen=True)
class Stage:
    """Curves measured around one network.

    Attributes:
        context: `(units,)` channels that every unit has lost already.
        loss: mean loss per image of that network.
        counts, losses: per unit the channels it has lost instead, above its context, ascending, and the mean
            loss per image then, the other units as in the context.
    """

    context: tuple[int, ...]
    loss: float
    counts: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LossCurves:
    """The loss curves of one model, in the order in which one criterion removes channels.

    Attributes:
        criterion: decides which channels of a group go first.
        units: names of the units' first groups.
        stages: from the unpruned network on, deeper each time, one for each of `DEPTHS` in the end.

    Raises:
        ValueError: a stage is of another number of units, or a loss is not finite.
    """

    criterion: str
    units: tuple[str, ...]
    stages: tuple[Stage, ...]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for stage in self.stages:
            lengths = {len(stage.context), len(stage.counts), len(stage.losses)}
            if lengths != {len(self.units)}:
                raise ValueError(f"every stage must have {len(self.units)} units, got {sorted(lengths)}")
            values = [stage.loss, *(v for losses in stage.losses for v in losses)]
            if not np.isfinite(values).all():
                bad = [value for value in values if not np.isfinite(value)]
                raise ValueError(f"losses must be finite, got {bad[:3]}")

    @property
    def is_whole(self) -> bool:
        """Whether no stage is missing, as after an interruption."""
        return len(self.stages) == len(DEPTHS)

    def prices(self, unit_scores: Sequence[FloatArray], removed: float = np.inf) -> list[FloatArray]:
        """Per unit what its i-th removal raises the loss by, `(channels,)`, never falling.

        Args:
            unit_scores: first-order estimates of the same, see `Demand.unit_scores`.
            removed: channels that the network in question has lost, over all units. Curves are those measured
                around the networks nearest to it, in proportion; by default around the deepest.
        """
        depths = [float(sum(stage.context)) for stage in self.stages]
        at = float(np.interp(removed, depths, range(len(depths))))
        shallow, deep = int(at), min(int(at) + 1, len(depths) - 1)
        result = []
        for u, scores in enumerate(unit_scores):
            counts, near, far = self._neighbours(u, len(scores), shallow, deep)
            rises = (1 - (at - shallow)) * near + (at - shallow) * far
            corners = hull_below(counts.tolist(), rises.tolist())
            curve = np.interp(np.arange(len(scores) + 1), counts[corners], rises[corners])
            result.append(np.maximum.accumulate(np.diff(curve) + _FIRST_ORDER * scores))
        return result

    @cached_property
    def _known(self) -> dict[tuple[int, int, int], tuple[FloatArray, FloatArray, FloatArray]]:
        return {}

    def _neighbours(
        self, unit: int, channels: int, shallow: int, deep: int
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Where a unit's curves by two stages bend: removed counts, the first 0 and the last `channels`, and
        both rises there. In between both are straight, so that nothing made of them bends elsewhere.
        """
        key = (unit, channels, shallow)
        if key not in self._known:
            near, far = (self._curve(unit, channels, stage) for stage in (shallow, deep))
            counts = np.union1d(near[0], far[0])
            self._known[key] = counts, np.interp(counts, *near), np.interp(counts, *far)
        return self._known[key]

    def _curve(self, unit: int, channels: int, stage: int) -> tuple[FloatArray, FloatArray]:
        """Removed counts and the rise there, by the stages up to one."""
        counts, rises = self._rise(unit, stage)
        if counts[-1] < channels:  # beyond what was measured the curve goes on as it ended
            slope = (rises[-1] - rises[-2]) / (counts[-1] - counts[-2]) if len(counts) > 1 else 0.0
            rises = [*rises, rises[-1] + slope * (channels - counts[-1])]
            counts = [*counts, channels]
        return np.array(counts, dtype=float), np.array(rises)

    def _rise(self, unit: int, stage: int) -> tuple[list[int], list[float]]:
        """Points of a unit's curve: each stage's part from where its context stands to the next one's."""
        counts, rises = [0], [0.0]
        for around in self.stages[: stage + 1]:
            start = around.context[unit]
            height = float(np.interp(start, counts, rises))
            kept = [i for i, count in enumerate(counts) if count < start]
            counts, rises = [*(counts[i] for i in kept), start], [*(rises[i] for i in kept), height]
            for count, loss in zip(around.counts[unit], around.losses[unit], strict=True):
                counts.append(count)
                rises.append(max(rises[-1], height + loss - around.loss))
        return counts, rises

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LossCurves:
        """Raises ValueError for another format version."""
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}")
        stages = tuple(
            Stage(
                tuple(stage["context"]),
                stage["loss"],
                tuple(tuple(counts) for counts in stage["counts"]),
                tuple(tuple(losses) for losses in stage["losses"]),
            )
            for stage in data["stages"]
        )
        return cls(data["criterion"], tuple(data["units"]), stages)


def sensitivity(demand: Demand, curves: LossCurves, cost: WidthCost, beta: float) -> IntArray:
    """The widths of least measured loss, weighed by what they save; `(U,)` counts.

    Equation (7) with the measured rise of the loss in the place of the first-order score and, in the place of
    a layer's latency per channel, what a channel of the unit saves: at beta 0 cost does not matter, at 1 it
    is loss per cost, the best for a budget of that cost. All widths are chosen at once, among those allowed:
    an order of single channels that is rounded afterwards gives away what the rounding moves.
    """
    if demand.ratio == 0.0:
        return np.zeros(len(demand.groups.units), dtype=np.int64)
    counts = in_order(demand, curves, cost, beta)
    for _ in range(_ROUNDS):
        # The knapsack weighs loss against the budget. So scaled, it is against cost ** beta, whatever the
        # budget.
        scale = _saved_per_channel(demand, demand.share, counts)
        scale = scale / _saved_per_channel(demand, cost_removed(cost), counts) ** beta
        prices = curves.prices(demand.unit_scores(), float(counts.sum()))
        losses = [np.concatenate([[0.0], np.cumsum(p)]) * s for p, s in zip(prices, scale, strict=True)]
        before, counts = counts, cheapest(demand, losses, counts)
        if np.array_equal(counts, before):
            break  # what it was chosen around is what it came to
    return counts


def _saved_per_channel(demand: Demand, share: ShareRemoved, point: IntArray) -> FloatArray:
    """What a unit saves per channel, in the mean over its widths, the others as at `point`; `(U,)`."""
    groups = demand.groups
    most = np.array([demand.widths.options(int(c))[-1] for c in groups.unit_channels])
    none, full = (np.repeat(point[None], len(point), axis=0) for _ in range(2))
    np.fill_diagonal(none, 0)
    np.fill_diagonal(full, most)
    saved = (share(groups.spread(full)) - share(groups.spread(none))) / np.maximum(most, 1)
    result: FloatArray = np.maximum(saved, saved.max() * 1e-6)
    return result


def in_order(demand: Demand, curves: LossCurves, cost: WidthCost, beta: float) -> IntArray:
    """Channels one by one in ascending order of price over `cost ** beta`; `(U,)` settled counts.

    Savings shrink as neighbours do and prices rise as others go, so both are taken again around what was
    found.
    """
    groups, scores = demand.groups, demand.unit_scores()
    owner = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
    counts, removed = np.zeros(len(scores), dtype=np.int64), np.inf
    for _ in range(_ROUNDS):
        prices = np.concatenate(curves.prices(scores, removed))
        saved = groups.gather(cost.marginal(groups.spread(counts)))
        saved = np.maximum(saved, saved.max() * 1e-6)
        weight = (saved / saved.max()) ** beta
        counts = cut(demand, owner[np.argsort(prices / weight[owner], kind="stable")])
        removed = float(counts.sum())
    return counts

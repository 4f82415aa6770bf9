"""The knapsack allocation: all widths at once, keeping as much of the scores as the budget allows.

A multiple-choice knapsack (which width for each unit) solved exactly on a grid of the budget by dynamic
programming. What a width saves depends on its neighbours' widths, so the savings are taken around a point and
the knapsack is solved again around what it found. Knows no model and no device beyond the budget's function.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .allocation import Demand, rank

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_GRID = 4000
_ROUNDS = 6
#: Share of the budget that a solution may miss or pass the one asked for by, before another round.
_CLOSE = 0.004


def knapsack(demand: Demand) -> IntArray:
    """The widths that lose the least score among those that save the share asked for; `(U,)` counts.

    The idea of latency-saliency knapsacks (HALP, arXiv 2210.06659), over coupled channels and any budget.
    """
    losses = [np.concatenate([[0.0], np.cumsum(s)]) for s in demand.unit_scores()]
    return cheapest(demand, losses, rank(demand))


def cheapest(demand: Demand, losses: Sequence[FloatArray], start: IntArray) -> IntArray:
    """The settled counts of least total loss that save the demand's share.

    Args:
        losses: per unit `(channels + 1,)`, what removing that many channels loses; any shape, need not rise.
        start: `(U,)` settled counts to take the first savings around; best some that save about the share.

    Returns:
        `(U,)` counts. Where no choice of widths saves as much, those that save most.
    """
    if demand.ratio == 0.0:
        return np.zeros(len(losses), dtype=np.int64)
    groups = demand.groups
    options = [demand.widths.options(int(c)) for c in groups.unit_channels]
    costs = [loss[option] for loss, option in zip(losses, options, strict=True)]
    point, wanted = start, demand.ratio
    found: list[tuple[bool, float, IntArray]] = []
    for _ in range(_ROUNDS):
        savings = _savings(demand, options, point)
        reached = float(demand.share(groups.spread(point)[None])[0])
        # The savings are relative to the point: what it saves itself counts as the sum of its own options'.
        own = sum(float(s[np.searchsorted(o, c)]) for s, o, c in zip(savings, options, point, strict=True))
        chosen = choose(costs, savings, wanted - reached + own)
        counts = np.array([o[c] for o, c in zip(options, chosen, strict=True)])
        saved = float(demand.share(groups.spread(counts)[None])[0])
        loss = float(sum(c[i] for c, i in zip(costs, chosen, strict=True)))
        miss = demand.ratio - saved
        found.append((abs(miss) > _CLOSE, loss if abs(miss) <= _CLOSE else abs(miss), counts))
        if abs(miss) <= _CLOSE and np.array_equal(counts, point):
            break
        # The linear savings were too hopeful or too modest by this much; ask for as much more.
        wanted += miss / 2
        point = counts
    return min(found, key=lambda entry: entry[:2])[2]


def _savings(demand: Demand, options: Sequence[IntArray], point: IntArray) -> list[FloatArray]:
    """Per unit what each of its options saves, the other units as at `point`; 0 for the first, which keeps
    all.
    """
    rows = []
    for u, option in enumerate(options):
        block = np.repeat(point[None], len(option), axis=0)
        block[:, u] = option
        rows.append(block)
    shares = demand.share(demand.groups.spread(np.concatenate(rows)))
    ends = np.cumsum([len(option) for option in options])[:-1]
    return [part - part[0] for part in np.split(shares, ends)]


def choose(costs: Sequence[FloatArray], savings: Sequence[FloatArray], wanted: float) -> list[int]:
    """One option per unit, of least total cost among those whose savings add up to `wanted` or more.

    Args:
        costs, savings: per unit `(options,)`; savings are rounded down to 1/4000 of the sum of the largest.

    Returns:
        The option's position for each unit; where `wanted` cannot be reached, the largest savings.
    """
    most = float(sum(s.max() for s in savings))
    if wanted >= most:
        return [int(np.argmax(s)) for s in savings]
    step = most / _GRID
    # best[b]: least cost of saving at least b steps with the units so far; b = 0 is free of any demand.
    need = max(0, int(np.ceil(wanted / step)))
    best = np.full(need + 1, np.inf)
    best[0] = 0.0
    rows = []
    for cost, saving in zip(costs, savings, strict=True):
        gain = np.maximum(np.floor(saving / step).astype(np.int64), 0)
        rows.append((cost, gain, best))
        # With option o the units before must have saved at least b - gain[o], and nothing where that is less.
        after = np.full(need + 1, np.inf)
        for price, steps in zip(cost, np.minimum(gain, need + 1), strict=True):
            np.minimum(after[:steps], best[0] + price, out=after[:steps])
            np.minimum(after[steps:], best[: need + 1 - steps] + price, out=after[steps:])
        best = after
    if not np.isfinite(best[need]):  # lost to rounding down
        return [int(np.argmax(s)) for s in savings]
    chosen, at = [], need
    for cost, gain, before in reversed(rows):
        option = int(np.argmin(before[np.maximum(at - gain, 0)] + cost))  # only where the way back passes
        chosen.append(option)
        at = max(at - int(gain[option]), 0)
    return chosen[::-1]

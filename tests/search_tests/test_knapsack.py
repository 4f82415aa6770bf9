"""The knapsack allocation, against plain enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from search.allocation import Demand, Widths, rank
from search.budget import ShareRemoved, channels_removed
from search.groups import ChannelGroup, ChannelGroups, Member
from search.knapsack import cheapest, choose, knapsack


def chain(channels: tuple[int, ...]) -> ChannelGroups:
    """Layers one after the other, a group each."""
    groups = tuple(
        ChannelGroup(f"layer{i}", n, (Member(f"layer{i}", "out", np.arange(n).reshape(-1, 1), True),))
        for i, n in enumerate(channels)
    )
    return ChannelGroups(groups, (), {g.name: (3, g.channels) for g in groups})


def pair_share(channels: tuple[int, ...]) -> ShareRemoved:
    """A chain costs the products of neighbouring widths: no sum of what each group saves."""
    whole = np.array(channels, dtype=float)

    def share(removed: np.ndarray) -> np.ndarray:
        kept = whole - removed
        return 1 - (kept[:, 1:] * kept[:, :-1]).sum(axis=1) / (whole[1:] * whole[:-1]).sum()

    return share


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 5, 5)
    costs = [np.concatenate([[0.0], np.sort(rng.random(n))]) for n in sizes]
    savings = [np.concatenate([[0.0], np.sort(rng.random(n))]) for n in sizes]
    most = sum(s.max() for s in savings)
    wanted = float(rng.uniform(0.1, 0.9)) * most
    chosen = choose(costs, savings, wanted)
    saved = sum(s[c] for s, c in zip(savings, chosen, strict=True))
    assert saved >= wanted
    cost = sum(c[i] for c, i in zip(costs, chosen, strict=True))
    best = min(
        sum(c[i] for c, i in zip(costs, picks, strict=True))
        for picks in itertools.product(*(range(len(c)) for c in costs))
        # What rounding down to the grid may cost.
        if sum(s[i] for s, i in zip(savings, picks, strict=True)) >= wanted + len(costs) * most / 4000
    )
    assert cost <= best + 1e-12


def test_what_cannot_be_saved_gives_the_most_there_is() -> None:
    costs = [np.array([0.0, 1.0, 5.0]), np.array([0.0, 2.0])]
    assert choose(costs, [np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0])], 10.0) == [2, 1]


def test_nothing_wanted_costs_nothing() -> None:
    costs = [np.array([0.0, 1.0]), np.array([0.0, 2.0])]
    assert choose(costs, [np.array([0.0, 1.0]), np.array([0.0, 1.0])], 0.0) == [0, 0]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("round_to", [1, 8])
def test_it_reaches_the_share_and_loses_no_more_than_the_ranking(ratio: float, round_to: int) -> None:
    channels = (32, 64, 48, 128, 64)
    groups = chain(channels)
    rng = np.random.default_rng(5)
    scores = [10 ** rng.uniform(-1, 1) * rng.random(n) for n in channels]
    demand = Demand(groups, scores, ratio, pair_share(channels), Widths(round_to, 8))
    counts = knapsack(demand)
    reached = float(demand.share(counts[None])[0])
    assert reached == pytest.approx(ratio, abs=0.01 if round_to == 1 else 0.05)
    kept = np.array(channels) - counts
    assert (kept[counts > 0] % round_to == 0).all()
    assert (kept >= 8).all()

    def lost(found: np.ndarray) -> float:
        return sum(float(np.sort(s)[:c].sum()) for s, c in zip(scores, found, strict=True))

    # The ranking ignores what channels cost; at the share that the knapsack reached it must lose as much or
    # more.
    ranked = rank(Demand(groups, scores, reached, demand.share, demand.widths))
    if float(demand.share(ranked[None])[0]) >= reached - 0.002:
        assert lost(counts) <= lost(ranked) * 1.01


def test_it_prefers_what_is_dear_for_its_budget() -> None:
    groups = chain((64, 64))
    scores = [np.ones(64), np.ones(64)]
    weights = np.array([5.0, 1.0])
    share: ShareRemoved = lambda removed: removed @ weights / (weights.sum() * 64)  # noqa: E731  a function of one use
    counts = knapsack(Demand(groups, scores, 0.4, share, Widths(1, 8)))
    assert counts[0] > 28
    assert counts[1] == 0


def test_losses_need_not_rise() -> None:
    """A measured curve may dip; the dip is taken."""
    groups = chain((16, 16))
    losses = [np.concatenate([[0.0], np.full(16, 1.0)]), np.concatenate([[0.0], np.full(16, 1.0)])]
    losses[0][4] = -0.5
    demand = Demand(groups, [np.zeros(16)] * 2, 0.125, channels_removed(groups), Widths(1, 1))
    assert cheapest(demand, losses, np.array([2, 2])).tolist() == [4, 0]


def test_nothing_asked_is_nothing_done() -> None:
    groups = chain((16, 16))
    demand = Demand(groups, [np.ones(16)] * 2, 0.0, channels_removed(groups), Widths(8, 8))
    assert knapsack(demand).tolist() == [0, 0]

"""From scores to the channels that go: shares, rounding, floors, ties."""

from __future__ import annotations

import numpy as np
import pytest

from search import allocation
from search.allocation import Demand, Widths, complexity, uniform
from search.budget import ShareRemoved, channels_removed
from search.groups import ChannelGroup, ChannelGroups, Member
from search.plan import PruningPlan

CHANNELS = (64, 32, 128, 48, 96, 16, 80, 80, 24)
TIED = (6, 7)


def make_groups(channels: tuple[int, ...] = CHANNELS, tied: tuple[int, ...] = TIED) -> ChannelGroups:
    """One layer a group; the second group is a stream of three layers."""
    groups = []
    for i, n in enumerate(channels):
        layers = [f"layer{i}", f"layer{i}b", f"layer{i}c"] if i == 1 else [f"layer{i}"]
        index = np.arange(n).reshape(-1, 1)
        groups.append(
            ChannelGroup(f"layer{i}", n, tuple(Member(name, "out", index, True) for name in layers))
        )
    widths = {m.layer: (3, g.channels) for g in groups for m in g.members}
    return ChannelGroups(tuple(groups), (tuple(f"layer{i}" for i in tied),) if tied else (), widths)


share_of_channels = channels_removed


def reached_by(share: ShareRemoved, gone: np.ndarray) -> float:
    return float(share(gone[None])[0])


def rank(
    groups: ChannelGroups, scores: list[np.ndarray], ratio: float, share: ShareRemoved, widths: Widths
) -> dict[str, np.ndarray]:
    demand = Demand(groups, scores, ratio, share, widths)
    return demand.pick(allocation.rank(demand))


def random_scores(groups: ChannelGroups, seed: int) -> list[np.ndarray]:
    """Layers at quite different levels, as Taylor's are."""
    rng = np.random.default_rng(seed)
    return [10 ** rng.uniform(-2, 2) * rng.random(g.channels) for g in groups.groups]


def counts(groups: ChannelGroups, removed: dict[str, np.ndarray]) -> np.ndarray:
    return np.array([len(removed.get(g.name, ())) for g in groups.groups])


@pytest.mark.parametrize("round_to", [1, 8, 16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.7])
def test_a_choice_keeps_every_rule(round_to: int, seed: int, ratio: float) -> None:
    groups = make_groups()
    share = share_of_channels(groups)
    removed = rank(groups, random_scores(groups, seed), ratio, share, Widths(round_to, 8))
    gone = counts(groups, removed)
    kept = groups.channels - gone
    assert (kept >= np.minimum(groups.channels, max(8, round_to))).all()
    assert (kept[gone > 0] % round_to == 0).all()
    assert gone[TIED[0]] == gone[TIED[1]]
    for name, indices in removed.items():
        assert len(indices) > 0
        assert (np.diff(indices) > 0).all(), f"{name}: sorted, no repetition"
    PruningPlan.of("key", groups, removed)  # the plan's own rules
    # One step of rounding in one place is the finest there is: a tied pair or the stream of three.
    step = max(1, round_to) * max(2, int(groups.weights.max()), len(TIED)) / groups.prunable_channels
    assert abs(reached_by(share, gone) - ratio) <= step, f"{reached_by(share, gone):.3f} of {ratio}"


@pytest.mark.parametrize("round_to", [1, 8])
def test_the_share_reached_is_the_nearest_that_the_ranking_offers(round_to: int) -> None:
    """Against plain enumeration of all cuts."""
    groups = make_groups((24, 40, 16), tied=())
    share, widths = share_of_channels(groups), Widths(round_to, 8)
    scores = random_scores(groups, 7)
    owner = np.repeat(np.arange(3), groups.channels)[np.argsort(np.concatenate(scores), kind="stable")]
    reachable = []
    for cut in range(len(owner) + 1):
        kept = widths.settle(groups.channels - np.bincount(owner[:cut], minlength=3), groups.channels)
        reachable.append(reached_by(share, groups.channels - kept))
    for ratio in np.linspace(0.02, 0.8, 40):
        reached = reached_by(share, counts(groups, rank(groups, scores, float(ratio), share, widths)))
        assert abs(reached - ratio) == pytest.approx(min(abs(r - ratio) for r in reachable))


def test_without_rounding_the_lowest_scores_of_the_whole_network_go() -> None:
    groups = make_groups((20, 30), tied=())
    rng = np.random.default_rng(3)
    scores = [rng.random(20), 1.5 * rng.random(30)]
    removed = rank(groups, scores, 0.4, lambda gone: gone.sum(axis=1) / 50, Widths(1, 1))
    threshold = np.sort(np.concatenate(scores))[20]
    for group, values in zip(groups.groups, scores, strict=True):
        assert removed.get(group.name, np.array([])).tolist() == np.flatnonzero(values < threshold).tolist()


def test_tied_groups_lose_their_own_lowest_channels() -> None:
    groups = make_groups((10, 10, 10), tied=(0, 1))
    scores = [np.arange(10.0), np.arange(10.0)[::-1].copy(), np.full(10, 100.0)]
    removed = rank(groups, scores, 0.2, share_of_channels(groups), Widths(1, 1))
    assert {name: indices.tolist() for name, indices in removed.items()} == {
        "layer0": [0, 1, 2],
        "layer1": [7, 8, 9],
    }


@pytest.mark.parametrize("round_to", [1, 4, 16])
def test_a_larger_ratio_never_gives_a_channel_back(round_to: int) -> None:
    groups = make_groups()
    scores, share = random_scores(groups, 5), share_of_channels(groups)
    before: dict[str, set[int]] = {}
    reached = 0.0
    for ratio in np.linspace(0.0, 0.9, 31):
        removed = rank(groups, scores, float(ratio), share, Widths(round_to, 4))
        now = {name: set(indices.tolist()) for name, indices in removed.items()}
        assert all(channels <= now.get(name, set()) for name, channels in before.items())
        assert reached_by(share, counts(groups, removed)) >= reached
        before, reached = now, reached_by(share, counts(groups, removed))
    assert reached > 0.6


def test_ratio_zero_removes_nothing_and_too_much_stops_at_the_floor() -> None:
    groups = make_groups()
    scores, share = random_scores(groups, 0), share_of_channels(groups)
    assert rank(groups, scores, 0.0, share, Widths()) == {}
    gone = counts(groups, rank(groups, scores, 0.999, share, Widths(1, 16)))
    assert (groups.channels - gone == np.minimum(groups.channels, 16)).all()


@pytest.mark.parametrize("round_to", [1, 8])
def test_uniform_takes_the_same_share_of_every_group(round_to: int) -> None:
    groups = make_groups()
    demand = Demand(groups, random_scores(groups, 1), 0.5, share_of_channels(groups), Widths(round_to, 1))
    gone = groups.spread(uniform(demand))
    assert reached_by(demand.share, gone) == pytest.approx(0.5, abs=0.05)
    # Half a step of rounding and the cut itself.
    assert (np.abs(gone - 0.5 * groups.channels) <= round_to / 2 + 1).all()


def test_complexity_draws_where_the_complexity_is() -> None:
    groups = make_groups((200, 200, 200), tied=())
    scores = [np.zeros(200)] * 3
    demand = Demand(groups, scores, 0.2, share_of_channels(groups), Widths(1, 1))
    draws = np.array([complexity(demand, np.array([6.0, 3.0, 1.0]), seed) for seed in range(200)])
    # The stream of three layers counts three times as much of the budget, but is drawn by its own share.
    np.testing.assert_allclose(draws.mean(axis=0) / draws.mean(axis=0).sum(), [0.6, 0.3, 0.1], atol=0.02)
    assert len({tuple(draw) for draw in draws}) > 100
    np.testing.assert_array_equal(draws[3], complexity(demand, np.array([6.0, 3.0, 1.0]), 3))


def test_a_unit_without_complexity_is_drawn_last() -> None:
    groups = make_groups((20, 20), tied=())
    demand = Demand(groups, [np.zeros(20)] * 2, 0.5, share_of_channels(groups), Widths(1, 4))
    gone = complexity(demand, np.array([1.0, 0.0]), 0)
    assert gone[0] == 16


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    groups = make_groups()
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got"):
        rank(groups, random_scores(groups, 0), ratio, share_of_channels(groups), Widths())


def test_equal_scores_are_decided_the_same_way_every_time() -> None:
    groups = make_groups()
    scores = [np.ones(g.channels) for g in groups.groups]
    first, second = (rank(groups, scores, 0.3, share_of_channels(groups), Widths(8, 8)) for _ in range(2))
    assert {n: i.tolist() for n, i in first.items()} == {n: i.tolist() for n, i in second.items()}


@pytest.mark.parametrize(
    ("round_to", "min_channels", "kept", "channels", "want"),
    [
        (8, 8, 20, 64, 24),  # halfway goes up
        (8, 8, 19, 64, 16),
        (8, 1, 3, 64, 8),  # never below one step
        (8, 20, 17, 64, 24),  # the floor is rounded up
        (8, 8, 63, 64, 64),
        (8, 8, 62, 66, 64),
        (16, 8, 9, 12, 12),  # a group below the floor keeps all
        (1, 8, 5, 64, 8),
        (4, 2, 21, 22, 20),
        (4, 2, 22, 22, 22),  # nothing asked, nothing done: 22 is no multiple, and stays
    ],
)
def test_settling_widths(round_to: int, min_channels: int, kept: int, channels: int, want: int) -> None:
    assert Widths(round_to, min_channels).settle(np.array([kept]), np.array([channels])).tolist() == [want]


@pytest.mark.parametrize("key", ["round_to", "min_channels"])
def test_widths_are_checked(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be at least 1, got 0"):
        Widths(**{key: 0})

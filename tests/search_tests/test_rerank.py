"""Equations (6) and (7): the properties that the ranking stands on."""

from __future__ import annotations

import numpy as np
import pytest

from search.groups import ChannelGroup, ChannelGroups, Member
from search.rerank import group_scores, hardware_scores, normalise, weighed_by_group

SEEDS = range(20)


def random_case(seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Scores over many orders of magnitude, and latencies per channel."""
    rng = np.random.default_rng(seed)
    layers = [f"layer{i}" for i in range(rng.integers(2, 8))]
    scores = {name: 10 ** rng.uniform(-9, 3, rng.integers(1, 40)) for name in layers}
    return scores, {name: float(10 ** rng.uniform(-6, 1)) for name in layers}


def one_layer_each(channels: dict[str, int]) -> ChannelGroups:
    groups = tuple(
        ChannelGroup(name, n, (Member(name, "out", np.arange(n).reshape(-1, 1), True),))
        for name, n in channels.items()
    )
    return ChannelGroups(groups, (), {name: (1, n) for name, n in channels.items()})


# ---- equation (6) --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_normalised_latencies_are_shares_of_the_largest(seed: int) -> None:
    _, delta = random_case(seed)
    norm = normalise(delta)
    assert max(norm.values()) == 1.0
    assert all(0 < value <= 1 for value in norm.values())
    largest = max(delta.values())
    for layer in delta:
        assert norm[layer] == delta[layer] / largest
    scaled = normalise({layer: value * 7.5 for layer, value in delta.items()})
    assert scaled == pytest.approx(norm, rel=1e-12)  # a slower machine of the same kind ranks alike


def test_a_layer_that_takes_no_time_counts_as_the_cheapest_one() -> None:
    assert normalise({"a": 0.0, "b": 0.2, "c": 0.8}) == {"a": 0.25, "b": 0.25, "c": 1.0}


@pytest.mark.parametrize("delta", [{}, {"a": 0.0}])
def test_latencies_of_nothing_are_refused(delta: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least one layer needs a positive latency"):
        normalise(delta)


# ---- equation (7) --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_beta_zero_is_taylor_to_the_last_bit(seed: int) -> None:
    scores, delta = random_case(seed)
    weighed = hardware_scores(scores, normalise(delta), 0.0)
    assert list(weighed) == list(scores)
    for layer in scores:
        assert weighed[layer].tobytes() == scores[layer].tobytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_formula(seed: int) -> None:
    scores, delta = random_case(seed)
    norm = normalise(delta)
    beta = float(np.random.default_rng(seed).uniform(0.01, 1))
    weighed = hardware_scores(scores, norm, beta)
    for layer, values in scores.items():
        np.testing.assert_allclose(weighed[layer], [v / norm[layer] ** beta for v in values], rtol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_of_equal_channels_the_slower_layers_goes_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = 10 ** rng.uniform(-6, 3, 12)
    slow, fast = sorted(rng.uniform(1e-4, 5, 2), reverse=True)
    for beta in (0.05, 0.5, 1.0):
        weighed = hardware_scores(
            {"slow": values, "fast": values}, normalise({"slow": slow, "fast": fast}), beta
        )
        assert (weighed["slow"] < weighed["fast"]).all()
        assert weighed["slow"].tobytes() == values.tobytes()  # the slowest layer's scores are Taylor's own


@pytest.mark.parametrize("seed", SEEDS)
def test_the_factor_grows_with_beta_and_with_speed(seed: int) -> None:
    scores, delta = random_case(seed)
    norm = normalise(delta)
    betas = np.linspace(0, 1, 11)
    factors = {
        layer: np.array([hardware_scores(scores, norm, b)[layer][0] / scores[layer][0] for b in betas])
        for layer in scores
    }
    for layer, factor in factors.items():
        steps = np.diff(factor)
        if norm[layer] < 1:
            assert (steps > 0).all()
        else:
            assert (factor == 1).all()
    fastest_first = sorted(scores, key=lambda layer: norm[layer])
    at_one = [factors[layer][-1] for layer in fastest_first]
    assert at_one == sorted(at_one, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_inside_a_layer_does_not_change(seed: int) -> None:
    scores, delta = random_case(seed)
    weighed = hardware_scores(scores, normalise(delta), 0.7)
    for layer in scores:
        assert (np.argsort(weighed[layer], kind="stable") == np.argsort(scores[layer], kind="stable")).all()


def test_a_layer_without_a_latency_keeps_its_scores() -> None:
    weighed = hardware_scores({"training_only": np.array([1.0, 2.0])}, {"other": 0.5}, 1.0)
    assert weighed["training_only"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("beta", [-0.01, 1.01, float("nan")])
def test_beta_outside_its_range_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got"):
        hardware_scores({"a": np.ones(1)}, {"a": 1.0}, beta)


# ---- groups --------------------------------------------------------------------------------------


def test_a_groups_score_is_the_sum_of_its_members_through_their_index_maps() -> None:
    members = (
        Member("a", "out", np.array([[2], [0], [1]]), True),
        Member("a_bn", "out", np.array([[2], [0], [1]]), False),
        Member("b", "out", np.array([[0, 3], [1, 4], [2, 5]]), True),
        Member("reader", "in", np.array([[0], [1], [2]]), False),
    )
    groups = ChannelGroups((ChannelGroup("g", 3, members),), (), {})
    scores = {
        "a": np.array([1.0, 2.0, 4.0]),
        "b": np.array([10.0, 20.0, 30.0, 100.0, 200.0, 300.0]),
        "reader": np.full(3, 1e9),
        "a_bn": np.full(3, 1e9),
    }
    (found,) = group_scores(scores, groups)
    assert found.tolist() == [4 + 110, 1 + 220, 2 + 330]
    del scores["b"]
    assert group_scores(scores, groups)[0].tolist() == [4, 1, 2]
    del scores["a"]
    with pytest.raises(ValueError, match=r"group g has no scored layer.*\['a', 'b'\]"):
        group_scores(scores, groups)


def test_independent_layers_rank_as_their_channels_do() -> None:
    scores, delta = random_case(1)
    groups = one_layer_each({name: len(v) for name, v in scores.items()})
    for beta in (0.0, 0.4):
        weighed = hardware_scores(scores, normalise(delta), beta)
        for found, layer in zip(group_scores(weighed, groups), scores, strict=True):
            assert found.tobytes() == weighed[layer].tobytes()


# ---- equation (7) with what a channel of the group saves ------------------------------------------------


def test_beta_zero_returns_group_scores_unchanged_whatever_they_save() -> None:
    scores = [np.array([1.0, 2.0]), np.array([3.0])]
    same = weighed_by_group(scores, np.array([1e-9, 5.0]), 0.0)
    assert all(a is b for a, b in zip(same, scores, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_of_equal_groups_the_one_that_saves_more_goes_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    saved = 10 ** rng.uniform(-4, 1, 6)
    weighed = weighed_by_group([np.ones(3)] * 6, saved, float(rng.uniform(0.05, 1)))
    assert (np.argsort([w[0] for w in weighed]) == np.argsort(-saved)).all()
    assert weighed[int(np.argmax(saved))] == pytest.approx(np.ones(3))


def test_a_group_that_saves_nothing_keeps_a_finite_score() -> None:
    weighed = weighed_by_group([np.ones(1), np.ones(1)], np.array([0.0, 2.0]), 1.0)
    assert np.isfinite(weighed[0]).all()
    with pytest.raises(ValueError, match="beta must be in"):
        weighed_by_group([np.ones(1)], np.array([1.0]), 1.5)

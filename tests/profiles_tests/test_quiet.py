"""Ratios from samples of machines made by hand, whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from profiles.quiet import (
    FLOOR,
    LEAST_SKEW_ERROR,
    MIN_ROUNDS,
    UNKNOWN_SKEW,
    QuietRatio,
    disturbance,
    quiet_ms,
    quiet_ratio,
    quiet_shares,
    turns_log,
)

Floats = NDArray[np.float64]
Round = tuple[Floats, Floats]
TRUTH = math.log(1.03)


def sampled(rng: np.random.Generator, slowness: Floats, suffers: float = 1.0) -> Round:
    """A round: processes of their own, models in turns of 5 runs, and `slowness` of each of the samples."""
    own = np.exp(rng.normal(0, 0.006, 2)) * (math.exp(TRUTH), 1.0)
    index = np.arange(len(slowness)) // 5 % 2
    samples = own[index] * rng.lognormal(0, 0.01, len(slowness))
    samples *= slowness * np.where(index == 0, 1 + (slowness - 1) * (suffers - 1), 1)
    return samples[index == 0].reshape(-1, 5), samples[index == 1].reshape(-1, 5)


def drifting(rng: np.random.Generator) -> Round:
    """The clock drifts, and one sample of 25 takes thrice as long."""
    slowness = 1 + np.abs(np.cumsum(rng.normal(0, 0.004, 100)))
    return sampled(rng, slowness * np.where(rng.random(100) < 0.04, 3.0, 1.0))


def shared(rng: np.random.Generator) -> Round:
    """A neighbour comes and goes, and while it is there the candidate suffers more than the baseline."""
    busy = np.logical_xor.accumulate(rng.random(100) < 0.04) ^ (rng.random() < 0.5)
    return sampled(rng, np.where(busy, 1.4, 1.0), suffers=1.2)


def decided(make: Callable[[np.random.Generator], Round], rng: np.random.Generator) -> QuietRatio:
    """Rounds until the ratio is known within 1%, 15 at most, as `compare` does."""
    rounds: list[Round] = []
    while True:
        rounds.append(make(rng))
        found = quiet_ratio(rounds)
        if len(rounds) >= MIN_ROUNDS and (found.half_width <= 0.01 or len(rounds) == 15):
            return found


@pytest.mark.parametrize("make", [drifting, shared])
def test_the_interval_covers_the_truth(make: Callable[[np.random.Generator], Round]) -> None:
    rng = np.random.default_rng(0)
    found = [decided(make, rng) for _ in range(150)]
    wrong = sum(abs(one.log - TRUTH) > one.half_width for one in found)
    assert wrong <= 0.06 * len(found)
    # And it is no excuse: 3% are seen.
    assert np.median([one.half_width for one in found]) < 0.02


def test_rounds_without_a_quiet_moment_do_not_count() -> None:
    rng = np.random.default_rng(0)
    quiet = [sampled(rng, np.ones(100)) for _ in range(5)]
    busy = [sampled(rng, np.full(100, 1.5), suffers=1.2) for _ in range(5)]
    found = quiet_ratio([*busy, *quiet])
    assert (found.quiet_rounds, found.counted) == (5, 5)
    assert found.log == pytest.approx(TRUTH, abs=0.01)


def neighbour(rng: np.random.Generator, truth: float, suffers: float) -> Round:
    """A neighbour that seldom pauses; the candidate suffers `suffers` times as much from it."""
    slowness = np.repeat(np.where(rng.random(10) < 0.9, rng.uniform(1.3, 1.5, 10), 1.0), 10)
    candidate, baseline = sampled(rng, slowness, suffers)
    return candidate * math.exp(truth - TRUTH), baseline


def test_models_alike_are_told_by_their_turns() -> None:
    """Both meet the neighbour alike, so no quiet moment is needed."""
    rng = np.random.default_rng(0)
    found = [quiet_ratio([neighbour(rng, 0.0, 1.0) for _ in range(8)]) for _ in range(40)]
    assert np.median([one.quiet_rounds for one in found]) < MIN_ROUNDS
    assert np.median([one.half_width for one in found]) < 0.025
    assert sum(abs(one.log) > one.half_width for one in found) <= 2


def test_models_unlike_are_not_known_better_than_a_neighbour_allows() -> None:
    """Beside it the smaller one takes 0.315 instead of 0.3: more turns say that more and more firmly."""
    rng = np.random.default_rng(0)
    found = [quiet_ratio([neighbour(rng, math.log(0.3), 1.18) for _ in range(40)]) for _ in range(10)]
    assert all(abs(one.log - math.log(0.3)) <= one.half_width for one in found)


def test_a_skew_is_learnt_from_models_beside_a_baseline_and_tells_a_further_one() -> None:
    """Models suffer the more the smaller they are."""
    rng = np.random.default_rng(0)

    def beside(log: float, busy: float) -> Round:
        slowness = np.repeat(np.where(rng.random(10) < busy, rng.uniform(1.3, 1.5, 10), 1.0), 10)
        both = slowness.reshape(10, 2, 5) ** np.array([[1 - 0.3 * log], [1.0]])
        candidate, baseline = sampled(rng, both.ravel())
        return candidate * math.exp(log - TRUTH), baseline

    logs = [-0.2, -0.4, -0.7, -0.9, -1.2, -1.5, -1.0, -0.5]
    found = quiet_shares([[beside(log, 0.75) for log in logs] for _ in range(4)])
    assert found.skew.slope == pytest.approx(0.3, abs=0.1)
    assert found.skew.error < UNKNOWN_SKEW.error / 2
    truth = math.log(0.4)
    rounds = [[beside(truth, 0.85) for _ in range(6)] for _ in range(30)]
    known, unknown = ([quiet_ratio(some, skew) for some in rounds] for skew in (found.skew, UNKNOWN_SKEW))
    assert np.mean([one.half_width for one in known]) < np.mean([one.half_width for one in unknown])
    assert sum(abs(one.log - truth) > one.half_width for one in known) <= 2


def test_what_says_nothing_of_a_skew_leaves_it() -> None:
    turns, quiet = np.array([-0.5, -0.7, -0.9, -1.1]), np.array([-0.6, -0.8, -1.0, -1.2])
    assert UNKNOWN_SKEW.updated(turns, quiet, np.zeros(4)) == UNKNOWN_SKEW  # nothing disturbs
    assert UNKNOWN_SKEW.updated(np.zeros(4), quiet, np.full(4, 0.3)) == UNKNOWN_SKEW  # copies of the baseline
    assert UNKNOWN_SKEW.updated(turns[:3], quiet[:3], np.full(3, 0.3)) == UNKNOWN_SKEW  # too few
    exact = UNKNOWN_SKEW.updated(turns, turns * (1 + 0.5 * 0.3), np.full(4, 0.3))
    assert (exact.slope, exact.error) == (pytest.approx(0.5), LEAST_SKEW_ERROR)


def test_quiet_moments_that_contradict_the_turns_win() -> None:
    """Alike in latency, the candidate suffers far more, which their ratio does not give away."""
    rng = np.random.default_rng(0)
    rounds = [neighbour(rng, 0.0, 1.3) for _ in range(60)]
    found = quiet_ratio(rounds)
    assert np.mean([turns_log(*one) for one in rounds]) > 0.07
    assert found.log == pytest.approx(0, abs=0.03)


def test_turns_may_differ_in_runs_and_rounds_in_turns() -> None:
    shapes = [((4, 5), (4, 3)), ((6, 7), (6, 3)), ((4, 5), (4, 3)), ((10, 4), (10, 3))]
    rounds = [(np.full(own, 2.0), np.full(beside, 4.0)) for own, beside in shapes]
    assert quiet_ratio(rounds).log == pytest.approx(math.log(0.5))
    assert disturbance([own for own, _ in rounds]) == 0


def test_too_few_quiet_rounds_are_still_heard() -> None:
    """The fastest samples of all rounds are those of the quiet ones; how little that is shows."""
    rng = np.random.default_rng(0)
    truth = math.log(0.2)
    busy, quiet = np.full(100, 1.5), np.ones(100)
    rounds = [sampled(rng, quiet if i in (1, 2) else busy, suffers=1.2) for i in range(6)]
    found = quiet_ratio([(candidate * math.exp(truth - TRUTH), baseline) for candidate, baseline in rounds])
    assert found.quiet_rounds == 2
    assert abs(found.log - truth) <= found.half_width
    assert found.half_width > 0.02
    assert quiet_ratio(rounds) == quiet_ratio(rounds)


def test_an_interval_is_never_narrower_than_processes_are_alike() -> None:
    same = (np.ones((10, 5)), np.ones((10, 5)))
    # Four rounds that agree to the last digit do so by chance: 0.4% of scatter, Student's t of three.
    assert quiet_ratio([same] * 4).half_width == pytest.approx(4.541 * 0.004 / 2, rel=1e-3)
    assert quiet_ratio([same] * 15) == QuietRatio(0.0, FLOOR, 15, 15)
    assert quiet_ratio([same]).half_width == math.inf


def test_an_undisturbed_latency_is_among_the_fastest() -> None:
    assert quiet_ms([1.0] * 20 + [1.5] * 80) == 1.0

"""Ratios from samples of machines made by hand, whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from profiles.quiet import FLOOR, MIN_ROUNDS, QuietRatio, quiet_ms, quiet_ratio

Floats = NDArray[np.float64]
Round = tuple[Floats, Floats]
TRUTH = math.log(1.03)


def sampled(rng: np.random.Generator, slowness: Floats, suffers: float = 1.0) -> Round:
    """A round: processes of their own, models in turns, and `slowness` of each of the samples."""
    own = np.exp(rng.normal(0, 0.006, 2)) * (math.exp(TRUTH), 1.0)
    index = np.arange(len(slowness)) // 5 % 2
    samples = own[index] * rng.lognormal(0, 0.01, len(slowness))
    samples *= slowness * np.where(index == 0, 1 + (slowness - 1) * (suffers - 1), 1)
    return samples[index == 0], samples[index == 1]


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
    assert found.log == pytest.approx(quiet_ratio(quiet).log)
    assert found.log == pytest.approx(TRUTH, abs=0.01)


def test_too_few_quiet_rounds_are_still_heard() -> None:
    """The fastest samples of all rounds are those of the quiet ones; how little that is shows."""
    rng = np.random.default_rng(0)
    rounds = [sampled(rng, np.full(100, 1.5), suffers=1.2) for _ in range(6)]
    rounds[1:3] = [sampled(rng, np.ones(100)) for _ in range(2)]
    found = quiet_ratio(rounds)
    assert (found.quiet_rounds, found.counted) == (2, 6)
    assert found.log == pytest.approx(TRUTH, abs=0.015)
    assert found.half_width > 0.02
    assert quiet_ratio(rounds) == found


def test_an_interval_is_never_narrower_than_processes_are_alike() -> None:
    same = (np.ones(50), np.ones(50))
    # Four rounds that agree to the last digit do so by chance: 0.4% of scatter, Student's t of three.
    assert quiet_ratio([same] * 4).half_width == pytest.approx(4.541 * 0.004 / 2, rel=1e-3)
    assert quiet_ratio([same] * 15) == QuietRatio(0.0, FLOOR, 15, 15)
    assert quiet_ratio([same]).half_width == math.inf


def test_an_undisturbed_latency_is_among_the_fastest() -> None:
    assert quiet_ms([1.0] * 20 + [1.5] * 80) == 1.0

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from profiles.timing import Comparison, Timing


@pytest.mark.parametrize("samples", [(), (1.0, math.nan), (1.0, math.inf), (-1.0,)])
def test_invalid_samples(samples: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="sample"):
        Timing(samples, 0)


def test_statistics_of_known_samples() -> None:
    timing = Timing(tuple(float(n) for n in range(1, 102)), 5)
    assert timing.mean_ms == timing.p50_ms == 51
    assert timing.p90_ms == 91
    low, high = timing.ci_ms
    assert 35 < low < 51 < high < 67
    assert Timing(timing.samples_ms, 5).ci_ms == timing.ci_ms
    assert not timing.is_stable
    assert Timing((2.0,) * 50, 5).is_stable


def test_median_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = Timing(tuple(rng.lognormal(0, 0.2, 80)), 0).ci_ms
        covered += low <= 1 <= high
    assert covered >= 85


def comparison(low: float, high: float) -> Comparison:
    timing = Timing((1.0, 2.0), 3)
    return Comparison(timing, timing, (low + high) / 2, (low, high), 4, 4, True)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.9, 0.99, "faster"), (1.01, 1.2, "slower"), (0.99, 1.01, "cannot tell"), (0.98, 1.0, "cannot tell")],
)
def test_verdict(low: float, high: float, verdict: str) -> None:
    assert comparison(low, high).verdict == verdict


def test_comparison_json_round_trip_and_version() -> None:
    made = comparison(0.9, 1.1)
    data = json.loads(json.dumps(made.to_json()))
    assert Comparison.from_json(data) == made
    with pytest.raises(ValueError, match="format_version"):
        Comparison.from_json({**data, "format_version": 99})
    with pytest.raises(ValueError, match="inside its interval"):
        Comparison(made.candidate, made.baseline, 2.0, (0.9, 1.1), 4, 4, True)

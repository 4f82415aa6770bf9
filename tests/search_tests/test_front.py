"""The Pareto front: ties, foreign points, area, knee and choice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from search.front import NoSuchPointError, ParetoFront
from search.range_end import range_end
from search.result import TrialParams, TrialResult
from search.sections import Choices, Range, SearchSection


def result(trial: int, accuracy: float, latency_ms: float, **changes: Any) -> TrialResult:
    base = TrialResult(
        trial=trial,
        device="here",
        fingerprint="print",
        asked=TrialParams(beta=0.1, ratio=0.2 if trial else 0.0),
        state="complete",
        accuracy=accuracy,
        latency_ms=latency_ms,
        latency_p90_ms=latency_ms * 1.1,
        speedup=10.0 / latency_ms,
        speedup_ci=(9.0 / latency_ms, 11.0 / latency_ms),
    )
    return replace(base, **changes)


BASE = result(0, 0.8, 10.0)


def trials(front: ParetoFront) -> list[int]:
    return [p.trial for p in front.points]


def test_the_front_is_what_nothing_beats() -> None:
    front = ParetoFront.of(
        [result(3, 0.5, 5.0), result(1, 0.7, 8.0), BASE, result(2, 0.6, 8.5), result(4, 0.4, 6.0)]
    )
    assert trials(front) == [3, 1, 0]
    assert front.baseline is BASE


@pytest.mark.parametrize("seed", range(10))
def test_against_the_definition(seed: int) -> None:
    """Few distinct values, so that ties of every kind occur."""
    rng = np.random.default_rng(seed)
    results = [BASE] + [
        result(i, float(rng.integers(1, 8)) / 10, float(rng.integers(2, 13))) for i in range(1, 25)
    ]

    def beaten(p: TrialResult, q: TrialResult) -> bool:
        assert p.accuracy is not None and p.latency_ms is not None  # noqa: PT018
        assert q.accuracy is not None and q.latency_ms is not None  # noqa: PT018
        if (q.accuracy, q.latency_ms) == (p.accuracy, p.latency_ms):
            return q.trial < p.trial
        return q.accuracy >= p.accuracy and q.latency_ms <= p.latency_ms

    want = {p.trial for p in results if not any(beaten(p, q) for q in results)}
    front = ParetoFront.of([results[i] for i in rng.permutation(len(results))])
    assert set(trials(front)) == want
    latencies = [p.latency_ms for p in front.points]
    assert latencies == sorted(latencies)
    assert [p.accuracy for p in front.points] == sorted(p.accuracy for p in front.points)


def test_ties() -> None:
    front = ParetoFront.of(
        [BASE, result(5, 0.5, 5.0), result(2, 0.5, 5.0), result(7, 0.5, 5.5), result(8, 0.4, 5.0)]
    )
    assert trials(front) == [2, 0]  # equal in both: the lower number; equal in one: the better in the other


def test_failed_and_stopped_trials_are_left_out() -> None:
    bad = [replace(BASE, trial=i, state=state, reason="why") for i, state in ((1, "failed"), (2, "stopped"))]
    assert trials(ParetoFront.of([BASE, *bad])) == [0]


def test_a_front_needs_the_unpruned_model() -> None:
    for results in (
        [],
        [result(1, 0.5, 5.0)],
        [replace(BASE, state="failed", reason="why"), result(1, 0.5, 5.0)],
    ):
        with pytest.raises(ValueError, match="needs the unpruned model, trial 0"):
            ParetoFront.of(results)


@pytest.mark.parametrize("key", ["device", "fingerprint"])
@pytest.mark.parametrize("latency_ms", [5.0, 20.0])
def test_a_point_of_another_machine_is_refused_even_where_it_lost(key: str, latency_ms: float) -> None:
    with pytest.raises(
        ValueError, match=r"trial 3 was measured on .*numbers of different machines do not compare"
    ):
        ParetoFront.of([BASE, result(3, 0.1, latency_ms, **{key: "other"})])


@pytest.mark.parametrize("key", ["accuracy", "latency_ms"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(key: str, value: float) -> None:
    bad = result(1, 0.5, 5.0)
    object.__setattr__(bad, key, value)  # the record itself would not allow it
    with pytest.raises(ValueError, match=f"trial 1: {key} must be finite, got {value}"):
        ParetoFront.of([BASE, bad])


def test_the_area_by_hand() -> None:
    front = ParetoFront.of([BASE, result(1, 0.6, 5.0), result(2, 0.2, 2.0)])
    # Relative: (1, 1), (0.5, 0.75), (0.2, 0.25); reference (1, 0).
    assert front.hypervolume == pytest.approx(0.5 * 0.75 + 0.3 * 0.25)
    assert ParetoFront.of([BASE]).hypervolume == 0.0
    # Slower than unpruned covers nothing, more accurate than unpruned counts above 1.
    assert ParetoFront.of([BASE, result(1, 0.9, 12.0)]).hypervolume == 0.0
    assert ParetoFront.of([BASE, result(1, 0.88, 7.5)]).hypervolume == pytest.approx(0.25 * 1.1)
    assert ParetoFront.of([replace(BASE, accuracy=0.0), result(1, 0.0, 5.0)]).hypervolume == 0.0


def test_a_further_trial_never_shrinks_the_area() -> None:
    rng = np.random.default_rng(0)
    results, before = [BASE], 0.0
    for i in range(1, 40):
        results.append(result(i, float(rng.uniform(0, 0.9)), float(rng.uniform(1, 12))))
        area = ParetoFront.of(results).hypervolume
        assert area >= before - 1e-12
        before = area


def test_the_knee() -> None:
    points = [BASE, result(1, 0.2, 2.0), result(2, 0.7, 4.0), result(3, 0.75, 7.0)]
    assert ParetoFront.of(points).knee.trial == 2
    assert ParetoFront.of(points[:2]).knee.trial == 0  # two points: the most accurate
    assert ParetoFront.of([BASE]).knee.trial == 0


def test_choosing() -> None:
    front = ParetoFront.of([BASE, result(1, 0.2, 2.0), result(2, 0.7, 4.0), result(3, 0.75, 7.0)])
    assert front.choose() is front.knee
    assert front.choose(trial=3).trial == 3
    assert front.choose(max_latency_ms=7.0).trial == 3  # the limit is within
    assert front.choose(max_latency_ms=6.99).trial == 2
    assert front.choose(min_accuracy=0.7).trial == 2  # the fastest that reaches it
    assert front.choose(max_latency_ms=9.0, min_accuracy=0.3).trial == 3


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"trial": 9}, "trial 9 is not on the front of here; its trials are 1, 0"),
        ({"max_latency_ms": 1.0}, "fastest is 2.00 ms at 0.2000, the most accurate 10.00 ms at 0.8000"),
        ({"min_accuracy": 0.9}, "min accuracy 0.9"),
        ({"max_latency_ms": 5.0, "min_accuracy": 0.5}, "no point of here is within the limits"),
    ],
)
def test_what_cannot_be_chosen(limits: dict[str, Any], message: str) -> None:
    front = ParetoFront.of([BASE, result(1, 0.2, 2.0)])
    with pytest.raises(NoSuchPointError, match=message):
        front.choose(**limits)


def test_json_has_the_contracts_keys() -> None:
    front = ParetoFront.of([BASE, result(1, 0.6, 5.0, params=7, macs=9)])
    document = json.loads(json.dumps(front.to_json({1: {"run_id": "r", "model": "m.onnx"}}), allow_nan=False))
    assert document["fingerprint"] == "print"
    assert document["baseline"] == {"accuracy": 0.8, "latency_ms": 10.0, "latency_p90_ms": 11.0}
    assert math.isclose(document["hypervolume"], front.hypervolume)
    first, last = document["points"]
    assert {k: first[k] for k in ("trial", "beta", "ratio", "accuracy", "latency_ms", "speedup")} == {
        "trial": 1, "beta": 0.1, "ratio": 0.2, "accuracy": 0.6, "latency_ms": 5.0, "speedup": 2.0,
    }  # fmt: skip
    assert (first["params"], first["macs"], first["run_id"], first["model"]) == (7, 9, "r", "m.onnx")
    assert first["latency_p90_ms"] == 5.5
    assert (last["trial"], last["run_id"], last["model"]) == (0, None, None)


def ends_at(ratio: float, accuracy: float) -> ParetoFront:
    """A front whose fastest point was asked that ratio and has that accuracy, of 0.8."""
    return ParetoFront.of(
        [BASE, result(1, accuracy, 3.0, asked=TrialParams(ratio=ratio)), result(2, 0.79, 7.0)]
    )


@pytest.mark.parametrize("searched", [Range(low=0.1, high=0.7), Choices(choices=(0.3, 0.1, 0.7))])
def test_a_front_that_the_range_cut_short_says_so(searched: Any) -> None:
    hint = range_end(ends_at(0.69, 0.78), SearchSection(ratio=searched))
    assert hint is not None
    for said in ("here", "trial 1", "98%", "0.69", "search.ratio", "0.7"):
        assert said in hint


@pytest.mark.parametrize(
    ("front", "ratio"),
    [
        (ends_at(0.6, 0.78), Range(low=0.1, high=0.7)),  # not the end
        (ends_at(0.7, 0.7), Range(low=0.1, high=0.7)),  # going on would cost more than it has cost already
        (ends_at(0.7, 0.78), 0.7),  # nothing was searched
        (ParetoFront.of([BASE]), Range(low=0.1, high=0.7)),
        (ParetoFront.of([result(0, 0.0, 10.0), result(1, 0.0, 5.0)]), Range(low=0.1, high=0.7)),
    ],
)
def test_other_fronts_do_not(front: ParetoFront, ratio: Any) -> None:
    assert range_end(front, SearchSection(ratio=ratio)) is None

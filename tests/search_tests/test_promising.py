"""Which screened candidate comes next: where, by what the trials have shown, the largest gap is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from search.front import covered
from search.promising import most_promising
from search.proxy import Proxy
from search.result import TrialParams, TrialResult
from search.screening import Candidate
from search.sections import Limits


def result(trial: int, latency_ms: float, accuracy: float, kept: float, **more: Any) -> TrialResult:
    known: dict[str, Any] = {
        "device": "d",
        "fingerprint": "print",
        "asked": TrialParams(ratio=0.5) if trial else TrialParams(),
        "state": "complete",
        "latency_p90_ms": latency_ms,
        "speedup": 10 / latency_ms,
        "predicted_latency_ms": latency_ms,
        "plan_digest": f"plan{trial}",
        "details": {"proxy": Proxy("scores", kept).to_json()},
    }
    return TrialResult(trial=trial, accuracy=accuracy, latency_ms=latency_ms, **{**known, **more})


def candidate(predicted_ms: float, kept: float, recovery: str = "finetune") -> Candidate:
    """Its plan is named after its predicted latency."""
    point = {"ratio": 1 - predicted_ms / 10}
    return Candidate(point, f"at{predicted_ms:g}", recovery, predicted_ms, Proxy("scores", kept))


UNPRUNED = result(0, 10.0, 0.8, 1.0)
#: Two trials far apart: half of the unpruned accuracy at 3 ms, all but a twentieth of it at 8 ms.
FAR_APART = [UNPRUNED, result(1, 3.0, 0.4, 0.2), result(2, 8.0, 0.76, 0.7)]
#: Between them, a little left of the one and a little left of the other.
CANDIDATES = [candidate(2.9, 0.19), candidate(5.0, 0.4), candidate(7.9, 0.69)]


def chosen(*arguments: Any) -> str | None:
    found = most_promising(*arguments)
    return None if found is None else found.way


def test_the_largest_gap_comes_first() -> None:
    assert chosen(CANDIDATES, FAR_APART) == "at5"
    filled = [*FAR_APART, result(3, 5.0, 0.66, 0.4, plan_digest="at5")]
    assert chosen([candidate(4.97, 0.395), *CANDIDATES[1:]], filled) == "at7.9"


def test_nothing_is_tried_twice() -> None:
    assert chosen(CANDIDATES[1:2], FAR_APART) == "at5"
    stopped = result(3, 5.0, 0.1, 0.4, plan_digest="at5", state="stopped", reason="dominated")
    assert chosen(CANDIDATES[1:2], [*FAR_APART, stopped]) is None


def test_what_grows_the_front_by_nothing_is_left_to_the_sampler() -> None:
    assert chosen([candidate(3.01, 0.2005)], FAR_APART) is None
    assert chosen([candidate(3.5, 0.15)], FAR_APART) is None  # slower and keeps less
    assert chosen([], FAR_APART) is None


@pytest.mark.parametrize("before", [[], [result(1, 3.0, 0.4, 0.2)], [result(0, 10.0, 0.0, 1.0)]])
def test_nothing_is_expected_without_an_unpruned_model(before: list[TrialResult]) -> None:
    assert chosen(CANDIDATES, before) is None


def test_before_any_pruned_trial_what_is_kept_counts_as_accuracy() -> None:
    # 0.5 * 0.4 of the area against 0.71 * 0.19 and 0.21 * 0.69.
    assert chosen(CANDIDATES, [UNPRUNED]) == "at5"
    assert chosen([candidate(2.9, 0.4), *CANDIDATES[1:]], [UNPRUNED]) == "at2.9"


def test_what_is_kept_is_worth_what_the_best_trial_made_of_it() -> None:
    between = [candidate(5.0, 0.4)]
    short, long = (0.1, 0.2), (0.1, 0.2, 0.2, 0.2)
    first, second = (replace(r, epochs=long) for r in FAR_APART[1:])
    low = result(3, 4.5, 0.2, 0.35)
    # A trial that was trained for less pulls no expectation down, one with extra epochs does,
    assert chosen(between, [UNPRUNED, first, second, replace(low, epochs=short)]) == "at5"
    assert chosen(between, [UNPRUNED, first, second, replace(low, epochs=short, accuracy=0.41)]) == "at5"
    assert chosen(between, [UNPRUNED, first, second, replace(low, epochs=long)]) is None
    first_short = replace(first, epochs=short)
    assert chosen(between, [UNPRUNED, first_short, second, replace(low, epochs=long[:3])]) is None
    # and where all were trained alike every one does.
    assert chosen(between, [*FAR_APART, low]) is None
    # One that made nearly all of less leaves nothing to be gained at 5 ms.
    assert chosen(between, [*FAR_APART, result(3, 4.9, 0.6, 0.35)]) == "at5"
    assert chosen(between, [*FAR_APART, result(3, 4.9, 0.758, 0.39)]) is None


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, "at9"),
        ({"details": {"proxy": Proxy("curves", 0.1).to_json()}}, None),
        ({"details": {}}, None),
        ({"asked": TrialParams(recovery="scratch")}, None),
    ],
)
def test_only_trials_of_the_same_kind_say_what_is_kept_is_worth(
    other: dict[str, Any], expected: str | None
) -> None:
    odd = result(3, 9.9, 0.79, 0.1, **other)
    assert chosen([candidate(9.0, 0.1)], [*FAR_APART, odd]) == expected


@pytest.mark.parametrize(("predicted_ms", "expected"), [(4.0, None), (5.0, "at4.5")])
def test_predicted_latencies_are_taken_as_they_turned_out(predicted_ms: float, expected: str | None) -> None:
    """4.5 ms are more than 5 where 4 ms were 5."""
    known = result(1, 5.0, 0.6, 0.4, predicted_latency_ms=predicted_ms)
    assert chosen([candidate(4.5, 0.4)], [UNPRUNED, known]) == expected


def test_trials_in_flight_count_as_what_they_are_expected_to_bring() -> None:
    near = candidate(5.1, 0.405)
    four = [*CANDIDATES, near]
    assert chosen(four, FAR_APART) == "at5"
    assert chosen(four, FAR_APART, {"at5"}) == "at2.9"  # not the one beside it
    assert chosen(four, FAR_APART, {"of another study file"}) == "at5"
    assert chosen(CANDIDATES[1:2], FAR_APART, {"at5"}) is None


@pytest.mark.parametrize(
    ("accuracy", "expected"), [(None, "at5"), (0.65, "at5"), (0.655, "at7.9"), (0.76, None)]
)
def test_what_cannot_be_accurate_enough_is_not_chosen(accuracy: float | None, expected: str | None) -> None:
    """0.652 are expected at 5 ms, 0.758 at 7.9."""
    assert chosen(CANDIDATES, FAR_APART, (), Limits(accuracy=accuracy)) == expected


def test_covered_area() -> None:
    assert covered([]) == 0.0
    assert covered([(1.0, 1.0)]) == 0.0
    assert covered([(0.5, 0.8)]) == pytest.approx(0.4)
    assert covered([(0.5, 0.8), (0.75, 0.9), (0.6, 0.1), (1.2, 2.0)]) == pytest.approx(0.425)

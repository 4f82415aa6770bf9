"""The records of a trial, and their JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from search.result import TrialParams, TrialResult

RESULT = TrialResult(
    trial=3,
    device="here",
    fingerprint="print",
    asked=TrialParams(beta=0.25, ratio=0.5, round_to=8),
    state="complete",
    accuracy=0.5,
    latency_ms=4.0,
    latency_p90_ms=4.5,
    latency_raw_ms=4.1,
    speedup=1.5,
    speedup_ci=(1.4, 1.6),
    predicted_latency_ms=3.9,
    params=10,
    macs=20,
    duration_s={"prune": 0.1},
    epochs=(0.1, 0.5),
    plan_digest="p",
    artifact_digest="a",
    finished_at="2026-01-02T03:04:05+00:00",
    details={"stable": True, "list": [1, 2]},
)


def test_json_both_ways() -> None:
    for result in (RESULT, replace(RESULT, state="failed", reason="why", accuracy=None, speedup_ci=None)):
        assert TrialResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert RESULT.to_json()["format_version"] == 1
    assert TrialParams.from_json(json.loads(json.dumps(RESULT.asked.to_json()))) == RESULT.asked
    with pytest.raises(ValueError, match="format_version must be 1, got None"):
        TrialResult.from_json({k: v for k, v in RESULT.to_json().items() if k != "format_version"})


@pytest.mark.parametrize("key", ["accuracy", "latency_ms", "latency_p90_ms", "speedup"])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_complete_trial_has_finite_numbers(key: str, value: float | None) -> None:
    with pytest.raises(ValueError, match=f"a complete trial needs a finite {key}, got {value}"):
        replace(RESULT, **{key: value})


@pytest.mark.parametrize("state", ["failed", "stopped"])
@pytest.mark.parametrize("reason", [None, ""])
def test_a_trial_that_is_not_complete_says_why(state: Any, reason: str | None) -> None:
    with pytest.raises(ValueError, match=f"a {state} trial needs a reason, got"):
        replace(RESULT, state=state, reason=reason)


def test_other_states_are_refused() -> None:
    with pytest.raises(ValueError, match="state must be one of complete, stopped, failed, got 'pruned'"):
        replace(RESULT, state="pruned")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("beta", -0.1, r"beta must be in \[0, 1\], got -0.1"),
        ("beta", 1.1, r"beta must be in \[0, 1\], got 1.1"),
        ("beta", float("nan"), r"beta must be in \[0, 1\], got nan"),
        ("ratio", 1.0, r"ratio must be in \[0, 1\), got 1.0"),
        ("ratio", -0.1, r"ratio must be in \[0, 1\), got -0.1"),
        ("round_to", 0, "round_to must be at least 1, got 0"),
    ],
)
def test_params_are_checked(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrialParams(**{key: value})

"""How far a measured model is outside the limits that the user set. Knows results and limits, no sampler."""

from __future__ import annotations

from .result import TrialResult
from .sections import Limits


def excess_of(result: TrialResult, limits: Limits) -> dict[str, float]:
    """How far a result is outside each limit, relative (accuracy: absolute); at most 0 is inside.

    Returns:
        One entry per limit set, in the order of the study file's keys.
    """
    excess = {}
    if limits.latency_ms is not None:
        assert result.latency_ms is not None
        excess["latency_ms"] = result.latency_ms / limits.latency_ms - 1.0
    if limits.accuracy is not None:
        assert result.accuracy is not None
        excess["accuracy"] = limits.accuracy - result.accuracy
    if limits.params is not None:
        assert result.params is not None
        excess["params"] = result.params / limits.params - 1.0
    if limits.size_mb is not None:
        excess["size_mb"] = float(result.details["size_mb"]) / limits.size_mb - 1.0
    return excess

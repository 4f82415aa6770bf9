"""What a sampler hears of a result: the values it learns from, and how far they are outside the limits."""

from __future__ import annotations

from collections.abc import Iterable

from .limits import excess_of
from .result import TrialResult
from .sections import Limits


def shown_to_sampler(result: TrialResult, results: Iterable[TrialResult]) -> TrialResult | None:
    """The result whose values count; None where there is nothing to learn from.

    A trial stopped in training is complete to a sampler, with the accuracy it had: no more than it would have
    reached, and dominated already. One that had the plan of another has that one's values.
    """
    if result.state == "failed":
        return None
    if result.accuracy is None and result.plan_digest is not None:
        twins = (r for r in results if r.way == result.way)
        return next((r for r in twins if r.state == "complete"), None)
    return result if result.latency_ms is not None and result.accuracy is not None else None


def constraints_of(result: TrialResult, limits: Limits, demanded: Iterable[str] | None) -> dict[str, float]:
    """Excess by limit.

    Args:
        demanded: the constraints of the trials so far, None before the first: samplers demand the same of
            every complete trial. A limit set later bounds what is begun, but no sampler hears of it; one
            lifted is satisfied.
    """
    excess = excess_of(result, limits)
    return excess if demanded is None else {name: excess.get(name, -1.0) for name in demanded}

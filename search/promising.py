"""The screened candidate that is expected to grow the front most.

What a plan promises (`search.proxy`) is no accuracy, and a latency model has its error; what both mean on
this device the trials so far have shown, and the next one goes where, by that, the largest gap is. Knows
records only: no bench, no storage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache

import numpy as np

from .front import covered, relative
from .hull import hull_below
from .proxy import promised
from .result import TrialResult, accuracy_of, latency_of
from .screening import Candidate
from .sections import Limits

#: Of the hypervolume; a smaller gain is within what two trainings of one network differ.
LEAST_GAIN = 0.001


def most_promising(
    candidates: Sequence[Candidate],
    results: Sequence[TrialResult],
    begun: Collection[str] = (),
    limits: Limits | None = None,
) -> Candidate | None:
    """The candidate whose expected latency and accuracy add most to the hypervolume, of those not tried yet.

    Args:
        results: the device's finished trials.
        begun: the ways of candidates that are being tried. What they are expected to bring is taken for
            granted.
        limits: what is expected to be less accurate than these allow is not chosen.

    Returns:
        None where none is expected to add `LEAST_GAIN`, or before trial 0 is complete.
    """
    complete = [r for r in results if r.state == "complete"]
    baseline = next((r for r in complete if r.trial == 0), None)
    if baseline is None or not baseline.accuracy or not baseline.latency_ms:
        return None
    front = [relative(latency_of(r), accuracy_of(r), baseline) for r in complete]
    tried = {r.way for r in results}
    _, least = relative(0.0, (limits.accuracy if limits else None) or 0.0, baseline)
    expect = _expectation(complete, baseline)
    expected = {c.way: (c, expect(c)) for c in candidates if c.way not in tried}
    front += [likely for way, (_, likely) in expected.items() if way in begun]
    before = covered(front)
    gains = [
        (covered([*front, likely]) - before, candidate)
        for way, (candidate, likely) in expected.items()
        if way not in begun and likely[1] >= least
    ]
    gain, chosen = max(gains, key=lambda one: one[0], default=(0.0, None))
    return chosen if gain >= LEAST_GAIN else None


def _expectation(
    complete: Sequence[TrialResult], baseline: TrialResult
) -> Callable[[Candidate], tuple[float, float]]:
    """A candidate's latency and accuracy, relative to the unpruned model's."""
    factor = _factor(complete)

    @cache
    def accuracy(kind: str, recovery: str) -> Callable[[float], float]:
        alike = [r for r in complete if r.trial > 0 and r.asked.recovery == recovery]
        return _accuracy_by_kept(alike, kind, accuracy_of(baseline))

    def expect(candidate: Candidate) -> tuple[float, float]:
        latency_ms = candidate.predicted_ms * factor(candidate.predicted_ms)
        reached = accuracy(candidate.proxy.kind, candidate.recovery)(candidate.proxy.kept)
        return relative(latency_ms, reached, baseline)

    return expect


def _accuracy_by_kept(trials: Sequence[TrialResult], kind: str, unpruned: float) -> Callable[[float], float]:
    """What a plan that keeps so much can reach.

    Among trials that were trained alike accuracy falls with `1 / kept - 1`, by loss curves the rise of the
    loss as a share of the unpruned one, along a nearly straight line. So straight lines are drawn from the
    unpruned model through the trials to the deepest one. What lies below those of all others and had no
    extra epochs is left out: it could have more. Beyond the deepest the line from the unpruned model through
    it goes on.
    """
    seen = [
        (1 / proxy.kept - 1, accuracy_of(r), len(r.epochs))
        for r in trials
        if (proxy := promised(r)) is not None and proxy.kind == kind and proxy.kept > 0
    ]
    if not seen:  # what is kept of the accuracy, for want of anything better
        return lambda kept: unpruned * kept
    best = {0.0: max(unpruned, *(accuracy for _, accuracy, _ in seen))}
    for rise, accuracy, _ in seen:
        best[rise] = max(best.get(rise, 0.0), accuracy)
    x, y = zip(*sorted(best.items()), strict=True)
    above = {x[i] for i in hull_below(x, [-accuracy for accuracy in y])}  # upside down: a hull from above
    lengths = [epochs for *_, epochs in seen]
    final = {rise for rise, _, epochs in seen if epochs > min(lengths) or epochs == max(lengths)}
    line = [(rise, accuracy) for rise, accuracy in zip(x, y, strict=True) if rise in above | final]
    deepest, reached = line[-1]
    if reached < unpruned:
        line.append((deepest * unpruned / (unpruned - reached), 0.0))
    rises, accuracies = zip(*line, strict=True)
    return lambda kept: float(np.interp(1 / kept - 1, rises, accuracies)) if kept > 0 else 0.0


def _factor(complete: Sequence[TrialResult]) -> Callable[[float], float]:
    """Measured over predicted latency as a function of the predicted one."""
    seen = sorted(
        (r.predicted_latency_ms, latency_of(r) / r.predicted_latency_ms)
        for r in complete
        if r.predicted_latency_ms
    )
    if not seen:
        return lambda predicted: 1.0
    predicted_ms, factors = zip(*seen, strict=True)
    return lambda predicted: float(np.interp(predicted, predicted_ms, factors))

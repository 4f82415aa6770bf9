"""When a trial is not worth going on with: the rules, asked between its steps.

Decides from the plan, the device's latency model and what earlier trials of the device measured. Knows no
step of a trial, and neither Optuna nor MLflow. Every rule errs on the side of going on: a prediction counts
with the error its model states, an expected accuracy with the scatter seen so far and a margin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from profiles.latency_profile import LatencyProfile

from .front import FIRST_TRIALS, covered, relative
from .plan import PruningPlan
from .prediction import predict_ms
from .proxy import Proxy, promised
from .result import TrialResult, accuracy_of, latency_of, way_of
from .sections import Limits, StoppingSection

#: A latency measured as no lower than the unpruned model's ends a trial only where its interval leaves less
#: than this to be gained: on a busy machine a short measurement misses by more.
LEAST_SAVING = 0.05
#: Of the hypervolume, what extra epochs must be expected to add: in their time a new trial brings about that.
LEAST_EXTRA_GAIN = 0.002


class TrialStopped(Exception):  # noqa: N818  (no error: it ends a trial early, as asked)
    """A trial is not worth going on with; the text says why."""


class Gate(Protocol):
    """Asked between a trial's steps; a text is the reason to stop there."""

    def planned(self, plan: PruningPlan, proxy: Proxy | None) -> str | None: ...

    def pruned(self, params: int) -> str | None: ...

    def measured(self, ratio: float, ratio_ci: tuple[float, float], size_mb: float) -> str | None: ...

    def epoch(self, done: int, epochs: int, accuracy: float) -> str | None: ...

    def extra_epochs(self) -> int: ...


class OpenGate:
    """Lets everything pass."""

    def planned(self, plan: PruningPlan, proxy: Proxy | None) -> str | None:
        return None

    def pruned(self, params: int) -> str | None:
        return None

    def measured(self, ratio: float, ratio_ci: tuple[float, float], size_mb: float) -> str | None:
        return None

    def epoch(self, done: int, epochs: int, accuracy: float) -> str | None:
        return None

    def extra_epochs(self) -> int:
        return 0


@dataclass
class FrontGate:
    """Stops what cannot end on the front. One per trial: it remembers what was asked.

    Attributes:
        baseline: the unpruned model of this device.
        results: the device's finished trials, read anew at every question: other workers finish theirs.
        claim: given what names a plan and its recovery (`result.way_of`), the number of another trial that
            has these, or None.
        recovery: how this trial is trained back; what to expect is learned from trials of the same kind.
    """

    baseline: TrialResult
    results: Callable[[], Sequence[TrialResult]]
    profile: LatencyProfile
    limits: Limits
    rules: StoppingSection
    claim: Callable[[str], int | None]
    recovery: str = "finetune"
    _low_ms: float = 0.0
    _latency_ms: float = 0.0
    _proxy: Proxy | None = None
    _curve: list[float] = field(default_factory=list)
    _extensions: int = 0
    _extended_at: int = 0

    # -- before training

    def planned(self, plan: PruningPlan, proxy: Proxy | None) -> str | None:
        """A plan seen before, or one whose predicted latency rules it out."""
        self._proxy = proxy
        twin = self.claim(way_of(plan.digest, self.recovery))
        if twin is not None:
            return f"the same plan as trial {twin}"
        error = self.profile.model.error
        if error is None:  # a model that was never held against a measurement decides nothing
            return None
        ratio = predict_ms(plan, self.profile) / self.profile.predict_ms({})
        shown = f"predicted {ratio * self._base_ms:.2f} ms ± {error:.0%}"
        return self._too_slow(ratio, ratio * max(0.0, 1.0 - error), shown)

    def pruned(self, params: int) -> str | None:
        """More parameters than allowed."""
        if self.limits.params is not None and params > self.limits.params:
            return f"{params} parameters, the limit is {self.limits.params}"
        return None

    def measured(self, ratio: float, ratio_ci: tuple[float, float], size_mb: float) -> str | None:
        """The measured latency, before any training."""
        self._latency_ms = ratio * self._base_ms
        if self.limits.size_mb is not None and size_mb > self.limits.size_mb:
            return f"the exported model has {size_mb:.2f} MB, the limit is {self.limits.size_mb:g}"
        shown = f"measured {self._latency_ms:.2f} ms, {1 / ratio:.3f} times as fast as unpruned"
        if ratio >= 1.0 and ratio_ci[0] > 1.0 - LEAST_SAVING:
            return f"no faster than the unpruned model: {shown}"
        return self._too_slow(ratio, ratio_ci[0], shown)

    def _too_slow(self, ratio: float, low: float, shown: str) -> str | None:
        """Rules on a latency of which `low`, a ratio to the unpruned one, is the least that is plausible."""
        self._low_ms = low * self._base_ms
        limit = self.limits.latency_ms
        if limit is not None and self._low_ms > limit:
            return f"outside the latency limit of {limit:g} ms: {shown}"
        if low >= 1.0:
            return f"no faster than the unpruned model: {shown}"
        ceiling = self._expected_ceiling()
        rival = self._rival(self._low_ms)
        if ceiling is None or rival is None or accuracy_of(rival) < ceiling:
            return None
        return (
            f"dominated: {shown}, at most {ceiling:.4f} expected; trial {rival.trial} has "
            f"{accuracy_of(rival):.4f} at {rival.latency_ms:.2f} ms"
        )

    def _expected_ceiling(self) -> float | None:
        """The highest accuracy that what the plan keeps promises, by the trials so far."""
        if self._proxy is None:
            return None
        kind = self._proxy.kind
        earlier = [(promised(r), accuracy_of(r)) for r in self._alike()]
        seen = sorted((p.kept, accuracy) for p, accuracy in earlier if p is not None and p.kind == kind)
        if len(seen) <= self.rules.after:
            return None
        from scipy.optimize import isotonic_regression

        kept, accuracies = (np.array(column) for column in zip(*seen, strict=True))
        # Less kept cannot be expected to be better; how far trials stray from that is the scatter.
        fit = isotonic_regression(accuracies).x
        scatter = float(np.abs(accuracies - fit).max())
        above = int(np.searchsorted(kept, self._proxy.kept))
        if above == len(kept):
            return None
        return float(fit[above]) + scatter + self._margin

    # -- during training

    def epoch(self, done: int, epochs: int, accuracy: float) -> str | None:
        """Accuracy after an epoch, 0 before training: can this trial still reach the front?"""
        self._curve.append(accuracy)
        if done >= epochs:  # nothing is left to be saved
            return None
        return self._out_of_reach(done, epochs) or self._outpaced(done)

    def _out_of_reach(self, done: int, epochs: int) -> str | None:
        """Even the largest gain that trials as damaged as this one made from here on would not do."""
        base, best = accuracy_of(self.baseline), max(self._curve)
        gap = base - best
        if gap <= 0:
            return None
        gains = []
        for result in self._alike():
            curve = result.epochs  # with its extra epochs: this trial may be given some, too
            if result.trial == 0 or len(curve) <= epochs:
                continue
            at = max(curve[: done + 1])
            if base - at >= gap / 2:  # the less damaged ones close any gap, which says nothing here
                gains.append((max(curve) - at) / (base - at))
        if len(gains) < self.rules.after:
            return None
        ceiling = best + max(gains) * gap + self._margin
        reached = f"{best:.4f} after epoch {done} of {epochs}, at most {ceiling:.4f} expected"
        if self.limits.accuracy is not None and ceiling < self.limits.accuracy:
            return f"cannot reach the accuracy limit of {self.limits.accuracy:g}: {reached}"
        rival = self._rival(self._low_ms)
        if rival is not None and accuracy_of(rival) >= ceiling:
            return (
                f"cannot reach the front: {reached}; trial {rival.trial} has {accuracy_of(rival):.4f} at "
                f"{rival.latency_ms:.2f} ms"
            )
        return None

    def _outpaced(self, done: int) -> str | None:
        """Successive halving: at this epoch, is the trial among the best by rank?"""
        if self.rules.halving < 2 or done < 1 or done & (done - 1):
            return None
        if sum(r.trial > 0 for r in self._alike()) < self.rules.after:
            return None
        points = [
            (float(r.latency_ms), max(r.epochs[: done + 1]))
            for r in self.results()
            if r.trial > 0 and r.latency_ms is not None and len(r.epochs) > done and self._is_alike(r)
        ]
        own = (self._latency_ms, max(self._curve))
        ranks = pareto_ranks([*points, own])
        better = sum(rank < ranks[-1] for rank in ranks)
        if ranks[-1] == 0 or better * self.rules.halving < len(ranks):
            return None
        return (
            f"outpaced: after epoch {done} {better} of {len(points)} trials rank above its {own[1]:.4f} at "
            f"{own[0]:.2f} ms, and the best 1/{self.rules.halving} go on"
        )

    def extra_epochs(self) -> int:
        """Epochs more for a trial that can grow the front by them; the first gets none.

        Its last epoch, or all that it was given last together, brought more than the margin; no trial at most
        that slow that was given more epochs was ahead of it after as many; and going on like that it would
        add `LEAST_EXTRA_GAIN` to the hypervolume.

        What it says counts as given: the next answer looks at what these brought.
        """
        if self._extensions == self.rules.extensions or len(self._curve) < 2:
            return 0
        if sum(r.trial > 0 for r in self._alike()) < FIRST_TRIALS:
            return 0
        since = self._extended_at or len(self._curve) - 1
        best, before = max(self._curve), max(self._curve[:since])
        if best <= before + self._margin:
            return 0
        limit = self.limits.latency_ms
        if limit is not None and self._latency_ms > limit:
            return 0
        given_more = [
            r
            for r in self._as_fast(self._latency_ms)
            if self._is_alike(r) and len(r.epochs) > len(self._curve)
        ]
        if any(best <= max(r.epochs[: len(self._curve)]) for r in given_more):
            return 0
        likely = best + (best - before) / (len(self._curve) - since) * self.rules.extra_epochs
        # Those it is ahead of do not count for how they ended: it may come to that as well.
        if self._gain(best, likely, [r for r in self._complete() if r not in given_more]) < LEAST_EXTRA_GAIN:
            return 0
        self._extensions, self._extended_at = self._extensions + 1, len(self._curve)
        return self.rules.extra_epochs

    def _gain(self, accuracy: float, likely: float, others: Sequence[TrialResult]) -> float:
        """What the hypervolume grows by where this trial gets from one accuracy to another."""
        points = [relative(latency_of(r), accuracy_of(r), self.baseline) for r in others]
        now, then = (relative(self._latency_ms, value, self.baseline) for value in (accuracy, likely))
        return covered([*points, then]) - covered([*points, now])

    # -- what is known

    @property
    def _base_ms(self) -> float:
        assert self.baseline.latency_ms is not None
        return self.baseline.latency_ms

    @property
    def _margin(self) -> float:
        return self.rules.margin * accuracy_of(self.baseline)

    def _is_alike(self, result: TrialResult) -> bool:
        """From random weights or not: accuracies during and after the recovery tell nothing of the other."""
        return result.trial == 0 or result.asked.recovery == self.recovery

    def _alike(self) -> list[TrialResult]:
        return [r for r in self._complete() if self._is_alike(r)]

    def _complete(self) -> list[TrialResult]:
        return [r for r in self.results() if r.state == "complete"]

    def _rival(self, latency_ms: float) -> TrialResult | None:
        """The most accurate complete trial at most that slow."""
        return max(self._as_fast(latency_ms), key=accuracy_of, default=None)

    def _as_fast(self, latency_ms: float) -> list[TrialResult]:
        """The complete trials at most that slow."""
        return [r for r in self._complete() if latency_of(r) <= latency_ms]


def pareto_ranks(points: Sequence[tuple[float, float]]) -> list[int]:
    """Non-dominated sorting of (latency, accuracy): 0 for points that none beats in both, 1 for those that
    are so once the first are gone, and so on. Equal points share a rank.
    """
    left = set(range(len(points)))
    ranks = [0] * len(points)
    rank = 0
    while left:
        front = {i for i in left if not any(_beats(points[j], points[i]) for j in left)}
        for i in front:
            ranks[i] = rank
        left -= front
        rank += 1
    return ranks


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other

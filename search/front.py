"""The Pareto front of one device: the trials that no other trial beats in both accuracy and latency.

Knows results only: not how they were measured, nor Optuna's own front. Accuracy is maximised, latency
minimised.

Tie rule, the only one in the project: a point is dominated where another one is at least as good in both
values and better in one; of points equal in both, the one with the lowest trial number stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .result import TrialResult, accuracy_of, latency_of

#: Pruned trials that a search begins with: before they ended there is no front to speak of, so what they are
#: is not chosen by what they would add to it, and they get no extra epochs for that.
FIRST_TRIALS = 1


class NoSuchPointError(LookupError):
    """No point of a front is what was asked for."""


@dataclass(frozen=True)
class ParetoFront:
    """The front of one device.

    Attributes:
        device, fingerprint: the device all points were measured on.
        baseline: trial 0, the unpruned model.
        points: non-dominated complete trials, sorted by latency (ascending), accuracy rising with it.

    Raises:
        ValueError: a point is not complete, not finite, or from another device or fingerprint.
    """

    device: str
    fingerprint: str
    baseline: TrialResult
    points: tuple[TrialResult, ...]

    def __post_init__(self) -> None:
        for point in (self.baseline, *self.points):
            if point.state != "complete":
                raise ValueError(f"a front holds complete trials only, trial {point.trial} is {point.state}")
            for name in ("accuracy", "latency_ms"):
                if not math.isfinite(getattr(point, name)):
                    raise ValueError(
                        f"trial {point.trial}: {name} must be finite, got {getattr(point, name)}"
                    )
            if (point.device, point.fingerprint) != (self.device, self.fingerprint):
                raise ValueError(
                    f"trial {point.trial} was measured on {point.device} ({point.fingerprint}), this front "
                    "is of "
                    f"{self.device} ({self.fingerprint}); numbers of different machines do not compare"
                )

    @classmethod
    def of(cls, results: Iterable[TrialResult]) -> ParetoFront:
        """The front of one device's results; stopped and failed trials are left out.

        Raises:
            ValueError: there is no complete trial 0, or the results are not of one device and fingerprint.
        """
        complete = sorted((r for r in results if r.state == "complete"), key=lambda r: r.trial)
        if not complete or complete[0].trial != 0:
            raise ValueError("a front needs the unpruned model, trial 0, and there is no complete one yet")
        baseline = complete[0]
        points: list[TrialResult] = []
        best = -math.inf
        for result in sorted(complete, key=lambda r: (latency_of(r), -accuracy_of(r), r.trial)):
            if accuracy_of(result) > best:
                points.append(result)
                best = accuracy_of(result)
        # Dominated results are checked like the rest: a foreign one must not pass because it lost.
        cls(baseline.device, baseline.fingerprint, baseline, tuple(complete))
        return cls(baseline.device, baseline.fingerprint, baseline, tuple(points))

    @property
    def hypervolume(self) -> float:
        """Area that the front covers, in the unit square, higher is better.

        Latency and accuracy are taken relative to the unpruned model; the reference point is (1, 0): the
        unpruned latency, no accuracy at all. Points slower than the unpruned model cover nothing. Comparable
        between devices and studies of one model.
        """
        return covered(relative(latency_of(p), accuracy_of(p), self.baseline) for p in self.points)

    @property
    def knee(self) -> TrialResult:
        """The point farthest above the straight line between the front's ends, in relative units.

        A front of one or two points has no knee; the faster end whose accuracy is the highest possible is
        returned then, that is the most accurate point.
        """
        if len(self.points) < 3:
            return self.points[-1]
        first, last = self.points[0], self.points[-1]
        width = latency_of(last) - latency_of(first)
        height = accuracy_of(last) - accuracy_of(first)

        def above(point: TrialResult) -> float:
            x = (latency_of(point) - latency_of(first)) / width
            y = (accuracy_of(point) - accuracy_of(first)) / height
            return y - x

        return max(self.points, key=lambda p: (above(p), -p.trial))

    def choose(
        self,
        *,
        max_latency_ms: float | None = None,
        min_accuracy: float | None = None,
        trial: int | None = None,
    ) -> TrialResult:
        """One point: by number, by limits (the best accuracy within them), or the knee where nothing is said.

        With only `min_accuracy` the fastest point that reaches it is chosen.

        Raises:
            NoSuchPointError: no point of the front satisfies what was asked; the message names what there is.
        """
        if trial is not None:
            for point in self.points:
                if point.trial == trial:
                    return point
            have = ", ".join(str(p.trial) for p in self.points)
            raise NoSuchPointError(
                f"trial {trial} is not on the front of {self.device}; its trials are {have}"
            )
        if max_latency_ms is None and min_accuracy is None:
            return self.knee
        within = [
            p
            for p in self.points
            if (max_latency_ms is None or latency_of(p) <= max_latency_ms)
            and (min_accuracy is None or accuracy_of(p) >= min_accuracy)
        ]
        if not within:
            fastest, best = self.points[0], self.points[-1]
            raise NoSuchPointError(
                f"no point of {self.device} is within the limits asked (max latency {max_latency_ms} ms, "
                f"min accuracy {min_accuracy}); the fastest is {latency_of(fastest):.2f} ms at "
                f"{accuracy_of(fastest):.4f}, the most accurate {latency_of(best):.2f} ms at "
                f"{accuracy_of(best):.4f}"
            )
        return within[0] if max_latency_ms is None else within[-1]

    def to_json(self, runs: Mapping[int, Mapping[str, str]] | None = None) -> dict[str, Any]:
        """The device's entry of `paretoprune front --json`.

        Args:
            runs: by trial number the texts that tracking knows, `run_id` and `model` (path of the model
                file).
        """
        runs = runs or {}
        return {
            "fingerprint": self.fingerprint,
            "baseline": {
                "accuracy": self.baseline.accuracy,
                "latency_ms": self.baseline.latency_ms,
                "latency_p90_ms": self.baseline.latency_p90_ms,
            },
            "hypervolume": self.hypervolume,
            "points": [
                {
                    "trial": p.trial,
                    "beta": p.asked.beta,
                    "ratio": p.asked.ratio,
                    "asked": p.asked.to_json(),
                    "accuracy": p.accuracy,
                    "latency_ms": p.latency_ms,
                    "latency_p90_ms": p.latency_p90_ms,
                    "speedup": p.speedup,
                    "speedup_ci": list(p.speedup_ci) if p.speedup_ci else None,
                    "params": p.params,
                    "macs": p.macs,
                    "run_id": runs.get(p.trial, {}).get("run_id"),
                    "model": runs.get(p.trial, {}).get("model"),
                }
                for p in self.points
            ],
        }


def relative(latency_ms: float, accuracy: float, baseline: TrialResult) -> tuple[float, float]:
    """Latency and accuracy as shares of the unpruned model's; where that is never right all have none."""
    base = accuracy_of(baseline)
    return latency_ms / latency_of(baseline), accuracy / base if base > 0 else 0.0


def covered(points: Iterable[tuple[float, float]]) -> float:
    """Area between points and the reference (1, 0), see `ParetoFront.hypervolume`.

    Args:
        points: latency and accuracy, both relative to the unpruned model's; dominated ones change nothing.
    """
    area, at, best = 0.0, 0.0, 0.0
    for latency, accuracy in sorted(points):
        if latency >= 1.0:
            break
        area += (latency - at) * best
        at, best = latency, max(best, accuracy)
    return area + (1.0 - at) * best

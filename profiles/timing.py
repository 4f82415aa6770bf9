"""Samples of one model's latency (`Timing`) and two models measured in turns (`Comparison`).

Statistics of numbers already taken; knows nothing of how they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

FORMAT_VERSION = 1
#: A median whose 95% interval is within this share of it counts as stable.
STABLE_WITHIN = 0.02


@dataclass(frozen=True)
class Timing:
    """Latency samples.

    Attributes:
        samples_ms: one value per inference, in milliseconds, in order of time.
        warmup: inferences before the first sample, in each measured process.

    Raises:
        ValueError: no samples, or one that is negative or not finite.
    """

    samples_ms: tuple[float, ...]
    warmup: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples_ms", tuple(float(s) for s in self.samples_ms))
        if not self.samples_ms:
            raise ValueError("a timing needs at least one sample, got none")
        bad = [s for s in self.samples_ms if not math.isfinite(s) or s < 0]
        if bad:
            raise ValueError(f"samples_ms must be finite and not negative, got {bad[0]}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")

    @cached_property
    def mean_ms(self) -> float:
        return float(np.mean(self.samples_ms))

    @cached_property
    def p50_ms(self) -> float:
        return float(np.median(self.samples_ms))

    @cached_property
    def p90_ms(self) -> float:
        return float(np.percentile(self.samples_ms, 90))

    @cached_property
    def ci_ms(self) -> tuple[float, float]:
        """95% interval of the median, by a seeded bootstrap: the same samples give the same interval."""
        samples = np.asarray(self.samples_ms)
        picks = np.random.default_rng(0).integers(0, len(samples), (500, min(len(samples), 2000)))
        medians = np.median(samples[picks], axis=1)
        low, high = np.percentile(medians, (2.5, 97.5))
        return float(low), float(high)

    @property
    def is_stable(self) -> bool:
        """Whether the median is known within 2%."""
        low, high = self.ci_ms
        return (high - low) / 2 <= STABLE_WITHIN * self.p50_ms

    def to_json(self) -> dict[str, Any]:
        return {"samples_ms": list(self.samples_ms), "warmup": self.warmup}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Timing:
        return cls(tuple(data["samples_ms"]), data["warmup"])


Verdict = Literal["faster", "slower", "cannot tell"]


@dataclass(frozen=True)
class Comparison:
    """Two models measured in turns.

    Attributes:
        candidate, baseline: all samples of each, over all rounds.
        ratio: candidate over baseline time; below 1 the candidate is faster.
        ratio_ci: its 95% interval.
        rounds: fresh pairs of processes.
        counted: the rounds that the ratio comes from, see `quiet.QuietRatio`.
        is_stable: whether the interval is as narrow as was asked for.
        reason: why not, where it is not stable.

    Raises:
        ValueError: the ratio is not inside its interval.
    """

    candidate: Timing
    baseline: Timing
    ratio: float
    ratio_ci: tuple[float, float]
    rounds: int
    counted: int
    is_stable: bool
    reason: str | None = None

    def __post_init__(self) -> None:
        low, high = self.ratio_ci
        object.__setattr__(self, "ratio_ci", (float(low), float(high)))
        if not 0 < low <= self.ratio <= high:
            raise ValueError(
                f"ratio must be inside its interval and positive, got {self.ratio} in [{low}, {high}]"
            )

    @property
    def verdict(self) -> Verdict:
        """What may be said of the candidate: an interval that holds 1 decides nothing."""
        low, high = self.ratio_ci
        return "faster" if high < 1 else "slower" if low > 1 else "cannot tell"

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "candidate": self.candidate.to_json(),
            "baseline": self.baseline.to_json(),
            "ratio": self.ratio,
            "ratio_ci": list(self.ratio_ci),
            "rounds": self.rounds,
            "counted": self.counted,
            "is_stable": self.is_stable,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"comparison format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}"
            )
        return cls(
            candidate=Timing.from_json(data["candidate"]),
            baseline=Timing.from_json(data["baseline"]),
            ratio=data["ratio"],
            ratio_ci=(data["ratio_ci"][0], data["ratio_ci"][1]),
            rounds=data["rounds"],
            counted=data["counted"],
            is_stable=data["is_stable"],
            reason=data["reason"],
        )

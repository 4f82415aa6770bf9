"""What a trial was asked (`TrialParams`) and what it measured (`TrialResult`).

Plain records with JSON both ways. Knows neither Optuna nor MLflow, nor how a trial is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal

FORMAT_VERSION = 1
State = Literal["complete", "stopped", "failed"]
STATES: tuple[State, ...] = ("complete", "stopped", "failed")
#: How a pruned model is trained back: from its own weights, or from random ones.
RECOVERIES = ("finetune", "scratch")


@dataclass(frozen=True)
class TrialParams:
    """One point of the search space: everything that decides which channels go.

    Attributes:
        beta: exponent of the normalised latency in equation (7), in [0, 1]; 0 is plain Taylor.
        ratio: share to remove of what `ratio_of` names, in [0, 1); 0 is the unpruned model.
        round_to: kept widths are multiples of this (1: any width).
        ratio_of, criterion, cost, allocation: words, as the study file spells them.
        steps: the ratio is reached in so many equal steps, with scores taken anew in between.
        depth: share of the blocks that can go as a whole which do, in [0, 1); `ratio` is about channels.
        recovery: "finetune", or "scratch" for training from random weights.

    Raises:
        ValueError: a number is outside its range, or an unknown way of recovery.
    """

    beta: float = 0.0
    ratio: float = 0.0
    ratio_of: str = "channels"
    criterion: str = "taylor"
    cost: str = "layer"
    allocation: str = "rank"
    round_to: int = 1
    steps: int = 1
    depth: float = 0.0
    recovery: str = "finetune"

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0.0 <= self.depth < 1.0:
            raise ValueError(f"depth must be in [0, 1), got {self.depth}")
        if self.recovery not in RECOVERIES:
            raise ValueError(f"recovery must be one of {', '.join(RECOVERIES)}, got {self.recovery!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialParams:
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})


def differing(asked: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The keys besides `beta` and `ratio` in which some parameters, in their JSON form, are not alike."""
    every = list(asked)
    names = [f.name for f in fields(TrialParams) if f.name not in ("beta", "ratio")]
    return tuple(name for name in names if len({one.get(name) for one in every}) > 1)


@dataclass(frozen=True)
class TrialResult:
    """What one trial measured.

    Attributes:
        trial: number within the device's study; 0 is the unpruned model.
        device, fingerprint: where the latency was measured.
        asked: the trial's parameters.
        state: `complete` (has accuracy and latency), `stopped` (ended early, see `reason`) or `failed`.
        accuracy: the task's metric of the recovered model (mAP50-95 or top-1), in [0, 1].
        latency_ms: the measured ratio to the unpruned model times the unpruned model's latency in this study,
            so that a drift of the machine between two trials moves no point.
        latency_p90_ms: 90th percentile, scaled alike.
        latency_raw_ms: median of the candidate's own samples, as the clock gave them.
        speedup: unpruned over pruned latency, measured in turns; `speedup_ci` its 95% interval.
        predicted_latency_ms: by the device's latency model, before anything was measured.
        params, macs: of the pruned model, for one input.
        duration_s: seconds of each step (rerank, plan, prune, recover, evaluate, export, measure).
        epochs: accuracy after each epoch of the recovery; index 0 is before any training.
        plan_digest, artifact_digest: sha256 of plan.json's content and of the measured artifact.
        details: further measured values that have no field of their own (JSON types only).

    Raises:
        ValueError: a complete result lacks a number, or one of them is not finite.
    """

    trial: int
    device: str
    fingerprint: str
    asked: TrialParams
    state: State
    reason: str | None = None
    accuracy: float | None = None
    latency_ms: float | None = None
    latency_p90_ms: float | None = None
    latency_raw_ms: float | None = None
    speedup: float | None = None
    speedup_ci: tuple[float, float] | None = None
    predicted_latency_ms: float | None = None
    params: int | None = None
    macs: int | None = None
    duration_s: Mapping[str, float] = field(default_factory=dict)
    epochs: tuple[float, ...] = ()
    plan_digest: str | None = None
    artifact_digest: str | None = None
    finished_at: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}, got {self.state!r}")
        if self.state == "complete":
            for name in ("accuracy", "latency_ms", "latency_p90_ms", "speedup"):
                value = getattr(self, name)
                if value is None or not math.isfinite(value):
                    raise ValueError(f"a complete trial needs a finite {name}, got {value}")
        elif not self.reason:
            raise ValueError(f"a {self.state} trial needs a reason, got {self.reason!r}")

    @classmethod
    def failed(
        cls,
        trial: int,
        device: str,
        fingerprint: str,
        asked: TrialParams,
        reason: str,
        *,
        retry: bool = False,
    ) -> TrialResult:
        """The record of a trial that came to nothing.

        Args:
            retry: its parameters are tried again, under another number.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        details = {"retry": True} if retry else {}
        return cls(trial, device, fingerprint, asked, "failed", reason, finished_at=now, details=details)

    @property
    def way(self) -> str | None:
        """What makes two trials the same: the plan and how it was trained back; None without a plan."""
        return None if self.plan_digest is None else way_of(self.plan_digest, self.asked.recovery)

    @property
    def was_only_planned(self) -> bool:
        """Stopped before anything was measured; unless it took several steps, within milliseconds."""
        return self.state == "stopped" and self.latency_ms is None

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialResult:
        """Read what `to_json` wrote.

        Raises:
            ValueError: another format version, or values that break the record's rules.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}")
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        known["asked"] = TrialParams.from_json(data["asked"])
        known["epochs"] = tuple(data.get("epochs") or ())
        if data.get("speedup_ci") is not None:
            low, high = data["speedup_ci"]
            known["speedup_ci"] = (low, high)
        return cls(**known)


def latency_of(result: TrialResult) -> float:
    """What a complete trial has for certain, in milliseconds."""
    assert result.latency_ms is not None
    return result.latency_ms


def accuracy_of(result: TrialResult) -> float:
    """What a complete trial has for certain, in [0, 1]."""
    assert result.accuracy is not None
    return result.accuracy


def way_of(plan_digest: str, recovery: str) -> str:
    """Names a plan together with how it is trained back."""
    return plan_digest if recovery == "finetune" else f"{plan_digest}-{recovery}"


def brief(value: Any) -> str:
    """A value as one line of at most 160 characters, for a reason."""
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else text[:157] + "..."

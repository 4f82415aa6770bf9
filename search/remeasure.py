"""Remeasuring: is an exported file, fetched from wherever, as fast on its device as was recorded?

Knows exported folders and the study's unpruned model; nothing of fronts or registries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.artifact import Artifact
from profiles.device import Device
from profiles.measure import compare
from profiles.quiet import UNKNOWN_SKEW
from profiles.runner.files import model_digest
from profiles.timing import Comparison

from .bench import Shop
from .exported import read_metrics
from .storage import SearchError
from .studyfile import StudyFile
from .workspace import Workspace


@dataclass(frozen=True)
class Remeasured:
    """A latency measured again.

    Attributes:
        latency_ms, ci_ms: now, scaled by the unpruned model as every latency of the study is.
        recorded_ms, recorded_ci_ms: as the trial measured them.
    """

    latency_ms: float
    ci_ms: tuple[float, float]
    recorded_ms: float
    recorded_ci_ms: tuple[float, float]

    @property
    def agrees(self) -> bool:
        """Whether the two 95% intervals meet."""
        return self.ci_ms[0] <= self.recorded_ci_ms[1] and self.recorded_ci_ms[0] <= self.ci_ms[1]

    @property
    def inside(self) -> bool:
        """Whether the new median lies within the recorded interval: more than `agrees` asks, and more than a
        noisy machine can always give.
        """
        return self.recorded_ci_ms[0] <= self.latency_ms <= self.recorded_ci_ms[1]

    def to_json(self) -> dict[str, Any]:
        return {
            "latency_ms": self.latency_ms,
            "latency_ci_ms": list(self.ci_ms),
            "recorded_ms": self.recorded_ms,
            "recorded_ci_ms": list(self.recorded_ci_ms),
            "inside": self.inside,
            "agrees": self.agrees,
        }


def against_unpruned(shop: Shop, artifact: Artifact, device: Device) -> Comparison:
    """Measure an artifact in turns with the study's unpruned model, as the study file says.

    Raises: as `profiles.measure.compare`.
    """
    section, profile = shop.study.measure, shop.shelf.profile(device, device.fingerprint)
    return compare(
        device,
        artifact,
        shop.baseline(device),
        target=section.target,
        limit_s=section.limit_s,
        skew=profile.skew if profile else UNKNOWN_SKEW,
    )


def remeasure(
    study: StudyFile, device: str, folder: Path, *, notice: Callable[[str], None] = print
) -> Remeasured:
    """Measure an exported folder's file on the device, in turns with the study's unpruned model.

    Raises:
        SearchError: the device or the unpruned model is another one than the recorded one.
        ValueError: a file is not the recorded one.
        DeviceError: the device is gone.
    """
    metrics, target = read_metrics(folder), study.device(device).device()
    if target.fingerprint != metrics["fingerprint"]:
        raise SearchError(
            f"the latency of {folder.name} was recorded on {metrics['fingerprint']}, and {device} is "
            f"{target.fingerprint}; numbers of different devices do not compare"
        )
    # The first is the device's own; what `--also` added comes behind it.
    path = folder / next(iter(metrics["artifacts"]))
    shape = tuple(metrics["input_shape"])
    artifact = Artifact(path, target.runtime, target.precision, shape, model_digest(path), ())
    shop = Shop(study, Workspace(study.folder), notice=notice)
    if shop.task.model_key != metrics["model_key"]:
        raise SearchError(
            f"{folder.name} was pruned from another model than {study.source.name} names (its key is "
            f"{metrics['model_key'][:12]}, that model's {shop.task.model_key[:12]}), so the study's unpruned "
            "model says nothing of its latency"
        )
    done = against_unpruned(shop, artifact, target)
    unpruned_ms, recorded = metrics["baseline"]["latency_ms"], metrics["latency_ci_ms"]
    low, high = done.ratio_ci
    result = Remeasured(
        done.ratio * unpruned_ms,
        (low * unpruned_ms, high * unpruned_ms),
        metrics["latency_ms"],
        (recorded[0], recorded[1]) if recorded else (metrics["latency_ms"], metrics["latency_ms"]),
    )
    now, then = result.ci_ms, result.recorded_ci_ms
    notice(
        f"measured again: {result.latency_ms:.2f} ms ({now[0]:.2f} to {now[1]:.2f}), "
        f"recorded {result.recorded_ms:.2f} ms ({then[0]:.2f} to {then[1]:.2f}); it lies "
        f"{'inside' if result.inside else 'outside'} the recorded interval, and the two "
        f"{'meet' if result.agrees else 'do not meet'}"
    )
    return result

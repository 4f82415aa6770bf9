"""What is kept of a study, and under which keys: scores, loss curves, block scores, profiles.

Looks up and never computes. Knows of the task only the keys of its model and its data, so that what is kept
can be read where neither is opened.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from objectives.task import TaskKeys
from profiles.cache import Cache
from profiles.device import Device
from profiles.latency_profile import LatencyProfile

from .criteria import rescored_data_key, scores_data_key
from .depth import Block
from .groups import ChannelGroups
from .plan import PruningPlan
from .scores import ChannelScores
from .sections import Choices
from .sensitivity import LossCurves
from .studyfile import StudyFile
from .workspace import Workspace

_log = logging.getLogger("paretoprune")

#: Called with a line about something long that begins or was found done.
Notice = Callable[[str], None]
Key = Mapping[str, Any]


@dataclass(frozen=True)
class Shelf:
    """The caches of one study.

    Attributes:
        keys: of the study's model and data.
    """

    study: StudyFile
    workspace: Workspace
    keys: TaskKeys
    notice: Notice = _log.info

    @cached_property
    def cache(self) -> Cache:
        return Cache(self.workspace.cache)

    # -- scores

    @property
    def criteria(self) -> tuple[str, ...]:
        """Every criterion that a trial of this study may ask for."""
        criterion = self.study.search.criterion
        return criterion.choices if isinstance(criterion, Choices) else (criterion,)

    @property
    def calibration(self) -> dict[str, Any]:
        """The settings that scores are computed with."""
        section = self.study.calibration
        return {
            "images": section.images,
            "batch": section.batch,
            "loss": section.loss,
            "seed": self.study.seed,
        }

    def scores_key(self, criterion: str, gone: PruningPlan | None = None) -> str:
        """What scores depend on besides the model; those of what a plan leaves, on the plan too."""
        if gone is None:
            return scores_data_key(criterion, self.keys, **self.calibration)
        return rescored_data_key(self.keys, gone, criterion, self.calibration)

    def scores_path(self, criterion: str, data_key: str) -> Path:
        name = hashlib.sha256((self.keys.model_key + data_key).encode()).hexdigest()[:24]
        return self.workspace.cache / "scores" / f"{criterion}-{name}.safetensors"

    def scores(self, criterion: str, gone: PruningPlan | None = None) -> ChannelScores | None:
        """Scores that are kept; None where there are none that can be used."""
        data_key = self.scores_key(criterion, gone)
        path = self.scores_path(criterion, data_key)
        if not path.exists():
            return None
        try:
            kept = ChannelScores.load(path)
        except ValueError as error:
            self.notice(f"scores: cache refused ({error}); computing again")
            return None
        if (kept.criterion, kept.model_key, kept.data_key) != (criterion, self.keys.model_key, data_key):
            self.notice(
                f"scores: the cached {criterion} belong to another model or other data; computing again"
            )
            return None
        return kept

    # -- blocks

    def block_scores_key(self, blocks: Sequence[Block]) -> Key:
        return {
            "blocks": [block.name for block in blocks],
            "model_key": self.keys.model_key,
            "data_key": scores_data_key("taylor", self.keys, **self.calibration),
        }

    def block_scores(self, blocks: Sequence[Block]) -> dict[str, float] | None:
        """The kept scores of these blocks; empty for none."""
        if not blocks:
            return {}
        key = self.block_scores_key(blocks)
        return self.cache.get("blocks", key, lambda data: {str(k): float(v) for k, v in data.items()})

    # -- loss curves

    @property
    def curve_criteria(self) -> tuple[str, ...]:
        """Every criterion whose loss curves a trial of this study may ask for."""
        allocation = self.study.search.allocation
        words = allocation.choices if isinstance(allocation, Choices) else (allocation,)
        return self.criteria if "sensitivity" in words else ()

    @property
    def curve_images(self) -> int:
        return self.study.calibration.curve_images or self.study.calibration.images

    @property
    def curve_batch(self) -> int:
        return min(self.study.calibration.batch, self.curve_images)

    def curves_key(self, scores: ChannelScores, groups: ChannelGroups) -> Key:
        images, batch = self.curve_images, self.curve_batch
        return {
            "criterion": scores.criterion,
            "model_key": self.keys.model_key,
            "data_key": scores_data_key("taylor", self.keys, images=images, batch=batch, loss="task"),
            "order": scores.data_key,
            "groups": [group.name for group in groups.groups],
            "min_channels": self.study.search.min_channels,
        }

    def curves(self, scores: ChannelScores, groups: ChannelGroups) -> LossCurves | None:
        """Loss curves in the order of these scores, whole or what an interruption left of them."""
        return self.cache.get("curves", self.curves_key(scores, groups), LossCurves.from_json)

    # -- profiles

    def profile_key(self, device: Device, fingerprint: str) -> Key:
        search, variants = self.study.search, {}
        if self.study.profile.model == "fitted":  # to variants in which these layers were narrowed
            variants = {
                "include": list(search.include),
                "exclude": list(search.exclude),
                "min_channels": search.min_channels,
            }
        return {
            "model_key": self.keys.model_key,
            "input_shape": list(self.keys.input_shape),
            "fingerprint": fingerprint,
            "device": device.to_json(),
            **self.study.profile.model_dump(),
            **variants,
        }

    def profile(self, device: Device, fingerprint: str) -> LatencyProfile | None:
        """The kept profile of a device as this fingerprint names it; asks no device."""
        return self.cache.get("profile", self.profile_key(device, fingerprint), LatencyProfile.from_json)

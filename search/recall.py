"""What was found when the task was last opened, kept so that a plan needs neither the model nor the device.

Opening a model takes seconds, a plan takes milliseconds. What is kept holds for as long as no file changes
that it was read from: the model, the data, and the user's code that built the model. Computes nothing anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from objectives.digest import loaded_code, stamp
from profiles.cache import Cache
from profiles.device import Device

from .depth import Block
from .evidence import Evidence
from .groups import ChannelGroups
from .plan import PruningPlan
from .scores import ChannelScores
from .shelf import Key, Notice, Shelf
from .studyfile import StudyFile
from .workspace import Workspace

_log = logging.getLogger("paretoprune")

#: What reads models, follows their channels or names what was found.
_LIBRARIES = ("paretoprune", "torch", "torchvision", "torch-pruning", "ultralytics")


@dataclass(frozen=True, eq=False)
class Recalled:
    """A task as it was when it was last opened.

    Attributes:
        model_key, data_key, input_shape: as of `objectives.task.Task`.
        groups: within the study's include and exclude.
        blocks: what can go as a whole; empty where the study searches no depth.
    """

    model_key: str
    data_key: str
    input_shape: tuple[int, int, int, int]
    groups: ChannelGroups
    blocks: tuple[Block, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "model_key": self.model_key,
            "data_key": self.data_key,
            "input_shape": list(self.input_shape),
            "groups": self.groups.to_json(),
            "blocks": [[block.name, list(block.layers)] for block in self.blocks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recalled:
        batch, channels, height, width = data["input_shape"]
        return cls(
            data["model_key"],
            data["data_key"],
            (batch, channels, height, width),
            ChannelGroups.from_json(data["groups"]),
            tuple(Block(name, tuple(layers)) for name, layers in data["blocks"]),
        )


def remember(
    study: StudyFile, workspace: Workspace, task: Recalled, sources: list[Path], since: float
) -> None:
    """Keep what was found, with a stamp of everything that it was read from.

    Args:
        sources: files and folders that the task was read from.
        since: when it began to be opened, in seconds of the epoch. Nothing is kept where a source is newer:
            what was read may be older than what lies there now.
    """
    watched = sorted({str(path) for path in [*sources, *loaded_code()]})
    seen = stamp(map(Path, watched))
    if seen.newest < since:
        payload = {"watched": watched, "stamp": seen.digest, "task": task.to_json()}
        Cache(workspace.cache).put("task", _task_key(study), payload)


def recall(study: StudyFile, workspace: Workspace) -> Recalled | None:
    """What was found when the task was last opened, None where it would have to be opened again."""

    def load(payload: Mapping[str, Any]) -> tuple[list[str], str, Recalled]:
        return payload["watched"], payload["stamp"], Recalled.from_json(payload["task"])

    kept = Cache(workspace.cache).get("task", _task_key(study), load)
    if kept is None:
        return None
    watched, seen, task = kept
    return task if stamp(map(Path, watched)).digest == seen else None


def remember_device(workspace: Workspace, device: Device) -> None:
    """Keep what a device's machine was, when it was last asked."""
    cache, key = Cache(workspace.cache), device.to_json()
    if cache.get("device", key, lambda data: data["fingerprint"]) != device.fingerprint:
        cache.put("device", key, {"fingerprint": device.fingerprint})


def recall_evidence(
    study: StudyFile,
    device: Device,
    workspace: Workspace,
    *,
    rescore: Callable[[str, PruningPlan], ChannelScores],
    notice: Notice = _log.info,
) -> Evidence | None:
    """What plans for a device are made from, all of it from the caches; None where anything is missing.

    The device is not asked: the profile is that of the machine as it was when it was last asked.

    Args:
        rescore: scores of what a plan leaves, for those that no cache holds.
    """
    task = recall(study, workspace)
    fingerprint = Cache(workspace.cache).get(
        "device", device.to_json(), lambda data: str(data["fingerprint"])
    )
    if task is None or fingerprint is None:
        return None
    shelf = Shelf(study, workspace, task, notice)
    profile, block_scores = shelf.profile(device, fingerprint), shelf.block_scores(task.blocks)
    scores = {criterion: kept for criterion in shelf.criteria if (kept := shelf.scores(criterion))}
    if profile is None or block_scores is None or len(scores) < len(shelf.criteria):
        return None
    curves = {
        criterion: measured
        for criterion in shelf.curve_criteria
        if (measured := shelf.curves(scores[criterion], task.groups)) and measured.is_whole
    }
    if len(curves) < len(shelf.curve_criteria):
        return None
    return Evidence(
        device=device,
        model_key=task.model_key,
        groups=task.groups,
        scores=scores,
        profile=profile,
        min_channels=study.search.min_channels,
        seed=study.seed,
        curves=curves,
        blocks=task.blocks,
        block_scores=block_scores,
        rescore=lambda criterion, plan: shelf.scores(criterion, plan) or rescore(criterion, plan),
    )


def _task_key(study: StudyFile) -> Key:
    """Everything in the study file that decides what is found, and what finds it."""
    described = study.model if isinstance(study.model, str) else study.model.model_dump(mode="json")
    return {
        "model": described,
        "data": study.data,
        "imgsz": study.imgsz,
        "folder": str(study.source.parent.resolve()),
        "include": list(study.search.include),
        "exclude": list(study.search.exclude),
        "depth": study.search.depth != 0.0,
        "libraries": {name: version(name) for name in _LIBRARIES},
    }

"""What a study's trials were measured under, and what of it differs: numbers of others do not compare.

Knows no storage and no trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .result import brief
from .space import searched_keys
from .studyfile import StudyFile

if TYPE_CHECKING:
    from objectives.task import Task
    from profiles.device import Device

    from .trial import Bench


def conditions_of_trials(study: StudyFile, bench: Bench) -> dict[str, Any]:
    """Everything that a device's trials must have in common."""
    return {
        **conditions_of(bench.task, bench.device),
        "finetune": study.finetune.model_dump(mode="json", exclude={"device", "threads"}),
        "fingerprint": bench.fingerprint,
        # Samplers cannot learn from trials that lack a key, and the storage takes no other choices.
        "searched keys": searched_keys(study.search),
    }


def conditions_of(task: Task, device: Device) -> dict[str, Any]:
    """What every number of a device's study depends on, besides the training and the machine."""
    return {
        "model": task.model_key,
        "data": task.data_key,
        "input_shape": list(task.input_shape),
        # Not its address: one machine has several, and the fingerprint tells machines apart.
        "device": replace(device, host=None).to_json(),
    }


def changed(known: Mapping[str, Any], conditions: Mapping[str, Any]) -> str:
    """What differs, in words; what is not on record, as in a study of an earlier version, is not compared."""
    return "; ".join(
        f"{key} was {brief(known[key])}, is {brief(now)}"
        for key, now in conditions.items()
        if key in known and known[key] != now
    )

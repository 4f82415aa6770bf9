"""What a study has found on its devices so far, read from its stores and its output folder.

Reads only: starts no trial, measures nothing, asks no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .front import ParetoFront
from .recorder import open_tracker
from .reference import Reference, known_references
from .result import TrialResult
from .space import parameter_importances
from .storage import SearchError, open_storage
from .study import DeviceStudy
from .studyfile import StudyFile
from .workspace import Workspace

MODEL_SUFFIXES = (".onnx", ".pt2", ".xml", ".param")


@dataclass(frozen=True)
class Found:
    """What a study found on one device.

    Attributes:
        results: every finished trial, by number.
        references: stock models to compare the front with.
        importances: objective to parameter to importance; empty while there are too few trials.
        runs: trial number to `run_id` and `model`, as far as they are known.
        conditions: what the study was begun under on this device, see `DeviceStudy.claim`.
    """

    front: ParetoFront
    results: tuple[TrialResult, ...]
    references: tuple[Reference, ...] = ()
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    runs: dict[int, dict[str, str]] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """The device's entry of `paretoprune front --json`."""
        shown = [r.to_json(self.front.baseline) for r in self.references]
        return {**self.front.to_json(self.runs), "knee": self.front.knee.trial, "references": shown}

    @property
    def run_ids(self) -> dict[int, str]:
        return {number: run["run_id"] for number, run in self.runs.items() if "run_id" in run}


def find(study: StudyFile, device: str) -> Found | None:
    """What is found on one device, without MLflow's run ids; None before its unpruned model is measured."""
    workspace = Workspace(study.folder)
    device_study = DeviceStudy.existing(study, device, open_storage(study, workspace), workspace)
    front = None if device_study is None else device_study.front()
    if device_study is None or front is None:
        return None
    results = tuple(device_study.results())
    runs = {}
    for result in results:
        model = model_file(workspace.trial(device, result.trial))
        if model is not None:
            runs[result.trial] = {"model": model.relative_to(study.folder).as_posix()}
    return Found(
        front,
        results,
        known_references(study, workspace, device, front.fingerprint),
        parameter_importances(device_study.optuna),
        runs,
        device_study.conditions,
    )


def fronts_of(study: StudyFile, devices: Sequence[str]) -> dict[str, Found]:
    """What a study has found so far, with the run of each trial.

    Raises:
        SearchError: none of the devices has a front yet.
    """
    found = {name: f for name in devices if (f := find(study, name)) is not None}
    if not found:
        raise SearchError(
            f"study {study.name} has no front yet for {', '.join(devices)}; run paretoprune search "
            f"{study.source.name} first"
        )
    tracker = open_tracker(study)
    for name, f in found.items():
        for number, run_id in tracker.run_ids(name).items():
            f.runs.setdefault(number, {})["run_id"] = run_id
    return found


def model_file(folder: Path) -> Path | None:
    """The exported model in a trial's folder."""
    return next((p for p in sorted(folder.glob("model.*")) if p.suffix in MODEL_SUFFIXES), None)

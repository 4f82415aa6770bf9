"""References: stock models to compare a front with, a smaller one or a smaller image size.

A reference is measured as a trial is, from its exported file in turns with the unpruned model, or its numbers
are given in the study file and shown as such. None is ever a point of a front, which holds trials only.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from objectives.size import count_macs, count_params
from objectives.task import Task
from profiles.artifact import export_artifact, open_artifact
from profiles.cache import Cache
from profiles.device import Device
from profiles.lock import host_lock

from .bench import Shop
from .model_files import check_parity
from .open_task import open_task
from .remeasure import against_unpruned
from .result import TrialResult, brief
from .sections import ModelSection, ReferenceSection
from .storage import SearchError
from .studyfile import StudyFile, StudyFileError
from .workspace import Workspace

FORMAT_VERSION = 1
_KIND = "reference"


@dataclass(frozen=True)
class Reference:
    """A model to compare with, on one device.

    Attributes:
        name: as the study file calls it.
        accuracy: the task's metric, at the model's own input size.
        ratio, ratio_ci: its latency over the unpruned model's, measured in turns; None where numbers were
            given.
        p90_ratio: its 90th percentile over the unpruned model's median.
        latency_ms: as given; None where it was measured.
        params, macs: for one input; None where numbers were given.
        imgsz: side of its input, pixels.
    """

    name: str
    accuracy: float
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None
    p90_ratio: float | None = None
    latency_ms: float | None = None
    params: int | None = None
    macs: int | None = None
    imgsz: int | None = None

    @property
    def is_measured(self) -> bool:
        return self.ratio is not None

    def to_json(self, baseline: TrialResult) -> dict[str, Any]:
        """What is shown beside a front.

        Args:
            baseline: the front's unpruned model, whose latency scales a measured ratio as it does a trial's.
        """
        assert baseline.latency_ms is not None
        unpruned_ms = baseline.latency_ms
        latency_ms = self.latency_ms if self.ratio is None else self.ratio * unpruned_ms
        assert latency_ms is not None
        low, high = self.ratio_ci or (None, None)
        return {
            "name": self.name,
            "measured": self.is_measured,
            "accuracy": self.accuracy,
            "latency_ms": latency_ms,
            "latency_p90_ms": None if self.p90_ratio is None else self.p90_ratio * unpruned_ms,
            "speedup": unpruned_ms / latency_ms,
            "speedup_ci": [1 / high, 1 / low] if low and high else None,
            "params": self.params,
            "macs": self.macs,
            "imgsz": self.imgsz,
        }

    def record(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_record(cls, data: Mapping[str, Any]) -> Reference:
        """Read what `record` gave.

        Raises:
            ValueError: another format version.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}")
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        if known.get("ratio_ci") is not None:
            known["ratio_ci"] = tuple(known["ratio_ci"])
        return cls(**known)


def open_references(study: StudyFile) -> dict[str, Task]:
    """The tasks of the references that are to be measured, by name.

    Raises:
        StudyFileError: a model cannot be used, all faults at once.
    """
    tasks: dict[str, Task] = {}
    faults = []
    for section in study.references:
        if section.is_given:
            continue
        changes = {"model": section.model or study.model, "imgsz": section.imgsz or study.imgsz}
        try:
            tasks[section.name] = open_task(study.model_copy(update=changes))
        except ValueError as error:
            faults.append(f"references.{section.name}: {error}")
    if faults:
        raise StudyFileError(study.source.name, faults)
    return tasks


def measure_references(
    study: StudyFile, shop: Shop, tasks: Mapping[str, Task], devices: Sequence[str]
) -> None:
    """Measure what the cache lacks, on each device; one that cannot be measured costs the others nothing.

    Args:
        tasks: what `open_references` returned.

    Raises:
        SearchError: a device is gone, or an exported reference does not compute what its model computes; all
            faults at once.
    """
    faults: list[str] = []
    causes: list[Exception] = []
    for name in devices:
        for section in _of(study, name):
            if section.is_given or section.name not in tasks:
                continue
            try:
                _measure_once(study, shop, section, tasks[section.name], name)
            except Exception as error:
                causes.append(error)
                faults.append(f"reference {section.name} on {name}: {type(error).__name__}: {brief(error)}")
    if faults:
        raise SearchError("; ".join(faults)) from causes[0]


def _measure_once(study: StudyFile, shop: Shop, section: ReferenceSection, task: Task, name: str) -> None:
    device, cache = study.device(name).device(), Cache(shop.workspace.cache)
    key = _key(study, section, name, device.fingerprint)
    shop.workspace.device(name).mkdir(parents=True, exist_ok=True)
    # Of two workers that share a folder one measures, and the other one finds it done.
    with FileLock(shop.workspace.device(name) / ".reference.lock"):
        if cache.get(_KIND, key, Reference.from_record) is None:
            shop.notice(f"reference: measuring {section.name} on {name}")
            cache.put(_KIND, key, _measure(shop, section.name, task, device).record())


def known_references(
    study: StudyFile, workspace: Workspace, device: str, fingerprint: str
) -> tuple[Reference, ...]:
    """A device's references as far as they are known: given, or measured on this very machine before."""
    found = []
    for section in _of(study, device):
        if section.is_given:
            assert section.accuracy is not None
            found.append(Reference(section.name, section.accuracy, latency_ms=section.latency_ms))
            continue
        key = _key(study, section, device, fingerprint)
        cached = Cache(workspace.cache).get(_KIND, key, Reference.from_record)
        if cached is not None:
            found.append(cached)
    return tuple(found)


def _of(study: StudyFile, device: str) -> list[ReferenceSection]:
    return [section for section in study.references if section.device in (None, device)]


def _key(study: StudyFile, section: ReferenceSection, device: str, fingerprint: str) -> dict[str, Any]:
    """What a measured reference depends on; from files alone, so that looking opens no model."""
    settings = study.device(device).device()
    # Of narrow arithmetic the accuracy was once the model's own, which such a file does not reach.
    judged = {} if settings.precision == "fp32" else {"accuracy": "of the artifact"}
    return {
        **judged,
        "name": section.name,
        "reference": _digest(section.model),
        "reference_imgsz": section.imgsz,
        "model": _digest(study.model),
        "data": _digest(study.data),
        "imgsz": study.imgsz,
        "device": settings.to_json(),
        "fingerprint": fingerprint,
    }


def _digest(model: ModelSection | str | None) -> Any:
    """What stands for a model or data file in a key: its content where it is a file."""
    if isinstance(model, ModelSection):
        return {**model.model_dump(mode="json"), "weights": _digest(model.weights)}
    if model is None or not Path(model).is_file():
        return model
    return hashlib.sha256(Path(model).read_bytes()).hexdigest()


def _measure(shop: Shop, name: str, task: Task, device: Device) -> Reference:
    model = task.load_model()
    is_narrow = device.precision != "fp32"
    # Only its numbers are wanted. A folder of this process: the lock above is for one machine's workers.
    with tempfile.TemporaryDirectory(dir=shop.workspace.device(device.name), prefix="reference-") as folder:
        with host_lock("export"):
            artifact = export_artifact(
                task.deployable(model), device, Path(folder), task.input_shape, task.metadata(model)
            )
            check_parity(task.predictor(model), artifact, task)
        with host_lock("evaluation"):  # as a trial is judged: what ships is what is right or wrong
            predict = open_artifact(artifact, device.threads) if is_narrow else task.predictor(model)
            accuracy = task.evaluate(predict)
        comparison = against_unpruned(shop, artifact, device)
    return Reference(
        name,
        accuracy=accuracy,
        ratio=comparison.ratio,
        ratio_ci=comparison.ratio_ci,
        p90_ratio=comparison.ratio * comparison.candidate.p90_ms / comparison.candidate.p50_ms,
        params=count_params(model),
        macs=count_macs(model, task.input_shape),
        imgsz=task.input_shape[-1],
    )

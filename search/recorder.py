"""The recorder: tells MLflow what a search does, trial by trial, and where a study's MLflow is.

Between the search, which knows no store, and tracking, which knows no study file.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .front import ParetoFront
from .result import TrialResult
from .studyfile import StudyFile
from .tracking import Tracker
from .workspace import Workspace

if TYPE_CHECKING:
    from .trial import Bench

PACKAGES = ("torch", "onnxruntime", "openvino", "ncnn", "optuna", "mlflow", "torch-pruning", "ultralytics")


def tracking_place(study: StudyFile) -> tuple[str, Path | None]:
    """(tracking URI, artifact folder); a server keeps artifacts itself."""
    workspace = Workspace(study.folder)
    if study.tracking_uri is None:
        return workspace.default_tracking_uri, workspace.artifacts
    return study.tracking_uri, None if study.tracking_uri.startswith("http") else workspace.artifacts


def open_tracker(study: StudyFile, notice: Callable[[str], None] | None = None) -> Tracker:
    """The study's tracker; records that could not be sent earlier are sent."""
    uri, artifacts = tracking_place(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    return Tracker.open(uri, study.name, artifacts, outbox=study.folder / "outbox", notice=notice)


class MlflowRecorder:
    """Tells MLflow every finished trial; what a killed process did not tell is told at the next start.

    Attributes:
        begun: the devices that have a run by now, in the order in which they began.
    """

    def __init__(self, study: StudyFile, tracker: Tracker) -> None:
        self._study = study
        self._tracker = tracker
        self.begun: list[str] = []

    def begin(self, bench: Bench, earlier: Sequence[tuple[TrialResult, Path]]) -> None:
        study = self._study
        limits = study.limits_of(bench.device.name).model_dump(exclude_none=True)
        self._tracker.device_run(
            bench.device.name,
            fingerprint=bench.fingerprint,
            tags={
                "runtime": bench.device.runtime,
                "optuna.study": f"{study.name}.{bench.device.name}",
                **{f"version.{name}": found for name, found in versions().items()},
            },
            params={
                "runtime": bench.device.runtime,
                "threads": bench.device.threads,
                "precision": bench.device.precision,
                "imgsz": bench.task.input_shape[-1],
                "trials": study.trials,
                "sampler": study.search.sampler,
                "seed": study.seed,
                "epochs": study.finetune.epochs,
                "metric": bench.task.metric,
                **{f"limits.{name}": value for name, value in limits.items()},
            },
            datasets={"model": bench.task.model_key, "data": bench.task.data_key},
        )
        self.begun.append(bench.device.name)
        self._tracker.sync(earlier)

    def record(self, result: TrialResult, folder: Path, front: ParetoFront | None) -> None:
        """Tell a trial and, so that tags and hypervolume keep up with the trials, the front with it."""
        self._tracker.log_trial(result, folder)
        if front is not None:
            self._tracker.log_front(front, {})


def versions() -> dict[str, str]:
    """Python's and the packages' versions that a result may depend on."""
    found = {name: v for name in PACKAGES if (v := installed_version(name))}
    return {"python": platform.python_version(), **found}


def installed_version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(package)
    except ImportError:  # PackageNotFoundError
        return None

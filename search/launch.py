"""Launching a study and looking at what it found: the search, its record in MLflow, and the report, put
together.

What the commands, the quickstart and a notebook all call.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import Shop
from .front import ParetoFront
from .loop import Progress, run_search
from .plan import PruningPlan
from .report import layer_widths, write_figure, write_report
from .result import TrialResult
from .study import DeviceStudy, SearchError, open_storage
from .studyfile import StudyFile
from .tables import profile_json
from .tracking import Tracker
from .workspace import Workspace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from profiles.latency_profile import LatencyProfile

    from .trial import Bench

_VERSIONS = ("torch", "onnxruntime", "openvino", "ncnn", "optuna", "mlflow", "torch-pruning", "ultralytics")


def tracking_place(study: StudyFile) -> tuple[str, Path | None]:
    """(tracking URI, artifact folder); a server keeps artifacts itself."""
    workspace = Workspace(study.folder)
    if study.tracking_uri is None:
        return workspace.default_tracking_uri, workspace.artifacts
    return study.tracking_uri, None if study.tracking_uri.startswith("http") else workspace.artifacts


def open_tracker(study: StudyFile, progress: Progress | None = None) -> Tracker:
    """The study's tracker; records that could not be sent earlier are sent."""
    uri, artifacts = tracking_place(study)
    study.folder.mkdir(parents=True, exist_ok=True)
    notice = progress.notice if progress else None
    return Tracker.open(uri, study.name, artifacts, outbox=study.folder / "outbox", notice=notice)


class MlflowRecorder:
    """Tells MLflow every finished trial; what a killed process did not tell is told at the next start."""

    def __init__(self, study: StudyFile, tracker: Tracker):
        self._study = study
        self._tracker = tracker

    def begin(self, bench: Bench, earlier: Sequence[tuple[TrialResult, Path]]) -> None:
        study = self._study
        self._tracker.device_run(
            bench.device.name,
            fingerprint=bench.fingerprint,
            tags={
                "runtime": bench.device.runtime,
                "optuna.study": f"{study.name}.{bench.device.name}",
                "python": platform.python_version(),
                **{f"version.{name}": found for name in _VERSIONS if (found := installed_version(name))},
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
            },
            datasets={"model": bench.task.model_key, "data": bench.task.data_key},
        )
        self._tracker.sync(earlier)

    def record(self, result: TrialResult, folder: Path) -> None:
        self._tracker.log_trial(result, folder)


def launch(
    study: StudyFile, devices: Sequence[str], *, trials: int, timeout_s: float | None, progress: Progress
) -> dict[str, ParetoFront]:
    """Run a study, or go on with it, and record it.

    Args:
        devices: names of devices of the study file.
        trials: finished trials wanted per device, earlier ones counted in, the unpruned model not.

    Returns:
        Device name to front.

    Raises:
        StudyFileError: model or data cannot be used.
        SearchError: the search cannot go on.
    """
    shop = Shop(study, Workspace(study.folder), notice=progress.notice)
    _ = shop.task  # what is wrong with model or data is said before anything is opened
    tracker = open_tracker(study, progress)
    recorder = MlflowRecorder(study, tracker)
    interrupted = True
    try:
        fronts = run_search(
            study, shop, devices, trials=trials, timeout_s=timeout_s, progress=progress, recorder=recorder
        )
        interrupted = False
    finally:
        for name in devices:
            found = _find(study, name)
            if found is not None:
                record_front(study, shop, tracker, found)
                tracker.end_device(name, interrupted=interrupted)
    return fronts


@dataclass(frozen=True)
class Found:
    """What a study found on one device."""

    front: ParetoFront
    results: tuple[TrialResult, ...]
    runs: dict[int, dict[str, str]]

    @property
    def document(self) -> dict[str, Any]:
        return self.front.to_json(self.runs)


def _find(study: StudyFile, device: str) -> Found | None:
    workspace = Workspace(study.folder)
    device_study = DeviceStudy.existing(study, device, open_storage(study, workspace), workspace)
    if device_study is None:
        return None
    front = device_study.front()
    if front is None:
        return None
    runs: dict[int, dict[str, str]] = {}
    for result in device_study.results():
        model = next(
            (p for p in workspace.trial(device, result.trial).glob("model.*") if p.suffix in MODEL_SUFFIXES),
            None,
        )
        if model is not None:
            runs[result.trial] = {"model": model.relative_to(study.folder).as_posix()}
    return Found(front, tuple(device_study.results()), runs)


MODEL_SUFFIXES = (".onnx", ".pt2", ".xml", ".param")


def fronts_of(study: StudyFile, devices: Sequence[str]) -> dict[str, Found]:
    """What a study has found so far, with the run of each trial.

    Raises:
        SearchError: none of the devices has a front yet.
    """
    found = {name: f for name in devices if (f := _find(study, name)) is not None}
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


def write_study_report(study: StudyFile, found: dict[str, Found], path: Path) -> Path:
    """Write the self-contained page of all devices in `found`."""
    shop = Shop(study, Workspace(study.folder))
    profiles = {}
    widths: dict[str, dict[int, dict[str, tuple[int, int]]]] = {}
    for name, f in found.items():
        cached = shop.cached_profile(study.device(name).device(), f.front.fingerprint)
        if cached is not None:
            profiles[name] = profile_json(cached)
        widths[name] = {p.trial: plan_widths(study, name, p.trial, cached) for p in f.front.points}
    return write_report(
        path,
        study.name,
        [f.front for f in found.values()],
        {name: f.results for name, f in found.items()},
        profiles=profiles,
        widths=widths,
        limits={name: study.limits_of(name).model_dump(exclude_none=True) for name in found},
        run_ids={
            name: {n: r["run_id"] for n, r in f.runs.items() if "run_id" in r} for name, f in found.items()
        },
        study_file=study.source.name,
    )


def plan_widths(
    study: StudyFile, device: str, trial: int, profile: LatencyProfile | None
) -> dict[str, tuple[int, int]]:
    """Layer to channels before and after, of a trial whose plan is on this machine; empty where it is not.

    With a profile the layers that keep everything are listed too, in the network's order.
    """
    path = Workspace(study.folder).trial(device, trial) / "plan.json"
    original = None if profile is None else {layer.layer: layer.out_channels for layer in profile.layers}
    return layer_widths(PruningPlan.load(path), original) if path.exists() else {}


def record_front(study: StudyFile, shop: Shop, tracker: Tracker, found: Found) -> None:
    """Put a device's front and figures on its parent run."""
    with tempfile.TemporaryDirectory(dir=study.folder) as scratch:
        files = {}
        for name, figure in figures(study, shop, found).items():
            path = Path(scratch) / f"{name}.html"
            write_figure(path, figure)
            files[f"figures/{name}.html"] = path
        tracker.log_front(found.front, files)


def figures(study: StudyFile, shop: Shop, found: Found) -> dict[str, Figure]:
    """Every figure of one device, by name."""
    from . import figures as draw

    device = found.front.device
    limits = {device: study.limits_of(device).model_dump(exclude_none=True)}
    result = {
        "front": draw.front_figure([found.front], {device: found.results}, limits=limits),
        "hypervolume": draw.hypervolume_figure({device: found.results}),
        "beta_ratio_accuracy": draw.beta_ratio_figure(found.results, "accuracy"),
        "beta_ratio_speedup": draw.beta_ratio_figure(found.results, "speedup"),
        "predicted_measured": draw.predicted_measured_figure(found.results),
    }
    profile = shop.cached_profile(study.device(device).device(), found.front.fingerprint)
    points = [p for p in found.front.points if p.trial > 0]
    shares = {f"trial {p.trial}": w for p in points if (w := plan_widths(study, device, p.trial, profile))}
    if shares:
        result["pruned_share"] = draw.pruned_share_figure(shares)
    if profile is not None:
        result["profile"] = draw.profile_figure(profile_json(profile))
    return result


def installed_version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return version(package)
    except ImportError:  # PackageNotFoundError
        return None

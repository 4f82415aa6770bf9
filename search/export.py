"""Export: one point of a front becomes a folder that can be shipped, checked before it is written.

    DIR/  the runtime's model file (model.onnx, model.pt2, ...), model.pt (for detection, opens with YOLO),
    plan.json, metrics.json

Replays the trial's plan on the original weights, loads the recovered state, and compares the artifact with
the PyTorch model on real images and with the accuracy that the trial recorded. Of MLflow it knows the model
registry, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiles.artifact import open_artifact

from .bench import Shop
from .judge import PARITY_TOLERANCE, check_parity, export_model
from .launch import fronts_of, installed_version, open_tracker
from .plan import PruningPlan
from .prune import check_widths, prune
from .result import TrialResult
from .study import SearchError
from .studyfile import StudyFile
from .workspace import Workspace, write_json

FORMAT_VERSION = 1
_REGISTERED_PATH = "export"
#: How far the accuracy through the exported artifact may lie from the recorded one.
ACCURACY_TOLERANCE = 0.005
_PARITY_IMAGES = 8
_PACKAGES = ("torch", "onnxruntime", "openvino", "ncnn", "ultralytics", "torch-pruning", "optuna", "mlflow")


def export_best(
    study: StudyFile,
    device: str,
    *,
    max_latency_ms: float | None = None,
    min_accuracy: float | None = None,
    trial: int | None = None,
    out: Path | None = None,
    register: bool = False,
    notice: Callable[[str], None] = print,
) -> Path:
    """Export one point of a device's front; nothing said, its knee.

    Args:
        out: the folder to write; default `exports/<device>` in the output folder. Replaced as a whole, and
            only after the checks.
        register: also make it the `champion` of `<study>.<device>` in MLflow's registry.

    Returns:
        The folder.

    Raises:
        NoSuchPointError: no point of the front is within the limits.
        SearchError: the trial's files are not on this machine, or the artifact fails a check.
    """
    workspace = Workspace(study.folder)
    found = fronts_of(study, [device])[device]
    chosen = found.front.choose(max_latency_ms=max_latency_ms, min_accuracy=min_accuracy, trial=trial)
    source = workspace.trial(device, chosen.trial)
    notice(
        f"{device}: trial {chosen.trial}, accuracy {chosen.accuracy:.4f}, {chosen.latency_ms:.2f} ms "
        f"({chosen.speedup:.2f}x)"
    )
    shop = Shop(study, workspace, notice=notice)
    model, plan = restore(shop, source, chosen)
    target = out or workspace.folder / "exports" / device
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "export"
        folder.mkdir()
        artifact = export_model(model, shop.task, study.device(device).device(), folder)
        try:
            parity = check_parity(model, artifact, shop.task, _PARITY_IMAGES)
        except ValueError as error:
            raise SearchError(f"export refused: {error}") from error
        notice(
            f"outputs equal PyTorch's within {parity:.1e} (allowed "
            f"{PARITY_TOLERANCE[artifact.precision]:g}) on "
            f"{_PARITY_IMAGES} images"
        )
        accuracy = shop.task.evaluate(open_artifact(artifact, threads=study.device(device).threads))
        assert chosen.accuracy is not None
        if not abs(accuracy - chosen.accuracy) <= ACCURACY_TOLERANCE:
            raise SearchError(
                f"export refused: {shop.task.metric} through the artifact must be within "
                f"{ACCURACY_TOLERANCE} of the recorded "
                f"{chosen.accuracy:.4f}, got {accuracy:.4f}"
            )
        notice(f"{shop.task.metric} through the artifact {accuracy:.4f}, recorded {chosen.accuracy:.4f}")
        plan.save(folder / "plan.json")
        run_id = found.runs.get(chosen.trial, {}).get("run_id")
        metrics = metrics_json(study, chosen, shop, run_id, parity=parity, accuracy=accuracy, folder=folder)
        write_json(folder / "metrics.json", metrics)
        if target.exists():
            shutil.rmtree(target)
        folder.replace(target)
    if register:
        notice(register_export(study, device, target, run_id))
    return target


def restore(shop: Shop, folder: Path, result: TrialResult) -> tuple[Any, PruningPlan]:
    """The recovered model of a trial: plan replayed on the original weights, recovered state loaded.

    Raises:
        SearchError: the files are not here, or are not the recorded ones.
    """
    from safetensors.torch import load_file

    if not (folder / "model.safetensors").exists() or not (folder / "plan.json").exists():
        raise SearchError(
            f"the files of trial {result.trial} are not in this output folder; it ran on another machine, "
            "or they were deleted. "
            f"Its MLflow run holds them"
        )
    plan = PruningPlan.load(folder / "plan.json")
    if plan.digest != result.plan_digest:
        raise SearchError(
            f"plan.json of trial {result.trial} is not the recorded one; it was edited or replaced"
        )
    model = shop.task.load_model()
    if not plan.is_empty:
        prune(model, plan, shop.task.settle)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    check_widths(model, plan)
    return model.eval(), plan


def metrics_json(
    study: StudyFile,
    result: TrialResult,
    shop: Shop,
    run_id: str | None,
    *,
    parity: float,
    accuracy: float,
    folder: Path,
) -> dict[str, Any]:
    """What was measured, on what, and how to run it again."""
    return {
        "format_version": FORMAT_VERSION,
        "study": study.name,
        "device": result.device,
        "fingerprint": result.fingerprint,
        "trial": result.trial,
        "run_id": run_id,
        "asked": result.asked.to_json(),
        "metric": shop.task.metric,
        "accuracy": result.accuracy,
        "accuracy_of_artifact": accuracy,
        "latency_ms": result.latency_ms,
        "latency_p90_ms": result.latency_p90_ms,
        "latency_ci_ms": _latency_interval(result),
        "speedup": result.speedup,
        "speedup_ci": list(result.speedup_ci) if result.speedup_ci else None,
        "params": result.params,
        "macs": result.macs,
        "input_shape": list(shop.task.input_shape),
        "parity": {
            "largest_relative_difference": parity,
            "allowed": PARITY_TOLERANCE[study.device(result.device).precision],
            "images": _PARITY_IMAGES,
        },
        "model_key": shop.task.model_key,
        "data_key": shop.task.data_key,
        "plan_digest": result.plan_digest,
        "files": {p.name: _sha256(p) for p in sorted(folder.iterdir()) if p.is_file()},
        "versions": {name: found for name in _PACKAGES if (found := installed_version(name))},
        "command": f"paretoprune export {study.source.name} --device {result.device} --trial {result.trial}",
    }


def _latency_interval(result: TrialResult) -> list[float] | None:
    """The speedup's 95% interval as latencies."""
    if result.speedup_ci is None or result.latency_ms is None or result.speedup is None:
        return None
    unpruned = result.latency_ms * result.speedup
    return [unpruned / result.speedup_ci[1], unpruned / result.speedup_ci[0]]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def register_export(study: StudyFile, device: str, folder: Path, run_id: str | None) -> str:
    """Log an exported folder to its trial's run and register it.

    The version gets the alias `champion`; the version that had it becomes `previous`.

    Args:
        run_id: MLflow's run of the exported trial.

    Returns:
        A line that says what was registered.

    Raises:
        SearchError: the trial has no run in MLflow yet.
        TrackingError: MLflow does not answer.
    """
    from mlflow.exceptions import MlflowException

    if run_id is None:
        raise SearchError(
            f"trial to register has no run in MLflow; run paretoprune search {study.source.name} to send "
            "what waits"
        )
    client = open_tracker(study).client()
    name = f"{study.name}.{device}"
    client.log_artifacts(run_id, str(folder), _REGISTERED_PATH)
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, tags={"study": study.name, "device": device})
    try:
        before: str | None = client.get_model_version_by_alias(name, "champion").version
    except MlflowException:
        before = None
    version = client.create_model_version(
        name, source=f"runs:/{run_id}/{_REGISTERED_PATH}", run_id=run_id
    ).version
    if before is not None:
        client.set_registered_model_alias(name, "previous", before)
    client.set_registered_model_alias(name, "champion", version)
    return f"registered {name} version {version} as champion" + (
        f", version {before} is previous" if before else ""
    )


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of an exported folder."""
    data: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return data

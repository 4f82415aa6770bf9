"""Export: one point of a front becomes a folder that can be shipped, checked before it is written.

    DIR/  the runtime's model file (model.onnx, model.pt2, ...), model.pt (for detection, opens with YOLO),
    plan.json, metrics.json, MODEL_CARD.md

Replays the trial's plan on the original weights, loads the recovered state, and compares each artifact with
the PyTorch model on real images, with the accuracy that the trial recorded and with the structure of the
file that it measured. Knows no registry.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.device import RUNTIMES, Device
from profiles.lock import host_lock
from profiles.structure import structure_digest

from .bench import Shop
from .conditions import changed, conditions_of
from .exported import CARD, FORMAT_VERSION, METRICS, check_target, replace_folder, sha256
from .found import Found, fronts_of
from .front import ParetoFront
from .model_card import model_card
from .model_files import PARITY_TOLERANCE, check_parity, export_model
from .plan import PruningPlan
from .prune import check_widths, prune
from .recorder import open_tracker, versions
from .result import TrialResult
from .review import study_arguments
from .storage import SearchError
from .studyfile import StudyFile, StudyFileError
from .uri import publishable
from .workspace import Workspace, write_json

#: How far the accuracy through an exported artifact may lie from the recorded one.
ACCURACY_TOLERANCE = 0.005
_PARITY_IMAGES = 8

Notice = Callable[[str], None]


def export_best(
    study: StudyFile,
    device: str,
    *,
    max_latency_ms: float | None = None,
    min_accuracy: float | None = None,
    trial: int | None = None,
    out: Path | None = None,
    also: Sequence[str] = (),
    notice: Notice = print,
) -> Path:
    """Export one point of a device's front; nothing said, its knee.

    Args:
        out: the folder to write; default `exports/<device>` in the output folder. Replaced as a whole, and
            only after the checks.
        also: further runtimes to write the model for, in fp32; checked like the device's own, not timed.

    Returns:
        The folder.

    Raises:
        NoSuchPointError: no point of the front is within the limits.
        SearchError: the study file is not what the trial ran under, its files cannot be had, or an artifact
            fails a check.
        StudyFileError: `also` names no runtime, or `out` holds other files.
    """
    unknown = sorted(set(also) - set(RUNTIMES))
    if unknown:
        raise StudyFileError("--also", [f"must be one of {', '.join(RUNTIMES)}, got {', '.join(unknown)}"])
    workspace = Workspace(study.folder)
    target = out or workspace.folder / "exports" / device
    check_target(target)
    found = fronts_of(study, [device])[device]
    chosen = found.front.choose(max_latency_ms=max_latency_ms, min_accuracy=min_accuracy, trial=trial)
    notice(
        f"{device}: trial {chosen.trial}, accuracy {chosen.accuracy:.4f}, {chosen.latency_ms:.2f} ms "
        f"({chosen.speedup:.2f}x)"
    )
    shop = Shop(study, workspace, notice=notice)
    check_conditions(shop, found)
    model, plan = restore(shop, trial_folder(study, found, chosen, notice), chosen)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "export"
        folder.mkdir()
        own = study.device(device).device()
        # Not while another process measures on this machine: all of this keeps every core busy.
        with host_lock("export"):
            artifacts = [export_model(model, shop.task, own, folder)]
            for runtime in dict.fromkeys(r for r in also if r != own.runtime):
                other = Device(name=f"{device}-{runtime}", runtime=runtime)
                artifacts.append(
                    export_artifact(
                        shop.task.deployable(model), other, folder, shop.task.input_shape,
                        shop.task.metadata(model),
                    )
                )  # fmt: skip
            check_structure(artifacts[0], chosen)
            checks = {a.path.name: _check(a, model, shop, chosen, own.threads, notice) for a in artifacts}
        plan.save(folder / "plan.json")
        metrics = metrics_json(study, chosen, found, shop, plan=plan, checks=checks, folder=folder)
        write_json(folder / METRICS, metrics)
        card = model_card(metrics, dict(shop.task.metadata(model)), plan)
        (folder / CARD).write_text(card, encoding="utf-8")
        replace_folder(folder, target)
    return target


def check_choice(
    choice: Mapping[str, object],
    further: Mapping[str, object],
    *,
    from_registry: bool,
    alias: str | None = None,
) -> None:
    """Refuse options that contradict each other.

    Args:
        choice: option to value of those that choose a point, None where not given.
        further: the others that only make sense for an export of our own.
        alias: of a registered model, None where not given.

    Raises:
        StudyFileError: a trial and limits, anything but an alias together with `--from-registry`, or an alias
            without it.
    """
    asked = [option for option, value in choice.items() if value is not None]
    if from_registry and (words := [*asked, *(option for option, value in further.items() if value)]):
        raise StudyFileError(
            "--from-registry", [f"fetches what was registered, so takes no {', '.join(words)}"]
        )
    if alias is not None and not from_registry:
        raise StudyFileError(
            "--alias", [f"names a registered model, so {alias!r} needs --from-registry beside it"]
        )
    if "--trial" in asked and len(asked) > 1:
        raise StudyFileError("--trial", [f"names one point, so takes no {', '.join(asked[1:])}"])


def check_conditions(shop: Shop, found: Found) -> None:
    """Make sure that the study file still describes what was measured.

    Its training may have changed: that is over, and what it was is on record.

    Raises:
        SearchError: the trials had another model, other data, another input, or the device other settings.
    """
    device = found.front.device
    now = conditions_of(shop.task, shop.study.device(device).device())
    what = changed(found.conditions, now)
    if what:
        raise SearchError(
            f"study {shop.study.name} on {device} ran under other conditions ({what}), so its trials are not "
            "what this study file describes; use the study file and the --set overrides of the search"
        )


def check_structure(artifact: Artifact, chosen: TrialResult) -> None:
    """Hold the file that ships against the one that was measured, weights apart.

    Raises:
        SearchError: it is another computation, whose latency nobody knows.
    """
    recorded, found = chosen.details.get("structure"), structure_digest(artifact)
    if recorded is not None and found is not None and found != recorded:
        raise SearchError(
            f"export refused: {artifact.path.name} must have the structure of the file that trial "
            f"{chosen.trial} measured ({recorded[:12]}), got {found[:12]}, so the recorded latency is not "
            "this file's; export with the versions that the search ran with (tags version.* of the device's "
            "run in MLflow), or search again under another name"
        )


def _check(
    artifact: Artifact, model: Any, shop: Shop, chosen: TrialResult, threads: int, notice: Notice
) -> dict[str, float]:
    """Compare an artifact with the model's outputs and with the recorded accuracy.

    Raises:
        SearchError: one of them is too far off.
    """
    try:
        parity = check_parity(shop.task.predictor(model), artifact, shop.task, _PARITY_IMAGES)
    except ValueError as error:
        raise SearchError(f"export refused: {error}") from error
    notice(
        f"{artifact.path.name}: outputs equal PyTorch's within {parity:.1e} (allowed "
        f"{PARITY_TOLERANCE[artifact.precision]:g}) "
        f"on {_PARITY_IMAGES} images"
    )
    accuracy = shop.task.evaluate(open_artifact(artifact, threads=threads))
    assert chosen.accuracy is not None
    if not abs(accuracy - chosen.accuracy) <= ACCURACY_TOLERANCE:
        raise SearchError(
            f"export refused: {shop.task.metric} through the artifact must be within "
            f"{ACCURACY_TOLERANCE} of the recorded {chosen.accuracy:.4f}, got {accuracy:.4f}"
        )
    notice(
        f"{artifact.path.name}: {shop.task.metric} through the artifact {accuracy:.4f}, "
        f"recorded {chosen.accuracy:.4f}"
    )
    return {"accuracy": accuracy, "largest_relative_difference": parity}


def trial_folder(study: StudyFile, found: Found, result: TrialResult, notice: Notice) -> Path:
    """The folder with a trial's plan and weights; fetched from its MLflow run where another machine ran it.

    Raises:
        SearchError: they are neither here nor in MLflow.
    """
    folder = Workspace(study.folder).trial(result.device, result.trial)
    missing = [n for n in ("plan.json", "model.safetensors") if not (folder / n).exists()]
    if missing:
        run_id = found.run_ids.get(result.trial)
        if run_id is None or not open_tracker(study, notice).fetch(run_id, missing, folder):
            raise SearchError(
                f"trial {result.trial}: {' and '.join(missing)} must be in this output folder or in the "
                "trial's MLflow run, and are in neither; export on the machine that ran it"
            )
        notice(f"trial {result.trial} ran elsewhere: its files were fetched from MLflow")
    return folder


def restore(shop: Shop, folder: Path, result: TrialResult) -> tuple[Any, PruningPlan]:
    """The recovered model of a trial: plan replayed on the original weights, recovered state loaded.

    Raises:
        SearchError: the files are not the recorded ones.
    """
    from safetensors.torch import load_file

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
    found: Found,
    shop: Shop,
    *,
    plan: PruningPlan,
    checks: dict[str, dict[str, float]],
    folder: Path,
) -> dict[str, Any]:
    """What was measured, on what, and how to make it again; without paths of this machine and secrets."""
    front: ParetoFront = found.front
    own = next(iter(checks.values()))
    words = [*study_arguments(study), "--device", result.device]
    command = shlex.join(["paretoprune", "export", *words, "--trial", str(result.trial)])
    uri = study.tracking_uri or ""
    document: dict[str, Any] = publishable(
        {
            "format_version": FORMAT_VERSION,
            "study": study.name,
            "device": result.device,
            "device_settings": replace(study.device(result.device).device(), host=None).to_json(),
            "fingerprint": result.fingerprint,
            "trial": result.trial,
            "run_id": found.run_ids.get(result.trial),
            "asked": result.asked.to_json(),
            # As the search had it: this study file may say otherwise by now.
            "finetune": found.conditions.get("finetune") or study.finetune.model_dump(mode="json"),
            "epochs_trained": max(len(result.epochs) - 1, 0),
            "blocks": list(plan.blocks),
            "metric": shop.task.metric,
            "accuracy": result.accuracy,
            "accuracy_of_artifact": own["accuracy"],
            "latency_ms": result.latency_ms,
            "latency_p90_ms": result.latency_p90_ms,
            "latency_ci_ms": latency_interval_ms(result),
            "speedup": result.speedup,
            "speedup_ci": list(result.speedup_ci) if result.speedup_ci else None,
            "params": result.params,
            "macs": result.macs,
            "baseline": {
                key: getattr(front.baseline, key)
                for key in ("accuracy", "latency_ms", "latency_p90_ms", "params", "macs")
            },
            "input_shape": list(shop.task.input_shape),
            "parity": {
                "largest_relative_difference": own["largest_relative_difference"],
                "allowed": PARITY_TOLERANCE[study.device(result.device).precision],
                "images": _PARITY_IMAGES,
            },
            "artifacts": checks,
            "model_key": shop.task.model_key,
            "data_key": shop.task.data_key,
            "plan_digest": result.plan_digest,
            "finished_at": result.finished_at,
            "versions": versions(),
            "command": command,
        },
        uri,
    )
    # Last and as they are: a digest holds no secret, whatever its letters spell.
    document["files"] = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.is_file()}
    return document


def latency_interval_ms(result: TrialResult) -> list[float] | None:
    """The speedup's 95% interval as latencies.

    The unpruned model's speedup is 1 by definition; what is known of its latency is how far two copies of it
    came out apart.
    """
    if result.speedup_ci is None or result.latency_ms is None or result.speedup is None:
        return None
    copies = result.details.get("copies_ratio_ci")
    if copies:
        return [result.latency_ms * min(1.0, copies[0]), result.latency_ms * max(1.0, copies[1])]
    unpruned = result.latency_ms * result.speedup
    return [unpruned / result.speedup_ci[1], unpruned / result.speedup_ci[0]]

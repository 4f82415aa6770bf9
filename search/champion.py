"""The champion: a device's exported model that ships, put into MLflow's model registry and fetched again.

Between exported folders, which know no registry, and the registry, which knows no study.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from .exported import CARD, check_target, read_metrics, replace_folder
from .recorder import open_tracker
from .storage import SearchError
from .studyfile import StudyFile
from .tracking import fetch_model, register_model
from .workspace import Workspace


def model_name(study: StudyFile, device: str) -> str:
    """The registered model's name, `<study>.<device>`."""
    return f"{study.name}.{device}"


def register_export(study: StudyFile, device: str, folder: Path) -> str:
    """Put an exported folder into the registry as the device's champion; the one before becomes `previous`.

    Returns:
        A line that says what was registered.

    Raises:
        SearchError: the trial has no run in MLflow yet.
        TrackingError: MLflow does not answer or refuses.
    """
    metrics = read_metrics(folder)
    if metrics["run_id"] is None:
        raise SearchError(
            f"trial {metrics['trial']} must have a run in MLflow to be registered, and has none; run "
            f"paretoprune search {study.source.name} to send what waits, then export again"
        )
    # Not the files' bytes: a checkpoint carries the date of its writing.
    same = (
        metrics["run_id"],
        metrics["plan_digest"],
        metrics["files"]["model.safetensors"],
        *metrics["artifacts"],
    )
    shown = ("trial", "metric", "accuracy", "latency_ms", "latency_p90_ms", "speedup", "fingerprint")
    done = register_model(
        open_tracker(study).client(),
        model_name(study, device),
        folder,
        metrics["run_id"],
        identity=hashlib.sha256("\n".join(same).encode()).hexdigest(),
        tags={key: str(metrics[key]) for key in (*shown, "plan_digest", "model_key", "data_key")},
        description=(folder / CARD).read_text(encoding="utf-8"),
    )
    if not done.is_new:
        return f"{done.name} version {done.version} is this very model and stays champion"
    before = f", version {done.previous} is previous" if done.previous else ""
    return f"registered {done.name} version {done.version} as champion{before}"


def fetch_export(
    study: StudyFile,
    device: str,
    *,
    alias: str = "champion",
    out: Path | None = None,
    notice: Callable[[str], None] = print,
) -> Path:
    """Fetch a registered model's folder: on any machine, without the study's model, data or trials.

    Args:
        out: the folder to write; default `exports/<device>` in the output folder. Replaced as a whole, and
            only once every file is here and is the recorded one.

    Returns:
        The folder.

    Raises:
        TrackingError: MLflow does not answer, or there is no such model.
        SearchError: what came is not what was registered.
        StudyFileError: `out` holds other files.
    """
    target = out or Workspace(study.folder).folder / "exports" / device
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    client = open_tracker(study, notice).client()
    name = model_name(study, device)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        fetched = fetch_model(client, name, alias, Path(scratch))
        try:
            metrics = read_metrics(fetched.folder)
        except (OSError, ValueError, KeyError) as error:
            raise SearchError(f"{name} version {fetched.version} is damaged: {error}") from error
        if not fetched.is_whole:  # the digests above are of the other files
            raise SearchError(
                f"{name} version {fetched.version} is damaged: metrics.json or {CARD} must be as registered, "
                "or a file was added or lost; export and register it again"
            )
        notice(
            f"{name} version {fetched.version} ({alias}): trial {metrics['trial']}, {metrics['metric']} "
            f"{metrics['accuracy']:.4f}, {metrics['latency_ms']:.2f} ms on {metrics['fingerprint']}"
        )
        replace_folder(fetched.folder, target)
    return target

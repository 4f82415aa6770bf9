"""MLflow's model registry: an exported folder becomes the champion of `<study>.<device>`.

The second of the two modules that know MLflow; runs and metrics are `search.tracking`'s.
"""

from __future__ import annotations

from pathlib import Path

from .launch import open_tracker
from .study import SearchError
from .studyfile import StudyFile

ARTIFACT_PATH = "export"


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
        raise SearchError(f"trial to register has no run in MLflow; run paretoprune search {study.source.name} to send what waits")
    client = open_tracker(study).client()
    name = f"{study.name}.{device}"
    client.log_artifacts(run_id, str(folder), ARTIFACT_PATH)
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, tags={"study": study.name, "device": device})
    try:
        before: str | None = client.get_model_version_by_alias(name, "champion").version
    except MlflowException:
        before = None
    version = client.create_model_version(name, source=f"runs:/{run_id}/{ARTIFACT_PATH}", run_id=run_id).version
    if before is not None:
        client.set_registered_model_alias(name, "previous", before)
    client.set_registered_model_alias(name, "champion", version)
    return f"registered {name} version {version} as champion" + (f", version {before} is previous" if before else "")

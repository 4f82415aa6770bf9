"""The model registry: exported folders as versions of a registered model, found again by alias.

An alias `champion` for the version that ships, `previous` for the one before it. Knows exported folders by
their files alone; how they were made and checked is not its business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..outbox import first_line
from ..uri import redact
from .store import TrackingError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION, PREVIOUS = "champion", "previous"
_IDENTITY = "paretoprune.identity"
_DESCRIPTION_CHARACTERS = 4900  # MLflow takes 5000
_DIGEST_CHARACTERS = 12
#: How MLflow says that a model is not there, and that an alias is not: of an existing model's unknown alias
#: its stores say that the parameter is invalid.
_NO_MODEL, _NO_ALIAS = "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"


@dataclass(frozen=True)
class Registered:
    """The champion's version, the previous one's, and whether the champion is new."""

    name: str
    version: str
    previous: str | None
    is_new: bool


@dataclass(frozen=True)
class Fetched:
    """A version that was downloaded.

    Attributes:
        is_whole: whether its files, every one of them, are those that were registered.
    """

    version: str
    folder: Path
    is_whole: bool


def register_model(
    client: MlflowClient,
    name: str,
    folder: Path,
    run_id: str,
    *,
    identity: str,
    tags: Mapping[str, str],
    description: str,
) -> Registered:
    """Make a folder the champion of a registered model; the champion so far becomes `previous`.

    Registering the champion again changes nothing: `previous` stays a model one can go back to.

    Args:
        run_id: the run that keeps the files.
        identity: equal for folders that hold the same model.
        tags: of the version.
        description: of the version, Markdown.

    Raises:
        TrackingError: MLflow refuses.
    """
    from mlflow.exceptions import MlflowException

    # By content: a version's files must not change when the same trial is exported again with other ones.
    place = f"export/{_content(folder)}"
    try:
        try:
            client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != _NO_MODEL:
                raise
            study, _, device = name.rpartition(".")
            client.create_registered_model(
                name, tags={"study": study, "device": device}, description=f"Pruned models for {device}"
            )
        before = _version(client, name, CHAMPION)
        if before is not None and client.get_model_version(name, before).tags.get(_IDENTITY) == identity:
            return Registered(name, before, _version(client, name, PREVIOUS), is_new=False)
        client.log_artifacts(run_id, str(folder), place)
        if (folder / "model.onnx").is_file():
            _log_flavour(client, run_id, place)
        version = client.create_model_version(
            name,
            source=f"runs:/{run_id}/{place}",
            run_id=run_id,
            tags={**tags, _IDENTITY: identity},
            description=description[:_DESCRIPTION_CHARACTERS],
        ).version
        if before is not None:
            client.set_registered_model_alias(name, PREVIOUS, before)
        client.set_registered_model_alias(name, CHAMPION, version)
    except MlflowException as error:
        raise TrackingError(f"{name} cannot be registered: {redact(first_line(error))}") from None
    return Registered(name, str(version), before, is_new=True)


def fetch_model(client: MlflowClient, name: str, alias: str, scratch: Path) -> Fetched:
    """Download the version that has an alias into a folder inside `scratch`.

    Raises:
        TrackingError: there is no such model or alias, MLflow refuses, or its files cannot be had.
    """
    from mlflow.exceptions import MlflowException

    try:
        version = _aliased(client, name, alias)
    except MlflowException as error:
        raise TrackingError(
            f"the registry cannot be asked for {name} with the alias {alias}: {redact(first_line(error))}"
        ) from None
    if version is None:
        raise TrackingError(
            f"the registry must hold {name} with the alias {alias}, and does not; put it there with "
            "paretoprune export --register, from a machine with the study's files"
        )
    source = str(version.source)
    run_id, _, place = source.removeprefix("runs:/").partition("/")
    if not source.startswith("runs:/") or not place:
        raise TrackingError(f"{name} version {version.version} was not registered by paretoprune")
    try:
        folder = Path(client.download_artifacts(run_id, place, str(scratch)))
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"the files of {name} version {version.version} cannot be fetched from run {run_id}: "
            f"{redact(first_line(error))}"
        ) from None
    (folder / "MLmodel").unlink(missing_ok=True)  # only for those who load it through MLflow
    return Fetched(str(version.version), folder, _content(folder) == place.rpartition("/")[2])


def _aliased(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version with an alias, None where there is none.

    Raises:
        MlflowException: MLflow could not tell.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in (_NO_MODEL, _NO_ALIAS):
            return None
        raise


def _version(client: MlflowClient, name: str, alias: str) -> str | None:
    found = _aliased(client, name, alias)
    return None if found is None else str(found.version)


def _content(folder: Path) -> str:
    """The start of a sha256 over names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:_DIGEST_CHARACTERS]


def _log_flavour(client: MlflowClient, run_id: str, place: str) -> None:
    """The record by which `mlflow.onnx.load_model` and `mlflow.pyfunc.load_model` find `model.onnx`."""
    from importlib.metadata import version

    from mlflow.models import Model

    providers = ["CPUExecutionProvider"]
    model = Model(artifact_path=place, run_id=run_id)
    model.add_flavor("onnx", onnx_version=version("onnx"), data="model.onnx", providers=providers)
    model.add_flavor("python_function", loader_module="mlflow.onnx", data="model.onnx")
    client.log_text(run_id, model.to_yaml(), f"{place}/MLmodel")

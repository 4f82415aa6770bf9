"""Where a study lives: opening it, and one error for a storage that is away. Knows no trials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna

from .studyfile import StudyFile
from .turns import turns
from .uri import redact
from .workspace import Workspace


class SearchError(RuntimeError):
    """A search cannot go on; the message says why and what to do."""


class StorageAwayError(SearchError):
    """The storage does not answer at present."""


@contextmanager
def answering() -> Iterator[None]:
    """Turn what a storage that is away raises into one error.

    Raises:
        StorageAwayError: it did not answer what the block asked.
    """
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, OperationalError) as error:
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise StorageAwayError(f"the storage does not answer: {redact(lines[0])}") from error


def open_storage(study: StudyFile, workspace: Workspace) -> optuna.storages.BaseStorage:
    """Optuna's storage of a study: the study file's, or SQLite in the output folder.

    Raises:
        SearchError: it cannot be opened; no password is shown.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = workspace.storage_url(study.storage)
    if url.startswith("sqlite"):
        workspace.folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:
        options = {"pool_pre_ping": True}
    try:
        # Two workers that join an empty database at one moment would both make its tables.
        with turns(url, "tables", workspace.folder)():
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except Exception as error:
        text = str(error).strip().splitlines()
        said = redact(text[0]) if text else type(error).__name__
        raise SearchError(f"storage {redact(url)} cannot be opened: {said}") from error

"""The store: one experiment of an MLflow database or server, reached through `MlflowClient` alone.

No global active run, no autologging, no telemetry. Finds, makes and fills runs; knows neither what a trial or
a front is nor what its caller does while nobody answers.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import Timeout

from ..outbox import AwayError, first_line, is_away, probe
from ..uri import redact

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_SCHEMES = "a database (sqlite:///..., postgresql://..., mysql://...) or a server (http://..., https://...)"


class TrackingError(ValueError):
    """The tracking address is wrong or refuses us: something for the user to mend, not to wait for."""


class Store:
    """An experiment in MLflow, found or made when it is first needed.

    Args:
        uri: a database or server address.
        experiment: its name.
        artifact_folder: where a database store keeps files; a server (http) decides that for itself.
        lock: held while a database may be making its tables.
        say: told in one line what the user did not ask for.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifact_folder: Path | None,
        *,
        lock: Callable[[], AbstractContextManager[Any]],
        say: Callable[[str], None],
    ) -> None:
        self.experiment = experiment
        self._uri = uri
        self._artifacts = artifact_folder
        self._lock = lock
        self._say = say
        self._client: MlflowClient | None = None
        self._experiment_id = ""

    @property
    def shown_uri(self) -> str:
        """The address without user name and password."""
        return redact(self._uri)

    def connect(self) -> MlflowClient:
        """The client, with the experiment found or made.

        Raises:
            AwayError: nobody answers.
            TrackingError: the address is wrong or refuses us.
        """
        probe(self._uri)
        if self._client is not None:
            return self._client
        _quieten()
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        try:
            with warnings.catch_warnings(), self._lock():
                # MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
                warnings.filterwarnings(
                    "ignore", message="The ``noload`` loader strategy", category=DeprecationWarning
                )
                client = MlflowClient(tracking_uri=self._uri)
                self._experiment_id = self._find_experiment(client)
        except Exception as error:
            if is_away(error) or isinstance(error, Timeout):
                raise AwayError(first_line(error)) from None
            # ImportError: no driver for a database.
            known = (MlflowException, OSError, ValueError, ImportError)
            if isinstance(error, known) or "sqlalchemy" in type(error).__module__:
                raise TrackingError(
                    f"tracking_uri must be {_SCHEMES} that lets us in, got {self.shown_uri}: "
                    f"{redact(first_line(error), self._uri)}"
                ) from None
            raise
        self._client = client
        return client

    def _find_experiment(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        location, name = None, self.experiment
        if self._artifacts is not None and urlsplit(self._uri).scheme not in ("http", "https"):
            location = str(self._artifacts.resolve())
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                tags = {"paretoprune.study": name, "mlflow.experimentKind": "custom_model_development"}
                return str(client.create_experiment(name, artifact_location=location, tags=tags))
            except MlflowException:
                found = client.get_experiment_by_name(name)  # another worker was faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
            self._say(f"the deleted experiment {name} was restored, its runs with it")
        return str(found.experiment_id)

    # -- runs

    def find(self, condition: str) -> Iterator[Run]:
        """The experiment's runs that satisfy a condition in MLflow's search language, oldest first."""
        client, token = self.connect(), None
        while True:
            page = client.search_runs(
                [self._experiment_id],
                condition,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def one_run(self, condition: str, make: Callable[[], Run]) -> Run:
        """The run that satisfies the condition, made where there is none.

        Two machines may make one at the same moment: both then see both, and the same one wins.
        """
        runs = list(self.find(condition))
        if not runs:
            make()
            runs = list(self.find(condition))
        first, *others = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
        for other in others:
            self.connect().delete_run(other.info.run_id)
        return first

    def create_run(self, name: str, tags: Mapping[str, str], start_ms: int | None = None) -> Run:
        return self.connect().create_run(self._experiment_id, start_ms, dict(tags), run_name=name)

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Iterable[tuple[str, float, int]] = (),
        at_ms: int | None = None,
    ) -> None:
        """Params, tags and metrics (name, value, step) of a run."""
        from mlflow.entities import Metric, Param, RunTag

        at_ms = round(time.time() * 1000) if at_ms is None else at_ms
        entities = [Metric(name, value, at_ms, step) for name, value, step in metrics]
        client = self.connect()
        client.log_batch(
            run_id,
            entities[:900],  # the server takes at most 1000 metrics a call
            [Param(k, v) for k, v in (params or {}).items()],
            [RunTag(k, v) for k, v in (tags or {}).items()],
            synchronous=True,
        )
        for start in range(900, len(entities), 900):
            client.log_batch(run_id, entities[start : start + 900], synchronous=True)

    def log_datasets(self, run_id: str, datasets: Mapping[str, str]) -> None:
        """Name to digest of what a run started from; the whole digest is the tag `digest.<name>`."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        inputs = []
        for name, digest in datasets.items():
            source = CodeDatasetSource(tags={})
            # MLflow allows a digest 36 characters.
            # MetaDataset lacks a member that its base declares abstract, which only a type checker minds.
            dataset = MetaDataset(source, name=name, digest=digest[:36])  # type: ignore[abstract]
            inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", name)]))
        if inputs:
            self.connect().log_inputs(run_id, inputs)
            self.log(run_id, tags={f"digest.{name}": digest for name, digest in datasets.items()})

    def upload(self, run_id: str, path: Path, name: str) -> None:
        """Keep a file with a run under a name that may hold folders; one that is gone is said to be."""
        if not path.is_file():
            self._say(f"{name} was not logged: the file is gone")
            return
        folder, _, base = name.rpartition("/")
        if base == path.name:
            self.connect().log_artifact(run_id, str(path), folder or None)
            return
        with tempfile.TemporaryDirectory() as scratch:  # MLflow takes an artifact's name from the file
            copy = shutil.copy(path, Path(scratch) / base)
            self.connect().log_artifact(run_id, str(copy), folder or None)


def quote(value: str) -> str:
    """A value for MLflow's search language, which has no escapes.

    Raises:
        ValueError: it holds both kinds of quotes.
    """
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return f'"{value}"'
    raise ValueError(f"a device's name must not hold both kinds of quotes, got {value!r}")


def _quieten() -> None:
    """No telemetry, nothing on stdout, no log lines, little patience; called before MLflow's first use."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # Without it every download draws a bar on the error stream.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Records that were not sent wait on disk, so MLflow's minutes of retries would only hold up the study.
    for name, value in (("MAX_RETRIES", "2"), ("BACKOFF_FACTOR", "1"), ("TIMEOUT", "60")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    import mlflow  # noqa: F401  (sets its log levels, which are overruled next)

    for name in ("mlflow", "alembic"):
        # Its error lines quote addresses with their passwords; the errors reach us as exceptions.
        logging.getLogger(name).setLevel(logging.CRITICAL)

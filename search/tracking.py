"""Tracking: what a study found, in MLflow. The only module that knows MLflow's runs, tags and metrics.

An experiment per study, a parent run per device, a child run per trial. Works through `MlflowClient` alone:
no global active run, no autologging, no telemetry. Every record goes through the outbox on disk, so a store
that does not answer costs nothing but the wait. Knows nothing of how a trial is run, of Optuna, or of what
the figures show.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import Timeout

from .front import ParetoFront
from .outbox import AwayError, Letter, Notice, Outbox, file_name, first_line, is_away, probe
from .result import TrialResult
from .run_record import (
    front_csv,
    front_note,
    front_rows,
    result_digest,
    trial_metrics,
    trial_params,
    trial_period_ms,
    trial_tags,
)
from .uri import publishable, redact

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

# What MLflow gets of a trial's folder; result.json is rewritten on the way, without paths and secrets.
TRIAL_FILES = ("plan.json", "artifact.json", "model.*")
STATUS = {"complete": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_SCHEMES = "a database (sqlite:///..., postgresql://..., mysql://...) or a server (http://..., https://...)"
_DIGEST = "paretoprune.result_digest"


class TrackingError(ValueError):
    """The tracking address is wrong or refuses us: something for the user to mend, not to wait for."""


class Tracker:
    """A study's place in MLflow.

    No `log_*` call raises for what the store does: a record that cannot be sent stays in the outbox, `notice`
    is told once, and the next call, `flush` or process sends it. Records are sent in order, a device before
    its trials and the trials before the front.
    """

    def __init__(
        self,
        tracking_uri: str,
        study: str,
        artifact_folder: Path | None,
        outbox: Path,
        notice: Notice | None = None,
    ) -> None:
        self.study = study
        self._uri = tracking_uri
        self._artifacts = artifact_folder
        self._outbox = Outbox(outbox, tracking_uri, notice)
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._devices: dict[str, dict[str, Any]] = {}
        self._described: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(
        cls,
        tracking_uri: str,
        study: str,
        artifact_folder: Path | None,
        *,
        outbox: Path,
        notice: Notice | None = None,
    ) -> Tracker:
        """Find or make the study's experiment, and send what an earlier process could not.

        Args:
            tracking_uri: a database or server address.
            study: the experiment's name.
            artifact_folder: where a database store keeps files; a server (http) decides that for itself.
            outbox: folder for records that wait.
            notice: told in one line, without secrets, when the store goes away, comes back or refuses a
                record. Default: a log warning.

        Raises:
            TrackingError: the address is of no known kind, cannot be opened, or refuses our credentials. A
                server that only does not answer raises nothing.
        """
        tracker = cls(tracking_uri, study, artifact_folder, outbox, notice)
        try:
            tracker._connect()
        except AwayError as error:
            tracker._outbox.say_away(error)
            return tracker
        tracker.flush()
        return tracker

    @property
    def shown_uri(self) -> str:
        """The tracking address without user name and password."""
        return redact(self._uri)

    @property
    def waiting(self) -> int:
        """Records that the store has not taken yet."""
        return len(self._outbox.pending())

    def client(self) -> MlflowClient:
        """MLflow's own client, for the model registry.

        Raises:
            TrackingError: the store does not answer or refuses us.
        """
        try:
            return self._connect()
        except AwayError as error:
            raise TrackingError(f"MLflow at {self.shown_uri} does not answer: {error}") from None

    def device_run(
        self,
        device: str,
        *,
        fingerprint: str,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        datasets: Mapping[str, str] | None = None,
    ) -> str | None:
        """The device's parent run, found again or made, and running from now on.

        Args:
            tags: inherited by the trials' runs too: `runtime`, versions, `optuna.study`.
            params: the study's settings for this device. MLflow never changes a param: one that differs from
                an earlier session becomes the tag `changed.<name>`.
            datasets: name to digest of the data and the model, shown as the run's inputs.

        Returns:
            The run's id, or None while the store does not answer.
        """
        record = publishable(
            {
                "device": device,
                "fingerprint": fingerprint,
                "tags": {k: str(v) for k, v in (tags or {}).items()},
                "params": {k: str(v) for k, v in (params or {}).items()},
                "datasets": dict(datasets or {}),
            },
            self._uri,
        )
        self._devices[device] = record
        return self._post("device", device, {"device": record})

    def log_trial(self, result: TrialResult, folder: Path) -> str | None:
        """A trial's child run, `trial-0007`. Logging one result twice leaves one run.

        Args:
            folder: the trial's folder; what TRIAL_FILES names of it is kept with the run.

        Returns:
            The run's id, or None while the store does not answer.

        Raises:
            ValueError: `device_run` was not called for the device.
        """
        return self._post("trial", self._key(result), self._trial_body(result, folder))

    def sync(self, results: Iterable[tuple[TrialResult, Path]]) -> int:
        """Log the results that the store lacks, after a process was killed before it logged; how many."""
        have: dict[str, dict[int, str]] = {}
        missing = 0
        for result, folder in results:
            if result.device not in have:
                have[result.device] = {
                    int(run.data.tags["optuna.trial_number"]): run.data.tags.get(_DIGEST, "")
                    for run in self._search(_trials_of(result.device))
                }
            body = self._trial_body(result, folder)
            if have[result.device].get(result.trial) != result_digest(body["result"]):
                self._outbox.put("trial", self._key(result), body)
                missing += 1
        self._outbox.deliver(self._send)
        return missing

    def log_front(self, front: ParetoFront, files: Mapping[str, Path], *, step: int | None = None) -> None:
        """The device's front: table, hypervolume, figures on the parent run, and every trial's `pareto` tag.

        Args:
            files: artifact path in the run (`figures/front.html`) to the file.
            step: of the hypervolume metric; default the number of trials logged so far.

        Raises:
            ValueError: `device_run` was not called for the device.
        """
        body = {
            "device": self._record(front.device),
            "front": publishable(front.to_json(), self._uri),
            "step": step,
            "files": {name: os.path.relpath(path, self._outbox.folder) for name, path in files.items()},
        }
        if self._post("front", front.device, body) is None:
            # The caller may remove its files; a front that waits keeps copies.
            body["files"] = self._copies(front.device, files)
            self._outbox.put("front", front.device, body)

    def end_device(self, device: str, *, interrupted: bool = False) -> None:
        """Close the parent run, so that it does not look like one that still runs; `device_run` reopens it.

        Raises:
            ValueError: `device_run` was not called for the device.
        """
        self._post(
            "end", device, {"device": self._record(device), "status": "KILLED" if interrupted else "FINISHED"}
        )

    def run_ids(self, device: str) -> dict[int, str]:
        """Trial number to run id of the device's logged trials; empty while the store does not answer."""
        runs = self._search(_trials_of(device))
        return {int(run.data.tags["optuna.trial_number"]): run.info.run_id for run in runs}

    def flush(self) -> int:
        """Send what waits, now; how many records went."""
        return len(self._outbox.deliver(self._send, force=True))

    # -- the way out: everything is written to the outbox, then sent from there

    def _record(self, device: str) -> dict[str, Any]:
        if device not in self._devices:
            have = ", ".join(sorted(self._devices)) or "none"
            raise ValueError(
                f"device_run must be called before anything is logged for {device!r}; called for: {have}"
            )
        return self._devices[device]

    def _copies(self, device: str, files: Mapping[str, Path]) -> dict[str, str]:
        kept = {}
        for name, path in files.items():
            place = Path("files", file_name(device), name)
            target = self._outbox.folder / place
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
                kept[name] = str(place)
            except OSError as error:
                self._outbox.say(f"{name} is not kept for MLflow: {first_line(error)}")
        return kept

    def _key(self, result: TrialResult) -> str:
        return f"{result.device}-{result.trial:06d}"

    def _trial_body(self, result: TrialResult, folder: Path) -> dict[str, Any]:
        # Through JSON text once: what is compared later must look the same before and after the disk.
        data = json.loads(json.dumps(publishable(result.to_json(), self._uri)))
        return {
            "device": self._record(result.device),
            "result": data,
            # Relative, so that a study folder can be moved while records wait in it.
            "folder": os.path.relpath(folder, self._outbox.folder),
        }

    def _post(self, kind: str, key: str, body: Mapping[str, Any]) -> str | None:
        path = self._outbox.put(kind, key, body)
        return self._outbox.deliver(self._send).get(path.name) if path else None

    # -- the store

    def _connect(self) -> MlflowClient:
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
            with warnings.catch_warnings(), self._outbox.lock():
                # MLflow's own tables use a loader that SQLAlchemy 2.1 calls deprecated.
                warnings.filterwarnings(
                    "ignore", message="The ``noload`` loader strategy", category=DeprecationWarning
                )
                client = MlflowClient(tracking_uri=self._uri)
                self._experiment = self._find_experiment(client)
        except Exception as error:
            if is_away(error) or isinstance(error, Timeout):
                raise AwayError(first_line(error)) from None
            known = (
                MlflowException,
                OSError,
                ValueError,
                ImportError,
            )  # the last one: no driver for a database
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

        location = None
        if self._artifacts is not None and urlsplit(self._uri).scheme not in ("http", "https"):
            location = str(self._artifacts.resolve())
        found = client.get_experiment_by_name(self.study)
        if found is None:
            try:
                tags = {"paretoprune.study": self.study, "mlflow.experimentKind": "custom_model_development"}
                return str(client.create_experiment(self.study, artifact_location=location, tags=tags))
            except MlflowException:
                found = client.get_experiment_by_name(self.study)  # another worker was faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
            self._outbox.say(f"the deleted experiment {self.study} was restored, its runs with it")
        return str(found.experiment_id)

    def _search(self, condition: str) -> list[Run]:
        """The experiment's runs that satisfy the condition, oldest first; none while the store is away."""
        try:
            return list(self._find(condition))
        except AwayError as error:
            self._outbox.say_away(error)
        except Exception as error:
            self._outbox.say(f"MLflow could not be asked: {first_line(error)}")
        return []

    def _find(self, condition: str) -> Iterator[Run]:
        client, token = self._connect(), None
        while True:
            page = client.search_runs(
                [self._experiment],
                condition,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def _one_run(self, condition: str, make: Callable[[], Run]) -> Run:
        """The run that satisfies the condition, made where there is none.

        Two machines may make one at the same moment: both then see both, and the same one wins.
        """
        runs = list(self._find(condition))
        if not runs:
            make()
            runs = list(self._find(condition))
        first, *others = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
        for other in others:
            self._connect().delete_run(other.info.run_id)
        return first

    # -- sending: each of these may be repeated after it broke off anywhere

    def _send(self, letter: Letter) -> str:
        """Send one record; the id of the run it went to."""
        record = letter.body["device"]
        parent = self._parent(record, reopen=letter.kind == "device")
        if letter.kind == "trial":
            return self._send_trial(
                record, parent, letter.body["result"], self._outbox.folder / letter.body["folder"]
            )
        if letter.kind == "front":
            self._send_front(record, parent, letter.body)
        elif letter.kind == "end":
            self._connect().set_terminated(parent, letter.body["status"])
        return parent

    def _parent(self, record: Mapping[str, Any], *, reopen: bool) -> str:
        client, device = self._connect(), record["device"]
        tags = {"paretoprune.study": self.study, "role": "device", "device": device}
        condition = f"tags.role = 'device' and tags.device = {_quote(device)}"
        run = self._one_run(
            condition, lambda: client.create_run(self._experiment, tags=tags, run_name=f"device {device}")
        )
        run_id = str(run.info.run_id)
        if reopen and run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        if self._described.get(device) != record:
            old = run.data.params
            new = {**record["tags"], **tags, "fingerprint": record["fingerprint"]}
            new |= {f"changed.{k}": v for k, v in record["params"].items() if old.get(k, v) != v}
            self._log(run_id, params={k: v for k, v in record["params"].items() if k not in old}, tags=new)
            self._log_datasets(run_id, record["datasets"])
            self._described[device] = dict(record)
        return run_id

    def _send_trial(
        self, record: Mapping[str, Any], parent: str, result: Mapping[str, Any], folder: Path
    ) -> str:
        client, digest = self._connect(), result_digest(result)
        number, device = result["trial"], result["device"]
        start_ms, end_ms = trial_period_ms(result)
        tags = {"optuna.study": self.study, **record["tags"], **trial_tags(result)}
        tags |= {"paretoprune.study": self.study, "role": "trial", "mlflow.parentRunId": parent}
        condition = f"{_trials_of(device)} and tags.`optuna.trial_number` = '{number}'"

        def make() -> Run:
            # The pareto tag is set here only: logging a trial again must not take it off the front.
            return client.create_run(
                self._experiment, start_ms, {**tags, "pareto": "false"}, run_name=f"trial-{number:04d}"
            )

        run = self._one_run(condition, make)
        if run.data.tags.get(_DIGEST) == digest and run.info.status == STATUS[result["state"]]:
            return str(run.info.run_id)
        params = trial_params(result)
        if any(run.data.params.get(name, value) != value for name, value in params.items()):
            # Redone with other parameters: MLflow never changes a param, so the run is replaced.
            client.delete_run(run.info.run_id)
            run = self._one_run(condition, make)
        run_id = str(run.info.run_id)
        epochs = [("epoch_accuracy", value, step) for step, value in enumerate(result["epochs"])]
        metrics = [(name, value, 0) for name, value in trial_metrics(result).items()]
        self._log(run_id, params=params, tags=tags, metrics=[*metrics, *epochs], at_ms=end_ms)
        client.log_text(run_id, json.dumps(result, indent=1) + "\n", "result.json")
        for path in sorted(path for pattern in TRIAL_FILES for path in folder.glob(pattern)):
            client.log_artifact(run_id, str(path))  # a runtime's model may be a folder; this takes both
        client.set_terminated(run_id, STATUS[result["state"]], end_ms)
        # Last: a run that carries the digest is complete.
        client.set_tag(run_id, _DIGEST, digest)
        return run_id

    def _send_front(self, record: Mapping[str, Any], parent: str, body: Mapping[str, Any]) -> None:
        client, front = self._connect(), body["front"]
        on_front = {point["trial"] for point in front["points"]}
        run_ids: dict[int, str] = {}
        for run in self._find(_trials_of(record["device"])):
            number = int(run.data.tags["optuna.trial_number"])
            run_ids[number] = run.info.run_id
            # A trial measured on another machine of the same name is no point of this front.
            here = number in on_front and run.data.tags.get("fingerprint") == front["fingerprint"]
            wanted = {"pareto": "true" if here else "false", "mlflow.parentRunId": parent}
            for name, value in wanted.items():
                if run.data.tags.get(name) != value:
                    client.set_tag(run.info.run_id, name, value)
        rows = front_rows(front, run_ids)
        step = len(run_ids) if body["step"] is None else body["step"]
        metrics = {
            "hypervolume": front["hypervolume"],
            "front_points": len(rows),
            "baseline_accuracy": front["baseline"]["accuracy"],
            "baseline_latency_ms": front["baseline"]["latency_ms"],
        }
        note = {"mlflow.note.content": front_note(record["device"], front, rows)}
        self._log(parent, metrics=[(name, value, step) for name, value in metrics.items()], tags=note)
        shown = {**front, "points": [{**p, "run_id": run_ids.get(p["trial"])} for p in front["points"]]}
        client.log_text(parent, json.dumps(shown, indent=1) + "\n", "front.json")
        client.log_text(parent, front_csv(rows), "front.csv")
        for name, path in body["files"].items():
            self._upload(parent, self._outbox.folder / path, name)
        shutil.rmtree(self._outbox.folder / "files" / file_name(record["device"]), ignore_errors=True)

    def _upload(self, run_id: str, path: Path, name: str) -> None:
        if not path.is_file():
            self._outbox.say(f"{name} was not logged: the file is gone")
            return
        folder, _, base = name.rpartition("/")
        if base == path.name:
            self._connect().log_artifact(run_id, str(path), folder or None)
            return
        with tempfile.TemporaryDirectory() as scratch:  # MLflow takes an artifact's name from the file
            copy = shutil.copy(path, Path(scratch) / base)
            self._connect().log_artifact(run_id, str(copy), folder or None)

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Iterable[tuple[str, float, int]] = (),
        at_ms: int | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        at_ms = round(time.time() * 1000) if at_ms is None else at_ms
        entities = [Metric(name, value, at_ms, step) for name, value, step in metrics]
        client = self._connect()
        client.log_batch(
            run_id,
            entities[:900],  # the server takes at most 1000 metrics a call
            [Param(k, v) for k, v in (params or {}).items()],
            [RunTag(k, v) for k, v in (tags or {}).items()],
            synchronous=True,
        )
        for start in range(900, len(entities), 900):
            client.log_batch(run_id, entities[start : start + 900], synchronous=True)

    def _log_datasets(self, run_id: str, datasets: Mapping[str, str]) -> None:
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        inputs = []
        for name, digest in datasets.items():
            source = CodeDatasetSource(tags={})
            # MLflow allows a digest 36 characters; the whole one is a tag.
            # MetaDataset lacks a member that its base declares abstract, which only a type checker minds.
            dataset = MetaDataset(source, name=name, digest=digest[:36])  # type: ignore[abstract]
            inputs.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", name)]))
        if inputs:
            self._connect().log_inputs(run_id, inputs)
            self._log(run_id, tags={f"digest.{name}": digest for name, digest in datasets.items()})


def _quieten() -> None:
    """No telemetry, nothing on stdout, no log lines, little patience; called before MLflow's first use."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # Records that were not sent wait on disk, so MLflow's minutes of retries would only hold up the study.
    for name, value in (("MAX_RETRIES", "2"), ("BACKOFF_FACTOR", "1"), ("TIMEOUT", "60")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    import mlflow  # noqa: F401  (sets its log levels, which are overruled next)

    for name in ("mlflow", "alembic"):
        # Its error lines quote addresses with their passwords; the errors reach us as exceptions.
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _trials_of(device: str) -> str:
    return f"tags.role = 'trial' and tags.device = {_quote(device)}"


def _quote(value: str) -> str:
    """A value for MLflow's search language, which has no escapes."""
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return f'"{value}"'
    raise ValueError(f"a device's name must not hold both kinds of quotes, got {value!r}")

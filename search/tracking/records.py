"""Records on their way into MLflow: a device's become a parent run, a trial's a child run, a front's tables.

Works on the JSON bodies that wait in the outbox. Each record may be sent again after it broke off anywhere.
Knows nothing of when a record is sent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..outbox import Letter, file_name
from ..run_record import (
    front_csv,
    front_note,
    front_rows,
    result_digest,
    trial_metrics,
    trial_params,
    trial_period_ms,
    trial_tags,
)
from .store import Store, quote

if TYPE_CHECKING:
    from mlflow.entities import Run

# What MLflow gets of a trial's folder; result.json is rewritten on the way, without paths and secrets.
TRIAL_FILES = ("plan.json", "measurement.json", "model.*")
STATUS = {"complete": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
DIGEST = "paretoprune.result_digest"


class Records:
    """Sends records to a store.

    Args:
        folder: the outbox, from which a record's file names start.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._described: dict[str, dict[str, Any]] = {}

    def send(self, letter: Letter) -> str:
        """Send one record; the id of the run it went to.

        Raises:
            AwayError: nobody answers.
        """
        record = letter.body["device"]
        parent = self._parent(record, reopen=letter.kind == "device")
        if letter.kind == "trial":
            return self._trial(record, parent, letter.body["result"], self._folder / letter.body["folder"])
        if letter.kind == "front":
            self._front(record, parent, letter.body)
        elif letter.kind == "end":
            self._store.connect().set_terminated(parent, letter.body["status"])
        return parent

    def _parent(self, record: Mapping[str, Any], *, reopen: bool) -> str:
        store, device = self._store, record["device"]
        tags = {"paretoprune.study": store.experiment, "role": "device", "device": device}
        condition = f"tags.role = 'device' and tags.device = {quote(device)}"
        run = store.one_run(condition, lambda: store.create_run(f"device {device}", tags))
        run_id = str(run.info.run_id)
        if reopen and run.info.status != "RUNNING":
            store.connect().update_run(run_id, status="RUNNING")
        if self._described.get(device) != record:
            old = run.data.params
            new = {**record["tags"], **tags, "fingerprint": record["fingerprint"]}
            new |= {f"changed.{k}": v for k, v in record["params"].items() if old.get(k, v) != v}
            store.log(run_id, params={k: v for k, v in record["params"].items() if k not in old}, tags=new)
            store.log_datasets(run_id, record["datasets"])
            self._described[device] = dict(record)
        return run_id

    def _trial(self, record: Mapping[str, Any], parent: str, result: Mapping[str, Any], folder: Path) -> str:
        store, client, digest = self._store, self._store.connect(), result_digest(result)
        number, device = result["trial"], result["device"]
        start_ms, end_ms = trial_period_ms(result)
        tags = {"optuna.study": store.experiment, **record["tags"], **trial_tags(result)}
        tags |= {f"digest.{name}": value for name, value in record["datasets"].items()}
        tags |= {"paretoprune.study": store.experiment, "role": "trial", "mlflow.parentRunId": parent}
        condition = f"{trials_of(device)} and tags.`optuna.trial_number` = '{number}'"

        def make() -> Run:
            # The pareto tag is set here only: logging a trial again must not take it off the front.
            return store.create_run(f"trial-{number:04d}", {**tags, "pareto": "false"}, start_ms)

        run = store.one_run(condition, make)
        if run.data.tags.get(DIGEST) == digest and run.info.status == STATUS[result["state"]]:
            return str(run.info.run_id)
        params = trial_params(result)
        if any(run.data.params.get(name, value) != value for name, value in params.items()):
            # Redone with other parameters: MLflow never changes a param, so the run is replaced.
            client.delete_run(run.info.run_id)
            run = store.one_run(condition, make)
        run_id = str(run.info.run_id)
        epochs = [("epoch_accuracy", value, step) for step, value in enumerate(result["epochs"])]
        metrics = [(name, value, 0) for name, value in trial_metrics(result).items()]
        store.log(run_id, params=params, tags=tags, metrics=[*metrics, *epochs], at_ms=end_ms)
        client.log_text(run_id, json.dumps(result, indent=1) + "\n", "result.json")
        for path in sorted(path for pattern in TRIAL_FILES for path in folder.glob(pattern)):
            client.log_artifact(run_id, str(path))  # a runtime's model may be a folder; this takes both
        client.set_terminated(run_id, STATUS[result["state"]], end_ms)
        # Last: a run that carries the digest is complete.
        client.set_tag(run_id, DIGEST, digest)
        return run_id

    def _front(self, record: Mapping[str, Any], parent: str, body: Mapping[str, Any]) -> None:
        store, client, front = self._store, self._store.connect(), body["front"]
        on_front = {point["trial"] for point in front["points"]}
        run_ids: dict[int, str] = {}
        for run in store.find(trials_of(record["device"])):
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
        earlier = body.get("hypervolumes") or {}
        have = {m.step for m in client.get_metric_history(parent, "hypervolume")} if earlier else set()
        missing = [
            ("hypervolume", value, int(n)) for n, value in earlier.items() if int(n) not in {step, *have}
        ]
        latest = [(name, value, step) for name, value in metrics.items()]
        store.log(parent, metrics=[*missing, *latest], tags=note)
        shown = {**front, "points": [{**p, "run_id": run_ids.get(p["trial"])} for p in front["points"]]}
        client.log_text(parent, json.dumps(shown, indent=1) + "\n", "front.json")
        client.log_text(parent, front_csv(rows), "front.csv")
        for name, path in body["files"].items():
            store.upload(parent, self._folder / path, name)
        shutil.rmtree(self._folder / "files" / file_name(record["device"]), ignore_errors=True)


def trials_of(device: str) -> str:
    """The condition for the runs of a device's trials."""
    return f"tags.role = 'trial' and tags.device = {quote(device)}"

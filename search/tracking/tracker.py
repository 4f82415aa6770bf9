"""A study's place in MLflow: an experiment per study, a parent run per device, a child run per trial.

Every record goes through the outbox on disk, so a store that does not answer costs nothing but the wait.
Knows nothing of how a trial is run, of Optuna, or of what the figures show.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..front import ParetoFront
from ..outbox import AwayError, Notice, Outbox, file_name, first_line
from ..result import TrialResult
from ..run_record import result_digest
from ..uri import publishable
from .records import DIGEST, Records, trials_of
from .store import Store, TrackingError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


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
        self._outbox = Outbox(outbox, tracking_uri, notice)
        self._store = Store(
            tracking_uri, study, artifact_folder, lock=self._outbox.lock, say=self._outbox.say
        )
        self._send = Records(self._store, self._outbox.folder).send
        self._devices: dict[str, dict[str, Any]] = {}

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
            tracker._store.connect()
        except AwayError as error:
            tracker._outbox.say_away(error)
            return tracker
        tracker.flush()
        return tracker

    @property
    def shown_uri(self) -> str:
        """The tracking address without user name and password."""
        return self._store.shown_uri

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
            return self._store.connect()
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
                    int(run.data.tags["optuna.trial_number"]): run.data.tags.get(DIGEST, "")
                    for run in self._search(trials_of(result.device))
                }
            body = self._trial_body(result, folder)
            if have[result.device].get(result.trial) != result_digest(body["result"]):
                self._outbox.put("trial", self._key(result), body)
                missing += 1
        self._outbox.deliver(self._send)
        return missing

    def log_front(
        self,
        front: ParetoFront,
        files: Mapping[str, Path],
        *,
        references: Sequence[Mapping[str, Any]] = (),
        step: int | None = None,
        hypervolumes: Mapping[int, float] | None = None,
    ) -> None:
        """The device's front: table, hypervolume, figures on the parent run, and every trial's `pareto` tag.

        Args:
            files: artifact path in the run (`figures/front.png`) to the file.
            references: stock models to compare with, as in `paretoprune front --json`.
            step: of the hypervolume metric; default the number of trials logged so far.
            hypervolumes: of earlier steps, for those that the run lacks: fronts that wait replace each other.

        Raises:
            ValueError: `device_run` was not called for the device.
        """
        body = {
            "device": self._record(front.device),
            "front": publishable({**front.to_json(), "references": list(references)}, self._uri),
            "step": step,
            "hypervolumes": {str(n): value for n, value in (hypervolumes or {}).items()},
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
        runs = self._search(trials_of(device))
        return {int(run.data.tags["optuna.trial_number"]): run.info.run_id for run in runs}

    def fetch(self, run_id: str, names: Sequence[str], folder: Path) -> bool:
        """Download files of a run into a folder; whether all of them came. Says why where they did not."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name in names:
                self._store.connect().download_artifacts(run_id, name, str(folder))
        except AwayError as error:
            self._outbox.say_away(error)
        except Exception as error:
            self._outbox.say(f"MLflow does not give the run's files: {first_line(error)}")
        return all((folder / name).is_file() for name in names)

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

    def _search(self, condition: str) -> list[Run]:
        """The experiment's runs that satisfy the condition, oldest first; none while the store is away."""
        try:
            return list(self._store.find(condition))
        except AwayError as error:
            self._outbox.say_away(error)
        except Exception as error:
            self._outbox.say(f"MLflow could not be asked: {first_line(error)}")
        return []

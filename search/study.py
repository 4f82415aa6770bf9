"""The study: Optuna asks, a trial answers, and every answer is safe on disk before anybody is told.

One Optuna study per device, all in one storage; devices take turns, so that every front grows. Knows the
bench and the trial; it does not know how either works inside.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

from .bench import Shop
from .front import ParetoFront
from .result import TrialParams, TrialResult
from .sampler import grid_size, make_sampler
from .space import known_points, searched_space, suggest, unpruned_point
from .studyfile import Limits, StudyFile
from .trial import Bench, Listener, run_trial
from .workspace import Workspace, read_result, write_json

_RESULT, _WORKER, _IDENTITY = "result", "worker", "identity"
_MAX_FAILURES = 3


class SearchError(RuntimeError):
    """A search cannot go on; the message says why and what to do."""


class Progress(Listener, Protocol):
    """Watches a search."""

    def notice(self, text: str) -> None: ...

    def trial_begins(
        self, device: str, number: int, done: int, wanted: int, params: TrialParams | None
    ) -> None: ...

    def trial_ends(self, result: TrialResult, front: ParetoFront | None) -> None: ...


class Recorder(Protocol):
    """Is told every finished trial, after it is safe."""

    def begin(self, bench: Bench, earlier: Sequence[tuple[TrialResult, Path]]) -> None: ...

    def record(self, result: TrialResult, folder: Path) -> None: ...


class DeviceStudy:
    """One device's Optuna study, with the rules that keep it resumable."""

    def __init__(
        self, study: StudyFile, device: str, storage: optuna.storages.BaseStorage, workspace: Workspace
    ):
        self.file = study
        self.device = device
        self.workspace = workspace
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.optuna = optuna.create_study(
                study_name=f"{study.name}.{device}",
                storage=storage,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
            self.optuna.set_metric_names(["accuracy", "latency_ms"])

    @classmethod
    def existing(
        cls, study: StudyFile, device: str, storage: optuna.storages.BaseStorage, workspace: Workspace
    ) -> DeviceStudy | None:
        """The device's study to look at; None where it was never begun."""
        if f"{study.name}.{device}" not in optuna.get_all_study_names(storage):
            return None
        return cls(study, device, storage, workspace)

    # -- what there is

    def results(self) -> list[TrialResult]:
        """All finished trials, by number, from any worker."""
        found = []
        for trial in self.optuna.get_trials(deepcopy=False):
            if trial.state.is_finished() and _RESULT in trial.user_attrs:
                found.append(TrialResult.from_json(json.loads(trial.user_attrs[_RESULT])))
        return found

    def front(self) -> ParetoFront | None:
        """The front so far; None before trial 0 is complete."""
        results = self.results()
        if not any(r.trial == 0 and r.state == "complete" for r in results):
            return None
        return ParetoFront.of(results)

    def done(self) -> int:
        """Finished trials besides trial 0."""
        return sum(r.trial > 0 for r in self.results())

    # -- identity

    def claim(self, bench: Bench) -> None:
        """Make sure that new results compare with those that are there.

        Raises:
            SearchError: the study was begun with another model, other data, other training or on another
                machine.
        """
        identity = {
            "model": bench.task.model_key,
            "data": bench.task.data_key,
            "input_shape": list(bench.task.input_shape),
            "finetune": self.file.finetune.model_dump(mode="json", exclude={"device"}),
            "fingerprint": bench.fingerprint,
        }
        known = self.optuna.user_attrs.get(_IDENTITY)
        if known is None:
            self.optuna.set_user_attr(_IDENTITY, identity)
            return
        changed = [key for key in identity if known.get(key) != identity[key]]
        if changed:
            what = "; ".join(
                f"{key} was {_brief(known.get(key))}, is {_brief(identity[key])}" for key in changed
            )
            raise SearchError(
                f"study {self.file.name} on {self.device} was begun under other conditions ({what}), and "
                "its numbers would not "
                f"compare; give the study another name, or another --dir"
            )

    # -- asking

    def prepare(self) -> None:
        """Queue the unpruned model and the known good points, once."""
        if self.optuna.get_trials(deepcopy=False):
            return
        self.optuna.enqueue_trial(unpruned_point(self.file.search))
        if self.file.search.sampler == "grid":
            return  # the grid is the whole list
        for point in known_points(self.file.search)[: max(0, self.file.trials - 1)]:
            self.optuna.enqueue_trial(point)

    def ask(self, auto_round_to: int) -> tuple[optuna.Trial, TrialParams]:
        """The next trial: one whose worker died, else a new one."""
        trial = self._adopt()
        if trial is None:
            waiting = self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            number = waiting[0].number if waiting else len(self.optuna.get_trials(deepcopy=False))
            self._seat_sampler(number)
            trial = self.optuna.ask()
        trial.set_user_attr(_WORKER, _worker())
        params = suggest(trial, self.file.search, auto_round_to)
        if trial.number == 0:
            params = replace(params, ratio=0.0, beta=0.0)
        return trial, params

    def _seat_sampler(self, number: int) -> None:
        search = self.file.search
        self.optuna.sampler = make_sampler(
            search.sampler, searched_space(search), seed=self.file.seed, trial=number
        )

    def collect(self) -> None:
        """Tell the trials that had measured everything before their worker died; nothing is run again."""
        for frozen in self._abandoned():
            result = read_result(self.workspace.trial(self.device, frozen.number) / "result.json")
            if result is not None:
                self.tell(self._take(frozen), result)

    def _adopt(self) -> optuna.Trial | None:
        """A running trial whose worker is gone, under its own number and with its own parameters."""
        return next((self._take(frozen) for frozen in self._abandoned()), None)

    def _abandoned(self) -> list[FrozenTrial]:
        running = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if not _is_alive(trial.user_attrs.get(_WORKER))]

    def _take(self, frozen: FrozenTrial) -> optuna.Trial:
        self._seat_sampler(frozen.number)
        return optuna.Trial(self.optuna, frozen._trial_id)

    # -- telling

    def tell(self, trial: optuna.Trial, result: TrialResult) -> None:
        """Finish a trial in the storage. The result goes in first: a finished trial always has one."""
        trial.set_user_attr(_RESULT, json.dumps(result.to_json()))
        for key, value in (("state", result.state), ("reason", result.reason), ("plan", result.plan_digest)):
            trial.set_user_attr(key, value)
        if result.state == "complete":
            assert result.accuracy is not None
            assert result.latency_ms is not None
            for name, excess in constraints(result, self.file.limits_of(self.device)).items():
                trial.set_constraint(name, excess)
            self.optuna.tell(trial, [result.accuracy, result.latency_ms])
        else:
            self.optuna.tell(trial, state=TrialState.FAIL)


def constraints(result: TrialResult, limits: Limits) -> dict[str, float]:
    """How far a result is outside each limit, relative; at most 0 is inside. One entry per limit set."""
    assert result.accuracy is not None
    assert result.latency_ms is not None
    assert result.params is not None
    excess = {}
    if limits.latency_ms is not None:
        excess["latency_ms"] = result.latency_ms / limits.latency_ms - 1.0
    if limits.accuracy is not None:
        excess["accuracy"] = limits.accuracy - result.accuracy
    if limits.params is not None:
        excess["params"] = result.params / limits.params - 1.0
    return excess


def open_storage(study: StudyFile, workspace: Workspace) -> optuna.storages.BaseStorage:
    """Optuna's storage of a study: the study file's, or SQLite in the output folder.

    Raises:
        SearchError: it cannot be opened; no password is shown.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = study.storage or workspace.default_storage
    if url.startswith("sqlite"):
        workspace.folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:
        options = {"pool_pre_ping": True}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except Exception as error:
        from .uri import redact

        text = str(error).strip().splitlines()
        raise SearchError(
            f"storage {redact(url)} cannot be opened: {redact(text[0]) if text else type(error).__name__}"
        ) from error


def run_search(
    study: StudyFile,
    shop: Shop,
    devices: Sequence[str],
    *,
    trials: int,
    timeout_s: float | None,
    progress: Progress,
    recorder: Recorder,
) -> dict[str, ParetoFront]:
    """Run trials on every device until each has `trials` finished ones besides trial 0.

    Ctrl-C once lets the trial in flight finish; twice stops at once, and the next search redoes that trial.

    Args:
        timeout_s: no further trial begins after this.

    Returns:
        Device name to front.

    Raises:
        SearchError: the unpruned model could not be measured, or several trials in a row failed.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    storage = open_storage(study, shop.workspace)
    studies = {name: DeviceStudy(study, name, storage, shop.workspace) for name in devices}
    benches = {}
    for name, device_study in studies.items():
        benches[name] = shop.bench(study.device(name).device())
        device_study.claim(benches[name])
        device_study.prepare()
        recorder.begin(benches[name], list(shop.workspace.results(name)))
    if study.search.sampler == "grid":
        trials = min(trials, grid_size(searched_space(study.search)))
    failures = dict.fromkeys(devices, 0)
    with _first_interrupt_waits(progress.notice) as interrupted:
        while not interrupted():
            for device_study in studies.values():
                device_study.collect()  # before counting, or one trial too many would begin
            open_devices = [
                name for name in devices if studies[name].front() is None or studies[name].done() < trials
            ]
            if not open_devices:
                break
            for name in open_devices:
                if interrupted() or (deadline is not None and time.monotonic() > deadline):
                    break
                result = _one_trial(studies[name], benches[name], trials, progress, recorder)
                failures[name] = failures[name] + 1 if result.state == "failed" else 0
                if result.state == "failed" and result.trial == 0:
                    raise SearchError(f"the unpruned model could not be measured on {name}: {result.reason}")
                if failures[name] >= _MAX_FAILURES:
                    raise SearchError(
                        f"{_MAX_FAILURES} trials in a row failed on {name}, the last one: {result.reason}"
                    )
            if deadline is not None and time.monotonic() > deadline:
                progress.notice("time is up; the same command goes on from here")
                break
    fronts = {name: studies[name].front() for name in devices}
    return {name: front for name, front in fronts.items() if front is not None}


def _one_trial(
    study: DeviceStudy, bench: Bench, wanted: int, progress: Progress, recorder: Recorder
) -> TrialResult:
    """Ask, run, tell; a trial that raises is a failed trial with its reason."""
    front = study.front()
    if front is not None:
        bench = replace(
            bench, baseline_ms=front.baseline.latency_ms, baseline_p90_ms=front.baseline.latency_p90_ms
        )
    trial, params = study.ask(bench.profile.channel_multiple)
    folder = study.workspace.trial(study.device, trial.number)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
    progress.trial_begins(study.device, trial.number, study.done(), wanted, params)
    try:
        result = run_trial(trial.number, params, bench, folder, progress)
    except Exception as error:
        result = TrialResult(
            trial=trial.number,
            device=study.device,
            fingerprint=bench.fingerprint,
            asked=params,
            state="failed",
            reason=f"{type(error).__name__}: {_brief(str(error))}",
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        write_json(folder / "result.json", result.to_json())
    study.tell(trial, result)
    progress.trial_ends(result, study.front())
    recorder.record(result, folder)
    return result


@contextlib.contextmanager
def _first_interrupt_waits(notice: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the user has asked to stop. The second Ctrl-C raises
    KeyboardInterrupt.
    """
    asked = False

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        notice("stopping after this trial; press Ctrl-C again to stop now (the trial is redone next time)")

    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not the main thread, a notebook's worker say: leave its handling alone
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _worker() -> dict[str, Any]:
    """Who runs a trial; the process's start tells it from a later one with the same number."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _is_alive(worker: dict[str, Any] | None) -> bool:
    """Whether a trial's worker still runs. One on another host is taken to."""
    if not worker:
        return False
    if worker.get("host") != socket.gethostname():
        return True
    try:
        return bool(abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) < 1.0)
    except psutil.Error:
        return False


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else text[:157] + "..."

"""A launch from its start to its record, however it ends: trials are stand-ins, the stores are real."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import search.found
import search.launch
import search.loop
import search.review
from profiles.connection import DeviceError
from profiles.device import Device
from search.front import ParetoFront
from search.launch import launch
from search.recorder import open_tracker
from search.storage import SearchError, StorageAwayError
from search.studyfile import StudyFile
from search.tracking import Tracker


def _load_stand_ins() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stand_ins", Path(__file__).with_name("test_study.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STAND_INS = _load_stand_ins()


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with MLflow's tables: making them takes seconds, copying the file does not."""
    folder = tmp_path_factory.mktemp("store")
    Tracker.open(f"sqlite:///{folder}/empty.db", "nothing", folder / "files", outbox=folder / "outbox")
    return (folder / "empty.db").read_bytes()


@pytest.fixture
def study(tmp_path: Path, empty_store: bytes, no_pngs: None, monkeypatch: pytest.MonkeyPatch) -> StudyFile:
    monkeypatch.setattr(search.loop, "run_trial", STAND_INS.stand_in)
    made: StudyFile = STAND_INS.make_study(tmp_path, limits={"params": 5000, "latency_ms": 4.5})
    made.folder.mkdir(parents=True)
    (made.folder / "mlflow.db").write_bytes(empty_store)
    use_shop(monkeypatch)
    return made


def use_shop(
    monkeypatch: pytest.MonkeyPatch,
    bench: Callable[[Device], Any] = lambda device: STAND_INS.make_bench(device),
) -> None:
    """Have launches use benches of ours."""

    class Shop:
        def __init__(self, study: StudyFile, workspace: Any, notice: Any) -> None:
            self.study, self.workspace, self.notice = study, workspace, notice
            self.task = SimpleNamespace(metric="top-1")
            self.shelf = SimpleNamespace(
                profile=lambda device, fingerprint: STAND_INS.make_bench(device).profile
            )

        def bench(self, device: Device) -> Any:
            return bench(device)

    monkeypatch.setattr(search.launch, "Shop", Shop)


def begin(study: StudyFile, *devices: str, trials: int = 2, watcher: Any = None) -> dict[str, ParetoFront]:
    return launch(study, devices, trials=trials, timeout_s=None, progress=watcher or STAND_INS.Watcher())


def device_runs(study: StudyFile) -> dict[str, Any]:
    client = open_tracker(study).client()
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.role = 'device'")
    return {run.data.tags["device"]: run for run in runs}


def statuses(study: StudyFile) -> dict[str, str]:
    return {device: run.info.status for device, run in device_runs(study).items()}


def test_a_launch_is_recorded_with_its_limits_and_measurements(study: StudyFile) -> None:
    fronts = begin(study, "first", "second")
    runs = device_runs(study)
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(fronts, "FINISHED")
    params = runs["first"].data.params
    assert (params["limits.params"], params["limits.latency_ms"]) == ("5000", "4.5")
    assert "limits.accuracy" not in params


def test_what_went_wrong_is_said_where_a_device_with_a_front_was_not_begun(
    study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(study, "first", "second")

    def away(device: Device) -> Any:
        raise DeviceError(f"{device.name} is away")

    use_shop(monkeypatch, away)
    with pytest.raises(DeviceError, match="first is away"):
        begin(study, "first", trials=3)
    assert statuses(study) == {"first": "FINISHED", "second": "FINISHED"}

    other = STAND_INS.make_bench(study.device("second").device(), model_key="another")
    use_shop(monkeypatch, lambda device: other if device.name == "second" else STAND_INS.make_bench(device))
    with pytest.raises(SearchError, match="study on second was begun under other conditions"):
        begin(study, "second", "first", trials=3)
    with pytest.raises(SearchError, match="study on second was begun under other conditions"):
        begin(study, "first", "second", trials=3)
    assert statuses(study) == {"first": "KILLED", "second": "FINISHED"}  # none is left as if it still ran


def test_a_record_that_fails_hides_nothing_and_leaves_the_other_devices_theirs(
    study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = search.launch.record_front

    def full(study: StudyFile, shop: Any, tracker: Any, found: Any) -> None:
        if found.front.device == "first":
            raise OSError(28, "No space left on device")
        real(study, shop, tracker, found)

    monkeypatch.setattr(search.launch, "record_front", full)
    with pytest.raises(SearchError, match=r"the front of first is not recorded: OSError.*No space left"):
        begin(study, "first", "second")
    runs = device_runs(study)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    names = {f.path for f in open_tracker(study).client().list_artifacts(runs["second"].info.run_id)}
    assert "report.html" in names

    def stop_now(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(search.loop, "run_trial", stop_now)
    watcher = STAND_INS.Watcher()
    with pytest.raises(KeyboardInterrupt):
        begin(study, "first", "second", trials=3, watcher=watcher)
    assert any("the front of first is not recorded" in text for text in watcher.notices)
    assert set(statuses(study).values()) == {"KILLED"}


def test_after_one_ctrl_c_nothing_more_is_measured(study: StudyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[list[str]] = []
    monkeypatch.setattr(
        search.launch, "measure_references", lambda study, shop, tasks, devices: compared.append(devices)
    )

    def run(number: int, *rest: Any) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return STAND_INS.stand_in(number, *rest)

    monkeypatch.setattr(search.loop, "run_trial", run)
    fronts = begin(study, "first", trials=4)
    assert compared == []
    assert statuses(study) == {"first": "KILLED"}
    assert fronts["first"].baseline.trial == 0
    monkeypatch.setattr(search.loop, "run_trial", STAND_INS.stand_in)
    begin(study, "first", trials=4)
    assert compared == [["first"]]
    assert statuses(study) == {"first": "FINISHED"}


def test_a_device_that_fails_keeps_no_other_one_from_being_compared_and_recorded(
    study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[list[str]] = []
    monkeypatch.setattr(
        search.launch, "measure_references", lambda study, shop, tasks, devices: compared.append(devices)
    )

    def run(number: int, params: Any, bench: Any, *rest: Any) -> Any:
        if bench.device.name == "first":
            raise FloatingPointError("it has no such arithmetic")
        return STAND_INS.stand_in(number, params, bench, *rest)

    monkeypatch.setattr(search.loop, "run_trial", run)
    with pytest.raises(SearchError, match="the unpruned model could not be measured on first"):
        begin(study, "first", "second")
    assert compared == [["second"]]
    assert statuses(study) == {"first": "KILLED", "second": "FINISHED"}


def test_a_storage_that_goes_away_while_trials_are_recorded_ends_no_search(
    study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> Any:
        raise StorageAwayError("the storage does not answer")

    # What opens the storage anew; the search itself holds one that answers.
    monkeypatch.setattr(search.found, "open_storage", away)
    watcher = STAND_INS.Watcher()
    with pytest.raises(SearchError, match="the front of first is not recorded"):
        begin(study, "first", trials=3, watcher=watcher)
    assert watcher.begun == [("first", n) for n in range(4)]
    client, (run,) = open_tracker(study).client(), device_runs(study).values()
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "hypervolume")]
    assert sorted(steps) == [1, 2, 3, 4]

"""The study: counted, resumed and recorded right. Trials are stand-ins that plan for real.

Run as a script it is the worker that a test kills: `test_study.py FOLDER HANG_AT`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState

import search.heartbeat
import search.loop
import search.study
from objectives.task import Recovery
from profiles.connection import DeviceLostError
from profiles.device import Device
from profiles.latency_model import LatencyModel
from profiles.latency_profile import LatencyProfile, LayerProfile
from profiles.timing import Timing
from search.front import ParetoFront
from search.groups import ChannelGroup, ChannelGroups, Member
from search.heartbeat import Watch, identity
from search.limits import excess_of
from search.loop import run_search
from search.params import fixed_params, params_at
from search.planning import make_plan, rerank
from search.prediction import predict_ms
from search.proxy import Proxy, score_kept
from search.rerank import group_scores
from search.result import TrialParams, TrialResult
from search.scores import ChannelScores
from search.screening import Candidate, screened
from search.sections import Limits
from search.space import known_points, scattered_points
from search.storage import SearchError, StorageAwayError, open_storage
from search.study import EXHAUSTED, Begun, DeviceStudy
from search.studyfile import StudyFile, load_study_file
from search.trial import Bench
from search.turns import turns
from search.workspace import Workspace, write_json

ROOT = Path(__file__).resolve().parents[2]
DEVICES = ("first", "second")
LAYERS = {"a": 32, "b": 64, "c": 48}

RunTrial = Callable[[int, TrialParams, Bench, Path, Any, Any], TrialResult]


# ---- stand-ins -----------------------------------------------------------------------------------


def make_study(folder: Path, **changes: Any) -> StudyFile:
    for name in ("model.pt", "data.yaml"):
        (folder / name).touch()
    document = {
        "name": "study",
        "model": "model.pt",
        "data": "data.yaml",
        "devices": [{"name": name, "runtime": "onnxruntime"} for name in DEVICES],
        "search": {"sampler": "random"},
        "trials": 5,
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_study_file(path)


def make_bench(device: Device, fingerprint: str = "print", model_key: str = "model") -> Bench:
    """Three independent layers with fixed scores and latencies."""
    rng = np.random.default_rng(0)
    groups = ChannelGroups(
        tuple(
            ChannelGroup(name, n, (Member(name, "out", np.arange(n).reshape(-1, 1), True),))
            for name, n in LAYERS.items()
        ),
        (),
        {name: (8, n) for name, n in LAYERS.items()},
    )
    layers = tuple(
        LayerProfile(name, "conv", 8, n, (3, 3), (1, 1), 1, (8, 8), Timing((ms,), 0), (8, 8))
        for (name, n), ms in zip(LAYERS.items(), (3.0, 1.0, 0.2), strict=True)
    )
    model = LatencyModel.from_layers(
        "bilinear", [3.0, 1.0, 0.2], [8] * 3, list(LAYERS.values()), [1] * 3, 0.5
    )
    profile = LatencyProfile(device, fingerprint, "model", (1, 3, 8, 8), layers, 4.7, {"act": 0.5}, 4, model)
    scores = ChannelScores("taylor", model_key, "data", {name: rng.random(n) for name, n in LAYERS.items()})
    task: Any = SimpleNamespace(
        model_key=model_key, data_key="data", input_shape=(1, 3, 8, 8), metric="top-1"
    )
    return Bench(
        task=task,
        device=device,
        fingerprint=fingerprint,
        model_key=model_key,
        groups=groups,
        scores={"taylor": scores},
        profile=profile,
        baseline=SimpleNamespace(),  # type: ignore[arg-type]  # nothing is measured here
        recovery=Recovery(),
        min_channels=4,
        latency_target=0.01,
        latency_limit_s=1.0,
    )


class StandInShop:
    def __init__(self, study: StudyFile, **bench: str):
        self.workspace = Workspace(study.folder)
        self._changes = bench

    def bench(self, device: Device) -> Bench:
        return make_bench(device, **self._changes)


def stand_in(
    number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
) -> TrialResult:
    """A trial that plans for real and measures by formula."""
    plan = make_plan(params, rerank(params, bench), bench)
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    latency_ms = bench.profile.predict_ms(plan.widths)
    result = TrialResult(
        trial=number,
        device=bench.device.name,
        fingerprint=bench.fingerprint,
        asked=params,
        state="complete",
        accuracy=0.6 - params.ratio**2 * (1 + params.beta),
        latency_ms=latency_ms,
        latency_p90_ms=latency_ms * 1.1,
        speedup=bench.profile.predict_ms({}) / latency_ms,
        params=1000,
        plan_digest=plan.digest,
    )
    write_json(folder / "result.json", result.to_json())
    return result


class Watcher:
    """Progress and recorder in one; remembers what it was told."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.begun: list[tuple[str, int]] = []
        self.recorded: list[tuple[str, int, str]] = []
        self.earlier: dict[str, list[int]] = {}
        self.fronts: dict[str, ParetoFront | None] = {}

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def trial_begins(self, device: str, number: int, done: int, wanted: int, params: Any) -> None:
        self.begun.append((device, number))

    def trial_ends(self, result: TrialResult, front: Any) -> None: ...

    def step(self, name: str) -> None: ...

    def epoch(self, done: int, epochs: int, accuracy: float) -> None: ...

    def begin(self, bench: Bench, earlier: Any) -> None:
        self.earlier[bench.device.name] = [result.trial for result, _ in earlier]

    def record(self, result: TrialResult, folder: Path, front: ParetoFront | None) -> None:
        assert (folder / "result.json").exists()  # safe before anybody is told
        self.recorded.append((result.device, result.trial, result.state))
        self.fronts[result.device] = front


def go(study: StudyFile, devices: tuple[str, ...] = ("first",), trials: int = 5, **bench: str) -> Watcher:
    watcher = Watcher()
    shop: Any = StandInShop(study, **bench)
    run_search(study, shop, devices, trials=trials, timeout_s=None, progress=watcher, recorder=watcher)
    return watcher


def states(study: StudyFile, device: str = "first") -> list[TrialState]:
    storage = open_storage(study, Workspace(study.folder))
    loaded = optuna.load_study(study_name=f"study.{device}", storage=storage)
    return [t.state for t in loaded.get_trials(deepcopy=False) if t.state != TrialState.WAITING]


def results(study: StudyFile, device: str = "first") -> list[TrialResult]:
    workspace = Workspace(study.folder)
    found = DeviceStudy.existing(study, device, open_storage(study, workspace), workspace)
    return [] if found is None else found.results()


@pytest.fixture
def study(tmp_path: Path) -> StudyFile:
    return make_study(tmp_path)


@pytest.fixture(autouse=True)
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storages in memory, one per output folder: making SQLite's tables takes longer than the trials."""
    if "sqlite" in request.fixturenames:
        return
    kept: dict[Path, optuna.storages.BaseStorage] = {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def opened(study: StudyFile, workspace: Workspace) -> optuna.storages.BaseStorage:
        return kept.setdefault(workspace.folder, optuna.storages.InMemoryStorage())

    monkeypatch.setattr(search.loop, "open_storage", opened)
    monkeypatch.setitem(globals(), "open_storage", opened)


@pytest.fixture
def sqlite() -> None:
    """Use the real storage."""


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunTrial], None]:
    def put(function: RunTrial) -> None:
        monkeypatch.setattr(search.loop, "run_trial", function)

    put(stand_in)
    return put


@pytest.fixture
def dead_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are signed by a process that is gone, as if this one had been killed."""
    gone = {**identity(), "pid": 2**22 + 1, "started": 0.0}
    monkeypatch.setattr(search.study, "identity", lambda: gone)


pytestmark = pytest.mark.usefixtures("trial")


# ---- counting ------------------------------------------------------------------------------------


def test_trials_are_counted_without_the_unpruned_model_and_devices_take_turns(study: StudyFile) -> None:
    watcher = go(study, DEVICES, trials=3)
    assert watcher.begun == [(device, n) for n in range(4) for device in DEVICES]
    assert watcher.recorded == [(device, n, "complete") for n in range(4) for device in DEVICES]
    for device in DEVICES:
        assert [r.trial for r in results(study, device)] == [0, 1, 2, 3]
        assert results(study, device)[0].asked == TrialParams(round_to=4)  # the unpruned model
        assert watcher.fronts[device] == ParetoFront.of(results(study, device))


def test_a_second_search_goes_on_to_the_wanted_number(study: StudyFile) -> None:
    go(study, trials=2)
    assert go(study, trials=2).begun == []
    watcher = go(study, trials=4)
    assert watcher.begun == [("first", 3), ("first", 4)]
    assert watcher.earlier == {"first": [0, 1, 2]}


@pytest.mark.parametrize(
    ("screening", "first"),
    [({"keep": 0}, (1, 2, 3, 4)), ({"candidates": 0}, (1, 2, 3, 4)), ({"keep": 1}, (1, 3, 4, 5))],
)
def test_known_points_come_first_and_are_queued_once(
    tmp_path: Path, screening: dict[str, int], first: tuple[int, ...]
) -> None:
    study = make_study(tmp_path, screening=screening)
    go(study, trials=2)
    go(study, trials=6)
    asked = [r.asked for r in results(study)]
    assert [(asked[number].beta, asked[number].ratio) for number in first] == [
        (0.0, pytest.approx(0.4)), (0.0, pytest.approx(0.55)), (0.5, 0.3), (0.0, pytest.approx(0.25)),
    ]  # fmt: skip
    assert len({(p.beta, p.ratio) for p in asked}) == 7


def test_a_grid_ends_when_every_point_was_tried(tmp_path: Path) -> None:
    grid = {"sampler": "grid", "beta": {"choices": [0.0, 0.5]}, "ratio": {"choices": [0.2, 0.4, 0.6]}}
    study = make_study(tmp_path, search={**grid, "round_to": {"choices": [4]}})
    go(study, trials=40)
    asked = [(r.asked.beta, r.asked.ratio) for r in results(study)]
    assert asked[0] == (0.0, 0.0)
    assert sorted(asked[1:]) == [(b, r) for b in (0.0, 0.5) for r in (0.2, 0.4, 0.6)]


def test_no_trial_begins_when_the_time_is_up(study: StudyFile) -> None:
    watcher = Watcher()
    shop: Any = StandInShop(study)
    run_search(study, shop, ["first"], trials=5, timeout_s=-1, progress=watcher, recorder=watcher)
    assert watcher.begun == []
    assert watcher.notices == ["time is up; the same command goes on from here"]


# ---- failures ------------------------------------------------------------------------------------


def failing(*numbers: int) -> RunTrial:
    def run(
        number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if number in numbers:
            raise FloatingPointError(f"the loss became\nnan in trial {number}")
        return stand_in(number, params, bench, folder, listener, gate)

    return run


def test_a_failed_trial_has_its_reason_everywhere_and_the_search_goes_on(
    study: StudyFile, trial: Callable[[RunTrial], None]
) -> None:
    trial(failing(2, 3))
    watcher = go(study)
    assert [state for _, _, state in watcher.recorded] == ["complete"] * 2 + ["failed"] * 2 + ["complete"] * 2
    assert states(study)[2:4] == [TrialState.FAIL] * 2
    failed = results(study)[2]
    assert (failed.state, failed.reason) == ("failed", "FloatingPointError: the loss became nan in trial 2")
    folder = Workspace(study.folder).trial("first", 2)
    assert "Traceback" in (folder / "error.txt").read_text()
    assert json.loads((folder / "result.json").read_text())["reason"] == failed.reason
    assert len(results(study)) == 6  # failed ones are counted, not repeated


def test_three_failures_in_a_row_end_the_search(study: StudyFile, trial: Callable[[RunTrial], None]) -> None:
    trial(failing(2, 3, 4))
    with pytest.raises(SearchError, match=r"3 trials in a row failed on first, the last one: .* in trial 4"):
        go(study)
    assert len(results(study)) == 5
    trial(stand_in)
    assert go(study).begun == [("first", 5)]  # and the same command goes on


def test_without_the_unpruned_model_there_is_no_search(
    study: StudyFile, trial: Callable[[RunTrial], None]
) -> None:
    trial(failing(0))
    with pytest.raises(
        SearchError, match=r"the unpruned model could not be measured on first: .* in trial 0"
    ):
        go(study)
    trial(stand_in)
    assert go(study).begun[0] == ("first", 0)  # redone, for nothing can go on without it


def test_a_device_that_fails_does_not_keep_the_others_from_their_trials(
    study: StudyFile, trial: Callable[[RunTrial], None]
) -> None:
    def run(
        number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if bench.device.name == "first" and number > 0:
            raise MemoryError("16 GiB wanted")
        return stand_in(number, params, bench, folder, listener, gate)

    trial(run)
    with pytest.raises(SearchError, match=r"3 trials in a row failed on first, .*MemoryError: 16 GiB wanted"):
        go(study, DEVICES, trials=6)
    assert [r.state for r in results(study, "first")] == ["complete", "failed", "failed", "failed"]
    assert [r.state for r in results(study, "second")] == ["complete"] * 7


def test_a_lost_device_fails_the_trial_and_has_it_tried_again_later(
    tmp_path: Path, trial: Callable[[RunTrial], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, screening={"keep": 0})
    lost: list[TrialParams] = []

    def run(
        number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if bench.device.name == "first" and number == 2:
            lost.append(params)
            raise DeviceLostError("device first: no answer to 'round' within 360 s")
        return stand_in(number, params, bench, folder, listener, gate)

    trial(run)
    monkeypatch.setattr(search.loop, "_LOST_PAUSE_S", 0.3)
    monkeypatch.setattr(search.loop, "_POLL_S", 0.02)
    watcher = go(study, DEVICES, trials=4)
    found = results(study)
    assert found[2].reason == "DeviceLostError: device first: no answer to 'round' within 360 s"
    assert [r.state for r in found] == ["complete", "complete", "failed", "complete", "complete", "complete"]
    assert found[3].asked == lost[0]  # under the next number, and not counted twice
    asked = [(r.asked.beta, r.asked.ratio) for r in found]
    assert asked[4] == (0.5, 0.3)  # the known points are all there
    assert any("is lost; its trial is tried again" in text for text in watcher.notices)
    order = [entry for entry in watcher.begun if entry in (("first", 3), ("second", 3), ("second", 4))]
    assert order.index(("second", 3)) < order.index(("first", 3))  # the others did not wait for it


def test_a_full_disk_ends_the_trial_with_its_reason(
    study: StudyFile, trial: Callable[[RunTrial], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(*_: Any, **__: Any) -> None:
        raise full

    def run(
        number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if number == 2:
            monkeypatch.setattr(search.loop, "write_json", write)  # nor can the record be written
            raise full
        return stand_in(number, params, bench, folder, listener, gate)

    trial(run)
    watcher = Watcher()
    monkeypatch.setattr(watcher, "record", lambda result, *_: watcher.recorded.append(result.state))
    shop: Any = StandInShop(study)
    run_search(study, shop, ["first"], trials=4, timeout_s=None, progress=watcher, recorder=watcher)
    assert watcher.recorded == ["complete", "complete", "failed", "complete", "complete"]
    assert results(study)[2].reason == "OSError: [Errno 28] No space left on device"


# ---- interruptions -------------------------------------------------------------------------------


def interrupted(at: int, before: RunTrial | None = None) -> RunTrial:
    def run(
        number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if number == at:
            if before is not None:
                before(number, params, bench, folder, listener, gate)
            else:
                folder.mkdir(parents=True)
                (folder / "half-written").touch()
            raise KeyboardInterrupt
        return stand_in(number, params, bench, folder, listener, gate)

    return run


def parameters(study: StudyFile, number: int) -> dict[str, Any]:
    storage = open_storage(study, Workspace(study.folder))
    loaded = optuna.load_study(study_name="study.first", storage=storage)
    return dict(loaded.get_trials(deepcopy=False)[number].params)


@pytest.mark.usefixtures("dead_worker")
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_trial_whose_worker_died_is_redone_under_its_own_number(
    study: StudyFile, trial: Callable[[RunTrial], None], at: int
) -> None:
    trial(interrupted(at))
    with pytest.raises(KeyboardInterrupt):
        go(study)
    asked = parameters(study, at)
    assert states(study)[at] == TrialState.RUNNING
    trial(stand_in)
    watcher = go(study)
    assert watcher.begun == [("first", n) for n in range(at, 6)]
    assert parameters(study, at) == asked
    assert [r.trial for r in results(study)] == list(range(6))
    assert states(study) == [TrialState.COMPLETE] * 6
    assert not (Workspace(study.folder).trial("first", at) / "half-written").exists()


@pytest.mark.usefixtures("dead_worker")
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_trial_that_was_measured_but_not_told_is_told_and_not_run_again(
    study: StudyFile, trial: Callable[[RunTrial], None], at: int
) -> None:
    trial(interrupted(at, before=stand_in))
    with pytest.raises(KeyboardInterrupt):
        go(study)
    trial(stand_in)
    watcher = go(study)
    assert watcher.begun == [("first", n) for n in range(at + 1, 6)]
    assert [r.trial for r in results(study)] == list(range(6))
    assert states(study) == [TrialState.COMPLETE] * 6
    assert watcher.earlier == {"first": list(range(at + 1))}  # so tracking hears of it


@pytest.mark.usefixtures("dead_worker")
def test_a_half_written_result_is_no_result(study: StudyFile, trial: Callable[[RunTrial], None]) -> None:
    trial(interrupted(2, before=stand_in))
    with pytest.raises(KeyboardInterrupt):
        go(study)
    path = Workspace(study.folder).trial("first", 2) / "result.json"
    path.write_text(path.read_text()[:50])
    trial(stand_in)
    assert go(study).begun[0] == ("first", 2)


def test_a_living_workers_trial_is_left_alone_until_it_was_silent_for_long(
    study: StudyFile, trial: Callable[[RunTrial], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process lives, so what it signed looks like another worker's trial in flight."""
    trial(interrupted(2))
    with pytest.raises(KeyboardInterrupt):
        go(study)
    trial(stand_in)
    looks = itertools.count()

    def clock() -> float:
        """Stands still while trials are to be begun, then goes on by a second at each look."""
        return float(next(looks)) if len([*Workspace(study.folder).results("first")]) == 4 else 0.0

    monkeypatch.setattr(search.study, "Watch", lambda: Watch(silence_s=3.0, clock=clock))
    monkeypatch.setattr(search.loop, "_POLL_S", 0.02)
    watcher = go(study, trials=4)
    assert watcher.begun == [("first", 3), ("first", 4), ("first", 2)]  # and no fifth one meanwhile
    assert watcher.notices == [f"first: waiting for 1 trial in flight on {identity()['host']}"]
    assert states(study) == [TrialState.COMPLETE] * 5


def test_one_ctrl_c_lets_the_trial_finish(study: StudyFile, trial: Callable[[RunTrial], None]) -> None:
    before = signal.getsignal(signal.SIGINT)

    def run(
        number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return stand_in(number, params, bench, folder, listener, gate)

    trial(run)
    watcher = go(study)
    assert watcher.recorded[-1] == ("first", 2, "complete")
    assert watcher.notices == [
        "stopping after this trial; press Ctrl-C again to stop now (the trial is redone next time)"
    ]
    assert signal.getsignal(signal.SIGINT) is before
    trial(stand_in)
    assert go(study).begun == [("first", n) for n in (3, 4, 5)]


def test_the_second_ctrl_c_stops_at_once(study: StudyFile, trial: Callable[[RunTrial], None]) -> None:
    def run(
        number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the trial went on")
        return stand_in(number, params, bench, folder, listener, gate)

    trial(run)
    with pytest.raises(KeyboardInterrupt):
        go(study)
    assert len(results(study)) == 2


@pytest.mark.usefixtures("sqlite")
def test_kill_9_in_the_middle_of_a_trial(study: StudyFile) -> None:
    command = [sys.executable, __file__, str(study.source.parent), "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    worker = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    marker = study.source.parent / "hanging"
    deadline = time.monotonic() + 120
    while not marker.exists():
        if worker.poll() is not None or time.monotonic() > deadline:
            worker.kill()
            pytest.fail(f"the worker never came to its trial: {worker.communicate()[1]}")
        time.sleep(0.05)
    worker.kill()
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL
    asked = parameters(study, 3)
    assert asked
    watcher = go(study)
    assert watcher.begun == [("first", 3), ("first", 4), ("first", 5)]
    assert watcher.earlier == {"first": [0, 1, 2]}
    assert parameters(study, 3) == asked
    assert [r.trial for r in results(study)] == list(range(6))
    assert states(study) == [TrialState.COMPLETE] * 6


# ---- the same study twice ------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
@pytest.mark.usefixtures("one_thread")
def test_one_seed_gives_the_same_parameters_and_plans(tmp_path: Path, sampler: str) -> None:
    def search_in(name: str, seed: int, stops: tuple[int, ...]) -> list[tuple[TrialParams, str | None]]:
        folder = tmp_path / name
        folder.mkdir()
        study = make_study(folder, search={"sampler": sampler}, seed=seed)
        for trials in stops:
            go(study, trials=trials)
        return [(r.asked, r.plan_digest) for r in results(study)]

    first = search_in("first", 1, (9,))
    assert len({digest for _, digest in first}) > 7
    assert search_in("again", 1, (9,)) == first
    # Known points are queued for the trials the file asks for, so an interruption changes nothing.
    assert search_in("interrupted", 1, (2, 7, 9)) == first
    assert search_in("other", 2, (9,)) != first


# ---- what does not compare -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": "another machine"}, "fingerprint was print, is another machine"),
        ({"model_key": "another"}, "model was model, is another"),
    ],
)
def test_other_conditions_are_refused(study: StudyFile, change: dict[str, str], says: str) -> None:
    go(study, trials=1)
    with pytest.raises(
        SearchError, match=f"begun under other conditions .*{says}.*another name, or another --dir"
    ):
        go(study, trials=2, **change)
    assert len(results(study)) == 2


def test_other_training_is_refused_and_another_training_device_is_not(study: StudyFile) -> None:
    go(study, trials=1)
    same = study.model_copy(update={"finetune": study.finetune.model_copy(update={"device": "cpu"})})
    go(same, trials=2)
    other = study.model_copy(update={"finetune": study.finetune.model_copy(update={"epochs": 9})})
    with pytest.raises(SearchError, match=r"finetune was .*'epochs': 3.*, is .*'epochs': 9"):
        go(other, trials=3)


def test_other_device_settings_are_refused_and_another_address_is_not(study: StudyFile) -> None:
    def on(**settings: Any) -> StudyFile:
        devices = [{"name": name, "runtime": "onnxruntime", **settings} for name in DEVICES]
        return make_study(study.source.parent, devices=devices)

    go(study, trials=1)
    go(on(host="ssh://somebody@elsewhere"), trials=2)
    with pytest.raises(SearchError, match=r"device was .*'threads': 1.*, is .*'threads': 2"):
        go(on(threads=2), trials=3)
    assert len(results(study)) == 3


def test_what_an_earlier_version_did_not_record_is_not_compared(study: StudyFile) -> None:
    go(study, trials=1)
    workspace = Workspace(study.folder)
    found = DeviceStudy.existing(study, "first", open_storage(study, workspace), workspace)
    assert found is not None
    assert found.conditions["device"]["threads"] == 1
    kept = {key: value for key, value in found.conditions.items() if key != "device"}
    found.optuna.set_user_attr("identity", kept)
    go(study, trials=2)
    with pytest.raises(SearchError, match="model was model, is another"):
        go(study, trials=3, model_key="another")


# ---- stopped trials ------------------------------------------------------------------------------


def stopping(*numbers: int, measured: bool) -> RunTrial:
    """Some trials are stopped, for their plan alone or in training."""

    def run(
        number: int, params: TrialParams, bench: Bench, folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        result = stand_in(number, params, bench, folder, listener, gate)
        if number not in numbers:
            return result
        early = replace(result, state="stopped", reason="not worth it")
        return early if measured else replace(early, accuracy=None, latency_ms=None, plan_digest=f"p{number}")

    return run


def test_a_plan_that_was_only_thought_of_costs_no_trial(
    study: StudyFile, trial: Callable[[RunTrial], None]
) -> None:
    trial(stopping(2, 4, measured=False))
    watcher = go(study, trials=3)
    assert [(n, state) for _, n, state in watcher.recorded] == [
        (0, "complete"), (1, "complete"), (2, "stopped"), (3, "complete"), (4, "stopped"), (5, "complete"),
    ]  # fmt: skip
    assert [s.name for s in states(study)] == [
        "COMPLETE",
        "COMPLETE",
        "PRUNED",
        "COMPLETE",
        "PRUNED",
        "COMPLETE",
    ]
    assert go(study, trials=3).begun == []


def test_a_trial_stopped_in_training_counts_and_teaches_the_sampler(
    study: StudyFile, trial: Callable[[RunTrial], None]
) -> None:
    trial(stopping(2, measured=True))
    watcher = go(study, trials=3)
    assert [n for _, n, _ in watcher.recorded] == [0, 1, 2, 3]
    assert states(study) == [TrialState.COMPLETE] * 4
    found = DeviceStudy.existing(
        study, "first", open_storage(study, Workspace(study.folder)), Workspace(study.folder)
    )
    assert found is not None
    front = found.front()
    assert front is not None
    assert 2 not in {p.trial for p in front.points}


def test_a_search_that_finds_nothing_worth_a_trial_ends(
    study: StudyFile, trial: Callable[[RunTrial], None]
) -> None:
    trial(stopping(*range(2, 100), measured=False))
    watcher = go(study, trials=5)
    assert len(watcher.recorded) == 2 + EXHAUSTED
    assert (
        "proposals were all stopped before training, the last one because: not worth it"
        in watcher.notices[-1]
    )
    assert go(study, trials=5).begun == []


def test_a_plan_belongs_to_one_trial(study: StudyFile, trial: Callable[[RunTrial], None]) -> None:
    """Through the real gate: trial 3 asks for what trial 1 was asked."""
    go(study, trials=1)
    device_study = DeviceStudy(
        study, "first", open_storage(study, Workspace(study.folder)), Workspace(study.folder)
    )
    plan = str(results(study)[1].plan_digest)
    first, second = (device_study.next_trial(9, 4) for _ in range(2))
    assert isinstance(first, Begun)
    assert isinstance(second, Begun)
    assert device_study.claim_plan(first, plan) == 1  # measured already
    assert device_study.claim_plan(first, "new") is None
    assert device_study.claim_plan(second, "new") == first.number  # about to be
    assert device_study.claim_plan(first, "new") is None  # its own, after it was redone say
    twin = replace(results(study)[1], trial=second.number, state="stopped", reason="twin", accuracy=None)
    assert device_study.tell(second, replace(twin, latency_ms=None))
    told = device_study.optuna.get_trials()[second.number]
    assert told.values == device_study.optuna.get_trials()[1].values


# ---- screening -----------------------------------------------------------------------------------


def test_screening_finds_what_plans_promise(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=12, screening={"candidates": 200, "keep": 3})
    bench = make_bench(study.device("first").device())
    found = screened(study, "first", bench)
    assert found == screened(study, "first", bench)
    assert [Candidate.from_json(json.loads(json.dumps(c.to_json()))) for c in found] == found
    assert len(found) > 3
    asked = [params_at(study.search, candidate.point, 4) for candidate in found]
    assert all(0.1 <= p.ratio <= 0.7 for p in asked)
    plans = [make_plan(p, rerank(p, bench), bench) for p in asked]
    assert [plan.digest for plan in plans] == [candidate.way for candidate in found]
    predicted = [predict_ms(plan, bench.profile) for plan in plans]
    assert predicted == [candidate.predicted_ms for candidate in found] == sorted(predicted)
    # Of all 200 none is both faster and keeps more of the scores.
    scores = group_scores(bench.scores["taylor"].layers, bench.groups)
    others = [params_at(study.search, point, 4) for point in scattered_points(study.search, 200, 0)]
    for other in others:
        plan = make_plan(other, rerank(other, bench), bench)
        for one, ms in zip(plans, predicted, strict=True):
            kept, mine = (score_kept(p, scores, bench.groups) for p in (plan, one))
            assert kept is not None
            assert mine is not None
            assert not (predict_ms(plan, bench.profile) < ms and kept > mine)


def test_screening_heeds_the_limit_and_can_be_switched_off(tmp_path: Path) -> None:
    limits = {"latency_ms": 2.0}
    study = make_study(tmp_path, trials=12, limits=limits, screening={"candidates": 200, "keep": 3})
    bench = make_bench(study.device("first").device())
    found = screened(study, "first", bench)
    assert len(found) > 3
    for candidate in found:
        params = params_at(study.search, candidate.point, 4)
        assert predict_ms(make_plan(params, rerank(params, bench), bench), bench.profile) <= 2.0
    none = study.model_copy(update={"screening": study.screening.model_copy(update={"candidates": 0})})
    assert screened(none, "first", bench) == []


@pytest.mark.parametrize(
    "section",
    [{"depth": {"low": 0.0, "high": 0.5}}, {"beta": 0.5}, {"criterion": {"choices": ["taylor", "l1"]}}],
)
def test_other_searched_keys_are_refused_and_a_wider_range_is_not(
    tmp_path: Path, section: dict[str, Any]
) -> None:
    go(make_study(tmp_path, search={"sampler": "gp"}), trials=1)
    assert go(make_study(tmp_path, search={"ratio": {"low": 0.2, "high": 0.9}}), trials=2).begun
    with pytest.raises(SearchError, match="searched keys was"):
        go(make_study(tmp_path, search=section), trials=3)


def test_one_plan_trained_back_in_two_ways_is_two_trials(study: StudyFile) -> None:
    go(study, trials=1)
    device_study = DeviceStudy(
        study, "first", open_storage(study, Workspace(study.folder)), Workspace(study.folder)
    )
    one = results(study)[1]
    tuned, scratch = one.way, replace(one, asked=replace(one.asked, recovery="scratch")).way
    begun = device_study.next_trial(9, 4)
    assert isinstance(begun, Begun)
    assert device_study.claim_plan(begun, str(tuned)) == 1
    assert device_study.claim_plan(begun, str(scratch)) is None


def test_the_lowest_depth_stands_for_a_searched_one_and_known_points_keep_blocks(tmp_path: Path) -> None:
    study = make_study(tmp_path, search={"beta": 0.5, "ratio": 0.3, "depth": {"low": 0.0, "high": 0.5}})
    assert fixed_params(study.search, 4).depth == 0.0
    study = make_study(tmp_path, search={"depth": {"low": 0.0, "high": 0.5}})
    assert [point["depth"] for point in known_points(study.search)] == [0.0] * 4


def test_a_trial_taken_but_not_begun_is_begun_next(study: StudyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage goes away after it gave out the trial, before its parameters are there."""
    go(study, trials=1)
    storage, workspace = open_storage(study, Workspace(study.folder)), Workspace(study.folder)
    worker = DeviceStudy(study, "first", storage, workspace)
    with monkeypatch.context() as patch:

        def away(*_: Any) -> None:
            raise optuna.exceptions.StorageInternalError("away")

        patch.setattr(search.study, "suggest", away)
        with pytest.raises(StorageAwayError, match="away"):
            worker.next_trial(9, 4)
    begun, other = worker.next_trial(9, 4), worker.next_trial(9, 4)
    assert isinstance(begun, Begun)
    assert isinstance(other, Begun)
    assert (begun.number, other.number) == (2, 3)


def test_few_points_are_drawn_at_once_and_none_while_something_is_measured_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, trials=9, screening={"keep": 0})
    storage, workspace = open_storage(study, Workspace(study.folder)), Workspace(study.folder)
    purposes: list[str] = []

    @contextlib.contextmanager
    def watched(purpose: str) -> Iterator[None]:
        purposes.append(purpose)
        yield

    monkeypatch.setattr(search.study, "host_lock", watched)
    worker = DeviceStudy(study, "first", storage, workspace)
    worker.seat(list)
    first = worker.next_trial(9, 4)
    assert isinstance(first, Begun)
    numbers = dict.fromkeys(("accuracy", "latency_ms", "latency_p90_ms", "speedup"), 1.0)
    assert worker.tell(first, TrialResult(0, "first", "print", first.params, "complete", **numbers))  # type: ignore[arg-type]
    for _ in range(4):
        worker.next_trial(9, 4)
    assert purposes == []  # known points are given, not drawn
    monkeypatch.setattr("search.turns.WAIT_AT_MOST_S", 0.1)
    impatient = DeviceStudy(study, "first", storage, workspace)
    impatient.seat(list)
    url = workspace.storage_url(study.storage)
    with turns(url, f"{impatient.optuna.study_name}.draw1", workspace.folder)():
        with pytest.raises(filelock.Timeout):  # another worker draws
            impatient.next_trial(9, 4)
        sixth = worker.next_trial(9, 4)
    fifth = impatient.next_trial(9, 4)
    assert isinstance(fifth, Begun)
    assert isinstance(sixth, Begun)
    assert (fifth.number, sixth.number) == (5, 6)
    assert purposes == ["suggestion"] * 3


def test_candidates_are_screened_once_for_all_workers_who_choose_different_ones(tmp_path: Path) -> None:
    screening = {"keep": 5}
    study = make_study(tmp_path, trials=9, screening=screening)
    storage, workspace = open_storage(study, Workspace(study.folder)), Workspace(study.folder)
    made: list[int] = []

    def make() -> list[Candidate]:
        made.append(1)
        return [
            Candidate({"beta": 0.25, "ratio": 0.5}, "a", "finetune", 0.5, Proxy("scores", 0.6)),
            Candidate({"beta": 0.5, "ratio": 0.625}, "b", "finetune", 0.3, Proxy("scores", 0.4)),
        ]

    one, two = (DeviceStudy(study, "first", storage, workspace) for _ in range(2))
    for worker in (one, two):
        worker.seat(make)

    def elsewhere(worker: DeviceStudy, host: str) -> TrialParams:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search.study, "identity", lambda: {**identity(), "host": host})
            begun = worker.next_trial(9, 4)
        assert isinstance(begun, Begun)
        return begun.params

    first = one.next_trial(9, 4)
    assert isinstance(first, Begun)
    assert first.params.ratio == 0.0
    numbers = dict.fromkeys(("accuracy", "latency_ms", "latency_p90_ms", "speedup"), 1.0)
    done = TrialResult(0, "first", "print", first.params, "complete", **numbers)  # type: ignore[arg-type]
    assert one.tell(first, done)
    assert (elsewhere(two, "known").ratio, made) == (pytest.approx(0.4), [])  # waits for no screening
    second, third = elsewhere(one, "second"), elsewhere(two, "third")
    assert (second.beta, second.ratio) == (0.25, 0.5)
    assert (third.beta, third.ratio) == (0.5, 0.625)  # what the second will bring is taken for granted
    fourth, fifth = elsewhere(two, "fourth"), elsewhere(two, "fifth")
    assert (fourth.beta, fourth.ratio) not in ((0.25, 0.5), (0.5, 0.625))  # the sampler's
    assert made == [1]
    limits = {"latency_ms": 0.4}
    changed = make_study(tmp_path, trials=9, screening=screening, limits=limits)
    limited = DeviceStudy(changed, "first", storage, workspace)
    limited.seat(make)
    sixth = elsewhere(limited, "sixth")
    assert made == [1, 1]  # another limit may want other candidates
    assert {fourth.ratio, fifth.ratio, sixth.ratio}.isdisjoint((0.55, 0.3, 0.25))  # five are chosen first
    known = [elsewhere(two, f"further{n}").ratio for n in range(3)]
    assert known == pytest.approx([0.55, 0.3, 0.25])


def test_a_candidate_that_failed_is_not_tried_again_and_one_cut_off_is(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=9)
    storage, workspace = open_storage(study, Workspace(study.folder)), Workspace(study.folder)
    worker = DeviceStudy(study, "first", storage, workspace)
    points = [{"beta": 0.25, "ratio": 0.5}, {"beta": 0.5, "ratio": 0.625}]
    worker.seat(
        lambda: [
            Candidate(points[0], "a", "finetune", 0.5, Proxy("scores", 0.6)),
            Candidate(points[1], "b", "finetune", 0.3, Proxy("scores", 0.4)),
        ]
    )

    def begun() -> Begun:
        taken = worker.next_trial(9, 4)
        assert isinstance(taken, Begun)
        return taken

    numbers = dict.fromkeys(("accuracy", "latency_ms", "latency_p90_ms", "speedup"), 1.0)
    assert worker.tell(begun(), TrialResult(0, "first", "print", TrialParams(), "complete", **numbers))  # type: ignore[arg-type]
    assert worker.tell(begun(), TrialResult.failed(1, "first", "print", TrialParams(), "known"))
    one = begun()
    assert dict(one.trial.params) == points[0]
    worker.give_up(one)  # as if it had been killed
    again = begun()
    assert (again.number, dict(again.trial.params)) == (one.number, points[0])
    assert worker.tell(again, TrialResult.failed(one.number, "first", "print", again.params, "broken"))
    assert dict(begun().trial.params) == points[1]


def test_a_limit_set_or_lifted_later_leaves_the_constraints_alike(tmp_path: Path) -> None:
    """The GP sampler refuses to go on where complete trials differ in theirs."""
    study = make_study(tmp_path, limits={"latency_ms": 4.0}, search={"sampler": "gp"}, trials=12)
    go(study, trials=7)
    go(make_study(tmp_path, limits={"accuracy": 0.5}, search={"sampler": "gp"}, trials=12), trials=9)
    loaded = optuna.load_study(study_name="study.first", storage=open_storage(study, Workspace(study.folder)))
    assert {tuple(t.constraints) for t in loaded.trials if t.state == TrialState.COMPLETE} == {
        ("latency_ms",)
    }
    assert loaded.trials[-1].constraints["latency_ms"] == -1.0


# ---- limits, storage -----------------------------------------------------------------------------


def test_limits_become_constraints_of_every_complete_trial(
    tmp_path: Path, trial: Callable[[RunTrial], None]
) -> None:
    study = make_study(tmp_path, limits={"latency_ms": 4.0, "accuracy": 0.5})
    trial(failing(2))
    go(study)
    loaded = optuna.load_study(study_name="study.first", storage=open_storage(study, Workspace(study.folder)))
    for done, result in zip(loaded.trials, results(study), strict=True):
        if done.state == TrialState.COMPLETE:
            excess = excess_of(result, study.limits)
            assert list(excess) == ["latency_ms", "accuracy"]
            assert (excess["latency_ms"] <= 0) == (result.latency_ms <= 4.0)  # type: ignore[operator]
            assert done.constraints == pytest.approx(excess)


def test_constraints_by_hand() -> None:
    result = TrialResult(
        1, "d", "f", TrialParams(), "complete",
        accuracy=0.5, latency_ms=6.0, latency_p90_ms=7.0, speedup=1.0, params=50,
    )  # fmt: skip
    limits = Limits(latency_ms=4.0, accuracy=0.6, params=100)
    assert excess_of(result, limits) == pytest.approx({"latency_ms": 0.5, "accuracy": 0.1, "params": -0.5})
    assert excess_of(result, Limits()) == {}
    assert excess_of(replace(result, latency_ms=4.0), Limits(latency_ms=4.0)) == {"latency_ms": 0.0}


@pytest.mark.usefixtures("sqlite")
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(study: StudyFile) -> None:
    wrong = study.model_copy(update={"storage": "postgresql+nodriver://u:hunter2@nowhere/db"})
    with pytest.raises(SearchError, match="cannot be opened") as caught:
        open_storage(wrong, Workspace(study.folder))
    assert "hunter2" not in str(caught.value)


def work(folder: Path, hang_at: int) -> None:
    """Search until one trial, and hang there."""
    study = make_study(folder)

    def run(
        number: int, params: TrialParams, bench: Bench, trial_folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if number == hang_at:
            trial_folder.mkdir(parents=True)
            (trial_folder / "half-written").touch()
            (folder / "hanging").touch()
            time.sleep(300)
        return stand_in(number, params, bench, trial_folder, listener, gate)

    search.loop.run_trial = run
    go(study)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))

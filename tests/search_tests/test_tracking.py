"""Tracking against real stores: SQLite in a temporary folder, and MLflow's own server on loopback."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.found import Found
from search.front import ParetoFront
from search.outbox import Outbox
from search.result import TrialParams, TrialResult
from search.review import hypervolumes
from search.tracking import Tracker, TrackingError
from search.ui import ui_command, ui_environment
from search.uri import publishable, redact, without_paths

SECRET = "hunter2-s3cret"


def make_result(trial: int, accuracy: float, latency_ms: float, **changes: Any) -> TrialResult:
    base = TrialResult(
        trial=trial,
        device="laptop-ort",
        fingerprint="cpu-abc",
        asked=TrialParams(beta=0.1 * trial, ratio=0.1 * trial),
        state="complete",
        accuracy=accuracy,
        latency_ms=latency_ms,
        latency_p90_ms=latency_ms * 1.1,
        latency_raw_ms=latency_ms * 1.02,
        speedup=10.0 / latency_ms,
        speedup_ci=(9.8 / latency_ms, 10.2 / latency_ms),
        predicted_latency_ms=latency_ms * 0.95,
        params=1000,
        macs=2000,
        duration_s={"rerank": 0.1, "recover": 12.0},
        epochs=(0.1, 0.2, accuracy),
        plan_digest="p" * 64,
        artifact_digest="a" * 64,
        finished_at="2026-01-02T03:04:05+00:00",
        details={"stable": True, "rounds": 7},
    )
    return replace(base, **changes)


def make_folder(study: Path, result: TrialResult) -> Path:
    folder = study / result.device / f"trial-{result.trial:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text('{"format_version": 1}\n')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "model.onnx").write_bytes(b"onnx")
    (folder / "measurement.json").write_text('{"ratio": 0.5}\n')
    (folder / "scratch.tmp").write_bytes(b"not for the store")
    return folder


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making them takes seconds, copying the file does not."""
    folder = tmp_path_factory.mktemp("store")
    Tracker.open(f"sqlite:///{folder}/empty.db", "nothing", folder / "files", outbox=folder / "outbox")
    return folder / "empty.db"


@pytest.fixture
def study(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return tmp_path


def open_tracker(study: Path, notices: list[str] | None = None) -> Tracker:
    notice: Callable[[str], None] = ([] if notices is None else notices).append
    return Tracker.open(
        f"sqlite:///{study}/mlflow.db", "bccd", study / "artifacts", outbox=study / "outbox", notice=notice
    )


def start_device(tracker: Tracker, **changes: Any) -> str | None:
    settings: dict[str, Any] = {
        "fingerprint": "cpu-abc",
        "tags": {"runtime": "onnxruntime", "version.torch": "2.15"},
        "params": {"imgsz": 320, "data": "/home/somebody/bccd/data.yaml"},
        "datasets": {"bccd": "d" * 64, "yolov8n-bccd": "e" * 64},
    }
    return tracker.device_run("laptop-ort", **{**settings, **changes})


def all_runs(tracker: Tracker) -> list[Any]:
    client = tracker.client()
    experiment = client.get_experiment_by_name(tracker.study)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_a_device_and_its_trials(study: Path) -> None:
    tracker = open_tracker(study)
    parent = start_device(tracker)
    result = make_result(7, 0.5, 8.0)
    run_id = tracker.log_trial(result, make_folder(study, result))
    assert parent is not None
    assert run_id is not None
    assert tracker.waiting == 0
    assert tracker.run_ids("laptop-ort") == {7: run_id}

    client = tracker.client()
    run = client.get_run(run_id)
    assert run.info.run_name == "trial-0007"
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 12100
    assert run.data.params["beta"] == str(0.1 * 7)
    assert run.data.params["criterion"] == "taylor"
    metrics = run.data.metrics
    assert metrics["accuracy"] == 0.5
    assert metrics["latency_ms"] == 8.0
    assert metrics["latency_p90_ms"] == result.latency_p90_ms
    assert metrics["speedup_low"] == 9.8 / 8.0
    assert metrics["params"] == 1000
    assert metrics["duration_recover_s"] == 12.0
    assert metrics["rounds"] == 7
    assert "stable" not in metrics
    tags = run.data.tags
    assert tags["mlflow.parentRunId"] == parent
    assert tags["runtime"] == "onnxruntime"
    assert tags["optuna.trial_number"] == "7"
    assert tags["optuna.study"] == "bccd"
    assert tags["pareto"] == "false"
    assert tags["state"] == "complete"
    assert tags["fingerprint"] == "cpu-abc"
    assert tags["plan_digest"] == "p" * 64
    assert tags["version.torch"] == "2.15"
    history = client.get_metric_history(run_id, "epoch_accuracy")
    assert [(m.step, m.value) for m in history] == [(0, 0.1), (1, 0.2), (2, 0.5)]
    names = {f.path for f in client.list_artifacts(run_id)}
    assert names == {"plan.json", "model.safetensors", "model.onnx", "result.json", "measurement.json"}
    kept = Path(client.download_artifacts(run_id, "result.json", str(study)))
    assert TrialResult.from_json(json.loads(kept.read_text())) == result

    device = client.get_run(parent)
    assert device.data.tags["role"] == "device"
    assert device.data.tags["digest.bccd"] == "d" * 64
    assert {d.dataset.name: d.dataset.digest for d in device.inputs.dataset_inputs} == {
        "bccd": "d" * 36,
        "yolov8n-bccd": "e" * 36,
    }
    assert device.info.status == "RUNNING"
    tracker.end_device("laptop-ort")
    assert client.get_run(parent).info.status == "FINISHED"
    assert start_device(tracker) == parent
    assert client.get_run(parent).info.status == "RUNNING"


def test_logging_twice_leaves_one_run(study: Path) -> None:
    result = make_result(3, 0.5, 8.0)
    folder = make_folder(study, result)
    tracker = open_tracker(study)
    start_device(tracker)
    first = tracker.log_trial(result, folder)
    again = tracker.log_trial(result, folder)
    other_process = open_tracker(study)
    parent = start_device(other_process, params={"imgsz": 640, "trials": 9})
    third = other_process.log_trial(result, folder)
    assert first == again == third
    assert len(all_runs(tracker)) == 2
    assert len(tracker.client().get_metric_history(str(first), "epoch_accuracy")) == 3
    assert parent is not None
    data = tracker.client().get_run(parent).data
    assert data.params["imgsz"] == "320"
    assert data.params["trials"] == "9"
    assert data.tags["changed.imgsz"] == "640"


def test_a_redone_trial_replaces_its_run(study: Path) -> None:
    tracker = open_tracker(study)
    start_device(tracker)
    result = make_result(3, 0.5, 8.0)
    first = tracker.log_trial(result, make_folder(study, result))
    redone = replace(result, asked=TrialParams(beta=0.9, ratio=0.2), accuracy=0.4)
    second = tracker.log_trial(redone, make_folder(study, redone))
    assert first != second
    assert tracker.run_ids("laptop-ort") == {3: second}
    assert tracker.client().get_run(str(second)).data.params["beta"] == "0.9"


def test_states_become_statuses(study: Path) -> None:
    tracker = open_tracker(study)
    start_device(tracker)
    asked = TrialParams(beta=0.5, ratio=0.6)
    stopped = TrialResult(1, "laptop-ort", "cpu-abc", asked, "stopped", "predicted 40 ms, the limit is 33 ms")
    failed = TrialResult(
        2,
        "laptop-ort",
        "cpu-abc",
        asked,
        "failed",
        f"cannot read /home/me/x.pt from http://me:{SECRET}@host/",
    )
    ids = [tracker.log_trial(r, study / f"trial-{r.trial}") for r in (stopped, failed)]
    runs = [tracker.client().get_run(str(i)) for i in ids]
    assert [run.info.status for run in runs] == ["KILLED", "FAILED"]
    assert runs[0].data.tags["reason"] == "predicted 40 ms, the limit is 33 ms"
    assert runs[1].data.tags["reason"] == "cannot read x.pt from http://***@host/"


def test_leaving_the_front_takes_the_tag_away(study: Path) -> None:
    tracker = open_tracker(study)
    parent = start_device(tracker)
    results = [make_result(0, 0.6, 10.0), make_result(1, 0.5, 8.0), make_result(2, 0.55, 7.0)]
    page = study / "figure.html"
    page.write_text("<p>front</p>")

    def on_front() -> dict[int, str]:
        runs = [r for r in all_runs(tracker) if r.data.tags["role"] == "trial"]
        return {int(r.data.tags["optuna.trial_number"]): r.data.tags["pareto"] for r in runs}

    for result in results[:2]:
        tracker.log_trial(result, make_folder(study, result))
    tracker.log_front(ParetoFront.of(results[:2]), {"figures/front.html": page})
    assert on_front() == {0: "true", 1: "true"}
    tracker.log_trial(results[2], make_folder(study, results[2]))
    assert on_front() == {0: "true", 1: "true", 2: "false"}
    front = ParetoFront.of(results)
    tracker.log_front(front, {"figures/front.html": page})
    assert on_front() == {0: "true", 1: "false", 2: "true"}
    tracker.log_trial(results[2], make_folder(study, results[2]))
    assert on_front()[2] == "true"

    client = tracker.client()
    history = client.get_metric_history(str(parent), "hypervolume")
    assert [m.step for m in history] == [2, 3]
    assert history[-1].value == front.hypervolume
    shown = json.loads(Path(client.download_artifacts(str(parent), "front.json", str(study))).read_text())
    assert [p["trial"] for p in shown["points"]] == [p.trial for p in front.points]
    assert {p["trial"]: p["run_id"] for p in shown["points"]}.items() <= tracker.run_ids("laptop-ort").items()
    table = Path(client.download_artifacts(str(parent), "front.csv", str(study))).read_text().splitlines()
    assert len(table) == 1 + len(front.points)
    assert [f.path for f in client.list_artifacts(str(parent), "figures")] == ["figures/front.html"]
    assert "| 2 | 0.200 |" in client.get_run(str(parent)).data.tags["mlflow.note.content"]


def test_sync_logs_only_what_is_missing(study: Path) -> None:
    tracker = open_tracker(study)
    start_device(tracker)
    results = [make_result(0, 0.6, 10.0), make_result(1, 0.5, 8.0), make_result(2, 0.4, 6.0)]
    pairs = [(r, make_folder(study, r)) for r in results]
    tracker.log_trial(*pairs[0])
    assert tracker.sync(pairs) == 2
    assert tracker.sync(pairs) == 0
    assert sorted(tracker.run_ids("laptop-ort")) == [0, 1, 2]


def test_a_run_that_was_left_half_written_is_completed(study: Path) -> None:
    tracker = open_tracker(study)
    start_device(tracker)
    result = make_result(1, 0.5, 8.0)
    client = tracker.client()
    real = client.log_text

    def dies(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed here")

    client.log_text = dies  # type: ignore[method-assign]
    assert tracker.log_trial(result, make_folder(study, result)) is None
    assert tracker.waiting == 1
    client.log_text = real  # type: ignore[method-assign]
    assert tracker.flush() == 1
    run = client.get_run(tracker.run_ids("laptop-ort")[1])
    assert run.info.status == "FINISHED"
    assert len(all_runs(tracker)) == 2


def test_two_parents_made_at_once_become_one(study: Path) -> None:
    tracker = open_tracker(study)
    parent = start_device(tracker)
    client = tracker.client()
    experiment = client.get_run(str(parent)).info.experiment_id
    tags = {"role": "device", "device": "laptop-ort", "paretoprune.study": "bccd"}
    client.create_run(experiment, tags=tags, start_time=int(time.time() * 1000) + 5000)
    assert start_device(open_tracker(study)) == parent
    assert len(all_runs(tracker)) == 1


def test_a_device_must_be_announced(study: Path) -> None:
    with pytest.raises(
        ValueError, match="device_run must be called before anything is logged for 'laptop-ort'"
    ):
        open_tracker(study).log_trial(make_result(0, 0.6, 10.0), study)


@pytest.mark.parametrize(
    "uri",
    ["nonsense://host/x", f"nodriver+x://me:{SECRET}@host/x", "sqlite:////proc/no/such/folder/x.db"],
)
def test_a_wrong_address_is_refused_without_its_password(tmp_path: Path, uri: str) -> None:
    with pytest.raises(TrackingError, match="tracking_uri must be") as caught:
        Tracker.open(uri, "bccd", None, outbox=tmp_path / "outbox")
    assert SECRET not in str(caught.value)


def test_mlflow_stays_quiet(study: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(study)
    start_device(tracker)
    tracker.log_trial(make_result(0, 0.6, 10.0), study)
    assert logging.getLogger("mlflow").level == logging.CRITICAL
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert capfd.readouterr() == ("", "")


# -- a server that is away


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def serve(study: Path, port: int) -> Iterator[Callable[[], None]]:
    """Starts MLflow's server with the command that `paretoprune ui` uses."""
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        uri = f"sqlite:///{study}/mlflow.db"
        command = [*ui_command(uri, None, port=port), "--artifacts-destination", str(study / "proxied")]
        environment = {**os.environ, **ui_environment(uri)}
        with (study / "server.log").open("wb") as log:
            # A session of its own: MLflow starts children, and all of them must go.
            process = subprocess.Popen(
                command, env=environment, cwd=study, stdout=log, stderr=log, start_new_session=True
            )
        processes.append(process)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.2)
        pytest.fail(f"the server did not start: {(study / 'server.log').read_text()[-2000:]}")

    yield start
    for process in processes:
        os.killpg(process.pid, 15)
        process.wait(20)


def test_records_wait_for_a_server_and_hold_no_secret(
    study: Path, port: int, serve: Callable[[], None]
) -> None:
    notices: list[str] = []
    uri = f"http://somebody:{SECRET}@127.0.0.1:{port}"
    tracker = Tracker.open(uri, "bccd", study / "artifacts", outbox=study / "outbox", notice=notices.append)
    assert start_device(tracker, tags={"runtime": "onnxruntime", "store": uri}) is None
    results = [make_result(0, 0.6, 10.0), make_result(1, 0.5, 8.0)]
    for result in results:
        assert tracker.log_trial(result, make_folder(study, result)) is None
    page = study / "gone-soon.html"
    page.write_text("<p>front</p>")
    tracker.log_front(ParetoFront.of(results), {"figures/front.html": page})
    page.unlink()
    assert tracker.run_ids("laptop-ort") == {}
    assert tracker.waiting == 4
    assert len(notices) == 1
    assert "does not answer" in notices[0]

    serve()
    assert tracker.flush() == 4
    assert tracker.waiting == 0
    assert notices[1:] == [f"MLflow at http://***@127.0.0.1:{port} answers again, 4 waiting records sent"]
    ids = tracker.run_ids("laptop-ort")
    assert sorted(ids) == [0, 1]
    assert sorted(f.path for f in tracker.client().list_artifacts(ids[1])) == [
        "measurement.json",
        "model.onnx",
        "model.safetensors",
        "plan.json",
        "result.json",
    ]
    run = tracker.client().get_run(ids[1])
    assert run.data.tags["pareto"] == "true"
    kept = tracker.client().list_artifacts(run.data.tags["mlflow.parentRunId"], "figures")
    assert [f.path for f in kept] == ["figures/front.html"]
    assert not list((study / "outbox").rglob("*.html"))

    written = [p for p in study.rglob("*") if p.is_file() and p.name != "server.log"]
    assert len(written) > 8
    for path in written:
        assert SECRET.encode() not in path.read_bytes(), path
    assert not any(SECRET in text for text in notices)
    with sqlite3.connect(study / "mlflow.db") as database:
        values = [
            row[0] for table in ("tags", "params") for row in database.execute(f"select value from {table}")
        ]
    database.close()
    assert values
    assert not [value for value in values if str(study) in value or "/home/" in value]


def test_another_process_sends_what_waits(study: Path, port: int) -> None:
    tracker = Tracker.open(f"http://127.0.0.1:{port}", "bccd", None, outbox=study / "outbox", notice=str)
    start_device(tracker)
    tracker.log_trial(make_result(4, 0.6, 10.0), study)
    assert tracker.waiting == 2
    # Nothing but the outbox tells it what is missing.
    assert sorted(open_tracker(study).run_ids("laptop-ort")) == [4]
    assert tracker.waiting == 0


def test_fronts_that_waited_leave_no_hole_in_the_hypervolume(study: Path, port: int) -> None:
    """Each replaced the one before it, so the last one says what the others would have said."""
    results = [make_result(n, 0.6 - 0.01 * n, 10.0 - n) for n in range(5)]
    found = Found(ParetoFront.of(results), tuple(results))
    tracker = open_tracker(study)
    parent = start_device(tracker)
    tracker.log_trial(results[0], study)
    tracker.log_front(ParetoFront.of(results[:1]), {})
    away = Tracker.open(f"http://127.0.0.1:{port}", "bccd", None, outbox=study / "outbox", notice=str)
    start_device(away)
    for n, result in enumerate(results[1:], start=2):
        away.log_trial(result, study)
        away.log_front(ParetoFront.of(results[:n]), {})
    away.log_front(found.front, {}, hypervolumes=hypervolumes(found))
    again = open_tracker(study)
    start_device(again)
    for _ in range(2):  # once more changes nothing
        history = again.client().get_metric_history(str(parent), "hypervolume")
        assert sorted({(m.step, m.value) for m in history}) == [
            (n, ParetoFront.of(results[:n]).hypervolume) for n in range(1, 6)
        ]
        again.log_front(found.front, {}, hypervolumes=hypervolumes(found))


# -- parts


def test_the_outbox_keeps_order_and_newest(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "outbox", "http://host")
    box.put("front", "d", {"n": 1})
    box.put("trial", "d-000010", {"n": 2})
    box.put("trial", "d-000009", {"n": 3})
    box.put("device", "d", {"n": 4})
    box.put("front", "d", {"n": 5})
    box.put("trial", "a/b", {"n": 6})
    box.put("trial", "a_b", {"n": 7})
    (tmp_path / "outbox" / "1-trial-broken.json").write_text('{"format_version": 1, "ki')
    letters = [(letter.kind, letter.body["n"]) for letter in box.pending()]
    assert letters[0] == ("device", 4)
    assert letters[-1] == ("front", 5)
    assert {n for kind, n in letters if kind == "trial"} == {2, 3, 6, 7}
    assert [n for _, n in letters].index(3) < [n for _, n in letters].index(2)


def test_a_refused_record_stays_and_the_others_go(tmp_path: Path) -> None:
    notices: list[str] = []
    box = Outbox(tmp_path / "outbox", "http://host", notices.append)
    for n in range(3):
        box.put("trial", f"d-{n}", {"n": n})

    def send(letter: Any) -> str:
        if letter.body["n"] == 1:
            raise ValueError("no such thing")
        return "id"

    assert len(box.deliver(send)) == 2
    assert [letter.body["n"] for letter in box.pending()] == [1]
    box.deliver(send)
    assert notices == ["MLflow refused 1-trial-d-1.json, it stays in the outbox: no such thing"]


def test_a_record_replaced_while_it_was_sent_is_kept(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "outbox", "http://host")
    box.put("front", "d", {"n": 1})

    def send(letter: Any) -> str:
        if letter.body["n"] == 1:
            box.put("front", "d", {"n": 2})
        return "id"

    box.deliver(send)
    assert [letter.body["n"] for letter in box.pending()] == [2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://me:p@ss/w@host:5432/db", "postgresql+psycopg://***@host:5432/db"),
        ("see http://token@host/x?password=abc&y=1", "see http://***@host/x?password=***&y=1"),
        ("password = geheim, user=me", "password = ***, user=me"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_password_standing_alone_is_hidden_too() -> None:
    address = "http://me:geheim%2Fwort@host"
    assert redact("tried geheim/wort and geheim%2Fwort", address) == "tried *** and ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open '/home/me/my.data/x.yaml'", "cannot open 'x.yaml'"),
        ("sqlite:////home/me/study/mlflow.db", "sqlite:mlflow.db"),
        (r"C:\Users\me\x.pt is gone", "x.pt is gone"),
        ("mAP/latency 3/4 of runs/bccd/x", "mAP/latency 3/4 of runs/bccd/x"),
        ("http://host/a/b", "http://host/a/b"),
    ],
)
def test_without_paths(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_publishable_goes_deep() -> None:
    assert publishable({"a": ["/x/y/z", 1, None], "b": {"c": "http://u:p@h"}}) == {
        "a": ["z", 1, None],
        "b": {"c": "http://***@h"},
    }


def test_the_ui_command_shows_no_address() -> None:
    uri = f"postgresql://me:{SECRET}@host/mlflow"
    command = ui_command(uri, Path("artifacts"))
    assert command[0] == sys.executable
    assert not any(SECRET in word for word in command)
    assert ui_environment(uri)["MLFLOW_BACKEND_STORE_URI"] == uri
    assert ui_command("http://host:5000", None) == []


# -- the mlflow/ folder

DEPLOYMENT = Path(__file__).parents[2] / "mlflow"


def test_the_readmes_searches_find_what_they_say(study: Path) -> None:
    searches = re.findall(r"```sql\n(.*?)```", (DEPLOYMENT / "README.md").read_text(), re.S)[0].splitlines()
    tracker = open_tracker(study)
    start_device(tracker, datasets={"data": "d" * 64, "model": "e5c1" + "e" * 60})
    results = [make_result(0, 0.6, 10.0), make_result(1, 0.58, 7.0), make_result(2, 0.5, 8.0)]
    results += [
        TrialResult(7, "laptop-ort", "cpu-abc", TrialParams(), "stopped", "dominated with margin"),
        TrialResult(8, "laptop-ort", "cpu-abc", TrialParams(), "failed", "out of memory"),
    ]
    for result in results:
        tracker.log_trial(result, study)
    tracker.log_front(ParetoFront.of(results), {})
    client = tracker.client()
    experiment = client.get_experiment_by_name("bccd")
    assert experiment is not None
    found = [
        sorted(run.data.tags.get("optuna.trial_number", "device") for run in runs)
        for runs in (client.search_runs([experiment.experiment_id], text) for text in searches)
    ]
    assert found == [
        ["0", "1"],
        ["0", "1"],
        ["1"],
        ["7"],
        ["8"],
        ["7"],
        ["0", "1", "2", "7", "8"],
        ["device"],
        ["1"],
        ["0", "1", "2"],
        ["0", "1", "2"],
    ]


def test_the_compose_file_matches_the_project() -> None:
    text = (DEPLOYMENT / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    assert services["mlflow"]["image"].endswith(f":v{importlib.metadata.version('mlflow')}-full")
    assert all("healthcheck" in service for service in services.values())
    example = dict(
        line.split("=", 1)
        for line in (DEPLOYMENT / ".env.example").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    # Every variable that has no default in the compose file is in the example, and the example has no other.
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    assert used == set(example)
    assert re.findall(r"CREATE DATABASE (\w+);", (DEPLOYMENT / "databases.sql").read_text()) == [
        "optuna",
        "mlflow",
    ]

"""The commands, from a study file to a shipped model, on a tiny detector; measured for real."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import search.cli
from search.plan import PruningPlan
from search.prune import check_widths

pytestmark = pytest.mark.usefixtures("one_thread", "no_pngs")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as JSON: anything else there is an error."""
        return json.loads(self.out)


Run = Callable[..., Answer]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The console script's own entry, without starting Python anew each time."""

    def call(*arguments: Any) -> Answer:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["paretoprune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            search.cli.main()
        out, err = capfd.readouterr()
        return Answer(int(stop.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def folder(shapes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    document = {
        "name": "tiny",
        "model": str(shapes.weights),
        "data": str(shapes.data),
        "imgsz": shapes.imgsz,
        "devices": [{"name": "ort", "runtime": "onnxruntime"}],
        "search": {"ratio": {"low": 0.5, "high": 0.8}, "round_to": 4, "min_channels": 4},
        "calibration": {"images": 6, "batch": 4},
        "finetune": {"epochs": 1, "batch": 4, "device": "cpu", "reestimate_images": 12},
        # The layer profile alone: fitting a latency model takes a minute and has tests of its own.
        "profile": {"model": "bilinear"},
        "measure": {"limit_s": 0.5, "target": 0.9},
        "trials": 2,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(document))
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    from profiles.connection import close_connections

    monkeypatch.chdir(folder)
    yield
    close_connections()


@pytest.fixture
def searched(run: Run, folder: Path) -> Path:
    """The study's folder with its search done; the command finds it done where an earlier test ran it."""
    done = run("search", "study.yaml")
    assert done.code == 0, done.err
    return folder


# ---- the main job --------------------------------------------------------------------------------


def test_search_front_and_export(run: Run, folder: Path, shapes: Any, tmp_path: Path) -> None:
    """One story, because each step stands on the one before."""
    # Nothing there yet.
    early = run("front", "study.yaml", "--json")
    assert (early.code, early.out) == (1, "")
    assert "has no front yet for ort; run paretoprune search study.yaml first" in " ".join(early.err.split())

    done = run("search", "study.yaml")
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    home = folder / "runs" / "tiny"
    results = [json.loads(p.read_text()) for p in sorted(home.glob("devices/ort/trial-*/result.json"))]
    assert [r["trial"] for r in results] == [0, 1, 2]
    assert {r["state"] for r in results} == {"complete"}

    # The same command again finds it done.
    again = run("search", "study.yaml")
    assert again.code == 0, again.err
    assert "scores: taylor found in the cache" in again.err
    assert "profile: ort found in the cache" in again.err
    assert len(list(home.glob("devices/ort/trial-*"))) == 3

    shown = run("front", "study.yaml", "--json", "--html", tmp_path / "front.html")
    assert shown.code == 0, shown.err
    entry = shown.document["devices"]["ort"]
    assert shown.document["study"] == "tiny"
    assert entry["baseline"]["accuracy"] == results[0]["accuracy"] > 0.05
    latencies = [p["latency_ms"] for p in entry["points"]]
    assert latencies == sorted(latencies)
    for point in entry["points"]:
        assert point["accuracy"] == results[point["trial"]]["accuracy"]
        assert (home / point["model"]).is_file()
        assert point["run_id"]
    assert "<html" in (tmp_path / "front.html").read_text()[:2000].lower()

    # A device that was not searched yet is named, in the terminal and on the page.
    both = "devices=[{name: ort, runtime: onnxruntime}, {name: later, runtime: torch}]"
    more = run("front", "study.yaml", "--json", "--set", both, "--html", tmp_path / "both.html")
    assert more.code == 0, more.err
    assert list(more.document["devices"]) == ["ort"]
    assert "no front yet, the unpruned model is not measured: later" in more.err
    assert "No front yet, the unpruned model is not measured: later" in (tmp_path / "both.html").read_text()

    # A pruned point, whether or not it is the knee.
    pruned = [p["trial"] for p in entry["points"] if p["trial"] > 0]
    if not pruned:
        pytest.fail(f"no pruned model is on the front: {results}")
    target = tmp_path / "shipped"
    made = run("export", "study.yaml", "--device", "ort", "--trial", pruned[0], "--out", target)
    assert made.code == 0, made.err
    assert made.out.replace("\n", "") == str(target)
    assert {p.name for p in target.iterdir()} == {
        "model.onnx", "model.pt", "model.safetensors", "plan.json", "metrics.json", "MODEL_CARD.md",
    }  # fmt: skip
    metrics = json.loads((target / "metrics.json").read_text())
    assert abs(metrics["accuracy_of_artifact"] - metrics["accuracy"]) <= 0.005
    assert metrics["trial"] == pruned[0]
    check_shipped(target, shapes, tmp_path)


def test_search_and_front_say_where_the_range_cut_the_front_short(
    run: Run, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.range_end.STILL_GOOD", 0.0)  # few epochs on few images leave less than that
    fastest = run("front", "study.yaml", "--json").document["devices"]["ort"]["points"][0]
    to_it, further = (f"search.ratio={{low: 0.0, high: {high}}}" for high in (fastest["ratio"], 0.99))
    for command in ("front", "search"):
        said = " ".join(run(command, "study.yaml", "--set", to_it).err.split())
        assert f"ort: trial {fastest['trial']}, the fastest of the front, has" in said
        assert f"search.ratio ends at {fastest['ratio']:g}" in said
        assert "a higher end" not in run(command, "study.yaml", "--set", further).err
    for until, is_said in ((to_it, True), (further, False)):
        page = tmp_path / "front.html"
        run("front", "study.yaml", "--set", until, "--html", str(page))
        assert ("a higher end is likely to bring faster models</p>" in page.read_text()) == is_said


def check_shipped(target: Path, shapes: Any, tmp_path: Path) -> None:
    """The folder as somebody without our code uses it; then the training that keeps it pruned."""
    import onnxruntime
    import torch
    from ultralytics import YOLO

    from objectives.detection import PrunedTrainer

    plan = PruningPlan.load(target / "plan.json")
    assert not plan.is_empty
    image = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    (have,) = session.run(None, {session.get_inputs()[0].name: image})
    yolo = YOLO(target / "model.pt")
    check_widths(yolo.model, plan)
    with torch.no_grad():
        want = yolo.model.float().eval()(torch.from_numpy(image))[0].numpy()
    assert np.abs(have - want).max() / np.abs(want).max() < 1e-3
    yolo.predict(np.zeros((64, 64, 3), dtype=np.uint8), imgsz=64, device="cpu", verbose=False)
    options = {
        "data": str(shapes.data), "imgsz": 64, "epochs": 1, "batch": 4, "device": "cpu", "workers": 0,
        "plots": False, "val": False, "amp": False, "project": str(tmp_path), "verbose": False,
    }  # fmt: skip
    with pytest.raises(Exception, match="pruned and cannot be rebuilt from its yaml"):
        YOLO(target / "model.pt").train(**options)
    trained = YOLO(target / "model.pt")
    trained.train(trainer=PrunedTrainer, **options)
    check_widths(trained.model, plan)


def test_plan_score_profile_and_devices_print_json_alone(run: Run, folder: Path) -> None:
    asked = ("--device", "ort", "--beta", "0.5", "--ratio", "0.3")
    plan = run("plan", "study.yaml", *asked, "--json")
    assert plan.code == 0, plan.err
    assert (plan.document["device"], plan.document["beta"], plan.document["ratio"]) == ("ort", 0.5, 0.3)
    assert plan.document["round_to"] == 4
    picture = folder / "plan.html"
    again = run("plan", "study.yaml", *asked, "--json", "--html", picture)
    assert again.document == plan.document
    shown = f"{plan.document['channels_removed']} of {plan.document['channels_total']} channels"
    assert shown in picture.read_text()
    assert list(run("score", "study.yaml", "--json").document) == ["taylor"]
    page = folder / "profile.html"
    profile = run("profile", "study.yaml", "--json", "--html", page).document["ort"]
    assert profile["fingerprint"] in page.read_text()
    assert profile["model_ms"] > 0
    devices = run("devices", "study.yaml", "--json")
    assert devices.code == 0
    assert devices.document["ort"]["fingerprint"] == profile["fingerprint"]


def test_limits_nothing_meets_are_wrong_input(run: Run, searched: Path) -> None:
    folder = searched
    answer = run("export", "study.yaml", "--device", "ort", "--max-latency", "0.000001")
    assert (answer.code, answer.out) == (2, "")
    assert "no point of ort is within the limits" in answer.err
    assert not (folder / "runs" / "tiny" / "exports").exists()


def test_an_artifact_of_another_accuracy_is_not_exported(
    run: Run, searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = searched
    from objectives.detection import DetectionTask

    monkeypatch.setattr(DetectionTask, "evaluate", lambda self, predict: 0.0)
    answer = run("export", "study.yaml", "--device", "ort")
    assert answer.code == 1
    assert "export refused: mAP50-95 through the artifact must be within 0.005" in " ".join(
        answer.err.split()
    )
    assert not (folder / "runs" / "tiny" / "exports" / "ort").exists()


def test_ui_serves_the_studys_own_store(searched: Path) -> None:
    """Really started, as users do it, on the SQLite store that a search left."""
    folder = searched
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    script = Path(sys.executable).with_name("paretoprune")
    with (folder / "ui.log").open("wb") as log:
        # A session of its own: MLflow starts children, and all of them must go.
        process = subprocess.Popen(
            [script, "ui", "study.yaml", "--port", str(port)],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    query = f"http://127.0.0.1:{port}/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=tiny"
    page, deadline = None, time.monotonic() + 120
    try:
        while page is None and process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(query, timeout=20) as answer:
                    experiment = json.load(answer)["experiment"]
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                    page = answer.read().decode()
            except OSError:
                time.sleep(0.3)
        assert page is not None, (folder / "ui.log").read_text()[-2000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    assert experiment["name"] == "tiny"
    assert "MLflow" in page
    assert f"http://127.0.0.1:{port}" in (folder / "ui.log").read_text()


# ---- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", "absent.yaml"], "absent.yaml: 1 fault the file does not exist"),
        (["search", "study.yaml", "--set", "colour=red"], "colour: unknown key"),
        (["search", "study.yaml", "--set", "search.beta=1.5"], "search.beta: must lie in [0, 1], got 1.5"),
        (["search", "study.yaml", "--set", "search.ratio=1"], "search.ratio: must lie in [0, 1), got 1"),
        (["search", "study.yaml", "--set", "devices=[]"], "devices: needs at least one entry, got none"),
        (["search", "study.yaml", "--device", "nowhere"], "--device must be one of ort, got 'nowhere'"),
        (["search", "study.yaml", "--timeout", "soon"], "90s, 30m or 2h, got 'soon'"),
        (["search", "study.yaml", "--trials", "0"], "Invalid value for '--trials'"),
        (["search", "study.yaml", "--set", "imgsz=65"], "imgsz must be a positive multiple of 32, got 65"),
        (
            ["search", "study.yaml", "--set", "model=text.pt"],
            "model must be an Ultralytics detection checkpoint",
        ),
        (["search", "study.yaml", "--set", "data=bare.yaml"], "data must have labels"),
        (
            ["plan", "study.yaml", "--device", "ort", "--beta", "2", "--ratio", "1"],
            "2 faults beta must lie in",
        ),
        (
            ["export", "study.yaml", "--device", "ort", "--trial", "1", "--max-latency", "3"],
            "--trial: 1 fault names one point, so takes no --max-latency",
        ),
        (
            ["export", "study.yaml", "--device", "ort", "--from-registry", "--trial", "1", "--register"],
            "--from-registry: 1 fault fetches what was registered, so takes no --trial, --register",
        ),
        (
            ["export", "study.yaml", "--device", "ort", "--also", "tensorflow"],
            "--also: 1 fault must be one of torch, onnxruntime, openvino, ncnn, got tensorflow",
        ),
        (
            ["export", "study.yaml", "--device", "ort", "--alias", "previous"],
            "--alias: 1 fault names a registered model, so 'previous' needs --from-registry",
        ),
        (["nonsense"], "No such command 'nonsense'"),
        (["search"], "Missing argument"),
    ],
)
def test_wrong_input_exits_2_and_says_why(
    run: Run, folder: Path, shapes: Any, arguments: list[str], says: str
) -> None:
    (folder / "text.pt").write_text("no model")
    bare = folder / "images" / "bare"
    bare.mkdir(parents=True, exist_ok=True)
    image = next((shapes.data.parent / "images" / "train").iterdir())
    (bare / image.name).write_bytes(image.read_bytes())
    names = yaml.safe_load(shapes.data.read_text())["names"]
    text = yaml.safe_dump({"train": str(bare), "val": str(bare), "names": names})
    (folder / "bare.yaml").write_text(text)
    answer = run(*arguments)
    # Typer draws a frame around what it says of a wrong command line.
    words = " ".join(answer.err.replace("│", " ").split())
    assert (answer.code, answer.out) == (2, ""), answer.err
    assert says in words
    assert "Traceback" not in answer.err


def test_several_faults_are_said_at_once(run: Run) -> None:
    answer = run("search", "study.yaml", "--set", "search.beta=2", "--set", "trials=0", "--set", "nonsense=1")
    assert answer.code == 2
    assert "study.yaml: 3 faults" in answer.err
    assert all(key in answer.err for key in ("search.beta: ", "trials: ", "nonsense: "))


def test_debug_shows_the_traceback(run: Run) -> None:
    try:
        assert "Traceback" in run("--debug", "search", "absent.yaml").err
    finally:
        search.cli._Settings.debug = False


def test_the_installed_script(folder: Path) -> None:
    script = Path(sys.executable).with_name("paretoprune")
    answer = subprocess.run([script, "front", "absent.yaml", "--json"], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "absent.yaml" in answer.stderr
    assert "search" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout

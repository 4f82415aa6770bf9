"""A whole study on a device behind a real SSH server, whose line is cut in the middle of a measurement."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import search.cli
import search.loop
from profiles.connection import close_connections

pytestmark = pytest.mark.usefixtures("one_thread", "no_pngs")


@pytest.fixture
def study(shapes: Any, ssh_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    ssh_server.use(monkeypatch)
    # A lost device is left alone for a minute; that it waits is not the question here.
    monkeypatch.setattr(search.loop, "_LOST_PAUSE_S", 0.5)
    document = {
        "name": "remote",
        "model": str(shapes.weights),
        "data": str(shapes.data),
        "imgsz": shapes.imgsz,
        "devices": [{"name": "far", "runtime": "onnxruntime", "host": ssh_server.host}],
        "search": {"ratio": {"low": 0.2, "high": 0.5}, "min_channels": 4, "sampler": "random"},
        "calibration": {"images": 6, "batch": 4},
        "finetune": {"epochs": 0, "batch": 4, "device": "cpu", "reestimate_images": 12},
        "measure": {"limit_s": 0.5, "target": 0.9},
        "stopping": {"enabled": False},
        "trials": 3,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    yield path
    close_connections()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["paretoprune", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        search.cli.main()
    return int(stop.value.code or 0)


def cut_during_trial(server: Any, trial: Path, cuts: list[float]) -> None:
    """Cut the line once, while a measured process runs for the trial whose folder that is."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (trial / "plan.json").exists():
            runners = [p for session in server.sessions for p in session.children(recursive=True)]
            # The runner forks a process for each model that it measures.
            measured = [p for p in runners if p.name().startswith("python") and len(_line(p)) > 1]
            if len(measured) > 1:
                server.cut()
                cuts.append(time.monotonic())
                return
        time.sleep(0.005)


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_full_profile_and_a_search_that_is_cut_and_goes_on(
    study: Path, ssh_server: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "profile", study, "--json") == 0
    profile = json.loads(capfd.readouterr().out)["far"]
    assert profile["model_ms"] > 0
    assert all(layer["latency_ms"] > 0 for layer in profile["layers"])
    assert len(list((ssh_server.cache / "models").iterdir())) > 5  # the fit's variants were measured there

    cuts: list[float] = []
    trial = study.parent / "runs" / "remote" / "devices" / "far" / "trial-0002"
    cutter = threading.Thread(target=cut_during_trial, args=(ssh_server, trial, cuts), daemon=True)
    cutter.start()
    assert run(monkeypatch, "search", study) == 0
    said = capfd.readouterr().err
    cutter.join(timeout=30)
    assert len(cuts) == 1
    assert "far is lost" in said

    assert run(monkeypatch, "front", study, "--json") == 0
    points = json.loads(capfd.readouterr().out)["devices"]["far"]["points"]
    results = [json.loads(path.read_text()) for path in sorted(trial.parent.glob("trial-*/result.json"))]
    lost = [result for result in results if result["state"] == "failed"]
    assert [result["trial"] for result in lost] == [2]
    assert "DeviceLostError: device far: lost ssh://" in lost[0]["reason"]
    done = [result for result in results if result["state"] == "complete"]
    assert len(done) == 4  # the unpruned model and three others, the lost one's second try among them
    assert any(r["asked"] == lost[0]["asked"] for r in done)
    assert {point["trial"] for point in points} <= {result["trial"] for result in done}

"""A classifier's study with whole blocks and training from scratch, from its file to report and MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from search.found import Found, fronts_of
from search.launch import launch
from search.progress import ConsoleProgress
from search.recorder import open_tracker
from search.space import IMPORTANCE_TRIALS
from search.studyfile import StudyFile, load_study_file

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = """
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))


def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), Block(16), Block(16), Block(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )
"""
TRIALS = IMPORTANCE_TRIALS


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFile:
    """Searched: trials of which each takes a second or two, and none of which is stopped."""
    from rich.console import Console

    from profiles.connection import close_connections

    folder = tmp_path_factory.mktemp("classifier")
    (folder / "nets_with_blocks.py").write_text(NETWORK)
    rng = np.random.default_rng(0)
    y = np.arange(24) % 3
    x = (rng.integers(0, 120, (24, 16, 16, 3)) + 60 * y[:, None, None, None]).astype(np.uint8)
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    document = {
        "name": "blocks",
        "model": {"builder": "nets_with_blocks:build"},
        "data": "data.npz",
        "devices": [{"name": "desk", "runtime": "onnxruntime", "limits": {"params": 5000}}],
        "search": {
            "ratio": {"low": 0.1, "high": 0.6},
            "depth": {"choices": [0.34, 0.67]},
            "recovery": "scratch",
            "min_channels": 4,
            "round_to": 1,
            "sampler": "random",
        },
        "calibration": {"images": 6, "batch": 6},
        "finetune": {"epochs": 0, "device": "cpu", "reestimate_images": 0},
        "profile": {"model": "bilinear", "repeats": 5},
        "measure": {"limit_s": 0.3, "target": 0.9},
        "screening": {"keep": 0},
        "stopping": {"enabled": False},
        "trials": TRIALS,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    loaded = load_study_file(folder / "study.yaml")
    try:
        with (folder / "log.txt").open("w") as log, ConsoleProgress(Console(file=log)) as progress:
            launch(loaded, ["desk"], trials=TRIALS, timeout_s=None, progress=progress)
    finally:
        close_connections()
    return loaded


@pytest.fixture(scope="module")
def found(study: StudyFile) -> Found:
    return fronts_of(study, ["desk"])["desk"]


def runs(study: StudyFile, role: str) -> list[Any]:
    client = open_tracker(study).client()
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.role = '{role}'"))


def test_depth_and_recovery_are_params_of_every_trial(study: StudyFile, found: Found) -> None:
    asked = {int(run.data.tags["optuna.trial_number"]): run.data.params for run in runs(study, "trial")}
    assert sorted(asked) == list(range(TRIALS + 1))
    assert {r.state for r in found.results} == {"complete"}
    for result in found.results:
        assert asked[result.trial]["depth"] == str(result.asked.depth)
        assert asked[result.trial]["recovery"] == "scratch"
    assert {asked[n]["depth"] for n in range(1, TRIALS + 1)} == {"0.34", "0.67"}


def test_every_sample_of_a_trials_measurement_is_in_mlflow(study: StudyFile, tmp_path: Path) -> None:
    client = open_tracker(study).client()
    run = next(r for r in runs(study, "trial") if r.data.tags["optuna.trial_number"] == "1")
    names = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert names >= {"plan.json", "result.json", "model.onnx", "model.safetensors", "measurement.json"}
    kept = json.loads(
        Path(client.download_artifacts(run.info.run_id, "measurement.json", str(tmp_path))).read_text()
    )
    assert len(kept["candidate"]["samples_ms"]) == run.data.metrics["samples"]


def test_the_report_shows_depth_and_the_blocks_that_are_gone(
    study: StudyFile, found: Found, browser: Any
) -> None:
    client, (device,) = open_tracker(study).client(), runs(study, "device")
    place = client.download_artifacts(device.info.run_id, "report.html", str(study.folder))
    tab = browser.open(Path(place).as_uri())
    tab.wait_for("document.readyState === 'complete' && document.querySelector('tr.point') !== null")
    assert "<th scope='col'>depth</th>" in Path(place).read_text()
    assert "Limits: params at most 5,000" in Path(place).read_text()
    pruned = [p for p in found.front.points if p.trial > 0]
    assert pruned
    for point in pruned:
        tab.evaluate(f"""document.querySelector('tr.point[data-trial="{point.trial}"]').click()""")
        text = str(tab.evaluate("document.querySelector('.detail').textContent"))
        gone = point.details["blocks"]
        assert len(gone) == round(point.asked.depth * 3)
        assert f"each an identity now: {', '.join(gone)}." in text
        assert f"{2 * len(gone)} gone with their blocks" in text
        assert "recoveryscratch" in text
    assert device.data.params["limits.params"] == "5000"


def test_importances_are_drawn_once_there_are_trials_enough(study: StudyFile, found: Found) -> None:
    client, (device,) = open_tracker(study).client(), runs(study, "device")
    names = {f.path for f in client.list_artifacts(device.info.run_id, "figures")}
    assert "figures/importance.json" in names
    text = Path(
        client.download_artifacts(device.info.run_id, "figures/importance.json", str(study.folder))
    ).read_text()
    drawn = {
        trace["name"]: dict(zip(trace["y"], trace["x"], strict=True)) for trace in json.loads(text)["data"]
    }
    assert drawn == {objective: pytest.approx(shares) for objective, shares in found.importances.items()}
    assert set(drawn["front"]) == {"beta", "ratio", "depth"}


def test_pictures_of_the_figures_are_with_them(study: StudyFile, browser: Any) -> None:
    pytest.importorskip("kaleido", reason="pictures need the extra png")
    client, (device,) = open_tracker(study).client(), runs(study, "device")
    names = {f.path for f in client.list_artifacts(device.info.run_id, "figures")}
    assert {n.removesuffix(".png") for n in names if n.endswith(".png")} == {
        n.removesuffix(".json") for n in names if n.endswith(".json")
    }
    picture = Path(
        client.download_artifacts(device.info.run_id, "figures/importance.png", str(study.folder))
    ).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"

"""References: each is measured once, as a trial is judged, and a fault costs only its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import profiles.lock
import search.reference
import search.remeasure
from objectives.classification import ClassificationTask
from profiles.artifact import Artifact
from profiles.connection import DeviceError
from profiles.device import Device
from profiles.timing import Comparison, Timing
from search.bench import Shop
from search.reference import Reference, known_references, measure_references, open_references
from search.storage import SearchError
from search.studyfile import StudyFile, load_study_file
from search.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = """
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFile:
    (tmp_path / "nets_to_compare.py").write_text(NETWORK)
    x = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    y = np.array([0, 1, 2, 2] * 3)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    document = {
        "name": "study",
        "model": {"builder": "nets_to_compare:build"},
        "data": "data.npz",
        "devices": [
            {"name": "plain", "runtime": "torch"},
            {"name": "narrow", "runtime": "torch", "precision": "bf16"},
        ],
        "references": [{"name": "smaller", "imgsz": 8}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.setattr(Device, "fingerprint", "print")
    return load_study_file(tmp_path / "study.yaml")


def make_shop(study: StudyFile) -> Shop:
    return Shop(study, Workspace(study.folder), notice=lambda text: None)


def known(study: StudyFile, device: str) -> list[str]:
    return [r.name for r in known_references(study, Workspace(study.folder), device, "print")]


def test_a_fault_on_one_device_costs_the_others_nothing(
    study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(shop: Shop, name: str, task: Any, device: Device) -> Reference:
        if device.name == "plain":
            raise DeviceError("plain is gone")
        return Reference(name, 0.5, ratio=0.5, ratio_ci=(0.4, 0.6))

    monkeypatch.setattr(search.reference, "_measure", measure)
    with pytest.raises(SearchError, match="reference smaller on plain: DeviceError: plain is gone"):
        measure_references(study, make_shop(study), open_references(study), ["plain", "narrow"])
    assert (known(study, "plain"), known(study, "narrow")) == ([], ["smaller"])


def test_two_workers_of_one_folder_measure_a_reference_once(
    study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    both = threading.Barrier(2, timeout=20)

    def measure(shop: Shop, name: str, task: Any, device: Device) -> Reference:
        measured.append(name)
        # The other worker has begun by then, and would measure too if nothing kept it from doing so.
        threading.Event().wait(0.5)
        return Reference(name, 0.5, ratio=0.5, ratio_ci=(0.4, 0.6))

    monkeypatch.setattr(search.reference, "_measure", measure)
    tasks = open_references(study)

    def work() -> None:
        both.wait()
        measure_references(study, make_shop(study), tasks, ["plain"])

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert measured == ["smaller"]
    assert known(study, "plain") == ["smaller"]


def test_a_reference_is_judged_by_what_runs_on_the_device(
    study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With narrow arithmetic the accuracy is the artifact's; nobody measures on this machine meanwhile."""
    evaluate, held, opened = ClassificationTask.evaluate, [], []

    def heard(self: ClassificationTask, predict: Any) -> float:
        held.append(list(profiles.lock._held))
        return evaluate(self, predict)

    def always_the_last(artifact: Artifact, threads: int) -> Any:
        opened.append((artifact.precision, artifact.path.is_file(), list(profiles.lock._held)))
        return lambda images: [np.tile(np.array([[0.0, 0.0, 1.0]], np.float32), (len(images), 1))]

    def compare(device: Device, candidate: Artifact, baseline: Artifact, **_: Any) -> Comparison:
        assert candidate.path.is_file()
        timings = [Timing((t, t, t), 0) for t in (0.5, 1.0)]
        return Comparison(timings[0], timings[1], 0.5, (0.4, 0.6), 4, 4, True)

    monkeypatch.setattr(ClassificationTask, "evaluate", heard)
    monkeypatch.setattr(search.reference, "open_artifact", always_the_last)
    monkeypatch.setattr(search.remeasure, "compare", compare)
    tasks = open_references(study)
    measure_references(study, make_shop(study), tasks, ["narrow", "plain"])
    (narrow,) = known_references(study, Workspace(study.folder), "narrow", "print")
    (plain,) = known_references(study, Workspace(study.folder), "plain", "print")
    assert narrow.accuracy == 0.5  # half of the images are of the last class
    own = tasks["smaller"]
    assert plain.accuracy == own.evaluate(own.predictor(own.load_model()))
    assert [(precision, there) for precision, there, _ in opened] == [("bf16", True)]
    assert all(opened[0][2])
    assert all(held[:2])
    folders = [p.name for d in ("narrow", "plain") for p in Workspace(study.folder).device(d).iterdir()]
    assert not [name for name in folders if name.startswith("reference-")]

"""What runs on an NVIDIA GPU: artifacts, scores, loss curves, recoveries, a whole search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from objectives.detection import DetectionTask
from objectives.task import Recovery
from profiles.artifact import Artifact, export_artifact
from profiles.connection import close_connections
from profiles.device import Device, describe
from profiles.latency_profile import OTHER
from profiles.measure import compare, profile_layers
from profiles.runner.sessions import open_session
from search.bench import Shop
from search.found import fronts_of
from search.groups import find_groups
from search.launch import launch
from search.plan import PruningPlan
from search.prune import prune
from search.studyfile import StudyFile, load_study_file
from search.workspace import Workspace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use here")

GPU = Device("gpu", "torch", threads=1, providers=("cuda",))
SHAPE = (1, 3, 64, 64)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _no_runners_left() -> Any:
    yield
    close_connections()


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(),
        nn.Conv2d(32, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


def exported(device: Device, folder: Path) -> Artifact:
    return export_artifact(make_net(), device, folder, SHAPE)


# ---- the device ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own loading of a program
@pytest.mark.parametrize(("precision", "within"), [("fp32", 1e-5), ("bf16", 3e-2), ("fp16", 3e-3)])
def test_an_artifact_computes_what_the_network_does(precision: str, within: float, tmp_path: Path) -> None:
    device = Device("gpu", "torch", threads=1, precision=precision, providers=("cuda",))
    artifact = exported(device, tmp_path)
    images = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    with torch.no_grad():
        wanted = make_net()(torch.from_numpy(images)).numpy()
    session = open_session(
        {**device.to_json(), "path": str(artifact.path), "input_shape": list(SHAPE)}, spin=False
    )
    found = session.run(images)[0]
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert found.dtype == np.float32
    # Another precision than the one that is stated, TF32 included, would be off by more, or by less.
    assert error <= within
    assert precision == "fp32" or error > 1e-5


def test_the_fingerprint_names_the_gpu() -> None:
    stable = describe(GPU).stable
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    assert name in json.dumps(stable)
    assert GPU.fingerprint != Device("cpu", "torch", threads=1).fingerprint


def test_two_copies_are_not_told_apart_and_layers_make_up_the_whole(tmp_path: Path) -> None:
    artifact = exported(GPU, tmp_path)
    result = compare(GPU, artifact, artifact, target=0.1, limit_s=6)
    low, high = result.ratio_ci
    assert low * 0.95 <= 1 <= high * 1.05
    entries = profile_layers(GPU, artifact, repeats=10, warmup=5)
    layers = [entry for entry in entries if entry.op != OTHER]
    assert [entry.layer for entry in layers] == [spec.layer for spec in artifact.layers]
    assert all(entry.timing.mean_ms > 0 for entry in layers)


# ---- scores, curves, recovery --------------------------------------------------------------------


def opened(shapes: Any, folder: Path, where: str) -> StudyFile:
    document = {
        "name": "tiny",
        "model": str(shapes.weights),
        "data": str(shapes.data),
        "imgsz": shapes.imgsz,
        "devices": [
            {"name": "cpu", "runtime": "onnxruntime", "threads": 1},
            {"name": "gpu", "runtime": "torch", "threads": 1, "providers": ["cuda"]},
        ],
        "search": {"ratio": {"low": 0.2, "high": 0.5}, "round_to": 4, "min_channels": 4},
        "calibration": {"images": 6, "batch": 4, "device": where},
        "finetune": {"epochs": 1, "batch": 4, "reestimate_images": 12},
        "profile": {"model": "bilinear", "repeats": 10},
        "measure": {"limit_s": 2, "target": 0.2},
        "trials": 2,
    }
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return load_study_file(folder / "study.yaml")


def shop_of(study: StudyFile) -> Shop:
    return Shop(study, Workspace(study.folder), notice=lambda text: None)


@pytest.mark.parametrize(
    "criterion", ["taylor", "taylor_rise", "taylor_weight", "hrank", "l1", "bn", "random"]
)
def test_scores_are_those_of_the_cpu(criterion: str, shapes: Any, tmp_path: Path) -> None:
    cpu, gpu = (
        shop_of(opened(shapes, tmp_path / where, where)).scores(criterion) for where in ("cpu", "cuda")
    )
    assert cpu.data_key == gpu.data_key
    assert cpu.layers.keys() == gpu.layers.keys()
    for name, values in cpu.layers.items():
        # A rank is a count, and a singular value at its threshold may fall on either side.
        within = 0.5 if criterion == "hrank" else 1e-3 * values.max()
        np.testing.assert_allclose(gpu.layers[name], values, rtol=0, atol=within)


def test_loss_curves_are_those_of_the_cpu(shapes: Any, tmp_path: Path) -> None:
    found = []
    for where in ("cpu", "cuda"):
        shop = shop_of(opened(shapes, tmp_path / where, where))
        device = shop.study.device("cpu").device()
        found.append(shop.curves("taylor", shop.profile(device)).stages[0])
    cpu, gpu = found
    assert cpu.counts == gpu.counts
    np.testing.assert_allclose(gpu.loss, cpu.loss, rtol=1e-3)
    np.testing.assert_allclose(np.concatenate(gpu.losses), np.concatenate(cpu.losses), rtol=1e-3)


def test_iterative_scores_work_there(shapes: Any, tmp_path: Path) -> None:
    shop = shop_of(opened(shapes, tmp_path / "cuda", "cuda"))
    groups = shop.groups
    first = groups.units[0]
    removed = {groups.groups[i].name: np.arange(4) for i in first}
    plan = PruningPlan.of(shop.task.model_key, groups, removed)
    scores = shop.rescore("taylor", plan)
    for name, cut in plan.layers.items():
        if cut.removed_out and name in scores.layers:
            assert not scores.layers[name][list(cut.removed_out)].any()
            assert scores.layers[name].any()


def test_a_recovery_there_comes_back_as_a_model_of_the_cpu(shapes: Any, tmp_path: Path) -> None:
    """With channels last, as the GPU trains it, it would ship with another speed than was measured."""
    task = DetectionTask(str(shapes.weights), str(shapes.data), shapes.imgsz)
    model = task.load_model()
    groups = find_groups(task.traceable(model), model)
    removed = {groups.groups[i].name: np.arange(4) for unit in groups.units for i in unit}
    pruned = prune(model, PruningPlan.of(task.model_key, groups, removed), task.settle)
    seen: list[tuple[int, float]] = []

    def on_epoch(done: int, epochs: int, accuracy: float) -> bool:
        seen.append((done, accuracy))
        return True

    settings = Recovery(epochs=2, batch=4, device="cuda:0", reestimate_images=12)
    recovered = task.recover(pruned, settings, tmp_path, on_epoch)
    assert [done for done, _ in seen] == [0, 1, 2]
    for name, tensor in recovered.state_dict().items():
        assert tensor.device.type == "cpu", name
        assert tensor.is_contiguous(), name
        assert tensor.dtype in (torch.float32, torch.int64), name
    # What was seen on the GPU holds on the CPU.
    best = max(accuracy for _, accuracy in seen)
    assert task.evaluate(task.predictor(recovered)) >= best - 0.02


# ---- all of it -----------------------------------------------------------------------------------


def test_a_search_trains_there_and_measures_there(shapes: Any, tmp_path: Path) -> None:
    from rich.console import Console

    from search.progress import ConsoleProgress

    study = opened(shapes, tmp_path / "search", "auto")
    with (tmp_path / "log.txt").open("w") as log, ConsoleProgress(Console(file=log)) as progress:
        launch(study, ["cpu", "gpu"], trials=2, timeout_s=None, progress=progress)
    fronts = fronts_of(study, ["cpu", "gpu"])
    for name in ("cpu", "gpu"):
        results = fronts[name].results
        assert results
        assert any(r.state == "complete" and r.trial > 0 for r in results)
        assert not [r.reason for r in results if r.state == "failed"]
    assert fronts["cpu"].results[0].fingerprint != fronts["gpu"].results[0].fingerprint

"""A pruned network's file made from the whole one's is the file that exporting it writes, weights apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import search.model_files
from objectives.classification import ClassificationTask
from objectives.detection import DetectionTask
from objectives.inference import as_predictor
from objectives.synthetic import CLASSES, make_detection_set
from objectives.task import Task
from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.device import Device
from profiles.runner.files import model_digest
from profiles.structure import structure_digest
from search.groups import find_groups
from search.model_files import Exported, check_parity, export_like
from search.plan import PruningPlan
from search.prune import prune

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEVICE = Device("here", "onnxruntime", threads=1)
CLASSIFIERS = (
    "resnet_cifar:resnet20",
    "networks:resnet18",
    "networks:mobilenet_v2",
    "networks:efficientnet_lite0",
    "networks:vgg16",
    "networks:alexnet",
)
DETECTORS = ("yolov8n", "yolo11n", "yolo26n")
#: What has its widths in its code: padded shortcuts, depthwise layers as OpenVINO reads them, and for ncnn
#: channels that are split at a number.
EXPORTED = {
    "onnxruntime": ("resnet_cifar:resnet20",),
    "openvino": ("resnet_cifar:resnet20", "networks:mobilenet_v2", "yolo11n"),
    "ncnn": ("resnet_cifar:resnet20", "yolo11n"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    x, y = random.integers(0, 255, (4, 32, 32, 3)).astype(np.uint8), np.arange(4)
    np.savez(folder / "noise.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    make_detection_set(folder / "shapes", images_train=2, images_val=2, imgsz=64, seed=0)
    return folder


def task_of(name: str, folder: Path) -> Task:
    if name in DETECTORS:
        from ultralytics.utils.checks import check_yaml  # behind `objectives`, which silences it

        architecture = folder / f"{name}.yaml"
        stock = Path(check_yaml(f"{name[:-1]}.yaml")).read_text(encoding="utf-8")
        architecture.write_text(stock.replace("nc: 80", f"nc: {len(CLASSES)}"), encoding="utf-8")
        return DetectionTask(str(architecture), str(folder / "shapes" / "data.yaml"), 64)
    arguments = {"small": True} if name.startswith("networks:") else {}
    return ClassificationTask(name, str(folder / "noise.npz"), folder=EXAMPLES, arguments=arguments)


def draw(model: nn.Module) -> None:
    """Weights as different from each other as a training makes them; biases and statistics begin alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand_like(tensor) + 0.5)  # type: ignore[union-attr,arg-type]
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.normal_(0.0, 0.1)


@pytest.mark.parametrize(
    ("runtime", "name"),
    [
        *(("onnxruntime", name) for name in (*DETECTORS, *CLASSIFIERS)),
        *(
            (runtime, name)
            for runtime in ("openvino", "ncnn")
            for name in ("yolov8n", "yolo11n", *CLASSIFIERS[::2])
        ),
    ],
)
def test_it_is_the_file_of_an_export(runtime: str, name: str, folder: Path, tmp_path: Path) -> None:
    for needed in {"openvino": ("openvino",), "ncnn": ("ncnn", "pnnx")}.get(runtime, ()):
        pytest.importorskip(needed)
    device = Device("here", runtime, threads=1)
    task = task_of(name, folder)
    model = task.load_model()
    draw(model)
    ready = task.deployable(model)
    whole = Exported(export_artifact(ready, device, tmp_path / "whole", task.input_shape), ready.state_dict())
    groups, random = find_groups(task.traceable(model), model), np.random.default_rng(1)
    removed = {}
    for unit, channels in zip(groups.units, groups.unit_channels.tolist(), strict=True):
        count = int(channels * random.uniform(0.0, 0.6))
        removed |= {groups.groups[i].name: random.choice(channels, count, False) for i in unit}
    pruned = prune(model, PruningPlan.of(task.model_key, groups, removed), task.settle)
    made, parity = export_like(whole, pruned, task, device, tmp_path / "made")
    assert (parity is None) == (name in EXPORTED[runtime])
    exported = export_artifact(task.deployable(pruned), device, tmp_path / "exported", task.input_shape)
    assert structure_digest(made.artifact) == structure_digest(exported)
    assert made.artifact.layers == exported.layers
    images = task.sample_images(1)
    for have, want in zip(
        open_artifact(made.artifact, 1)(images), open_artifact(exported, 1)(images), strict=True
    ):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_what_does_not_open_is_exported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of("resnet_cifar:resnet20", folder)
    ready = task.deployable(model := task.load_model())
    whole = Exported(export_artifact(ready, DEVICE, tmp_path / "whole", task.input_shape), ready.state_dict())

    def spoil(artifact: Artifact, *_: object) -> Artifact:
        path = tmp_path / "spoilt.onnx"
        spoilt = onnx.load(artifact.path)
        spoilt.graph.node[0].input[1] = spoilt.graph.node[-1].input[1]  # a weight of another shape
        onnx.save(spoilt, path)
        return replace(artifact, path=path, digest=model_digest(path))

    monkeypatch.setattr(search.model_files, "refill", spoil)
    made, parity = export_like(whole, model, task, DEVICE, tmp_path / "made")
    assert parity is None
    assert made.artifact.path.parent == tmp_path / "made"
    assert check_parity(as_predictor(ready), made.artifact, task) < 1e-5


def test_outputs_that_are_no_numbers_are_not_equal(folder: Path, tmp_path: Path) -> None:
    task = task_of("resnet_cifar:resnet20", folder)
    artifact = export_artifact(task.deployable(task.load_model()), DEVICE, tmp_path, task.input_shape)
    with pytest.raises(ValueError, match="got nan"):
        check_parity(lambda images: [np.full((len(images), 10), np.nan)], artifact, task)

"""A file's structure: the same for other weights, another for other widths, in every runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from profiles.artifact import Artifact, export_artifact
from profiles.device import Device
from profiles.structure import structure_digest

pytestmark = pytest.mark.usefixtures("one_thread")


def export(runtime: str, folder: Path, *, width: int = 16, seed: int = 0, stride: int = 1) -> Artifact:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, stride=stride),
        nn.SiLU(),
        nn.Conv2d(width, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()
    return export_artifact(net, Device("d", runtime), folder, (1, 3, 32, 32), {"seed": str(seed)})


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino", "ncnn"])
def test_weights_are_no_structure_and_widths_are(runtime: str, tmp_path: Path) -> None:
    if runtime in ("openvino", "ncnn"):
        pytest.importorskip({"openvino": "openvino", "ncnn": "pnnx"}[runtime])
    first = export(runtime, tmp_path / "first")
    other_weights = export(runtime, tmp_path / "weights", seed=1)
    assert first.digest != other_weights.digest
    assert structure_digest(first) is not None
    assert structure_digest(other_weights) == structure_digest(first)
    for name, change in {"width": {"width": 12}, "stride": {"stride": 2}}.items():
        assert structure_digest(export(runtime, tmp_path / name, **change)) != structure_digest(first)


def test_nothing_is_said_of_an_unknown_runtime(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "model.bin", "another", "fp32", (1, 3, 8, 8), "0", ())
    assert structure_digest(artifact) is None

"""A file given other weights is the file that an export of those weights would have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.device import Device
from profiles.refill import refill
from profiles.structure import structure_digest

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 8, 3), nn.AvgPool2d(12))
        self.head = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(1, 4))
        with torch.no_grad():
            self.body[1].weight.copy_(torch.rand(8))  # type: ignore[operator]  # its start is one number

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(images).flatten(1)) * self.scale
        return scores


class Shifted(Net):
    """A weight that the file holds in another form only: the exporter adds the one beforehand."""

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(images).flatten(1)) * (self.scale + 1)
        return scores


def export(net: nn.Module, folder: Path, runtime: str = "onnxruntime") -> Artifact:
    return export_artifact(net.eval(), Device("d", runtime), folder, (1, 3, 16, 16), {"names": "a, b"})


def refilled(old: nn.Module, new: nn.Module, folder: Path) -> Artifact | None:
    """An export of the old module with the weights of the new one, in `folder / "filled"`."""
    return refill(export(old, folder / "old"), old.state_dict(), new.state_dict(), folder / "filled")


def run(artifact: Artifact) -> np.ndarray:  # type: ignore[type-arg]
    images = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    return open_artifact(artifact, threads=1)(images)[0]


def test_it_computes_what_an_export_of_the_new_weights_computes(tmp_path: Path) -> None:
    old, new = Net(0), Net(1)
    source = export(old, tmp_path / "old")
    filled = refill(source, old.state_dict(), new.state_dict(), tmp_path / "filled")
    assert filled is not None
    assert filled.path == tmp_path / "filled" / "model.onnx"
    np.testing.assert_array_equal(run(filled), run(export(new, tmp_path / "new")))
    assert not np.allclose(run(filled), run(source))
    assert structure_digest(filled) == structure_digest(source)
    assert filled.digest != source.digest
    assert filled.layers == source.layers
    assert {p.key: p.value for p in onnx.load(filled.path).metadata_props} == {"names": "a, b"}
    # What is read back later is held against the digest.
    assert Artifact.from_json(filled.to_json(), tmp_path / "filled") == filled


def test_the_same_weights_give_the_same_file(tmp_path: Path) -> None:
    net = Net(0)
    filled = refilled(net, net, tmp_path)
    assert filled is not None
    np.testing.assert_array_equal(run(filled), run(export(net, tmp_path / "again")))


def test_statistics_of_batch_norm_are_weights_too(tmp_path: Path) -> None:
    def trained(seed: int) -> nn.Module:  # the first of them cannot be fused: no convolution stands before it
        torch.manual_seed(seed)
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.AvgPool2d(14), nn.Flatten())
        with torch.no_grad():
            for tensor in (*net[0].parameters(), net[0].running_mean, net[0].running_var):
                tensor.copy_(torch.rand(3) + 0.5)
        return net.train().requires_grad_(False)

    old, new = trained(0), trained(1)
    new(torch.rand(4, 3, 16, 16))
    filled = refilled(old, new, tmp_path)
    assert filled is not None
    np.testing.assert_array_equal(run(filled), run(export(new, tmp_path / "new")))


def test_a_part_of_the_weights_may_change(tmp_path: Path) -> None:
    old, new = Net(0), Net(0)
    with torch.no_grad():
        new.head.weight.add_(0.5)
    filled = refilled(old, new, tmp_path)
    assert filled is not None
    np.testing.assert_array_equal(run(filled), run(export(new, tmp_path / "new")))


def test_what_cannot_be_told_apart_is_not_filled(tmp_path: Path) -> None:
    # A bias of zeros looks like any other constant; two weights of equal values share one entry of the file.
    zeros, twins = Net(0), Net(0)
    with torch.no_grad():
        zeros.head.bias.zero_()
        twins.body[2].bias.copy_(twins.body[0].bias)  # type: ignore[union-attr,operator,arg-type]
    for old in (zeros, twins):
        assert refilled(old, Net(1), tmp_path) is None


def test_a_weight_that_the_exporter_worked_into_another_is_not_filled(tmp_path: Path) -> None:
    assert refilled(Shifted(0), Shifted(1), tmp_path) is None


@pytest.mark.parametrize("runtime", ["torch", "ncnn"])
def test_files_of_other_runtimes_are_exported_anew(runtime: str, tmp_path: Path) -> None:
    if runtime == "ncnn":
        pytest.importorskip("pnnx")
    net = Net(0)
    source = export(net, tmp_path / "old", runtime)
    assert refill(source, net.state_dict(), net.state_dict(), tmp_path / "filled") is None


def test_another_width_is_another_network(tmp_path: Path) -> None:
    net = Net(0)
    other = net.state_dict() | {"head.weight": torch.zeros(5, 8)}
    assert refill(export(net, tmp_path / "old"), net.state_dict(), other, tmp_path / "filled") is None

"""A file given other weights is the file that an export of those weights would have written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.device import Device
from profiles.refill import refill
from profiles.refill.parts import scaled_slice, scaled_split
from profiles.structure import structure_digest

METADATA = {"names": "a, b"}
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
    return export_artifact(net.eval(), Device("d", runtime), folder, (1, 3, 16, 16), METADATA)


def refilled(old: nn.Module, new: nn.Module, folder: Path) -> Artifact | None:
    """An export of the old module with the weights of the new one, in `folder / "filled"`."""
    return refill(export(old, folder / "old"), old.state_dict(), new.eval(), folder / "filled", METADATA)


def run(artifact: Artifact) -> np.ndarray:  # type: ignore[type-arg]
    images = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    return open_artifact(artifact, threads=1)(images)[0]


def test_it_computes_what_an_export_of_the_new_weights_computes(tmp_path: Path) -> None:
    old, new = Net(0), Net(1)
    source = export(old, tmp_path / "old")
    filled = refill(source, old.state_dict(), new.eval(), tmp_path / "filled", METADATA | {"imgsz": "16"})
    assert filled is not None
    assert filled.path == tmp_path / "filled" / "model.onnx"
    np.testing.assert_array_equal(run(filled), run(export(new, tmp_path / "new")))
    assert not np.allclose(run(filled), run(source))
    assert structure_digest(filled) == structure_digest(source)
    assert filled.digest != source.digest
    assert filled.layers == source.layers
    assert {p.key: p.value for p in onnx.load(filled.path).metadata_props} == METADATA | {"imgsz": "16"}
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


def test_files_of_other_runtimes_are_exported_anew(tmp_path: Path) -> None:
    net = Net(0)
    source = export(net, tmp_path / "old", "torch")
    assert refill(source, net.state_dict(), net, tmp_path / "filled", METADATA) is None


# ---- other widths ------------------------------------------------------------------------------------


class Halves(nn.Module):
    """What pruning meets in a detector: a layer split into halves, a depthwise one, one called twice."""

    def __init__(self, width: int, half: int, seed: int, by: str = "chunk") -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.by = by
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.wide = nn.Conv2d(width, 2 * half, 1)
        self.inner = nn.Conv2d(half, half, 3, padding=1)
        self.head = nn.Linear(3 * half, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.depthwise(self.stem(images)))))
        half = x.shape[1] // 2
        if self.by == "slice":
            first, second = x[:, :half], x[:, half:]
        else:
            first, second = x.chunk(2, 1) if self.by == "chunk" else x.split((half, half), 1)
        x = torch.cat([first, second, self.inner(self.inner(second))], 1)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def assert_as_exported(old: nn.Module, new: nn.Module, folder: Path) -> None:
    """The file made from the old module's is the one that exporting the new one writes."""
    filled, wanted = refilled(old, new, folder), export(new, folder / "new")
    assert filled is not None
    np.testing.assert_array_equal(run(filled), run(wanted))
    assert structure_digest(filled) == structure_digest(wanted)
    assert structure_digest(filled) != structure_digest(export(old, folder / "again"))
    assert filled.layers == wanted.layers
    shapes = {value.name: value for value in onnx.load(wanted.path).graph.value_info}
    recorded = onnx.load(filled.path).graph.value_info
    assert recorded
    assert all(value == shapes[value.name] for value in recorded)


@pytest.mark.parametrize("by", ["chunk", "split", "slice"])
@pytest.mark.parametrize(("width", "half"), [(8, 4), (5, 8), (7, 3)])
def test_a_narrower_network_gives_the_file_that_exporting_it_gives(
    by: str, width: int, half: int, tmp_path: Path
) -> None:
    assert_as_exported(Halves(8, 8, 0, by), Halves(width, half, 1, by), tmp_path)


@pytest.mark.parametrize(
    ("part", "width", "now", "wanted"),
    [
        ((0, 16), 32, 20, (0, 10)),
        ((16, 32), 32, 20, (10, 20)),
        ((16, 2**63 - 1), 32, 20, (10, 2**63 - 1)),
        ((8, 16), 32, 8, (2, 4)),
        ((8, 24), 32, 32, (8, 24)),
        ((8, 24), 32, 16, None),  # no part of an even split
        ((0, 16), 32, 21, None),
        ((0, 12), 32, 16, None),
        ((-16, 32), 32, 16, None),
    ],
)
def test_a_slice_of_other_channels(
    part: tuple[int, int], width: int, now: int, wanted: tuple[int, int] | None
) -> None:
    assert scaled_slice(*part, width, now) == wanted


@pytest.mark.parametrize(
    ("sizes", "now", "wanted"),
    [
        ((16, 16), 20, (10, 10)),
        ((8, 8, 8), 9, (3, 3, 3)),
        ((8, 24), 32, (8, 24)),
        ((8, 24), 16, None),
        ((4, 4), 7, None),
    ],
)
def test_a_split_of_other_channels(sizes: tuple[int, ...], now: int, wanted: tuple[int, ...] | None) -> None:
    assert scaled_split(sizes, now) == wanted


def test_a_width_that_the_file_holds_in_another_way_is_exported_anew(tmp_path: Path) -> None:
    class Uneven(Halves):
        def forward(self, images: Tensor) -> Tensor:
            x = self.wide(self.stem(images))
            third = x.shape[1] // 3  # a part that does not divide the whole
            scores: Tensor = self.head(
                torch.cat([x[:, third:], x[:, : x.shape[1] // 2 + third]], 1).mean((2, 3))
            )
            return scores

    assert refilled(Uneven(8, 8, 0), Uneven(8, 4, 1), tmp_path) is None


def test_other_layers_are_another_network(tmp_path: Path) -> None:
    class Shorter(Net):
        def forward(self, images: Tensor) -> Tensor:
            scores: Tensor = self.head(self.body[0](images).mean((2, 3)))  # of what is still there
            return scores

    other = Net(0)
    other.extra = nn.Conv2d(3, 3, 1)  # type: ignore[assignment]
    assert refilled(Net(0), other, tmp_path) is None
    assert refilled(Net(0), Shorter(0), tmp_path) is None


# ---- ncnn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slopes", [False, True])
def test_in_ncnn_weights_and_biases_of_layers_are_exchanged_and_nothing_else(
    slopes: bool, tmp_path: Path
) -> None:
    pytest.importorskip("ncnn")
    pytest.importorskip("pnnx")
    old, new = Net(0), Net(1)
    new.scale = old.scale
    if not slopes:  # which lie in the file as well, but not as a layer's
        new.body[1] = old.body[1]
    source = export(old, tmp_path / "old", "ncnn")
    filled = refill(source, old.state_dict(), new.eval(), tmp_path / "filled", METADATA | {"imgsz": "16"})
    if slopes:
        assert filled is None
        return
    assert filled is not None
    np.testing.assert_array_equal(run(filled), run(export(new, tmp_path / "new", "ncnn")))
    assert not np.allclose(run(filled), run(source))
    assert structure_digest(filled) == structure_digest(source)
    assert json.loads(filled.path.with_suffix(".json").read_text()) == METADATA | {"imgsz": "16"}
    assert Artifact.from_json(filled.to_json(), tmp_path / "filled") == filled

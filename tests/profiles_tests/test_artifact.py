from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from torch import nn

from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.device import Device
from profiles.latency_profile import OTHER
from profiles.measure import profile_layers
from profiles.runner.sessions import MissingRuntimeError

Export = Callable[[Device, int], Artifact]
Net = Callable[[int], nn.Module]


def test_artifact_gives_the_outputs_of_the_module_for_any_batch(
    device: Device, export: Export, small_net: Net
) -> None:
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        wanted = small_net(16)(images)
    before = torch.get_num_threads()
    got = open_artifact(export(device, 16), threads=2)(images.numpy())
    assert torch.get_num_threads() == before
    assert [g.shape for g in got] == [tuple(w.shape) for w in wanted]
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"got shape \(1, 3, 32, 64\)"):
        open_artifact(export(device, 16), threads=1)(np.zeros((1, 3, 32, 64), np.float32))


def test_layers_say_what_the_module_has(device: Device, export: Export) -> None:
    layers = {layer.layer: layer for layer in export(device, 16).layers}
    assert list(layers) == ["stem", "mix", "depthwise", "narrow", "skip", "up", "head", "tokens"]
    assert (layers["stem"].in_channels, layers["stem"].out_channels, layers["stem"].stride) == (3, 16, (2, 2))
    assert (layers["stem"].input_hw, layers["stem"].output_hw) == ((64, 64), (32, 32))
    assert (layers["depthwise"].groups, layers["up"].op, layers["head"].op) == (
        16,
        "conv_transpose",
        "linear",
    )


def test_file_carries_metadata(device: Device, export: Export) -> None:
    path = export(device, 16).path
    if device.runtime == "onnxruntime":
        assert {p.key: p.value for p in onnx.load(path).metadata_props} == {"names": "a, b"}
    elif device.runtime == "openvino":
        model = openvino.Core().read_model(str(path))
        assert model.get_rt_info(["paretoprune", "names"]).astype(str) == "a, b"
    elif device.runtime == "ncnn":
        assert json.loads(path.with_suffix(".json").read_text()) == {"names": "a, b"}
    else:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("metadata.json"))
            assert json.loads(archive.read(name)) == {"names": "a, b"}


def test_record_round_trip_and_changed_file(device: Device, export: Export, tmp_path: Path) -> None:
    artifact = export(device, 16)
    data = json.loads(json.dumps(artifact.to_json()))
    assert Artifact.from_json(data, artifact.path.parent) == artifact
    assert artifact.files[0] == artifact.path
    for changed in artifact.files:
        for file in artifact.files:
            (tmp_path / file.name).write_bytes(file.read_bytes() + (b"x" if file == changed else b""))
        with pytest.raises(ValueError, match="sha256"):
            Artifact.from_json(data, tmp_path)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "ncnn"])
def test_layers_of_equal_weights_are_told_apart(runtime: str, tmp_path: Path) -> None:
    """Exporters merge equal weights into one; each layer must still be found."""
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)
    ).eval()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.5)
    artifact = export_artifact(net, Device("d", runtime), tmp_path, (1, 3, 16, 16))
    assert [layer.layer for layer in artifact.layers] == ["0", "2", "4"]
    outputs = [layer.names[0] for layer in artifact.layers]
    assert len(set(outputs)) == 3
    if runtime == "onnxruntime":
        assert outputs[-1] == "output0"


def test_refusals(tmp_path: Path, small_net: Net) -> None:
    with pytest.raises(ValueError, match="eval mode"):
        export_artifact(small_net(4).train(), Device("d", "torch"), tmp_path, (1, 3, 64, 64))
    unfused = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    nn.init.constant_(unfused[1].get_parameter("weight"), 2.0)
    with pytest.raises(ValueError, match="fuse batch norm"):
        export_artifact(unfused, Device("d", "onnxruntime"), tmp_path, (1, 3, 64, 64))


def test_ncnn_takes_odd_sizes_and_transposed_groups(tmp_path: Path) -> None:
    """ncnn aligns its rows of channels, and stores a transposed convolution's weight the other way round."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(), nn.ConvTranspose2d(8, 6, 3, 2, groups=2), nn.Conv2d(6, 4, 1)
    ).eval()
    artifact = export_artifact(net, Device("d", "ncnn"), tmp_path, (1, 3, 7, 5))
    assert [layer.layer for layer in artifact.layers] == ["0", "2", "3"]
    assert all(layer.names for layer in artifact.layers)
    images = torch.rand(2, 3, 7, 5)
    with torch.no_grad():
        np.testing.assert_allclose(open_artifact(artifact, 1)(images.numpy())[0], net(images), atol=1e-5)
    with pytest.raises(ValueError, match="one image at a time"):
        export_artifact(net, Device("d", "ncnn"), tmp_path, (2, 3, 7, 5))


@pytest.mark.parametrize("runtime", ["openvino", "ncnn"])
def test_another_precision_than_the_one_stated_is_refused(
    runtime: str, export: Export, small_net: Net
) -> None:
    """Where the CPU lacks it, a runtime computes in another; where it has it, the outputs show it."""
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = small_net(16)(images)[0].numpy()
    for precision in ("bf16", "fp16"):
        artifact = replace(export(Device("d", runtime), 16), precision=precision)
        refusal = ""
        try:
            got = open_artifact(artifact, 1)(images.numpy())[0]
        except RuntimeError as error:
            refusal = str(error)
        if refusal:
            assert f"precision {precision} was asked for" in refusal
        else:
            assert 1e-5 < np.abs(got - wanted).max() / np.abs(wanted).max() < 0.1


def test_a_runtime_that_is_not_installed_gives_a_hint(
    export: Export, small_net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = export(Device("d", "ncnn"), 16)
    for name in ("openvino", "ncnn", "pnnx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingRuntimeError, match=r"runtime ncnn .* pip install ncnn"):
        open_artifact(artifact, 1)
    with pytest.raises(MissingRuntimeError, match="pip install pnnx"):
        export_artifact(small_net(16), Device("d", "ncnn"), tmp_path, (1, 3, 64, 64))
    with pytest.raises(MissingRuntimeError, match="pip install openvino"):
        export_artifact(small_net(16), Device("d", "openvino"), tmp_path, (1, 3, 64, 64))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_torch_computes_in_the_precision_stated(precision: str, export: Export) -> None:
    artifact = export(Device("here", "torch"), 16)
    narrow = replace(artifact, precision=precision)
    images = np.random.default_rng(1).random((2, 3, 64, 64), dtype=np.float32)
    wide = open_artifact(artifact, threads=1)(images)
    for expected, got in zip(wide, open_artifact(narrow, threads=1)(images), strict=True):
        assert got.dtype == np.float32
        error = np.abs(got - expected).max() / np.abs(expected).max()
        # A mantissa of 8 or 11 bits, seven layers deep: close, and visibly not fp32.
        assert 1e-5 < error < (0.05 if precision == "bf16" else 0.01)
    entries = profile_layers(Device("here", "torch", precision=precision), narrow, repeats=2, warmup=1)
    assert [e.layer for e in entries if e.op != OTHER] == [spec.layer for spec in artifact.layers]

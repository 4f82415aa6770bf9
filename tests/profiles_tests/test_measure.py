"""Measurements on this machine, in every runtime. Nothing here asserts a time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from profiles import measure as measure_module
from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.connection import DeviceError, DeviceLostError, connect
from profiles.device import Device, describe
from profiles.latency_profile import OTHER, LatencyProfile, Variant, build_profile
from profiles.measure import compare, measure, profile_layers

Export = Callable[[Device, int], Artifact]


def test_two_copies_of_one_model_are_not_told_apart(device: Device, export: Export) -> None:
    artifact = export(device, 16)
    lines: list[str] = []
    result = compare(device, artifact, artifact, target=0.1, limit_s=4, progress=lines.append)
    low, high = result.ratio_ci
    # Five percent beyond the interval: the machine that runs the tests also runs others.
    assert low * 0.95 <= 1 <= high * 1.05
    assert result.rounds == len(lines) >= 4
    assert result.is_stable == (result.reason is None)
    assert len(result.candidate.samples_ms) > 20


def test_a_much_bigger_model_is_slower(device: Device, export: Export) -> None:
    result = compare(device, export(device, 64), export(device, 16), target=0.2, limit_s=4)
    assert result.verdict == "slower"
    assert result.ratio > 1.5


def test_every_layer_is_accounted_for_and_the_parts_make_up_the_whole(device: Device, export: Export) -> None:
    artifact = export(device, 16)
    entries = profile_layers(device, artifact, repeats=10, warmup=2)
    layers = [entry for entry in entries if entry.op != OTHER]
    assert [entry.layer for entry in layers] == [spec.layer for spec in artifact.layers]
    assert all(len(entry.timing.samples_ms) == 10 for entry in entries)
    assert all(entry.timing.mean_ms > 0 for entry in layers)
    # Inferences keep their spread, over several processes.
    wholes = [sum(entry.timing.samples_ms[run] for entry in entries) for run in range(10)]
    assert len(set(wholes)) > 1


def test_a_layer_profile_is_taken_over_fresh_processes_and_adds_up(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device("here", "onnxruntime", threads=1)
    artifact = export(device, 16)
    asked: list[dict[str, Any]] = []
    real = measure_module._round

    def spy(*args: Any, profile: dict[str, Any], **rest: Any) -> dict[str, Any]:
        asked.append(profile)
        done = real(*args, profile=profile, **rest)
        return {**done, "blocks": [(0, [5.0, 6.0, 7.0])]}

    monkeypatch.setattr(measure_module, "_round", spy)
    entries = profile_layers(device, artifact, repeats=10, warmup=2)
    assert [profile["repeats"] for profile in asked] == [3, 3, 4]
    assert sum(entry.timing.mean_ms for entry in entries) == pytest.approx(6.0)
    asked.clear()
    assert len(profile_layers(device, artifact, repeats=1)[0].timing.samples_ms) == 1
    assert [profile["of"] for profile in asked] == [[], [], [0]]


def test_a_measured_profile_survives_json(device: Device, export: Export) -> None:
    asked: list[Variant] = []

    def make(variant: Variant) -> Artifact:
        asked.append(variant)
        return export(device, 16)

    profile = build_profile(device, make, "small", kind="bilinear", repeats=5, warmup=1)
    assert asked == [Variant()]
    assert profile.fingerprint == device.fingerprint
    assert profile.predict_ms({}) == pytest.approx(profile.model_ms)
    assert LatencyProfile.from_json(profile.to_json()) == profile


def test_artifact_of_another_runtime_is_refused(export: Export) -> None:
    torch_artifact = export(Device("t", "torch", threads=1), 16)
    with pytest.raises(ValueError, match="export it for this device"):
        measure(Device("o", "onnxruntime", threads=1), torch_artifact)


def test_a_damaged_artifact_is_an_error_and_the_runner_goes_on(tmp_path: Path) -> None:
    device = Device("here", "onnxruntime", threads=1)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is no model")
    broken = Artifact(path, "onnxruntime", "fp32", (1, 3, 8, 8), "0" * 64, ())
    with pytest.raises(DeviceError, match="device here: "):
        measure(device, broken)
    assert describe(device).stable["runtime"] == "onnxruntime"


def test_a_provider_that_is_not_there_is_an_error(export: Export) -> None:
    artifact = export(Device("o", "onnxruntime", threads=1), 16)
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider|not available"):
        measure(Device("gpu", "onnxruntime", threads=1, providers=("CUDAExecutionProvider",)), artifact)


def kill_a_measured_process(runner_pid: int, done: threading.Event) -> None:
    runner = psutil.Process(runner_pid)
    while not done.wait(0.01):
        for child in runner.children():
            os.kill(child.pid, signal.SIGKILL)
            return


@pytest.mark.skipif(not hasattr(os, "fork"), reason="measured processes are no children of the runner here")
def test_a_killed_measurement_is_an_error_and_the_runner_goes_on(export: Export) -> None:
    device = Device("here", "onnxruntime", threads=1)
    artifact, done = export(device, 16), threading.Event()
    pid = connect(device).ask({"do": "hello", "runtime": "onnxruntime", "threads": 1}, timeout_s=60)["pid"]
    killer = threading.Thread(target=kill_a_measured_process, args=(pid, done))
    killer.start()
    try:
        with pytest.raises(DeviceError, match="killed by SIGKILL"):
            compare(device, artifact, artifact)
    finally:
        done.set()
        killer.join()
    assert measure(device, artifact, rounds=1).p50_ms > 0
    assert connect(device).is_open


def test_a_lost_runner_is_said_and_the_next_measurement_starts_another(export: Export) -> None:
    device = Device("here", "onnxruntime", threads=1)
    artifact = export(device, 16)
    connection = connect(device)
    pid = connection.ask({"do": "hello", "runtime": "onnxruntime", "threads": 1}, timeout_s=60)["pid"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DeviceLostError, match="device here: the runner ended"):
        connection.ask({"do": "facts", **device.to_json()}, timeout_s=60)
    assert measure(device, artifact, rounds=1).p50_ms > 0


def test_a_silent_runner_is_given_up(export: Export) -> None:
    device = Device("here", "onnxruntime", threads=1)
    connection = connect(device)
    connection.ask({"do": "facts", **device.to_json()}, timeout_s=60)
    with pytest.raises(DeviceLostError, match="no answer to 'facts' within"):
        connection.ask({"do": "facts", **device.to_json()}, timeout_s=0.0)
    assert not connection.is_open
    assert connect(device) is not connection


def test_measured_processes_end_with_their_runner(export: Export) -> None:
    device = Device("here", "onnxruntime", threads=1)
    artifact = export(device, 16)
    connection = connect(device)
    pid = connection.ask({"do": "hello", "runtime": "onnxruntime", "threads": 1}, timeout_s=60)["pid"]
    children: list[psutil.Process] = []

    def kill_runner() -> None:
        while len(children) < 2:
            children[:] = psutil.Process(pid).children()
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_runner, daemon=True)
    killer.start()
    with pytest.raises(DeviceLostError, match="the runner ended"):
        compare(device, artifact, artifact)
    killer.join(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "openvino", "ncnn"])
def test_every_convolution_of_yolov8n_is_accounted_for(runtime: str, data: Path, tmp_path: Path) -> None:
    from objectives.detection.files import open_model

    module = open_model(str(data / "yolov8n-bccd.pt")).float().eval().fuse(verbose=False).eval()
    module.model[-1].export, module.model[-1].format = True, "onnx"
    device = Device("here", runtime, threads=1)
    artifact = export_artifact(module, device, tmp_path, (1, 3, 128, 128))
    images = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = module(images).numpy()
    difference = np.abs(open_artifact(artifact, 1)(images.numpy())[0] - wanted).max()
    assert difference < 1e-3 * np.abs(wanted).max()
    entries = profile_layers(device, artifact, repeats=3, warmup=1)
    layers = [entry.layer for entry in entries if entry.op != OTHER]
    assert len(layers) == 64
    assert layers == [spec.layer for spec in artifact.layers]
    assert {"model.0.conv", "model.22.dfl.conv", "model.22.cv3.2.2"} <= set(layers)


def test_a_layer_that_the_runtime_does_not_show_is_an_error(export: Export) -> None:
    device = Device("here", "onnxruntime", threads=1)
    artifact = export(device, 16)
    extra = replace(artifact.layers[0], layer="nowhere", names=())
    with pytest.raises(DeviceError, match="do not show in the profile"):
        profile_layers(device, replace(artifact, layers=(*artifact.layers, extra)), repeats=1)


def test_pytorchs_memory_is_kept_where_the_c_library_can(export: Export) -> None:
    import platform

    device = Device("here", "torch", threads=1)
    assert measure(device, export(device, 16), rounds=1).p50_ms > 0
    kept = describe(device).stable["allocator"]
    assert kept == ("glibc, keeps freed memory" if platform.libc_ver()[0] == "glibc" else "")
    assert describe(Device("here", "onnxruntime", threads=1)).stable["allocator"] == ""


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_a_layer_that_is_called_twice_has_the_time_of_both_calls(runtime: str, tmp_path: Path) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(torch.sigmoid(self.conv(torch.tanh(self.conv(x)))))
            return out

    device = Device("here", runtime, threads=1)
    artifact = export_artifact(Twice().eval(), device, tmp_path, (1, 3, 64, 64))
    entries = profile_layers(device, artifact, repeats=3, warmup=1)
    assert [e.layer for e in entries if e.op != OTHER] == ["conv", "last"]
    assert not [e.layer for e in entries if "conv" in e.layer.lower() and e.op == OTHER]

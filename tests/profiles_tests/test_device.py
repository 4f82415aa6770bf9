from __future__ import annotations

from typing import Any

import pytest

from profiles.device import Device, DeviceFacts, describe


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"runtime": "tflite"}, "runtime must be one of torch, onnxruntime, openvino, ncnn, got 'tflite'"),
        ({"threads": 0}, "threads must be a whole number of at least 1, got 0"),
        ({"threads": 1.5}, "threads must be a whole number"),
        ({"precision": "int3"}, "precision must be one of fp32.* got 'int3'"),
        ({"host": "pi@pi5.local"}, "host must look like ssh://"),
        ({"host": "ssh://-oProxyCommand=x"}, "host must look like ssh://"),
        ({"name": "a b"}, "device name"),
        ({"providers": ("tpu",)}, "providers must be one of cpu, cuda"),
        ({"runtime": "ncnn", "providers": ("cpu",)}, "providers must be empty for ncnn"),
    ],
)
def test_invalid_device_names_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Device(**{"name": "d", "runtime": "torch", **keys})


def test_json_round_trip_and_unknown_key() -> None:
    device = Device(
        "pi5", "onnxruntime", 4, providers=("CPUExecutionProvider",), host="ssh://pi@pi5.local:2222"
    )
    assert Device.from_json(device.to_json()) == device
    assert not device.is_local
    with pytest.raises(ValueError, match="unknown device key 'thread'"):
        Device.from_json({"name": "d", "runtime": "torch", "thread": 2})


def test_fingerprint_is_the_same_for_every_ask_and_differs_by_setting() -> None:
    one, again = Device("a", "onnxruntime", 1), Device("b", "onnxruntime", 1)
    assert one.fingerprint == again.fingerprint == describe(one).fingerprint
    assert Device("a", "onnxruntime", 2).fingerprint != one.fingerprint
    assert "onnxruntime" in one.fingerprint
    assert "/" not in one.fingerprint


@pytest.mark.parametrize(
    "key", ["cpu", "isa", "runtime_version", "precision", "governor", "providers", "cpus"]
)
def test_every_stable_fact_changes_the_fingerprint(key: str) -> None:
    facts = describe(Device("a", "onnxruntime", 1))
    other = DeviceFacts({**facts.stable, key: "something else"}, facts.state)
    assert other.fingerprint != facts.fingerprint
    assert DeviceFacts(facts.stable, {"load_1m": 99}).fingerprint == facts.fingerprint

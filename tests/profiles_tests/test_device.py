from __future__ import annotations

import re
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


QUIET = {"load_1m": 0.1, "busy": {0: 0.02, 1: 0.0}, "clock_mhz": 1500.0, "clock_max_mhz": 1500.0}


def facts(**state: object) -> DeviceFacts:
    stable = {"cpus": 2, "threads": 1, "governor": "performance"}
    return DeviceFacts(stable, {**QUIET, **state})


def test_a_quiet_machine_has_no_disturbances() -> None:
    assert facts().disturbances == ()
    # One of two CPUs is enough for one thread, and a board's register of past faults is clear.
    assert facts(busy={0: 1.0, 1: 0.0}, throttled="throttled=0x0").disturbances == ()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"load_1m": 1.9}, "load average 1.9 on 2 CPUs"),
        ({"busy": {0: 0.9, 1: 0.8}}, "CPU 0, 1 busy"),
        ({"clock_mhz": 600.0}, "clock 600 of 1500 MHz"),
        ({"temperature_c": 83.0}, "83 °C"),
        ({"throttled": "throttled=0x50005"}, "throttled \\(0x50005\\)"),
        ({"on_battery": True}, "battery"),
    ],
)
def test_each_disturbance_is_named(state: dict[str, object], says: str) -> None:
    found = facts(**state).disturbances
    assert len(found) == 1
    assert re.search(says, found[0])

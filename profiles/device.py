"""A device: a machine together with the runtime, threads and precision that models run with on it.

Says what is valid and what identifies the numbers measured there (`fingerprint`). Knows neither models nor
how anything is timed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

RUNTIMES = ("torch", "onnxruntime", "openvino", "ncnn")
PRECISIONS: dict[str, tuple[str, ...]] = {
    "torch": ("fp32", "bf16", "fp16"),
    "onnxruntime": ("fp32",),
    "openvino": ("fp32", "bf16", "fp16"),
    "ncnn": ("fp32", "bf16", "fp16"),
}


@dataclass(frozen=True)
class Device:
    """One device of a study.

    Attributes:
        name: the user's word for it, unique in a study; letters, digits, `.`, `_`, `-`.
        runtime: "torch", "onnxruntime", "openvino" or "ncnn".
        threads: CPU threads of one inference, at least 1.
        precision: arithmetic of the runtime: "fp32"; except for onnxruntime, whose arithmetic is the file's,
            also "bf16" and "fp16", refused when a model is opened where the runtime would compute in another.
        providers: for onnxruntime its execution providers in order of preference (empty:
            CPUExecutionProvider); for torch one of "cpu", "cuda", "cuda:N" (empty: cpu); nothing for the
            others.
        host: None for this machine, else `ssh://user@host[:port]`.

    Raises:
        ValueError: names the key, the value received and what is allowed.
    """

    name: str
    runtime: str
    threads: int = 1
    precision: str = "fp32"
    providers: tuple[str, ...] = ()
    host: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "providers", tuple(self.providers))
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(
                "device name must start with a letter or digit and hold letters, digits, '.', '_' or '-' "
                f"only, got {self.name!r}"
            )
        where = f"device {self.name}: "
        if self.runtime not in RUNTIMES:
            raise ValueError(f"{where}runtime must be one of {', '.join(RUNTIMES)}, got {self.runtime!r}")
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise ValueError(f"{where}threads must be a whole number of at least 1, got {self.threads!r}")
        if self.precision not in PRECISIONS[self.runtime]:
            allowed = ", ".join(PRECISIONS[self.runtime])
            raise ValueError(
                f"{where}precision must be one of {allowed} for {self.runtime}, got {self.precision!r}"
            )
        if any(not isinstance(p, str) or not p for p in self.providers):
            raise ValueError(f"{where}providers must be texts, got {self.providers!r}")
        if self.runtime == "torch":
            if len(self.providers) > 1 or any(
                not re.fullmatch(r"cpu|cuda(:\d+)?", p) for p in self.providers
            ):
                raise ValueError(
                    f"{where}providers must be one of cpu, cuda, cuda:N for torch, got {list(self.providers)}"
                )
        elif self.runtime != "onnxruntime" and self.providers:
            raise ValueError(f"{where}providers must be empty for {self.runtime}, got {list(self.providers)}")
        if self.host is not None and not re.fullmatch(
            r"ssh://([^@/:\s]+@)?[^@/:\s-][^@/:\s]*(:\d{1,5})?", self.host
        ):
            raise ValueError(
                f"{where}host must look like ssh://user@host or ssh://user@host:port, got {self.host!r}"
            )

    @property
    def is_local(self) -> bool:
        return self.host is None

    @cached_property
    def fingerprint(self) -> str:
        """What numbers of this device depend on, as a text fit for file names; asks the machine once.

        Raises:
            DeviceError: the machine cannot be reached or lacks the runtime.
        """
        return describe(self).fingerprint

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "providers": list(self.providers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Device:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"unknown device key {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
        return cls(**data)


@dataclass(frozen=True)
class DeviceFacts:
    """What a device's machine says of itself.

    Attributes:
        stable: what numbers depend on: CPU and GPU model, instruction sets, runtime and its version,
            threads, precision, providers, governor, allocator, number of CPUs.
        state: what may disturb a measurement just now: `load_1m`, `busy` (share by CPU), `temperature_c`,
            `clock_mhz` and `clock_max_mhz` of the CPUs to measure on, `throttled` (a Raspberry Pi's bits),
            `on_battery`; None where unreadable.
    """

    stable: Mapping[str, Any]
    state: Mapping[str, Any]

    @property
    def disturbances(self) -> tuple[str, ...]:
        """What makes the machine a poor place to measure on just now, in words, with what to do about it;
        empty when it is quiet.
        """
        stable, state = self.stable, self.state
        found = []
        load, cpus = state.get("load_1m"), stable.get("cpus") or 1
        if load is not None and load > 0.5:
            found.append(f"load average {load:.1f} on {cpus} CPUs; wait for other work to end")
        busy = [int(cpu) for cpu, share in (state.get("busy") or {}).items() if share > 0.3]
        if busy and len(busy) > cpus - (stable.get("threads") or 1):
            found.append(f"CPU {', '.join(map(str, busy))} busy just now; no {stable['threads']} are free")
        governor = stable.get("governor")
        if governor and governor != "performance":
            found.append(
                f"governor {governor}; clocks change with load (cpupower frequency-set -g performance)"
            )
        clock, most = state.get("clock_mhz"), state.get("clock_max_mhz")
        if governor == "performance" and clock and most and clock < 0.8 * most:
            found.append(f"clock {clock:.0f} of {most:.0f} MHz; it is being held back, by heat or by power")
        temperature = state.get("temperature_c")
        if temperature is not None and temperature > 75:
            found.append(f"{temperature:.0f} °C; it may throttle")
        throttled = str(state.get("throttled") or "").rpartition("=")[2]
        if throttled not in ("", "0", "0x0"):
            found.append(f"throttled ({throttled}); give it a stronger supply or cooling, then restart it")
        if state.get("on_battery"):
            found.append("running on battery; plug it in")
        if (stable.get("threads") or 1) > cpus:
            found.append(f"{stable['threads']} threads on {cpus} CPUs; set threads to {cpus} or fewer")
        return tuple(found)

    @property
    def fingerprint(self) -> str:
        """For example `onnxruntime-1.31.1_amd-epyc_2t_fp32_5f1c09ab`; the last part digests `stable`."""
        facts = self.stable
        digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:8]
        chip = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b", "", (facts["gpu"] or facts["cpu"]).lower())
        chip = re.sub(r"[^a-z0-9]+", "-", chip).strip("-")[:32].strip("-")
        version = re.sub(r"[^A-Za-z0-9.]+", ".", facts["runtime_version"])
        return f"{facts['runtime']}-{version}_{chip}_{facts['threads']}t_{facts['precision']}_{digest}"


def describe(device: Device) -> DeviceFacts:
    """Ask the device's machine what it is, through its runner.

    Raises:
        DeviceError: the machine cannot be reached or lacks the runtime.
    """
    from .connection import connect

    facts = connect(device).ask({"do": "facts", **device.to_json()}, timeout_s=60)
    return DeviceFacts(stable=facts["stable"], state=facts["state"])

"""The machine a runner is on: what it is, what disturbs it, and which CPUs to use."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from .session_torch import kept_memory
from .sessions import import_runtime


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip("\0\n ")
    except OSError:
        return ""


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def allowed_cpus() -> list[int]:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def busy_shares(watch_s: float = 0.1) -> dict[int, float]:
    """How busy each CPU is just now, in [0, 1]; empty where that cannot be read."""
    before = _cpu_ticks()
    time.sleep(watch_s if before else 0)
    shares = {}
    for cpu, (idle, total) in _cpu_ticks().items():
        past = before.get(cpu)
        if past and total > past[1]:
            shares[cpu] = 1 - (idle - past[0]) / (total - past[1])
    return shares


def _cpu_ticks() -> dict[int, tuple[int, int]]:
    ticks = {}
    for line in _read("/proc/stat").splitlines():
        fields = line.split()
        if re.fullmatch(r"cpu\d+", fields[0]):
            counts = [int(f) for f in fields[1:9]]
            ticks[int(fields[0][3:])] = (counts[3] + counts[4], sum(counts))
    return ticks


def choose_cpus(threads: int, busy: dict[int, float] | None = None) -> list[int]:
    """CPUs to pin to: the fastest kind, one per physical core before its siblings, the idlest ones."""
    allowed = allowed_cpus()
    if threads >= len(allowed):
        return allowed
    base = "/sys/devices/system/cpu/cpu"
    seen: set[str] = set()
    ranked = []
    # Of equally idle ones the high numbers first: interrupts land on CPU 0.
    for cpu in sorted(allowed, key=lambda c: (round((busy or {}).get(c, 0.0), 1), -c)):
        core = _read(f"{base}{cpu}/topology/thread_siblings_list") or str(cpu)
        speed = int(_read(f"{base}{cpu}/cpu_capacity") or _read(f"{base}{cpu}/cpufreq/cpuinfo_max_freq") or 0)
        ranked.append((-speed, core in seen, cpu))
        seen.add(core)
    return sorted(cpu for _, _, cpu in sorted(ranked, key=lambda entry: entry[:2])[:threads])


def _cpu_facts() -> dict[str, Any]:
    first: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    flags = set((first.get("flags") or first.get("Features") or "").split())
    isa = [
        f
        for f in (
            "avx",
            "avx2",
            "avx512f",
            "avx512_vnni",
            "avx512_bf16",
            "amx_tile",
            "asimddp",
            "sve",
            "bf16",
        )
        if f in flags
    ]
    name = first.get("model name") or _read("/proc/device-tree/model") or first.get("Model") or ""
    name = (
        name
        or _first_line(["sysctl", "-n", "machdep.cpu.brand_string"])
        or platform.processor()
        or "unknown CPU"
    )
    parts = [first[k] for k in ("cpu family", "model", "stepping", "CPU part") if k in first]
    return {"cpu": name, "cpu_model": "/".join(parts), "isa": isa}


def _gpu_index(provider: str) -> str:
    """What nvidia-smi calls the GPU that a provider such as `cuda:1` means."""
    _, _, number = provider.partition(":")
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = int(number) if number.isdigit() else 0
    return visible[index] if index < len(visible) else str(index)


def machine_facts(spec: dict[str, Any]) -> dict[str, Any]:
    """What numbers depend on (`stable`) and what disturbs them just now (`state`)."""
    threads = spec["threads"]
    version = import_runtime(spec["runtime"])
    governors = {
        _read(f"/sys/devices/system/cpu/cpu{c}/cpufreq/scaling_governor") for c in choose_cpus(threads)
    } - {""}
    providers = list(spec.get("providers") or [])
    gpu = ""
    if any("cuda" in p.lower() or "tensorrt" in p.lower() for p in providers):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = _first_line([*query, "-i", _gpu_index(providers[0])])
    stable = {
        "system": platform.system(),
        "machine": platform.machine(),
        **_cpu_facts(),
        "cpus": len(allowed_cpus()),
        "gpu": gpu,
        "runtime": spec["runtime"],
        "runtime_version": version,
        "threads": threads,
        "precision": spec["precision"],
        "providers": providers,
        "governor": "+".join(sorted(governors)),
        "allocator": kept_memory() if spec["runtime"] == "torch" else "",
    }
    temperatures = [_read(str(p)) for p in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    cpus = [f"/sys/devices/system/cpu/cpu{c}" for c in choose_cpus(threads)]
    mhz = [_read(f"{cpu}/cpufreq/scaling_cur_freq") for cpu in cpus]
    limits = [_read(f"{cpu}/cpufreq/cpuinfo_max_freq") for cpu in cpus]
    supplies = [_read(str(p)) for p in Path("/sys/class/power_supply").glob("A*/online")]
    state = {
        "load_1m": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "temperature_c": max((int(t) / 1000 for t in temperatures if t.lstrip("-").isdigit()), default=None),
        "clock_mhz": min((int(m) / 1000 for m in mhz if m.isdigit()), default=None),
        "clock_max_mhz": min((int(m) / 1000 for m in limits if m.isdigit()), default=None),
        # Nonzero on a Raspberry Pi that lacks power or cooling, or has since it was started.
        "throttled": _read("/sys/devices/platform/soc/soc:firmware/get_throttled") or None,
        "on_battery": all(s == "0" for s in supplies) if supplies else None,
        "busy": {cpu: share for cpu, share in busy_shares().items() if cpu in allowed_cpus()},
        "python": platform.python_version(),
    }
    return {"stable": stable, "state": state}

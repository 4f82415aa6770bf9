"""How often a latency comparison is right.

Run: `uv run python benchmarks/measurement.py [--check]`; a short look: `--pairs 2 --runtimes onnxruntime`.

Pairs of chains of equal convolutions are compared by `profiles.measure.compare`: two copies of one file, and
a chain against one with a thirty-third more of the same layers, 3.0% more work by construction. Both on the
machine as it is, and with another process spinning on one core. Beside it what a script would do: 50 runs of
the one, then 50 of the other in the same process, and the difference of the means by Welch's t-test at 5%.

Targets: identical pairs are called different at most 5% of the time; the 3% are found at least 90% of the
time; under load neither is worse than "cannot tell": a wrong winner is never named, identical pairs are
called different at most 5% of the time.

Duration: up to 30 s a pair, 4 cases: 50 pairs take an hour and a half per runtime. Needs no data.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
# Not this folder, whose `search.py` would hide the package of that name.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

from profiles.artifact import Artifact, export_artifact, open_artifact  # noqa: E402  # Not installed.
from profiles.device import Device  # noqa: E402
from profiles.lock import host_lock  # noqa: E402
from profiles.measure import compare  # noqa: E402

RUNTIMES = ("onnxruntime", "torch")
LAYERS, CHANNELS, PIXELS = 33, 32, 40
FALSE_ALARMS, FOUND = 0.05, 0.90
PLAIN_RUNS = 50


def chain(layers: int) -> nn.Module:
    """Equal convolutions one after the other; each is the same work."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts).eval()


def export_pairs(device: Device, folder: Path) -> dict[str, tuple[Artifact, Artifact]]:
    """Candidate and baseline of the two kinds of pairs."""
    shape = (1, CHANNELS, PIXELS, PIXELS)
    baseline = export_artifact(chain(LAYERS), device, folder / "baseline", shape)
    longer = export_artifact(chain(LAYERS + 1), device, folder / "longer", shape)
    (folder / "copy").mkdir()
    for path in baseline.files:
        shutil.copy(path, folder / "copy")
    copy = Artifact.from_json(baseline.to_json(), folder / "copy")
    return {"identical": (copy, baseline), "3% slower": (longer, baseline)}


def plain_verdict(device: Device, candidate: Artifact, baseline: Artifact) -> str:
    """What the mean of 50 runs, one model after the other in one process, would say."""
    image = np.zeros(baseline.input_shape, dtype=np.float32)
    samples = []
    with host_lock("measure"):
        for artifact in (candidate, baseline):
            run = open_artifact(artifact, device.threads)
            for _ in range(5):
                run(image)
            times = []
            for _ in range(PLAIN_RUNS):
                start = time.perf_counter()
                run(image)
                times.append(time.perf_counter() - start)
            samples.append(times)
    if float(stats.ttest_ind(*samples, equal_var=False).pvalue) >= 0.05:
        return "cannot tell"
    return "slower" if np.mean(samples[0]) > np.mean(samples[1]) else "faster"


@contextlib.contextmanager
def load(spinning: bool) -> Iterator[None]:
    """Another process that keeps one core busy."""
    if not spinning:
        yield
        return
    # Until this process is gone, however it ends.
    spin = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run(runtime: str, args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Verdicts of every case in one runtime."""
    device = Device("cpu", runtime, threads=args.threads)
    pairs = export_pairs(device, work / runtime)
    cases = [
        {
            "runtime": runtime,
            "load": spinning,
            "pair": kind,
            "verdicts": {"in turns": [], "plain": []},
            "ratios": [],
            "half_widths": [],
            "duration_s": [],
        }
        for spinning in (False, True)
        for kind in pairs
    ]
    # One pair of each case after the other, so that what the machine does in an hour meets all of them.
    for number in range(args.pairs):
        for case in cases:
            candidate, baseline = pairs[case["pair"]]
            with load(case["load"]):
                start = time.monotonic()
                found = compare(device, candidate, baseline, limit_s=args.limit_s)
                case["duration_s"].append(time.monotonic() - start)
                plain = plain_verdict(device, candidate, baseline)
            case["verdicts"]["in turns"].append(found.verdict)
            case["verdicts"]["plain"].append(plain)
            low, high = found.ratio_ci
            case["ratios"].append(found.ratio)
            case["half_widths"].append((high - low) / 2 / found.ratio)
            print(
                f"{runtime} {number + 1}/{args.pairs} {case['pair']}{', load' if case['load'] else ''}: "
                f"ratio {found.ratio:.4f} [{low:.4f}, {high:.4f}] {found.verdict}; plain: {plain}",
                file=sys.stderr,
                flush=True,
            )
    return cases


def shares(verdicts: list[str]) -> dict[str, float]:
    return {word: verdicts.count(word) / len(verdicts) for word in ("faster", "slower", "cannot tell")}


def missed_targets(cases: list[dict[str, Any]]) -> list[str]:
    missed = []
    for case in cases:
        found = shares(case["verdicts"]["in turns"])
        where = f"{case['runtime']}, {case['pair']}{', under load' if case['load'] else ''}"
        if case["pair"] == "identical" and 1 - found["cannot tell"] > FALSE_ALARMS:
            alarms = 1 - found["cannot tell"]
            missed.append(f"{where}: {alarms:.0%} called different, wanted at most {FALSE_ALARMS:.0%}")
        if case["pair"] != "identical":
            if found["faster"] > 0:
                missed.append(f"{where}: {found['faster']:.0%} wrong winners, wanted none")
            if not case["load"] and found["slower"] < FOUND:
                missed.append(f"{where}: {found['slower']:.0%} found, wanted {FOUND:.0%}")
    return missed


def table_text(cases: list[dict[str, Any]]) -> str:
    lines = [
        "| runtime | load | pair | method | faster | slower | cannot tell | ratio | ± | s a pair |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in cases:
        for method, verdicts in case["verdicts"].items():
            found = shares(verdicts)
            figures = "| | | "
            if method == "in turns":
                figures = (
                    f"| {np.median(case['ratios']):.4f} | {np.median(case['half_widths']):.2%} "
                    f"| {np.mean(case['duration_s']):.0f} "
                )
            lines.append(
                f"| {case['runtime']} | {'one core' if case['load'] else 'none'} | {case['pair']} | {method} "
                f"| {found['faster']:.0%} | {found['slower']:.0%} | {found['cannot tell']:.0%} {figures}|"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="comma-separated")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=30.0, help="longest comparison")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        cases = [case for runtime in args.runtimes.split(",") for case in run(runtime, args, Path(work))]
    missed = missed_targets(cases)
    if args.json:
        print(json.dumps({"cases": cases, "missed": missed}, indent=1))
    else:
        print(table_text(cases))
        print("\n" + ("\n".join(f"missed: {text}" for text in missed) or "all targets met"))
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast plans are made, once scores and profile are there.

Run: `uv run python benchmarks/planning.py [--check]`.

Makes 1,000 plans of YOLOv8n at 320 px with random beta and ratio: rerank, select, predict latency, by every
allocation that needs no measured loss. Beside it, in the same run, what Torch-Pruning takes to rank once: its
magnitude importance of every group, sorted over the network. Then the command `paretoprune plan`, a new
process each time, on a study whose caches are warm; and what of that a Python that imports NumPy takes.

Targets: 1,000 plans by `rank` in at most 2 s, the command in less than a second.

Duration: a minute or two. Needs no data: for the thousand plans, scores are the weights' and the latency
model's coefficients are drawn at random, which takes as long to evaluate as fitted ones; for the command, the
profile is measured with ONNX Runtime on this machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
# Not this folder, whose `search.py` would hide the package of that name.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

from objectives.detection import DetectionTask  # noqa: E402  # The repository is not installed as a package.
from objectives.synthetic import CLASSES, make_detection_set  # noqa: E402
from objectives.task import Task  # noqa: E402
from profiles.device import Device  # noqa: E402
from profiles.export import trace_layers  # noqa: E402
from profiles.latency_fit import STEPS  # noqa: E402
from profiles.latency_model import LatencyModel, term_names  # noqa: E402
from profiles.latency_profile import LatencyProfile, LayerProfile  # noqa: E402
from profiles.timing import Timing  # noqa: E402
from search.allocation import Demand, Widths  # noqa: E402
from search.budget import channels_removed, cost_removed  # noqa: E402
from search.criteria import compute_scores  # noqa: E402
from search.evidence import Evidence  # noqa: E402
from search.groups import find_groups  # noqa: E402
from search.planning import allocate, rerank  # noqa: E402
from search.result import TrialParams  # noqa: E402

PLANS, LIMIT_S, COMMAND_LIMIT_S = 1000, 2.0, 1.0
WAYS: dict[str, dict[str, str]] = {
    "rank": {},
    "rank, share of latency": {"ratio_of": "latency"},
    "rank, marginal cost": {"cost": "marginal"},
    "uniform": {"allocation": "uniform"},
    "complexity (MACs)": {"allocation": "complexity", "cost": "macs"},
    "knapsack, share of latency": {"allocation": "knapsack", "ratio_of": "latency"},
}


def make_evidence(folder: Path) -> tuple[Task, Evidence]:
    """YOLOv8n with scores and a latency model that were not measured."""
    data = make_detection_set(folder / "shapes", images_train=2, images_val=2, imgsz=64, seed=0)
    architecture = folder / "yolov8n.yaml"
    from ultralytics.utils.checks import check_yaml  # Behind `objectives`, which silences it.

    text = Path(check_yaml("yolov8.yaml")).read_text(encoding="utf-8")
    architecture.write_text(text.replace("nc: 80", f"nc: {len(CLASSES)}"), encoding="utf-8")
    task: Task = DetectionTask(str(architecture), str(data), 320)
    model = task.load_model()
    specs = trace_layers(task.deployable(model), task.input_shape)
    rng = np.random.default_rng(0)
    layers = tuple(LayerProfile.of(spec, Timing((float(rng.uniform(0.02, 0.5)),), 5)) for spec in specs)
    latency = LatencyModel(
        "fitted",
        tuple(layer.in_channels for layer in layers),
        tuple(layer.out_channels for layer in layers),
        tuple(tuple(row) for row in rng.uniform(0, 0.02, (len(layers), len(term_names(STEPS))))),
        1.0,
        STEPS,
    )
    device = Device("none", "onnxruntime")
    profile = LatencyProfile(device, "none", task.model_key, task.input_shape, layers, 10.0, {}, 8, latency)
    return task, Evidence(
        device=device,
        model_key=task.model_key,
        groups=find_groups(task.traceable(model), model),
        scores={"l1": compute_scores("l1", task, images=1, batch=1, loss="task")},
        profile=profile,
        min_channels=8,
    )


def plan_once(params: TrialParams, known: Evidence) -> float:
    """Rerank, select, predict: as a trial does before it touches a model."""
    groups = known.groups
    scores = rerank(params, known)
    of_channels = params.ratio_of == "channels"
    share = channels_removed(groups) if of_channels else cost_removed(known.cost(params.ratio_of))
    demand = Demand(groups, scores, params.ratio, share, Widths(params.round_to, known.min_channels))
    counts = allocate(params, demand, known)
    demand.pick(counts)
    return float(known.cost("latency").total(groups.spread(counts)[None])[0])


def rank_with_torch_pruning(task: Task) -> Callable[[], Any]:
    """One ranking of all groups by Torch-Pruning's magnitude importance; the groups are there."""
    traceable = task.traceable(task.load_model())
    model = traceable.model.requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=traceable.example, verbose=False)
    fixed = [model.get_submodule(name) for name in traceable.fixed]
    kinds = [nn.Conv2d, nn.Linear]
    groups = list(graph.get_all_groups(ignored_layers=fixed, root_module_types=kinds))
    importance = tp.importance.GroupMagnitudeImportance(p=1)

    def once() -> Any:
        values = [value for group in groups if (value := importance(group)) is not None]
        return torch.argsort(torch.cat(values))

    return once


def seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def time_command(folder: Path, repeats: int = 7) -> tuple[float, float]:
    """Seconds of `paretoprune plan`, caches warm, and of a Python that imports NumPy, in turns; medians."""
    study = folder / "study.yaml"
    described = {"name": "study", "model": "yolov8n.yaml", "data": "shapes/data.yaml", "imgsz": 320,
                 "devices": [{"name": "desk", "runtime": "onnxruntime"}], "profile": {"model": "linear"},
                 "search": {"allocation": "knapsack"}, "calibration": {"images": 2}}  # fmt: skip
    study.write_text(json.dumps(described), encoding="utf-8")
    asked = ["plan", str(study), "--device", "desk", "--beta", "0.5", "--ratio", "0.3"]
    commands = (
        [sys.executable, "-c", "from search.cli import main; main()", *asked],
        [sys.executable, "-c", "import numpy"],
    )
    taken: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 2):  # the first fills the caches, the second finds what it read unchanged
        for command, seconds_taken in zip(commands, taken, strict=True):
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
            if repeat > 1:
                seconds_taken.append(time.perf_counter() - start)
    return median(taken[0]), median(taken[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", type=int, default=PLANS)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 where the target is missed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task, known = make_evidence(Path(folder))
        command_s, numpy_s = time_command(Path(folder))
    rows = {}
    for name, keys in WAYS.items():
        rng = np.random.default_rng(0)

        def one(keys: dict[str, str] = keys, rng: np.random.Generator = rng) -> float:
            beta, ratio = float(rng.random()), float(rng.uniform(0.1, 0.7))
            return plan_once(
                TrialParams(beta=beta, ratio=ratio, criterion="l1", round_to=8, **keys),  # type: ignore[arg-type]  # words only
                known,
            )

        repeats = args.plans if not keys else max(10, args.plans // 20)
        rows[name] = seconds(one, repeats)
    theirs = seconds(rank_with_torch_pruning(task), 5)
    missed = [
        name
        for name, taken, limit in (
            ("1,000 plans", rows["rank"] * PLANS, LIMIT_S),
            ("the command", command_s, COMMAND_LIMIT_S),
        )
        if taken > limit
    ]
    if args.json:
        found = {"plan_s": rows, "torch_pruning_rank_s": theirs, "command_s": command_s, "numpy_s": numpy_s}
        print(json.dumps({**found, "missed": missed}))
    else:
        print("| way | s for 1,000 plans | beside one Torch-Pruning ranking |\n| --- | --- | --- |")
        for name, each in rows.items():
            print(f"| {name} | {each * 1000:.2f} | {theirs / each:.0f} times faster |")
        print(f"| Torch-Pruning, importance and sort | {theirs * 1000:.1f} | |")
        print(f"\n`paretoprune plan`, warm: {command_s:.2f} s; Python with NumPy alone: {numpy_s:.2f} s\n")
        print(
            f"targets, {LIMIT_S:g} s for 1,000 plans by rank and {COMMAND_LIMIT_S:g} s for the command: "
            + (f"missed by {', '.join(missed)}" if missed else "met")
        )
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

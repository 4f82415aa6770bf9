"""The main job on real data: examples/bccd.yaml, both devices, and what its fronts hold.

Measures: number of points on each front, and the best measured speedup of a point whose mAP50-95 is at most
0.03 below the unpruned model's. On: YOLOv8n trained on BCCD blood cells, 320 px, PyTorch and ONNX Runtime on
this CPU, 2 threads, 2 to 6 epochs of fine-tuning a trial. Targets: at least 4 points on each front; at least
1.3 times faster in ONNX Runtime; rerank + plan + prune under 0.5 s in every trial.
Takes: 20 to 40 minutes on 2 cores for 12 trials a device; a finished study in --dir is only read.

    PARETOPRUNE_DATA=... uv run python benchmarks/main_job.py --dir runs/main-job [--trials 12] [--json]
    [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
# Not this folder, whose `search.py` would hide the package of that name.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

from search.found import fronts_of  # noqa: E402
from search.launch import launch  # noqa: E402
from search.progress import ConsoleProgress, front_table  # noqa: E402
from search.studyfile import load_study_file  # noqa: E402

STUDY = ROOT / "examples" / "bccd.yaml"
LOSS, SPEEDUP, POINTS, STEPS_S = 0.03, 1.3, 4, 0.5


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="output folder of the study")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    options = parser.parse_args()
    console = Console(stderr=True)
    study = load_study_file(STUDY, (), options.dir)
    names = [device.name for device in study.devices]
    with ConsoleProgress(console, metric="mAP50-95", devices=names) as progress:
        launch(study, names, trials=options.trials, timeout_s=None, progress=progress)

    rows: dict[str, dict[str, Any]] = {}
    for name, found in fronts_of(study, names).items():
        console.print(front_table(name, found.front, "mAP50-95"))
        base = found.front.baseline
        good = [p for p in found.front.points if p.trial and (p.accuracy or 0) >= (base.accuracy or 0) - LOSS]
        best = max(good, key=lambda p: p.speedup or 0, default=base)
        trials = [r for r in found.results if r.state == "complete" and r.trial]
        choosing = [sum(r.duration_s.get(step, 0.0) for step in ("rerank", "plan", "prune")) for r in trials]
        rows[name] = {
            "points": len(found.front.points),
            "best_trial": best.trial,
            "best_speedup": best.speedup,
            "best_speedup_ci": best.speedup_ci,
            "accuracy_loss": (base.accuracy or 0) - (best.accuracy or 0),
            "rerank_plan_prune_s": {"median": sorted(choosing)[len(choosing) // 2], "max": max(choosing)},
            "hypervolume": found.front.hypervolume,
        }
    missed = [f"{n}: {r['points']} points, wanted {POINTS}" for n, r in rows.items() if r["points"] < POINTS]
    missed += [
        f"{n}: rerank + plan + prune took {r['rerank_plan_prune_s']['max']:.2f} s, wanted below {STEPS_S}"
        for n, r in rows.items()
        if r["rerank_plan_prune_s"]["max"] >= STEPS_S
    ]
    if rows["cpu-ort"]["best_speedup"] < SPEEDUP:
        missed.append(f"cpu-ort: {rows['cpu-ort']['best_speedup']:.2f} times faster, wanted {SPEEDUP}")
    if options.json:
        print(json.dumps({"devices": rows, "missed": missed}, indent=1))
    else:
        for name, row in rows.items():
            low, high = row["best_speedup_ci"] or (1, 1)
            print(
                f"{name:10} points {row['points']:2}  best within {LOSS} mAP: trial {row['best_trial']}, "
                f"{row['best_speedup']:.2f}x [{low:.2f}, {high:.2f}], mAP loss {row['accuracy_loss']:+.4f}  "
                f"rerank+plan+prune max {row['rerank_plan_prune_s']['max']:.3f} s"
            )
        print("targets: " + ("all met" if not missed else "; ".join(missed)))
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())

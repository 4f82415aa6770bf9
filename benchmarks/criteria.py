"""Which way of choosing channels keeps the most accuracy at equal measured latency.

Run: `uv run python benchmarks/criteria.py [--check]`; a short look: `--ways core --points 0.45 --seeds 1`.

YOLOv8n on blood cells at 320 px. Every way of choosing (criterion, allocation, beta, cost, steps) is brought
to the same measured latency: the ratio is moved until the exported model, measured in turns with the unpruned
one, takes 65%, 45% and 30% of its time. Then all are trained back alike, with several seeds. What is compared
is the mean accuracy, beside the spread between seeds. The row `unpruned` is the whole model trained alike:
what can be hoped for.

Ways: every criterion with `rank` (beta 0), `uniform`, `knapsack` and `sensitivity` (beta 0.25); `taylor` with
`rank` at beta 0.5; `complexity` over parameters, MACs and memory (random filters); and ours, `taylor` with
`sensitivity` at beta 0.25 and 1, of which the better one counts. `core` is ours and the three it has to beat;
`steps` is `taylor` and `taylor_rise`, ranked and by loss curves, at once and in four steps with scores taken
anew.

Targets: ours is first at every point, by more than the spread between seeds, against `taylor` with `rank` at
beta 0, `taylor` with `knapsack`, and `l1` with `uniform`.

Data: `yolov8n-bccd.pt` and `bccd` in the folder PARETOPRUNE_DATA (by default ../shared/data).

Duration: loss curves 10 to 20 minutes for each criterion, then 2 to 3 minutes for each way and point with
three seeds; `core` 40 minutes, all ways hours. `--keep FILE` keeps what is done and goes on from there. Parts
can run apart (`--only`), each with a `--keep` of its own in one folder, also side by side on cores of their
own (`taskset`, and a `TMPDIR` each, or they wait for each other's measurements); `--read a.json,b.json` makes
one table of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Not this folder, whose `search.py` would hide the package of that name.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

from profiles.artifact import export_artifact  # noqa: E402  # The repository is not installed as a package.
from profiles.lock import host_lock  # noqa: E402
from profiles.measure import compare  # noqa: E402
from search.bench import Shop  # noqa: E402
from search.plan import PruningPlan  # noqa: E402
from search.planning import make_plan, rerank  # noqa: E402
from search.prune import prune  # noqa: E402
from search.result import TrialParams  # noqa: E402
from search.studyfile import load_study_file  # noqa: E402
from search.trial import Bench  # noqa: E402
from search.workspace import Workspace  # noqa: E402

CRITERIA = ("taylor", "taylor_rise", "taylor_weight", "l1", "bn", "fpgm", "hrank", "random")
POINTS = (0.65, 0.45, 0.30)
#: How far the measured share may be from the point: well below what separates the points.
CLOSE = 0.015
STUDY = """name: criteria
model: {data}/yolov8n-bccd.pt
data: {data}/bccd/data.yaml
imgsz: 320
seed: 0
devices:
  - {{name: cpu, runtime: onnxruntime, threads: {threads}}}
search:
  criterion: {{choices: [{criteria}]}}
  allocation: {{choices: [rank, sensitivity]}}
  ratio_of: latency
calibration: {{images: 64, batch: 16, curve_images: {curve_images}}}
finetune: {{epochs: {epochs}}}
"""


@dataclass(frozen=True)
class Way:
    """One way of choosing channels."""

    criterion: str
    allocation: str
    beta: float = 0.0
    cost: str = "layer"
    steps: int = 1

    @property
    def name(self) -> str:
        if self == UNPRUNED:
            return "unpruned"
        steps = f", {self.steps} steps" if self.steps > 1 else ""
        return f"{self.criterion}, {self.allocation}, beta {self.beta:g}, {self.cost}{steps}"


#: Nothing removed: a row of its own at all of the latency.
UNPRUNED, WHOLE = Way("", ""), 1.0
#: Beta is a search variable: small ones keep more at shallow cuts, large ones at deep cuts. At each point the
#: better of the two counts.
OURS = tuple(Way("taylor", "sensitivity", beta, "marginal") for beta in (0.25, 1.0))
BEATEN = (Way("taylor", "rank"), Way("taylor", "knapsack"), Way("l1", "uniform"))
CORE = (*OURS, *BEATEN)
#: At once and in four steps with scores taken anew, by the absolute value and by the rise alone.
STEPS = tuple(
    way
    for criterion in ("taylor", "taylor_rise")
    for steps in (1, 4)
    for way in (
        Way(criterion, "rank", steps=steps),
        Way(criterion, "sensitivity", OURS[0].beta, "marginal", steps),
    )
)
ALL = tuple(
    dict.fromkeys(
        (
            UNPRUNED,
            *CORE,
            *STEPS,
            *(Way(c, a) for c in CRITERIA for a in ("rank", "uniform", "knapsack")),
            Way("taylor", "rank", 0.5),
            Way("taylor", "rank", 0.5, "marginal"),
            *(Way("random", "complexity", 0.0, cost) for cost in ("params", "macs", "memory")),
            *(Way(c, "sensitivity", OURS[0].beta, "marginal") for c in CRITERIA),
        )
    )
)


SETS = {"core": CORE, "steps": STEPS, "all": ALL}


@dataclass(frozen=True)
class Row:
    """What one way gave at one point; latency as a share of the unpruned model's."""

    way: str
    point: float
    ratio: float
    latency: float
    latency_ci: tuple[float, float]
    before: float
    after: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.after))

    @property
    def spread(self) -> float:
        """Half the distance between the best and the worst seed."""
        return (max(self.after) - min(self.after)) / 2


def plan_at(way: Way, ratio: float, bench: Bench) -> PruningPlan:
    params = TrialParams(
        beta=way.beta,
        ratio=ratio,
        ratio_of="latency",
        criterion=way.criterion,
        cost=way.cost,
        allocation=way.allocation,
        round_to=bench.profile.channel_multiple,
        steps=way.steps,
    )
    return make_plan(params, rerank(params, bench), bench)


def reach(way: Way, point: float, bench: Bench, folder: Path) -> tuple[PruningPlan, float, Any]:
    """Move the ratio until the exported model takes the share `point` of the unpruned one's time."""
    tried: list[tuple[float, PruningPlan, float, Any]] = []
    ratio = 1 - point
    for _ in range(4):
        plan = plan_at(way, ratio, bench)
        if any(plan.digest == earlier.digest for _, earlier, _, _ in tried):
            break
        model = prune(bench.task.load_model(), plan, bench.task.settle)
        module = bench.task.deployable(model)
        artifact = export_artifact(module, bench.device, folder / "artifact", bench.task.input_shape)
        limit_s, skew = bench.latency_limit_s, bench.profile.skew
        found = compare(bench.device, artifact, bench.baseline, limit_s=limit_s, skew=skew)
        shutil.rmtree(folder / "artifact")
        tried.append((abs(found.ratio - point), plan, ratio, found))
        if tried[-1][0] <= CLOSE:
            break
        ratio = float(np.clip(ratio + found.ratio - point, 0.01, 0.95))
    _, plan, ratio, found = min(tried, key=lambda entry: entry[0])
    return plan, ratio, found


def run_way(way: Way, point: float, seeds: int, bench: Bench, folder: Path) -> Row:
    task = bench.task
    if way == UNPRUNED:
        plan, ratio, latency, interval = PruningPlan(task.model_key, {}), 0.0, 1.0, (1.0, 1.0)
    else:
        plan, ratio, found = reach(way, point, bench, folder)
        latency, interval = found.ratio, found.ratio_ci
    after = []
    before = 0.0
    for seed in range(seeds):
        model = prune(task.load_model(), plan, task.settle)
        accuracies: list[float] = []
        with host_lock("training"):
            if seed == 0:
                before = task.evaluate(task.predictor(model))
            task.recover(
                model,
                replace(bench.recovery, seed=seed),
                folder,
                lambda done, epochs, accuracy, into=accuracies: into.append(accuracy) is None,
            )
        after.append(max(accuracies))
    return Row(way.name, point, ratio, latency, interval, before, tuple(after))


def missed_targets(rows: Sequence[Row]) -> list[str]:
    by = {(row.way, row.point): row for row in rows}
    missed = []
    for point in sorted({row.point for row in rows} - {WHOLE}, reverse=True):
        found = [by[way.name, point] for way in OURS if (way.name, point) in by]
        others = [by[way.name, point] for way in BEATEN if (way.name, point) in by]
        if len(found) < len(OURS) or len(others) < len(BEATEN):
            missed.append(f"at {point:.0%}: nothing shown without all ways of `core`")
            continue
        ours = max(found, key=lambda row: row.mean)
        for other in others:
            margin, spread = ours.mean - other.mean, max(ours.spread, other.spread)
            if margin <= spread:
                missed.append(
                    f"at {point:.0%}: {ours.mean:.3f} against {other.mean:.3f} of {other.way}, "
                    f"a difference of {margin:+.3f} with a spread of {spread:.3f}"
                )
    return missed


def table_text(rows: Sequence[Row]) -> str:
    lines = [
        "| latency | way | measured [95%] | no recovery | recovered, mean | spread |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (-row.point, -row.mean)):
        low, high = row.latency_ci
        lines.append(
            f"| {row.point:.0%} | {row.way} | {row.latency:.3f} [{low:.3f}, {high:.3f}] | {row.before:.3f} "
            f"| {row.mean:.4f} | ± {row.spread:.4f} |"
        )
    return "\n".join(lines)


def read_rows(file: Path) -> list[Row]:
    """The rows that `--keep` left in a file."""
    rows = []
    for entry in json.loads(file.read_text(encoding="utf-8")):
        entry |= {"latency_ci": tuple(entry["latency_ci"]), "after": tuple(entry["after"])}
        rows.append(Row(**entry))
    return rows


def report(rows: Sequence[Row], args: argparse.Namespace) -> int:
    """Print the table; 1 with `--check` where a target is missed."""
    missed = missed_targets(rows)
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "missed": missed}, indent=1))
    else:
        print(table_text(rows))
        print("\n" + ("\n".join(f"missed: {text}" for text in missed) or "all targets met"))
    return 1 if args.check and missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ways", choices=tuple(SETS), default="all")
    parser.add_argument("--only", default="*", help="ways whose names, as in the table, match this pattern")
    parser.add_argument("--points", default=",".join(f"{p:g}" for p in POINTS), help="shares of the latency")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=15.0, help="of a latency measurement")
    parser.add_argument(
        "--curve-images", type=int, default=64, help="images that loss curves are measured on"
    )
    parser.add_argument("--keep", type=Path, help="JSON file of finished rows, read and written")
    parser.add_argument("--read", help="files that --keep left, separated by commas; nothing is run")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    args = parser.parse_args()
    if args.read:
        return report([row for name in args.read.split(",") for row in read_rows(Path(name))], args)
    data = Path(os.environ.get("PARETOPRUNE_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (data / "yolov8n-bccd.pt").is_file():
        parser.error(f"no yolov8n-bccd.pt in {data}; set PARETOPRUNE_DATA")
    ways = [way for way in SETS[args.ways] if fnmatch(way.name, args.only)]
    if not ways:
        known = "; ".join(way.name for way in SETS[args.ways])
        parser.error(f"--only must match one of the ways {known}; got {args.only}")
    criteria = tuple(dict.fromkeys(way.criterion for way in ways if way != UNPRUNED)) or ("taylor",)
    rows = read_rows(args.keep) if args.keep and args.keep.exists() else []
    with tempfile.TemporaryDirectory() as work:
        # Scores and curves are worth keeping beside the rows.
        folder = args.keep.resolve().parent if args.keep else Path(work)
        text = STUDY.format(
            data=data,
            threads=args.threads,
            criteria=", ".join(criteria),
            epochs=args.epochs,
            curve_images=args.curve_images,
        )
        file = folder / f"{args.keep.stem if args.keep else 'criteria'}.yaml"
        file.write_text(text, encoding="utf-8")
        study = load_study_file(file)
        shop = Shop(study, Workspace(study.folder), notice=note)
        device = study.devices[0].device()
        profile = shop.profile(device)
        done = {(row.way, row.point) for row in rows}
        points = [float(point) for point in args.points.split(",")]
        wanted = [(way, point) for point in points for way in ways if way != UNPRUNED]
        wanted += [(way, WHOLE) for way in ways if way == UNPRUNED]
        left = [(way, point) for way, point in wanted if (way.name, point) not in done]
        bench = Bench(
            task=shop.task,
            device=device,
            fingerprint=device.fingerprint,
            model_key=shop.task.model_key,
            seed=study.seed,
            groups=shop.groups,
            scores={criterion: shop.scores(criterion) for criterion in criteria},
            profile=profile,
            baseline=shop.baseline(device),
            recovery=shop.recovery,
            min_channels=study.search.min_channels,
            latency_target=study.measure.target,
            latency_limit_s=args.limit_s,
            rescore=shop.rescore,
        )
        for way, point in left:
            if way.allocation == "sensitivity" and way.criterion not in bench.curves:
                curves = {way.criterion: shop.curves(way.criterion, profile)}
                bench = replace(bench, curves={**bench.curves, **curves})
            rows.append(run_way(way, point, args.seeds, bench, Path(work)))
            note(str(rows[-1]))
            if args.keep:
                args.keep.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return report(rows, args)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""How soon and how far the front grows: our default search against simpler ones, in equal wall-clock time.

On BCCD (YOLOv8n, `examples/bccd.yaml`) or any classification study file, one device, three seeds:

- `ours`: the study file's own settings.
- `random`: the same search with that sampler, nothing stopped or screened.
- `grid`: the same with the paper's allocation, `rank`, over its grid of betas and ratios.
- `plain-tpe`, `plain-nsga2`: the loop that a user would write today. In every trial a fresh Optuna
  suggestion, scores computed and layers profiled anew (without variants), a share of the channels pruned by
  `rank`, the model trained, exported and measured; no known points, nothing stopped. A detector is trained
  with Ultralytics' own settings and no batch norm is re-estimated; with `--plain-training ours` everything is
  trained alike.

All but ours train every trial for `finetune.epochs`, since only a search that compares trials can tell which
of them deserve `stopping.extra_epochs`; `--set finetune.epochs=6` gives all trials as many.

All get the same number of seconds, everything included: profile, scores and loss curves, which are made once
and charged to each way that uses them, and the unpruned model's measurement. Hypervolume is that of
`ParetoFront`, relative to the unpruned model, at times spread over the run. Printed besides: what share of a
trial of ours is neither training, evaluation nor measurement, by step.

Targets (`--check`): the plain loops' final hypervolume reached by ours in at most a third of the time; ours
at least 1.1 times the best other one at the end; overhead below 3%.
Takes five times three times `--minutes`: 10 hours with the default 40. To look at it:
`uv run python benchmarks/search.py --study examples/bccd.yaml --minutes 10 --seeds 1 --only ours,random`.

Parts can run apart, each with `--json` into a file: one way or one seed (`--first-seed`) at a time.
`--read a.json,b.json` makes one table of them. `benchmarks/search_side_by_side.py` does both, with several
runs at a time on cores of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Not this folder, whose `search.py` would hide the package of that name.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

from search.bench import Shop  # noqa: E402
from search.front import ParetoFront  # noqa: E402
from search.loop import run_search  # noqa: E402
from search.params import params_at  # noqa: E402
from search.result import TrialParams, TrialResult  # noqa: E402
from search.sections import Range, SearchSection  # noqa: E402
from search.space import searched_space  # noqa: E402
from search.studyfile import StudyFile, load_study_file  # noqa: E402
from search.trial import run_trial  # noqa: E402
from search.workspace import Workspace  # noqa: E402

WAYS = ("ours", "random", "grid", "plain-tpe", "plain-nsga2")
PLAIN = ("plain-tpe", "plain-nsga2")
#: What the paper's rule needs and no more. Without a latency model the ratio is one of channels.
PLAIN_SETTINGS = ("search.allocation=rank", "profile.model=linear", "search.ratio_of=channels")
#: What `YOLO(...).train()` does where it is told nothing but epochs.
STOCK_SETTINGS = (
    "finetune.batch=16", "finetune.reestimate_images=0", "finetune.options={optimizer: auto, nbs: 64, "
    "lrf: 0.01, warmup_epochs: 3.0, warmup_bias_lr: 0.1, scale: 0.5, translate: 0.1}",
)  # fmt: skip
#: Steps of a trial that are the work itself; everything else is overhead.
WORK = ("recover", "measure")
MANY = 100_000
#: Way to one list per seed: seconds since its beginning, and the trial that ended then.
Runs = dict[str, list[list[tuple[float, TrialResult]]]]
SPEED, GAIN, OVERHEAD = 3.0, 1.1, 0.03


class Clocked:
    """Progress and recorder in one: notes when each trial ended, and ends the search when its time is up.

    Args:
        seconds: how long the search may take.
        spent: how much of it was spent before, on what is cached.
    """

    def __init__(self, seconds: float, spent: float = 0.0) -> None:
        self._seconds = seconds
        self._began = time.monotonic() - spent
        self.found: list[tuple[float, TrialResult]] = []

    def notice(self, text: str) -> None:
        note(f"  {text}")

    def trial_begins(self, device: str, number: int, done: int, wanted: int, params: Any) -> None: ...

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self._began > self._seconds

    def trial_ends(self, result: TrialResult, front: Any) -> None:
        at = time.monotonic() - self._began
        if at <= self._seconds:
            self.found.append((at, result))
        measured = f"{result.accuracy} at {result.latency_ms} ms"
        note(f"  {at:.0f} s: trial {result.trial} {result.state}: {result.reason or measured}")
        if self.is_over:
            signal.raise_signal(signal.SIGINT)  # as one Ctrl-C: the search ends here, in order

    def step(self, name: str) -> None: ...

    def epoch(self, done: int, epochs: int, accuracy: float) -> None: ...

    def begin(self, bench: Any, earlier: Any) -> None: ...

    def record(self, result: TrialResult, folder: Path, front: ParetoFront | None) -> None: ...


def settings(way: str, study: StudyFile, training: str) -> list[str]:
    """What a way of searching sets in the study file; `training` is `--plain-training`."""
    if way in ("random", "grid"):
        chosen = [f"search.sampler={way}", "stopping.enabled=false", "screening.keep=0"]
        return chosen if way == "random" else [*chosen, "search.allocation=rank"]
    if way not in PLAIN:
        return []
    is_stock = isinstance(study.model, str) and training == "stock"
    return [*PLAIN_SETTINGS, as_channels(study.search), *(STOCK_SETTINGS if is_stock else ())]


def as_channels(search: SearchSection) -> str:
    """The range of a study's ratios for a loop whose ratio is one of channels, about as far in latency.

    Of YOLOv8n's latency 80% of the channels take about 70%, 90% about 80%.

    Raises:
        SystemExit: the study searches no range.
    """
    if not isinstance(search.ratio, Range):
        raise SystemExit(f"search.ratio must be a range to compare plain loops, got {search.ratio}")
    share = 2 / 3 if search.ratio_of == "latency" else 1.0
    high = 1 - share * (1 - search.ratio.high)
    return f"search.ratio={{low: {search.ratio.low}, high: {high:.2f}}}"


def prepare(study: StudyFile, device: str, folder: Path) -> dict[str, float]:
    """Fill the caches in a folder; seconds that each part took."""
    shop = Shop(study, Workspace(folder), notice=note)
    target = study.device(device).device()
    parts: dict[str, Callable[[], object]] = {
        "profile": lambda: shop.profile(target),
        "scores": lambda: [shop.scores(name) for name in shop.criteria],
    }
    if shop.curve_criteria:
        parts["curves"] = lambda: [shop.curves(name, shop.profile(target)) for name in shop.curve_criteria]
    taken = {}
    _ = shop.groups, target.fingerprint  # opening the model is nobody's work
    for part, make in parts.items():
        start = time.monotonic()
        make()
        taken[part] = time.monotonic() - start
    return taken


def searched(study: StudyFile, device: str, seconds: float, spent: float) -> list[tuple[float, TrialResult]]:
    """Our loop: seconds since the search began, and what was known then."""
    shop = Shop(study, Workspace(study.folder), notice=lambda text: None)
    watcher = Clocked(seconds, spent)
    run_search(study, shop, [device], trials=MANY, timeout_s=None, progress=watcher, recorder=watcher)
    return watcher.found


def plain(study: StudyFile, device: str, seconds: float, way: str) -> list[tuple[float, TrialResult]]:
    """The loop of today, with nothing kept from one trial to the next but Optuna's study."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"plain-tpe": optuna.samplers.TPESampler, "plain-nsga2": optuna.samplers.NSGAIISampler}
    trials = optuna.create_study(directions=["maximize", "minimize"], sampler=samplers[way](seed=study.seed))
    shop = Shop(study, Workspace(study.folder), notice=lambda text: None)
    target = study.device(device).device()
    bench = shop.bench(target)  # what it does once here every trial does again
    watcher = Clocked(seconds)
    zero = run_trial(0, TrialParams(), bench, shop.workspace.trial(device, 0), watcher)
    with contextlib.suppress(KeyboardInterrupt):
        watcher.trial_ends(zero, None)
    while not watcher.is_over:
        trial = trials.ask(searched_space(study.search))
        number = trial.number + 1
        bench = replace(
            bench,
            scores={name: shop.scores(name, refresh=True) for name in shop.criteria},
            profile=shop.profile(target, refresh=True),
            baseline_ms=zero.latency_ms,
            baseline_p90_ms=zero.latency_p90_ms,
        )
        params = params_at(study.search, trial.params, bench.profile.channel_multiple)
        try:
            result = run_trial(number, params, bench, shop.workspace.trial(device, number), watcher)
        except Exception as error:
            trials.tell(trial, state=optuna.trial.TrialState.FAIL)
            watcher.notice(f"trial {number} failed: {error}")
            continue
        trials.tell(trial, [result.accuracy, result.latency_ms])
        with contextlib.suppress(KeyboardInterrupt):
            watcher.trial_ends(result, None)
    return watcher.found


def hypervolume_at(found: Sequence[tuple[float, TrialResult]], moment_s: float) -> float:
    """Of what was complete by then."""
    known = [result for at, result in found if at <= moment_s]
    return ParetoFront.of(known).hypervolume if known else 0.0


def time_to_reach(found: Sequence[tuple[float, TrialResult]], hypervolume: float) -> float | None:
    """Seconds until the front covered that much; None where it never did."""
    for at in sorted(at for at, _ in found):
        if hypervolume_at(found, at) >= hypervolume:
            return at
    return None


def overhead(results: Iterable[TrialResult]) -> dict[str, float]:
    """Share of all trials' time by step, work included."""
    totals: dict[str, float] = {}
    for result in results:
        for step, seconds in result.duration_s.items():
            totals[step] = totals.get(step, 0.0) + seconds
    whole = sum(totals.values()) or 1.0
    return {step: seconds / whole for step, seconds in totals.items()}


def cost_of(part: str, taken: dict[str, dict[str, float]]) -> float:
    """Seconds that a part of the caches took whoever came first; the others found it done."""
    return max(parts.get(part, 0.0) for parts in taken.values())


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 1 with `--check` where a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, default=ROOT / "examples" / "bccd.yaml")
    parser.add_argument("--device", help="default: the study's last one")
    parser.add_argument("--minutes", type=float, default=40.0, help="for each way and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(WAYS), help="ways, separated by commas")
    parser.add_argument("--plain-training", choices=("stock", "ours"), default="stock")
    parser.add_argument("--set", action="append", default=[], help="as in paretoprune search")
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark-search"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--read", help="files that --json gave, separated by commas; nothing is run")
    options = parser.parse_args(arguments)
    if options.read:
        curves, seconds, commits = read_runs([Path(name) for name in options.read.split(",")])
        return report(curves, seconds, commits, options)
    ways, seconds = options.only.split(","), options.minutes * 60
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--only must be some of {', '.join(WAYS)}, got {unknown[0]}")
    curves = {way: [] for way in ways}
    asked = load_study_file(options.study, options.set)
    begun = options.dir / datetime.now().strftime("%Y%m%d-%H%M%S")
    taken: dict[str, dict[str, float]] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for way in ways:
            note(f"{way}, seed {seed}")
            chosen = [f"seed={seed}", *options.set, *settings(way, asked, options.plain_training)]
            folder = begun / f"{way}-{seed}"
            study = load_study_file(options.study, chosen, folder)
            device = options.device or study.devices[-1].name
            if seed == options.first_seed:  # the caches know no seed, so one filling serves them all
                taken[way] = prepare(study, device, begun / "prepared")
            shutil.copytree(Workspace(begun / "prepared").cache, Workspace(folder).cache)
            if way in PLAIN:
                run = plain(study, device, seconds, way)
            else:
                run = searched(study, device, seconds, sum(cost_of(part, taken) for part in taken[way]))
            curves[way].append(run)
    return report(curves, seconds, [checked_out()], options)


def checked_out() -> str:
    """The commit that this script is of, as git names it."""
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        if named := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
            return named
    return "unknown"


def report(curves: Runs, seconds: float, commits: Sequence[str], options: argparse.Namespace) -> int:
    """Print what was found; 1 with `--check` where a target is missed."""
    document = {**summary(curves, seconds), "commits": list(commits)}
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        show(document)
    return 1 if options.check and not document["targets_met"] else 0


def read_runs(files: Sequence[Path]) -> tuple[Runs, float, list[str]]:
    """The runs in files that `--json` gave, how long each took, and the commits they were made with.

    Raises:
        SystemExit: they took different times, or there are not as many of each way, which do not compare.
    """
    documents = [json.loads(file.read_text()) for file in files]
    times = {document["seconds"] for document in documents}
    if len(times) > 1:
        raise SystemExit(f"--read needs runs of one length, got {sorted(times)} s")
    curves: Runs = {}
    for document in documents:
        for way, runs in document["runs"].items():
            curves.setdefault(way, []).extend(
                [(at, TrialResult.from_json(result)) for at, result in run] for run in runs
            )
    found = {way: curves[way] for way in WAYS if way in curves}
    if len({len(runs) for runs in found.values()}) > 1:
        counts = ", ".join(f"{way} {len(runs)}" for way, runs in found.items())
        raise SystemExit(f"--read needs as many runs of one way as of another, got {counts}")
    commits = {commit for document in documents for commit in document.get("commits", ["unknown"])}
    return found, times.pop(), sorted(commits)


def summary(curves: Runs, seconds: float) -> dict[str, Any]:
    """Means over seeds."""
    moments = np.linspace(0, seconds, 11)[1:]
    rows = {
        way: {
            "hypervolume": [float(np.mean([hypervolume_at(run, t) for run in runs])) for t in moments],
            "final": [hypervolume_at(run, seconds) for run in runs],
            "trials": [max(0, len(run) - 1) for run in runs],
            "complete": [sum(r.state == "complete" and r.trial > 0 for _, r in run) for run in runs],
        }
        for way, runs in curves.items()
    }
    document: dict[str, Any] = {
        "seconds": seconds,
        "moments_s": moments.tolist(),
        "ways": rows,
        "runs": {
            way: [[(at, result.to_json()) for at, result in run] for run in runs]
            for way, runs in curves.items()
        },
    }
    met = []
    if "ours" in curves:
        shares = overhead(r for run in curves["ours"] for _, r in run)
        document["shares"] = shares
        document["overhead"] = sum(share for step, share in shares.items() if step not in WORK)
        met.append(document["overhead"] < OVERHEAD)
        others = {way: float(np.mean(row["final"])) for way, row in rows.items() if way != "ours"}
        if others:
            mine, best = float(np.mean(rows["ours"]["final"])), max(others.values())
            # Where the time was too short for anybody nothing is shown.
            document["gain"] = mine / best if best else float("inf") if mine else 0.0
            met.append(document["gain"] >= GAIN)
        for way in PLAIN:
            if way in curves:
                times = [
                    time_to_reach(ours, hypervolume_at(theirs, seconds))
                    for ours, theirs in zip(curves["ours"], curves[way], strict=True)
                ]
                document.setdefault("reached_s", {})[way] = times
                met.append(all(t is not None and t <= seconds / SPEED for t in times))
    document["targets_met"] = all(met)
    return document


def show(document: dict[str, Any]) -> None:
    """The tables."""
    minutes = [f"{t / 60:.1f}" for t in document["moments_s"]]
    print(
        f"Hypervolume, mean over seeds, after minutes\n\n| way | {' | '.join(minutes)} | trials | complete |"
    )
    print("| --- " + "| ---: " * (len(minutes) + 2) + "|")
    for way, row in document["ways"].items():
        values = " | ".join(f"{value:.4f}" for value in row["hypervolume"])
        print(f"| {way} | {values} | {np.mean(row['trials']):.1f} | {np.mean(row['complete']):.1f} |")
    if "shares" in document:
        print("\n| step | share of our trials |\n| --- | ---: |")
        for step, share in document["shares"].items():
            print(f"| {step} | {share:.2%} |")
        shown = f"{document['overhead']:.2%} (target below {OVERHEAD:.0%})"
        print(f"\nNeither training, evaluation nor measurement: {shown}")
    if "gain" in document:
        print(f"Final hypervolume over the best other one's: {document['gain']:.3f} (target {GAIN})")
    for way, times in document.get("reached_s", {}).items():
        shown = ", ".join("never" if t is None else f"{t / document['seconds']:.2f}" for t in times)
        print(f"Share of the time until ours reached the end of {way}: {shown} (target 0.33)")
    print(f"Made with {', '.join(document['commits'])}")


if __name__ == "__main__":
    sys.exit(main())

"""How the search spends its time, with trials that are played instead of run: many seeds in minutes.

Run: `uv run python benchmarks/search_stand_in.py [--check]`; a short look: `--seeds 1 --minutes 15`.

What `benchmarks/search.py` does in hours with real trials: our search with each of its samplers (`gp` is the
default), `random` and `grid` with nothing stopped or screened, and the plain Optuna loops that score and
profile anew in every trial. Scores, groups, latency model, plans, sampler, storage and every rule that stops
a trial are the real ones, of YOLOv8n on BCCD; only training and measuring are played, on a clock that is
played too:

- a plan's accuracy falls with the share of scores that it loses, fitted to three real trials (beta 0; 25, 40
  and 55% of the channels), with the spread between seeds that real trials showed (0.01);
- its latency is the predicted one, off by 2%;
- steps take what they took in these trials on two cores (`SECONDS`).

So this says how well trials are chosen and stopped, not what accuracy they reach: what loss curves and a
better recovery bring, for which `benchmarks/search.py` takes hours, all ways have here alike.

Targets (`--check`): no other sampler of ours ends above `gp` by more than 1%; `gp` reaches the plain loops'
final hypervolume in at most a third of the time.

Data: `yolov8n-bccd.pt` and `bccd` in the folder PARETOPRUNE_DATA (by default ../shared/data); the profile and
the scores are taken once, in two minutes.

Duration: about 15 minutes with five seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Not this folder, whose `search.py` would hide the package of that name.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

import search.loop  # noqa: E402  # The repository is not installed as a package.
from search.bench import Shop  # noqa: E402
from search.front import ParetoFront  # noqa: E402
from search.loop import run_search  # noqa: E402
from search.params import params_at  # noqa: E402
from search.planning import make_plan, rerank  # noqa: E402
from search.prediction import predict_ms  # noqa: E402
from search.proxy import promise, score_kept  # noqa: E402
from search.rerank import group_scores  # noqa: E402
from search.result import TrialParams, TrialResult  # noqa: E402
from search.space import searched_space  # noqa: E402
from search.stopping import Gate, OpenGate  # noqa: E402
from search.studyfile import StudyFile, load_study_file  # noqa: E402
from search.trial import Bench  # noqa: E402
from search.workspace import Workspace  # noqa: E402

OURS, UNSTOPPED, PLAIN = ("gp", "tpe", "nsga2"), ("random", "grid"), ("plain-tpe", "plain-nsga2")
WAYS = (*OURS, *UNSTOPPED, *PLAIN)
#: What the steps took in real trials; `profile` and `scores` are once for ours, in every trial for the plain
#: loops, which time the layers only.
SECONDS = {
    "profile": 85.0, "layers": 15.0, "scores": 12.0, "plan": 0.1, "export": 1.9, "measure": 22.0,
    "evaluate": 8.0, "epoch": 32.0,
}  # fmt: skip
UNPRUNED, LOST, STEEP = 0.585, 0.217, 3.0
SPREAD, LATENCY_OFF = 0.01, 0.02
SPEED, LEEWAY = 3.0, 0.01
MANY = 100_000
STUDY = """name: played
model: {data}/yolov8n-bccd.pt
data: {data}/bccd/data.yaml
imgsz: 320
devices:
  - {{name: cpu, runtime: onnxruntime, threads: 1}}
search:
  beta: {{low: 0.0, high: 1.0}}
  ratio: {{low: 0.1, high: 0.7}}
finetune: {{epochs: 2}}
"""


@dataclass
class Played:
    """A clock, and trials that only move it on. Is the search's progress and recorder, too.

    Attributes:
        limit_s: when the search is over.
        now_s: what has passed.
        found: when each trial ended, and how.
    """

    limit_s: float
    seed: int
    now_s: float = 0.0
    found: list[tuple[float, TrialResult]] = field(default_factory=list)

    def run(
        self,
        number: int,
        params: TrialParams,
        bench: Bench,
        folder: Path,
        listener: Any,
        gate: Gate | None = None,
    ) -> TrialResult:
        """In the place of `search.trial.run_trial`."""
        gate = gate or OpenGate()
        plan = make_plan(params, rerank(params, bench), bench)
        proxy = promise(plan, bench)
        known: dict[str, Any] = {
            "predicted_latency_ms": predict_ms(plan, bench.profile),
            "plan_digest": plan.digest,
            "details": {"proxy": None if proxy is None else proxy.to_json()},
        }

        def ended(reason: str | None, **more: Any) -> TrialResult:
            state = "complete" if reason is None else "stopped"
            return TrialResult(
                number, bench.device.name, bench.fingerprint, params, state, reason, **{**known, **more}
            )

        self.now_s += SECONDS["plan"]
        reason = gate.planned(plan, proxy)
        if reason is not None:
            return ended(reason)
        # Two trials of one plan differ like two seeds do, but a trial that is played again does not.
        rng = np.random.default_rng([self.seed, number, int(plan.digest[:8], 16)])
        base_ms = bench.profile.predict_ms({})
        ratio = 1.0 if plan.is_empty else predict_ms(plan, bench.profile) / base_ms
        ratio *= 1.0 if plan.is_empty else float(np.exp(rng.normal(0, LATENCY_OFF)))
        known |= {
            "latency_ms": ratio * base_ms, "latency_p90_ms": ratio * base_ms, "speedup": 1 / ratio,
            "speedup_ci": (0.99 / ratio, 1.01 / ratio),
        }  # fmt: skip
        self.now_s += SECONDS["export"] + SECONDS["measure"]
        reason = gate.measured(ratio, (0.99 * ratio, 1.01 * ratio), 1.0)
        if reason is not None:
            return ended(reason)
        epochs = 0 if plan.is_empty else bench.recovery.epochs
        accuracies = self._accuracies(plan, bench, epochs, rng)
        for epoch in range(epochs + 1):
            self.now_s += SECONDS["epoch" if epoch else "evaluate"]
            reason = gate.epoch(epoch, epochs, accuracies[epoch]) if epochs else None
            if reason is not None:
                seen = accuracies[: epoch + 1]
                return ended(reason, accuracy=max(seen), epochs=seen)
        self.now_s += SECONDS["export"]
        return ended(None, accuracy=max(accuracies), epochs=accuracies)

    @staticmethod
    def _accuracies(plan: Any, bench: Bench, epochs: int, rng: np.random.Generator) -> tuple[float, ...]:
        """Before training and after each epoch; the gap to the last one is wide for deep cuts and closes."""
        scores = group_scores(next(iter(bench.scores.values())).layers, bench.groups)
        lost = 1 - (score_kept(plan, scores, bench.groups) or 0.0)
        last = UNPRUNED * max(0.02, 1 - (lost / LOST) ** STEEP)
        if not plan.is_empty:
            last += float(rng.normal(0, SPREAD))
        gap = 0.04 + 2.8 * max(0.0, UNPRUNED - last)
        return tuple(max(0.0, last - gap * (0.38**n if n < epochs else 0.0)) for n in range(epochs + 1))

    def add(self, result: TrialResult) -> None:
        if self.now_s <= self.limit_s:
            self.found.append((self.now_s, result))

    # -- heard from the search

    def notice(self, text: str) -> None: ...

    def trial_begins(self, device: str, number: int, done: int, wanted: int, params: Any) -> None: ...

    def trial_ends(self, result: TrialResult, front: Any) -> None:
        self.add(result)
        if self.now_s > self.limit_s:
            signal.raise_signal(signal.SIGINT)  # as one Ctrl-C: the search ends here, in order

    def step(self, name: str) -> None: ...

    def epoch(self, done: int, epochs: int, accuracy: float) -> None: ...

    def begin(self, bench: Any, earlier: Any) -> None: ...

    def record(self, result: TrialResult, folder: Path, front: Any) -> None: ...


@dataclass(frozen=True)
class Prepared(Shop):
    """A shop that has one bench, made before."""

    made: Bench | None = None

    def bench(self, device: Any) -> Bench:
        assert self.made is not None
        return replace(self.made, device=device, recovery=self.recovery)


def settings(way: str) -> list[str]:
    if way in UNSTOPPED:
        return [f"search.sampler={way}", "stopping.enabled=false", "screening.keep=0"]
    return [f"search.sampler={way}"] if way in OURS else []


def searched(shop: Shop, seconds: float) -> list[tuple[float, TrialResult]]:
    """Our search, with what it prepares once."""
    played = Played(seconds, shop.study.seed, SECONDS["profile"] + SECONDS["scores"])
    real, search.loop.run_trial = search.loop.run_trial, played.run
    try:
        device = shop.study.devices[0].name
        run_search(shop.study, shop, [device], trials=MANY, timeout_s=None, progress=played, recorder=played)
    finally:
        search.loop.run_trial = real
    return played.found


def plain(shop: Shop, seconds: float, way: str) -> list[tuple[float, TrialResult]]:
    """The loop of today: every trial scores and profiles, none is stopped."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {"plain-tpe": optuna.samplers.TPESampler, "plain-nsga2": optuna.samplers.NSGAIISampler}
    study = shop.study
    trials = optuna.create_study(directions=["maximize", "minimize"], sampler=samplers[way](seed=study.seed))
    bench = shop.bench(study.devices[0].device())
    played = Played(seconds, study.seed)
    played.add(played.run(0, TrialParams(), bench, Path(), None))
    while played.now_s <= seconds:
        trial = trials.ask(searched_space(study.search))
        played.now_s += SECONDS["layers"] + SECONDS["scores"]
        params = params_at(study.search, trial.params, bench.profile.channel_multiple)
        result = played.run(trial.number + 1, params, bench, Path(), None)
        trials.tell(trial, [result.accuracy, result.latency_ms])
        played.add(result)
    return played.found


def hypervolume_at(found: Sequence[tuple[float, TrialResult]], moment_s: float) -> float:
    """Of what was complete by then."""
    known = [result for at, result in found if at <= moment_s]
    return ParetoFront.of(known).hypervolume if known else 0.0


def share_of_time(
    ours: Sequence[tuple[float, TrialResult]], theirs: Sequence[tuple[float, TrialResult]], seconds: float
) -> float | None:
    """Of the whole time, until ours covered what they cover at its end; None where it never did."""
    wanted = hypervolume_at(theirs, seconds)
    reached = (at for at, _ in ours if hypervolume_at(ours, at) >= wanted)
    at = next(reached, None)
    return None if at is None else at / seconds


def summary(runs: dict[str, list[list[tuple[float, TrialResult]]]], seconds: float) -> dict[str, Any]:
    moments = np.linspace(0, seconds, 9)[1:]
    ways = {
        way: {
            "hypervolume": [float(np.mean([hypervolume_at(run, t) for run in found])) for t in moments],
            "final": [hypervolume_at(run, seconds) for run in found],
            "trials": float(np.mean([len(run) - 1 for run in found])),
            "complete": float(np.mean([sum(r.state == "complete" for _, r in run) - 1 for run in found])),
        }
        for way, found in runs.items()
    }
    missed = []
    reached: dict[str, list[float | None]] = {}
    if "gp" in runs:
        final = {way: row["hypervolume"][-1] for way, row in ways.items()}
        for way in OURS[1:]:
            if way in final and final[way] > final["gp"] * (1 + LEEWAY):
                missed.append(f"{way} ends at {final[way]:.4f}, gp at {final['gp']:.4f}")
        for way in PLAIN:
            if way in runs:
                pairs = zip(runs["gp"], runs[way], strict=True)
                reached[way] = [share_of_time(ours, theirs, seconds) for ours, theirs in pairs]
                if any(share is None or share > 1 / SPEED for share in reached[way]):
                    missed.append(f"gp reaches the end of {way} too late: {shown(reached[way])}")
    return {"moments_s": moments.tolist(), "ways": ways, "reached": reached, "missed": missed}


def shown(shares: Sequence[float | None]) -> str:
    return ", ".join("never" if share is None else f"{share:.2f}" for share in shares)


def table_text(document: dict[str, Any]) -> str:
    minutes = " | ".join(f"{t / 60:.0f}" for t in document["moments_s"])
    lines = [
        "Hypervolume, mean over seeds, after played minutes\n",
        f"| way | {minutes} | spread | trials | complete |",
        "| --- " + "| ---: " * (len(document["moments_s"]) + 3) + "|",
    ]
    for way, row in document["ways"].items():
        values = " | ".join(f"{value:.4f}" for value in row["hypervolume"])
        spread = (max(row["final"]) - min(row["final"])) / 2
        lines.append(f"| {way} | {values} | ± {spread:.4f} | {row['trials']:.1f} | {row['complete']:.1f} |")
    for way, shares in document["reached"].items():
        lines.append(f"\nShare of the time until gp reached the end of {way}: {shown(shares)} (target 0.33)")
    return "\n".join(lines)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def study_of(way: str, seed: int, folder: Path, options: Sequence[str]) -> StudyFile:
    return load_study_file(
        folder / "study.yaml", [f"seed={seed}", *options, *settings(way)], folder / f"{way}-{seed}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=40.0, help="played, for each way and seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default=",".join(WAYS), help="ways, separated by commas")
    parser.add_argument("--set", action="append", default=[], help="as in paretoprune search")
    parser.add_argument("--dir", type=Path, help="keeps profile and scores for the next time")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    args = parser.parse_args()
    data = Path(os.environ.get("PARETOPRUNE_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (data / "yolov8n-bccd.pt").is_file():
        parser.error(f"no yolov8n-bccd.pt in {data}; set PARETOPRUNE_DATA")
    ways = args.only.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--only must be some of {', '.join(WAYS)}, got {unknown[0]}")
    runs: dict[str, list[list[tuple[float, TrialResult]]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "study.yaml").write_text(STUDY.format(data=data), encoding="utf-8")
        first = study_of(ways[0], 0, folder, args.set)
        prepared = Shop(first, Workspace(args.dir or folder / "prepared"), notice=note)
        bench = prepared.bench(first.devices[0].device())
        for seed in range(args.seeds):
            for way in ways:
                study = study_of(way, seed, folder, args.set)
                shop = Prepared(study, Workspace(study.folder), made=bench)
                seconds = args.minutes * 60
                found = plain(shop, seconds, way) if way in PLAIN else searched(shop, seconds)
                runs[way].append(found)
                note(
                    f"{way}, seed {seed}: {hypervolume_at(found, seconds):.4f} after {len(found) - 1} trials"
                )
    document = summary(runs, args.minutes * 60)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        print(table_text(document))
        print("\n" + ("\n".join(f"missed: {text}" for text in document["missed"]) or "all targets met"))
    return 1 if args.check and document["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())

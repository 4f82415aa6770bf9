"""The machine's lock: while one process measures, no other process of ours works on it.

Any number may work (train, evaluate) at a time; a measurement is alone. Held by the operating system, so a
process that dies gives it up. One lock for programs that run on the machine and for runners that others
started on it over ssh, as long as they belong to one user and agree about the temporary folder.
"""

from __future__ import annotations

import getpass
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl

    CAN_FLOCK = True
except ImportError:  # Windows, on which no runner is started over ssh.
    CAN_FLOCK = False

#: How often the lock is tried by one that announces its waiting.
TRY_S = 0.05


def lock_folder() -> Path:
    """Where this user's lock files are; made where it is not there."""
    # Users share the machine but not their files; two of them measuring at once is theirs to settle.
    folder = Path(tempfile.gettempdir()) / f"paretoprune-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class MachineLock:
    """The lock of this machine, taken and given back by hand. Not reentrant, not for several threads."""

    def __init__(self) -> None:
        self._held: IO[str] | None = None

    @property
    def is_taken(self) -> bool:
        return self._held is not None

    def take(self, alone: bool, waiting: Callable[[], None] | None = None, announce_s: float = 10.0) -> None:
        """Wait until it is free.

        Args:
            alone: not together with others that do not ask to be alone.
            waiting: called every `announce_s` of a wait, for a caller who would else take this process for
                dead.

        Raises:
            OSError: the lock's files cannot be written.
        """
        folder = lock_folder()
        file = (folder / "machine.lock").open("w")
        try:
            # Whoever wants in passes the gate first, so that a waiting measurement is not overtaken by new
            # work for ever.
            with (folder / "gate.lock").open("w") as gate:
                _flock(gate, True, waiting, announce_s)
                _flock(file, alone, waiting, announce_s)
                _unlock(gate)
        except BaseException:
            file.close()
            raise
        self._held = file

    def free(self) -> None:
        """Give it back, if it is taken."""
        if self._held is not None:
            _unlock(self._held)
            self._held.close()
            self._held = None


def _flock(file: IO[str], alone: bool, waiting: Callable[[], None] | None, announce_s: float) -> None:
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    if waiting is None:
        fcntl.flock(file, how)
        return
    announced = time.monotonic()
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(TRY_S)
        if time.monotonic() - announced > announce_s:
            announced = time.monotonic()
            waiting()


def _unlock(file: IO[str]) -> None:
    # Not by closing alone: a forked process, such as one that loads images, has a copy of the file.
    fcntl.flock(file, fcntl.LOCK_UN)

"""Taking turns at a study: while one worker takes or finishes a trial, no other one does.

The lock lives where the trials do, so that it holds for every worker that can see them: an advisory lock in
PostgreSQL, a file beside an SQLite database. A worker that dies gives it up. Knows nothing of what is done in
a turn.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

#: A turn takes milliseconds; a worker that holds one for this long has lost its connection.
HELD_AT_MOST_S = 60
WAIT_AT_MOST_S = 300


@dataclass(frozen=True)
class Waiting:
    """Nothing to begin at present; others still work on what is wanted."""

    reason: str


@dataclass(frozen=True)
class Finished:
    """Nothing is left to begin; `reason` where that is not because all wanted trials are there."""

    reason: str | None = None


#: Called for each turn: `with turn(): ...`.
Turn = Callable[[], AbstractContextManager[None]]


def turns(url: str, name: str, folder: Path) -> Turn:
    """Turns at what is called `name` in the database at `url`.

    Args:
        folder: where the lock file of a database without locks of its own lies: SQLite's output folder. Of
            other databases than PostgreSQL it orders the workers of this folder only.
    """
    if url.startswith("postgresql"):
        return _postgresql(url, name)
    lock = FileLock(folder / f".{name}.turn", timeout=WAIT_AT_MOST_S)

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        folder.mkdir(parents=True, exist_ok=True)
        with lock:
            yield

    return turn


def _postgresql(url: str, name: str) -> Turn:
    from sqlalchemy import NullPool, create_engine, text

    # A connection for each turn: one kept open would be a second one per worker that is idle nearly always.
    engine = create_engine(url, poolclass=NullPool)
    key = int.from_bytes(hashlib.sha256(f"paretoprune/{name}".encode()).digest()[:8], "big", signed=True)

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        with engine.begin() as connection:
            # The server ends the turn of a worker whose machine vanished, which TCP would notice in hours.
            connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{HELD_AT_MOST_S}s'"))
            connection.execute(text(f"SET LOCAL lock_timeout = '{WAIT_AT_MOST_S}s'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield

    return turn

"""Where a study keeps its files. Knows the layout of the output folder and nothing of what is in the files.

runs/<name>/
    cache/                     scores and profiles, computed once; locks/ of what is being made
    devices/<device>/baseline/ the unpruned model's artifact, the one every candidate is measured against
    devices/<device>/trial-0007/  plan.json, result.json, model.safetensors, the exported model
    optuna.db  mlflow.db  artifacts/   the default stores
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .result import TrialResult


@dataclass(frozen=True)
class Workspace:
    """The output folder of one study."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def default_storage(self) -> str:
        return f"sqlite:///{self.folder / 'optuna.db'}"

    def storage_url(self, asked: str | None) -> str:
        """Where the trials are: the address asked for, or SQLite in this folder."""
        url = asked or self.default_storage
        # The driver that is installed; without a name SQLAlchemy takes another one.
        return url.replace("postgresql://", "postgresql+psycopg://", 1)

    @property
    def default_tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    @contextlib.contextmanager
    def alone(self, what: str, on_wait: Callable[[], object]) -> Iterator[None]:
        """Hold the lock of one thing that is made once in this folder: several processes may work in it.

        Not reentrant. To be taken before the host's lock (`profiles.lock`), never under it: two processes
        would wait for each other.

        Args:
            what: names the thing, letters, digits, '.', '_' and '-'.
            on_wait: called where another process holds it, before waiting.
        """
        locks = self.cache / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{what}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def device(self, device: str) -> Path:
        return self.folder / "devices" / device

    def trial(self, device: str, number: int) -> Path:
        return self.device(device) / f"trial-{number:04d}"

    def results(self, device: str) -> Iterator[tuple[TrialResult, Path]]:
        """What trials of one device left here, by number; an unreadable file is no result."""
        for path in sorted(self.device(device).glob("trial-*/result.json")):
            result = read_result(path)
            if result is not None:
                yield result, path.parent


def write_json(path: Path, data: Any) -> Path:
    """Write a JSON file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def read_result(path: Path) -> TrialResult | None:
    """The result in a file; None where there is none or it cannot be read."""
    try:
        return TrialResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None

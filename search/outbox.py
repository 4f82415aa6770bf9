"""The outbox: records on their way to a store, as JSON files on disk until the store has them.

Every record is written here before it is sent and removed once it is there, so neither a server that is away
nor a process killed in mid-sentence loses one. Knows whether the other side answers; not what a record means.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from filelock import FileLock, Timeout

from .uri import publishable, redact

Notice = Callable[[str], None]

FORMAT_VERSION = 1
# Children need their parent and a front its children: the order in which records are sent.
KINDS = ("device", "trial", "front", "end")
RETRY_AFTER_S = 15.0
LOCK_TIMEOUT_S = 120.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


class AwayError(Exception):
    """The store does not answer at present."""


@dataclass(frozen=True)
class Letter:
    """One waiting record; `text` is the file's content when it was read."""

    path: Path
    text: str
    kind: str
    body: Mapping[str, Any]


class Outbox:
    """A folder of waiting records, shared by the processes of one machine.

    Args:
        folder: made when it is first needed.
        address: the store's, for `probe` and, without its password, for what is said.
        notice: told in one line, without secrets, when the store goes away, comes back or refuses a record.
            Default: a log warning.
    """

    def __init__(self, folder: Path, address: str, notice: Notice | None = None) -> None:
        self.folder = folder
        self._address = address
        self._notice = notice or logging.getLogger(__name__).warning
        self._threads = RLock()
        self._retry_at = 0.0
        self._is_away = False
        self._told: set[str] = set()

    def put(self, kind: str, key: str, body: Mapping[str, Any]) -> Path | None:
        """Write a record; a later one of the same kind and key replaces it.

        Returns:
            Its file, or None where the disk takes no more: then only the notice knows of it.
        """
        path = self.folder / f"{KINDS.index(kind)}-{kind}-{file_name(key)}.json"
        text = json.dumps({"format_version": FORMAT_VERSION, "kind": kind, "body": body}, indent=1) + "\n"
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)  # a reader sees the whole record or none
        except OSError as error:
            self.say(
                f"the outbox cannot be written ({first_line(error)}): the {kind} record {key} is not sent"
            )
            return None
        return path

    def pending(self) -> list[Letter]:
        """The waiting records in the order to send them; a file that is no record of ours is left alone."""
        letters = []
        for path in sorted(self.folder.glob("[0-9]-*.json")):
            try:
                text = path.read_text(encoding="utf-8")
                data = json.loads(text)
                if data["format_version"] == FORMAT_VERSION and data["kind"] in KINDS:
                    letters.append(Letter(path, text, data["kind"], data["body"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return letters

    def deliver(self, send: Callable[[Letter], str], *, force: bool = False) -> dict[str, str]:
        """Send what waits, in order; nothing is raised, what was not sent stays.

        Args:
            send: raises `AwayError` (see also `is_away`) where nobody answers, which ends the round; after
                any other error the next record has its turn.
            force: try also shortly after a failure, when other calls would not.

        Returns:
            File name to what `send` returned, for the records that went.
        """
        sent: dict[str, str] = {}
        if not force and time.monotonic() < self._retry_at:
            return sent
        try:
            with self._threads, self.lock():
                for letter in self.pending():
                    try:
                        sent[letter.path.name] = send(letter)
                    except Exception as error:
                        if is_away(error):
                            self.say_away(error)
                            return sent
                        self.say(
                            f"MLflow refused {letter.path.name}, it stays in the outbox: {first_line(error)}"
                        )
                    else:
                        self._done(letter)
        except (Timeout, OSError) as error:
            self.say(f"the outbox is busy or unreadable, records wait there: {first_line(error)}")
            return sent
        self._retry_at = 0.0
        if self._is_away and sent:
            self._is_away = False
            self.say(f"MLflow at {redact(self._address)} answers again, {len(sent)} waiting records sent")
        return sent

    def say(self, text: str) -> None:
        """Give notice, once for each text, without secrets."""
        text = publishable(text, self._address)
        if text not in self._told:
            self._told.add(text)
            self._notice(text)

    def say_away(self, error: BaseException) -> None:
        """Give notice, once until it answers again, that the store is away, and leave it be for a while."""
        self._retry_at = time.monotonic() + RETRY_AFTER_S
        if not self._is_away:
            self._is_away = True
            self._told.clear()
            self.say(
                f"MLflow at {redact(self._address)} does not answer ({first_line(error)}); records wait in "
                "the outbox and are sent when it is back"
            )

    def lock(self) -> FileLock:
        """Held while sending, so that two processes never send one record twice; raises filelock.Timeout."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock", timeout=LOCK_TIMEOUT_S, is_singleton=True)

    def _done(self, letter: Letter) -> None:
        # A newer record may have taken its place while this one was sent.
        if letter.path.exists() and letter.path.read_text(encoding="utf-8") == letter.text:
            letter.path.unlink(missing_ok=True)


def probe(address: str) -> None:
    """Raise `AwayError` where nobody listens: a moment here instead of a client's minutes of retries."""
    parts = urlsplit(address)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in _PORTS or not parts.hostname:
        return
    if scheme in getproxies() and not proxy_bypass(parts.hostname):
        return  # the proxy can reach what we cannot
    try:
        socket.create_connection((parts.hostname, parts.port or _PORTS[scheme]), timeout=3).close()
    except OSError as error:
        raise AwayError(f"{parts.hostname}: {error.strerror or error}") from None


def is_away(error: BaseException) -> bool:
    """A store that is not there at present, as against one that refuses what we send."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"AwayError", "ConnectionError", "Timeout", "TimeoutError", "OperationalError"}:
        return True
    # MLflow raises one type for everything; its code and its words tell the cases apart.
    code, text = getattr(error, "error_code", None), str(error)
    return code in ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED") or any(
        sign in text
        for sign in ("failed with exception", "failed with timeout exception", "failed with error code 5")
    )


def first_line(error: BaseException) -> str:
    """What an error says, for a notice of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def file_name(key: str) -> str:
    """A name for files about `key`, which may hold any characters."""
    plain = re.sub(r"[^\w.-]", "_", key)
    # Two keys that differ only in such characters must not share a file.
    return plain if plain == key else f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

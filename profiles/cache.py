"""Results kept on disk as JSON, each under the exact key it was computed for.

A file that is truncated, of another version or of another key is refused with a logged reason, and the
caller computes again; it is never repaired or half used. Knows nothing of what it keeps.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

FORMAT_VERSION = 1
T = TypeVar("T")
_log = logging.getLogger("paretoprune.cache")


class Cache:
    """A folder of JSON files, `<kind>/<sha256 of the key>.json`; writes are atomic."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        """Where a result lies or would lie."""
        return self.folder / kind / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()[:24]}.json"

    def get(self, kind: str, key: Mapping[str, Any], load: Callable[[Mapping[str, Any]], T]) -> T | None:
        """The result kept under a key, or None where there is none that can be used.

        Args:
            kind: what it is, one word.
            key: everything it depends on, plain JSON values.
            load: makes the result from its JSON; what it refuses (ValueError, KeyError, TypeError) is
                refused here.
        """
        path = self.path(kind, key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            _refuse(path, f"it cannot be read ({error})")
            return None
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            _refuse(path, f"it is truncated or no JSON ({error})")
            return None
        if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
            found = data.get("format_version") if isinstance(data, dict) else None
            _refuse(path, f"its format_version is {found!r}, wanted {FORMAT_VERSION}")
            return None
        if data.get("kind") != kind or _canonical(data.get("key")) != _canonical(key):
            _refuse(path, f"it is of another key: {_difference(data.get('key'), key)}")
            return None
        payload: Any = data.get("payload")
        if data.get("digest") != _digest(payload):
            _refuse(path, "its content does not match its digest; it was edited or damaged")
            return None
        try:
            return load(payload)
        except (ValueError, KeyError, TypeError) as error:
            _refuse(path, f"its content is not valid ({type(error).__name__}: {error})")
            return None

    def put(self, kind: str, key: Mapping[str, Any], payload: Mapping[str, Any]) -> Path:
        """Keep a result; an older one under the same key is replaced. Returns the file.

        Raises:
            OSError: the folder cannot be written.
            ValueError: the payload holds NaN or an infinity, which JSON has no word for.
        """
        path = self.path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "key": dict(key),
            "digest": _digest(payload),
            "payload": payload,
        }
        text = json.dumps(data, allow_nan=False)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


def _refuse(path: Path, reason: str) -> None:
    _log.warning("cache: %s/%s is not used: %s; computing it again", path.parent.name, path.name, reason)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(payload: Any) -> str:
    return hashlib.sha256(_canonical(payload).encode()).hexdigest()


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "it has none"
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name)!r}, wanted {wanted.get(name)!r}"
    return "another kind"

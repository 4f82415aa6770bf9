from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from profiles.cache import Cache

KEY = {"model": "abc", "fingerprint": "here", "input_shape": [1, 3, 64, 64]}


def identity(data: Mapping[str, Any]) -> Mapping[str, Any]:
    return data


def test_what_is_put_is_got_under_the_same_key_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get("profile", KEY, identity) is None
    path = cache.put("profile", KEY, {"ms": 1.5})
    assert cache.get("profile", dict(reversed(KEY.items())), identity) == {"ms": 1.5}
    assert cache.get("profile", {**KEY, "fingerprint": "there"}, identity) is None
    assert cache.get("scores", KEY, identity) is None
    cache.put("profile", KEY, {"ms": 2.5})
    assert Cache(tmp_path).get("profile", KEY, identity) == {"ms": 2.5}
    assert list(path.parent.iterdir()) == [path]


def refused(cache: Cache, caplog: pytest.LogCaptureFixture, load: Any = identity) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "paretoprune.cache"):
        assert cache.get("profile", KEY, load) is None
    assert len(caplog.records) == 1
    return caplog.text


def test_every_truncation_is_refused_with_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    path = cache.put("profile", KEY, {"ms": 1.5})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert "truncated" in refused(cache, caplog)
    path.write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused(cache, caplog)


def test_foreign_and_edited_files_are_refused_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path)
    path = cache.put("profile", KEY, {"ms": 1.5})
    foreign = cache.put("profile", {**KEY, "fingerprint": "there"}, {"ms": 9.0})
    original = path.read_text()
    path.write_text(foreign.read_text())
    assert "fingerprint is 'there', wanted 'here'" in refused(cache, caplog)
    path.write_text(original.replace("1.5", "1.4"))
    assert "digest" in refused(cache, caplog)
    path.write_text(json.dumps({**json.loads(original), "format_version": 0}))
    assert "format_version is 0" in refused(cache, caplog)
    path.write_text("[]")
    assert "format_version is None" in refused(cache, caplog)
    path.write_text(original)

    def strict(data: Mapping[str, Any]) -> float:
        return float(data["seconds"])

    assert "KeyError" in refused(cache, caplog, strict)


def test_nan_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Cache(tmp_path).put("profile", KEY, {"ms": float("nan")})

"""Model files: which belong together, what identifies them, and a remote device's store of them."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

#: Models kept in the store of a remote device; the longest unused go first.
KEPT = 32


def model_files(path: Path) -> tuple[Path, ...]:
    """All files of a model, the one that says the structure first."""
    return (path, path.with_suffix(".bin")) if path.suffix in (".xml", ".param") else (path,)


def model_digest(path: Path) -> str:
    """sha256 of a model's content, hexadecimal: of its file, or of its files' digests where it has several.

    Raises:
        FileNotFoundError: a file is gone.
    """
    digests = []
    for name in model_files(path):
        digest = hashlib.sha256()
        with name.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digests.append(digest.hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def cache_folder() -> Path | None:
    """Where this runner may keep files; None on the machine that asks, whose files are read in place."""
    folder = os.environ.get("PARETOPRUNE_RUNNER_CACHE")
    return Path(folder) if folder else None


def do_find(request: dict[str, Any]) -> dict[str, Any]:
    """Request: `digest`, `name` (of its first file). Result: `path` of the stored model, None without it."""
    path = _folder(request) / _name(request)
    if not path.is_file():
        return {"path": None}
    os.utime(path.parent)
    return {"path": str(path)}


def do_store(request: dict[str, Any]) -> dict[str, Any]:
    """Request: `digest`, `name`, `data` (base64), `offset` in bytes: one piece of a file, in order."""
    folder = _part(request)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _name(request)).open("ab" if request["offset"] else "wb") as file:
        if file.tell() != request["offset"]:
            raise RuntimeError(f"a piece at {request['offset']} came when {file.tell()} bytes were there")
        file.write(base64.b64decode(request["data"]))
    return {}


def do_keep(request: dict[str, Any]) -> dict[str, Any]:
    """Check what was stored and make it the model `digest`. Request and result as `do_find`."""
    part, folder = _part(request), _folder(request)
    found = model_digest(part / _name(request))
    if found != request["digest"]:
        shutil.rmtree(part)
        raise RuntimeError(f"the model arrived with sha256 {found}, sent was {request['digest']}")
    if folder.exists():  # Another connection was faster.
        shutil.rmtree(part)
    else:
        part.rename(folder)
    stored = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in stored[:-KEPT]:
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return do_find(request)


def _folder(request: dict[str, Any]) -> Path:
    cache = cache_folder()
    if cache is None or not re.fullmatch(r"[0-9a-f]{64}", request["digest"]):
        raise RuntimeError(f"no store for a model with digest {request['digest']!r}")
    return cache / "models" / str(request["digest"])


def _part(request: dict[str, Any]) -> Path:
    folder = _folder(request)
    return folder.with_name(f"{folder.name}.{os.getpid()}.part")


def _name(request: dict[str, Any]) -> str:
    name = str(request["name"])
    if name != Path(name).name:
        raise RuntimeError(f"a file's name must be without folders, got {name!r}")
    return name

"""An exported folder: what is in it, whether it may be replaced, and reading it back.

Knows files and digests; nothing of studies, fronts or registries.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from .studyfile import StudyFileError

FORMAT_VERSION = 1
METRICS, CARD = "metrics.json", "MODEL_CARD.md"


def check_target(target: Path) -> None:
    """Refuse a folder that an export must not replace: everything in it would be gone.

    Raises:
        StudyFileError: it holds something that no export wrote.
    """
    if not target.exists():
        return
    if not target.is_dir():
        fault = "which is no folder"
    else:
        ours = _recorded(target)
        foreign = sorted(p.name for p in target.iterdir() if p.name not in ours or not p.is_file())
        if not foreign:
            return
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        fault = f"which holds {', '.join(foreign[:5])}{more}"
    raise StudyFileError(
        "--out",
        [
            "must be a new or empty folder, or one with nothing but an earlier export in it, got "
            f"{target}, {fault}; name another folder, or move that away"
        ],
    )


def _recorded(folder: Path) -> frozenset[str]:
    """The files that an export wrote into a folder; none where its metrics.json is not an export's."""
    try:
        data = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return frozenset()
    if not (isinstance(data, dict) and "format_version" in data and isinstance(data.get("files"), dict)):
        return frozenset()
    return frozenset({*data["files"], METRICS, CARD})


def replace_folder(folder: Path, target: Path) -> None:
    """Put a finished folder in the place of an earlier export.

    Raises:
        StudyFileError: something came into it in the meantime.
    """
    check_target(target)
    if target.exists():
        shutil.rmtree(target)
    folder.replace(target)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of an exported folder.

    Raises:
        ValueError: another format version, or a file that is not the one recorded.
    """
    data: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    if data.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"metrics.json must have format_version {FORMAT_VERSION}, got {data.get('format_version')!r}"
        )
    for name, digest in data["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(
                f"{name} must be the file that metrics.json records, and is not; export it again"
            )
    return data

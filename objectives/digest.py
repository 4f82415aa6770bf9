"""Digests that say whether two models, or two data sets, are the same, and whether files may have changed.

Knows no framework.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def model_digest(model: nn.Module) -> str:
    """sha256 of a model's layers (names, types, shapes) and the exact values of its state."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name}:{type(module).__name__};".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def files_digest(files: Iterable[Path], root: Path, content: Iterable[str] = (".txt", ".yaml")) -> str:
    """sha256 of a set of files: names and sizes, and the content of those with a suffix in `content`.

    Images go in by name and size only: reading gigabytes at every start would cost more than what it guards
        against.
    """
    digest = hashlib.sha256()
    suffixes = set(content)
    for file in sorted(files):
        name = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
        digest.update(f"{name.as_posix()}:{file.stat().st_size};".encode())
        if file.suffix in suffixes:
            digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Stamp:
    """What a set of files and folders looks like from outside, without reading them.

    Attributes:
        digest: sha256 of names, sizes and times of change.
        newest: the latest change, in seconds of the epoch; 0 where nothing is there.
    """

    digest: str
    newest: float


def stamp(paths: Iterable[Path]) -> Stamp:
    """A stamp of files, and of the files that lie directly in folders; that a path is missing counts too.

    Folders inside a folder count by name: they change with what others put there.
    """
    digest, newest = hashlib.sha256(), 0.0
    for path in paths:
        entries = sorted(os.scandir(path), key=lambda e: e.name) if path.is_dir() else [path]
        digest.update(f"{path}:{len(entries)};".encode())
        for entry in entries:
            try:
                state = entry.stat()
            except FileNotFoundError:
                digest.update(f"{entry.name}:missing;".encode())
                continue
            if stat.S_ISDIR(state.st_mode):
                digest.update(f"{entry.name}/;".encode())
                continue
            digest.update(f"{entry.name}:{state.st_size}:{state.st_mtime_ns};".encode())
            newest = max(newest, state.st_mtime)
    return Stamp(digest.hexdigest(), newest)


def loaded_code() -> list[Path]:
    """Files of the modules that this process has loaded, without Python's own and installed packages.

    Code that may be another the next time.
    """
    known = sysconfig.get_paths()
    installed = {str(Path(known[name]).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and not str(Path(file).resolve()).startswith(
            tuple(f"{folder}{os.sep}" for folder in installed)
        ):
            found.add(Path(file))
    return sorted(found)

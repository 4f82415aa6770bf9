"""Digests that say whether two models, or two data sets, are the same. Knows no framework."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
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

"""Where training and scoring run: device, arithmetic, CPU threads. Knows nothing of what is run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

_NAMES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def check_device_name(device: str) -> str:
    """The name, if torch knows such devices, whether or not this machine has one.

    Raises:
        ValueError: it is none.
    """
    if not _NAMES.fullmatch(device):
        raise ValueError(f"must be one of auto, cpu, cuda, cuda:N, mps, got {device!r}")
    return device


def check_scoring_device(device: str) -> str:
    """As `check_device_name`, for what sums scores in float64, which mps lacks."""
    if device == "mps":
        raise ValueError(f"must be one of auto, cpu, cuda, cuda:N (mps has no float64), got {device!r}")
    return check_device_name(device)


def resolve_device(device: str) -> str:
    """A torch device; "auto" becomes CUDA where there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device; the message names those it has.
    """
    import torch

    check_device_name(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if count else "cpu"
    name, _, index = device.partition(":")
    if name == "cuda" and int(index or 0) >= count:
        there = ", ".join(["auto", "cpu", *(f"cuda:{n}" for n in range(count))])
        raise ValueError(f"device must be one that this machine has ({there}), got {device!r}")
    return device


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Have a GPU compute in float32 as the CPU does, for a block: scores are cached and read on any machine.

    By default convolutions round their inputs to TF32, ten bits, and may pick another algorithm each time.
    """
    import torch

    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Set torch's CPU threads for a block; None leaves them."""
    import torch

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Where training runs: the device and the CPU threads. Knows nothing of what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


def resolve_device(device: str) -> str:
    """A torch device; "auto" becomes CUDA where there is one, else the CPU."""
    import torch

    if device != "auto":
        return device
    return "cuda:0" if torch.cuda.is_available() else "cpu"


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

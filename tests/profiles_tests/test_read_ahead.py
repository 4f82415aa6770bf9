"""PyTorch's programs are read once, before the processes that measure them are forked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from profiles.artifact import Artifact
from profiles.device import Device
from profiles.runner import session_torch
from profiles.runner.example import example_images
from profiles.runner.session_torch import TorchSession, read_ahead

from .conftest import SHAPE

TORCH = Device("here", "torch", threads=1)

Export = Callable[[Device, int], Artifact]


@pytest.fixture(autouse=True)
def _nothing_read() -> Iterator[None]:
    session_torch._read_before.clear()
    yield
    session_torch._read_before.clear()


def spec(path: Path, threads: int = 1) -> dict[str, Any]:
    return {
        "runtime": "torch", "precision": "fp32", "path": str(path), "providers": ["cpu"], "threads": threads,
        "input_shape": list(SHAPE),
    }  # fmt: skip


def weight(module: torch.nn.Module) -> int:
    return next(iter(module.parameters())).data_ptr()


def test_a_process_gets_weights_of_its_own(export: Export) -> None:
    of = spec(export(TORCH, 16).path)
    images = example_images(SHAPE)
    plain = TorchSession(of).run(images)
    assert not session_torch._read_before  # only what is to be forked is kept

    read_ahead(of)
    (module,) = session_torch._read_before.values()
    read = weight(module)
    ahead = TorchSession(of)
    assert weight(module) != read
    for one, other in zip(ahead.run(images), plain, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc, which Linux has")
def test_no_threads_that_a_fork_would_lose(export: Export) -> None:
    before = torch.get_num_threads(), len(os.listdir("/proc/self/task"))
    torch.set_num_threads(4)
    try:
        read_ahead(spec(export(TORCH, 16).path, threads=4))
        assert torch.get_num_threads() == 4
        assert len(os.listdir("/proc/self/task")) == before[1]
    finally:
        torch.set_num_threads(before[0])


def test_a_model_for_a_gpu_is_left_to_each_process(export: Export) -> None:
    read_ahead({**spec(export(TORCH, 16).path), "providers": ["cuda"]})
    assert not session_torch._read_before


def test_another_file_of_the_same_name_is_read_anew(export: Export, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    shutil.copy(export(TORCH, 16).path, path)
    read_ahead(spec(path))
    shutil.copy(export(TORCH, 8).path, path)
    images = example_images(SHAPE)
    again, fresh = TorchSession(spec(path)), TorchSession(spec(export(TORCH, 8).path))
    for one, other in zip(again.run(images), fresh.run(images), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_oldest_go_first(export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{name}.pt2" for name in "abc"]
    for path in paths:
        shutil.copy(export(TORCH, 16).path, path)
    monkeypatch.setattr(session_torch, "_KEPT_BYTES", 2 * paths[0].stat().st_size)
    for path in paths:
        read_ahead(spec(path))
    assert [path for _, path, *_ in session_torch._read_before] == [str(path) for path in paths[1:]]

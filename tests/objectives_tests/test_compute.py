"""Where this process computes: devices that the machine has and those it lacks."""

from __future__ import annotations

import pytest
import torch

from objectives.compute import full_precision, resolve_device


@pytest.mark.parametrize(
    ("count", "device", "found"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
        (2, "cpu", "cpu"),
        (0, "mps", "mps"),
    ],
)
def test_a_device_is_taken_as_named(
    count: int, device: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve_device(device) == found


@pytest.mark.parametrize(
    ("count", "device", "there"),
    [(0, "cuda", "auto, cpu"), (2, "cuda:2", "auto, cpu, cuda:0, cuda:1"), (1, "gpu", "auto, cpu, cuda")],
)
def test_a_device_that_is_not_there_is_named_with_those_that_are(
    count: int, device: str, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=f"must be one .*{there}.*, got '{device}'"):
        resolve_device(device)


def test_settings_of_the_arithmetic_are_put_back() -> None:
    settings = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    matmul = torch.backends.cuda.matmul.allow_tf32
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.deterministic
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == settings
    assert torch.backends.cuda.matmul.allow_tf32 == matmul

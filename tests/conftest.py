"""What all tests share: an environment of their own, and small models whose outputs notice a wrong cut."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import nn

# Ultralytics reads this once, when it is imported: its settings file must not be the user's.
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="paretoprune-tests-"))


@pytest.fixture(autouse=True)
def _own_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's stores are no place for test runs."""
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is computed here is too small to share out, and threads that wait cost more than they bring."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real weights and images."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PARETOPRUNE_DATA", default))
    if not (folder / "yolov8n-bccd.pt").is_file():
        pytest.skip(f"no yolov8n-bccd.pt in {folder}; set PARETOPRUNE_DATA to the data folder")
    return folder


@pytest.fixture(scope="session")
def alive() -> Callable[[nn.Module, int, int], nn.Module]:
    """Make a fresh model's every channel matter: (model, seed, image side) to that model, eval mode, float64.

    A fresh batch norm does nothing (mean 0, variance 1, shift 0), so a cut that took the wrong entries of it
    would go unnoticed; and without fitting statistics a deep fresh network's signal dies out, which hides
    everything else.
    """
    import torch
    from torch import nn

    from objectives.batchnorm import reestimate_batchnorm

    def enliven(model: nn.Module, seed: int, side: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                with torch.no_grad():
                    module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                    module.bias.copy_(0.5 * torch.randn(module.bias.shape, generator=generator))
        reestimate_batchnorm(model, [torch.rand(4, 3, side, side, generator=generator)])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                spread = module.running_var.sqrt()
                module.running_mean += 0.3 * spread * torch.randn(spread.shape, generator=generator)
                module.running_var *= 0.7 + 0.6 * torch.rand(spread.shape, generator=generator)
                module.running_var.clamp_(min=1e-6)
        return model.double().eval()

    return enliven

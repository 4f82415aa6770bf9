"""A module in inference form as a function of images. Knows nothing of what its outputs mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .task import Predictor

if TYPE_CHECKING:
    import torch
    from torch import nn


def as_predictor(module: nn.Module, device: str | torch.device = "cpu") -> Predictor:
    """A module with one output, see `Task.deployable`, as a function of images.

    Args:
        device: where it runs; the module is moved there.
    """
    import torch

    module.to(device)

    def predict(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            return [module(torch.from_numpy(images).to(device)).cpu().numpy()]

    return predict

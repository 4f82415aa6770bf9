"""A network's weights as they were before any training. Knows no task."""

from __future__ import annotations

import torch
from torch import nn


def reinitialise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every layer's weights anew, by the layer's own rule (`reset_parameters`), in place.

    Args:
        seed: the same weights for the same seed; the caller's random state is left as it was.

    Raises:
        ValueError: a module has parameters of its own and no rule to draw them by.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise ValueError(
                    "recovery from scratch needs layers that know how to initialise themselves "
                    f"(reset_parameters), got {name or 'a model'} of {type(module).__name__}"
                )
    return model

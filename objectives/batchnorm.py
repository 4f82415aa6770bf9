"""Batch-norm statistics re-estimated on real images, without a gradient.

After channels are gone the running means and variances describe activations that no longer exist. One pass
over a few images mends that in a second; where the cut is deep it is worth more than an epoch of training.
Knows no task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> int:
    """Replace the running statistics of every batch norm by those over some batches, in place.

    Args:
        model: any model; its train/eval mode is restored.
        batches: `(batch, channels, height, width)` images as the model takes them, or what `forward` takes.
            With none of them nothing changes.
        forward: runs the model on a batch; default: calls it.

    Returns:
        The number of batches seen.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    was_training = model.training
    saved = [{k: v.clone() for k, v in m.state_dict().items()} for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average: every batch counts the same
        norm.train()
    seen = 0
    try:
        with torch.no_grad():
            for batch in batches:
                if forward is None:
                    model(batch)
                else:
                    forward(model, batch)
                seen += 1
    finally:
        for norm, momentum, state in zip(norms, momenta, saved, strict=True):
            norm.momentum = momentum
            if seen == 0:
                norm.load_state_dict(state)
        model.train(was_training)
    return seen

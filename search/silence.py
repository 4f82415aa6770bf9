"""Channels silenced instead of removed: what a network would compute without them, until it is put back.

A silenced channel is zero and nobody reads it, which is what a group's removal comes to, but no network is
copied and no layer made anew. Knows no scores and no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .plan import LayerCut, PruningPlan

if TYPE_CHECKING:
    from torch import Tensor, nn

IntArray = NDArray[np.int64]
_WHOLE = LayerCut(1, 1)


def further(plan: PruningPlan, context: PruningPlan) -> dict[str, tuple[IntArray, IntArray]]:
    """What a plan removes beyond another one: layer to input and output indices into what that one leaves.

    Raises:
        ValueError: `plan` keeps something that `context` removes.
    """
    if missing := [name for name in context.layers if name not in plan.layers]:
        raise ValueError(f"the plan must remove all that its context does, but keeps all of {missing[0]}")
    found: dict[str, tuple[IntArray, IntArray]] = {}
    for name, cut in plan.layers.items():
        before = context.layers.get(name, _WHOLE)
        if cut == before:  # most layers, and what follows takes a while
            continue
        found[name] = (
            _positions(name, cut.channels_in, cut.removed_in, before.removed_in),
            _positions(name, cut.channels_out, cut.removed_out, before.removed_out),
        )
    return found


def _positions(layer: str, channels: int, removed: tuple[int, ...], before: tuple[int, ...]) -> IntArray:
    """Where what was removed besides `before` stands among the channels that `before` leaves."""
    if removed == before:
        return np.empty(0, dtype=np.int64)
    if kept := set(before) - set(removed):
        raise ValueError(
            f"the plan must remove all that its context does, but keeps channel {min(kept)} of {layer}"
        )
    left = np.setdiff1d(np.arange(channels), np.array(before, dtype=np.int64))
    positions: IntArray = np.searchsorted(left, np.setdiff1d(removed, before))
    return positions


@contextmanager
def silenced(model: nn.Module, channels: Mapping[str, tuple[IntArray, IntArray]]) -> Iterator[None]:
    """Have a network compute what it would without some channels; afterwards it is as it was.

    Args:
        channels: layer to input and output indices, as `further` gives them.
    """
    import torch

    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for name, (into, out) in channels.items():
                layer = model.get_submodule(name)
                weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
                saved += [(p, p.clone()) for p in (weight, bias) if p is not None]
                if getattr(layer, "groups", 1) > 1:  # depthwise: input j and output j are one channel
                    into, out = into[:0], np.union1d(into, out)
                weight[out] = 0.0
                if bias is not None:
                    bias[out] = 0.0
                if len(into):
                    weight[:, into] = 0.0
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)

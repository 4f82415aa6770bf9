"""What a network costs as a function of how many channels each of its groups loses.

One quantity at a time: latency by the device's model, MACs, parameters or memory. Each can be asked for the
total of many choices at once, for what one more channel of a group saves, and for every layer's own part.
Works on the cached profile alone; no model is touched, nothing is measured. Knows no scores and no plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profiles.latency_profile import LatencyProfile

from .groups import ChannelGroups

FloatArray = NDArray[np.float64]

#: Quantities that are functions of widths.
QUANTITIES = ("latency", "macs", "params", "memory")
#: What `search.cost` may weigh a score with: the paper's per-channel latency of a layer, equation (5), or
#: what removing one channel of the group saves of a quantity; `marginal` is that of the latency.
COSTS = ("layer", "marginal", "macs", "params", "memory")
_BYTES = 4.0


@dataclass(frozen=True, eq=False)
class WidthCost:
    """One quantity of one network on one device, for L layers and G groups.

    Attributes:
        quantity: one of `QUANTITIES`. `latency` in ms; `macs` for one input; `params` weights without biases,
            which a fused network has one of per channel; `memory` bytes of weights and of every layer's
            output for one input in float32.
        profile: the device's profile; its layers give the order of L.
        into, out: `(L, G)`, channels that a layer loses on a side with one channel of a group.
    """

    quantity: str
    profile: LatencyProfile
    into: FloatArray
    out: FloatArray
    _in: FloatArray
    _out: FloatArray
    _pair: FloatArray  # (L,): cost of one input times one output channel; of one output where depthwise
    _each: FloatArray  # (L,): cost of one output channel, whatever feeds it
    _depthwise: NDArray[np.bool_]

    @classmethod
    def of(cls, quantity: str, groups: ChannelGroups, profile: LatencyProfile) -> WidthCost:
        """Raises ValueError for an unknown quantity."""
        if quantity not in QUANTITIES:
            raise ValueError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
        layers = profile.layers
        into, out = groups.incidence([layer.layer for layer in layers])
        pixels = np.array([float(np.prod(layer.output_hw)) for layer in layers])
        weights = np.array([float(np.prod(layer.kernel)) / layer.groups for layer in layers])
        # A depthwise layer's channels cancel: in x out / groups is its width, whatever the width is.
        depthwise = np.array([1 < layer.groups == layer.in_channels for layer in layers])
        weights[depthwise] *= np.array([layer.groups for layer in layers])[depthwise]
        none = np.zeros(len(layers))
        pair = {"latency": none, "macs": weights * pixels, "params": weights, "memory": weights * _BYTES}
        return cls(
            quantity,
            profile,
            into,
            out,
            np.array([layer.in_channels for layer in layers], dtype=np.float64),
            np.array([layer.out_channels for layer in layers], dtype=np.float64),
            pair[quantity],
            pixels * _BYTES if quantity == "memory" else none,
            depthwise,
        )

    def total(self, removed: ArrayLike) -> FloatArray:
        """The whole network's cost: removed channels `(n, G)` to `(n,)`."""
        counts = np.asarray(removed, dtype=np.float64)
        ins, outs = self._in - counts @ self.into.T, self._out - counts @ self.out.T
        if self.quantity == "latency":
            return self.profile.predict_many(ins, outs)
        fed = np.where(self._depthwise, 1.0, ins)
        result: FloatArray = (outs * (fed * self._pair + self._each)).sum(axis=1)
        return result

    def marginal(self, removed: ArrayLike) -> FloatArray:
        """What one more channel of each group would save, `(G,)`, when `(G,)` channels are gone.

        The derivative over all members: a removed channel narrows the layers that make it and those that read
        it.
        """
        counts = np.asarray(removed, dtype=np.float64)
        ins, outs = self._in - self.into @ counts, self._out - self.out @ counts
        if self.quantity == "latency":
            by_in, by_out = self.profile.gradient(ins, outs)
        else:
            fed = np.where(self._depthwise, 1.0, ins)
            by_in = np.where(self._depthwise, 0.0, outs * self._pair)
            by_out = fed * self._pair + self._each
        result: FloatArray = by_in @ self.into + by_out @ self.out
        return result

    def by_layer(self) -> dict[str, float]:
        """Layer to its part of the unpruned network's cost; of the latency, what was profiled."""
        if self.quantity == "latency":
            return {layer.layer: layer.timing.mean_ms for layer in self.profile.layers}
        fed = np.where(self._depthwise, 1.0, self._in)
        parts = self._out * (fed * self._pair + self._each)
        return {layer.layer: float(p) for layer, p in zip(self.profile.layers, parts, strict=True)}


def quantity_of(cost: str) -> str:
    """The quantity that a word of `search.cost` stands for."""
    return "latency" if cost in ("layer", "marginal") else cost


def unit_shares(by_layer: Mapping[str, float], groups: ChannelGroups) -> FloatArray:
    """What the layers that make each unit's channels cost, as shares of the units' total; `(units,)`.

    Args:
        by_layer: layer to its part of the unpruned network's cost; layers left out cost nothing.
    """
    own = np.zeros(len(groups.groups))
    for g, group in enumerate(groups.groups):
        for member in group.weighted:
            whole = groups.widths[member.layer][1]
            own[g] += by_layer.get(member.layer, 0.0) * member.index.size / whole
    shares = groups.gather(own)
    result: FloatArray = shares / shares.sum()
    return result

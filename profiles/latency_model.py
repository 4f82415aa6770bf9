"""Latency of a network as a function of its layers' widths.

Predicts from coefficients and knows nothing of how they were measured, nor which widths a plan can reach.

With x and y a layer's input and output channels as shares of the unpruned layer's, its latency is
`constant + per_in x + per_out y + per_pair x y`. Kinds:

- `linear`: `t y`, the rule of the paper (doi 10.30837/0135-1710.2026.189.034, equation 5): a channel costs
  t / N, whatever feeds it.
- `bilinear`: `t x y`, or `t y` for a depthwise layer; a removed channel also narrows the layers that read it.

Everything that is no layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

KINDS = ("linear", "bilinear")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LatencyModel:
    """Coefficients for L layers.

    Attributes:
        kind: "linear" or "bilinear".
        in_channels, out_channels: widths of the unpruned layers, `(L,)`.
        coefficients: `(L, 4)` in ms: constant, per_in, per_out, per_pair.
        other_ms: latency of everything that is no layer.

    Raises:
        ValueError: lengths differ, a width is below 1 or a coefficient is not finite.
    """

    kind: str
    in_channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    coefficients: tuple[tuple[float, float, float, float], ...]
    other_ms: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not len(self.in_channels) == len(self.out_channels) == len(self.coefficients):
            raise ValueError(
                f"one width and one row of coefficients per layer, got {len(self.in_channels)} inputs, "
                f"{len(self.out_channels)} outputs and {len(self.coefficients)} rows"
            )
        if any(width < 1 for width in (*self.in_channels, *self.out_channels)):
            raise ValueError(f"widths must be at least 1, got {min(*self.in_channels, *self.out_channels)}")
        if not np.isfinite([*np.ravel(self.coefficients), self.other_ms]).all():
            raise ValueError("coefficients must be finite")

    @classmethod
    def from_layers(
        cls,
        kind: str,
        layer_ms: Sequence[float],
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        groups: Sequence[int],
        other_ms: float,
    ) -> LatencyModel:
        """The linear or bilinear model of layers measured once, unpruned; sequences of length L."""
        rows: list[tuple[float, float, float, float]] = []
        for ms, inputs, group in zip(layer_ms, in_channels, groups, strict=True):
            # A depthwise layer has as many groups as channels: both widths shrink as one.
            by_output_alone = kind == "linear" or (group > 1 and group == inputs)
            rows.append((0.0, 0.0, float(ms), 0.0) if by_output_alone else (0.0, 0.0, 0.0, float(ms)))
        return cls(kind, tuple(in_channels), tuple(out_channels), tuple(rows), float(other_ms))

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats, Floats]:
        ins = np.asarray(self.in_channels, dtype=float)
        outs = np.asarray(self.out_channels, dtype=float)
        return ins, outs, np.asarray(self.coefficients, dtype=float).reshape(-1, 4).T

    def predict_many(self, in_widths: ArrayLike, out_widths: ArrayLike) -> Floats:
        """Latency of n plans: widths `(n, L)` in channels, result `(n,)` in ms."""
        ins, outs, (constant, per_in, per_out, per_pair) = self._arrays
        x = self._checked(in_widths, 2) / ins
        y = self._checked(out_widths, 2) / outs
        layer_ms: Floats = constant + per_in * x + per_out * y + per_pair * x * y
        return np.asarray(self.other_ms + layer_ms.sum(axis=1))

    def gradient(self, in_widths: ArrayLike, out_widths: ArrayLike) -> tuple[Floats, Floats]:
        """What one more channel costs, in ms: with respect to the inputs `(L,)` and the outputs `(L,)`."""
        ins, outs, (_, per_in, per_out, per_pair) = self._arrays
        x = self._checked(in_widths, 1) / ins
        y = self._checked(out_widths, 1) / outs
        return (per_in + per_pair * y) / ins, (per_out + per_pair * x) / outs

    def _checked(self, widths: ArrayLike, dimensions: int) -> Floats:
        array = np.asarray(widths, dtype=float)
        if array.ndim != dimensions or array.shape[-1] != len(self.coefficients):
            wanted = f"({'n, ' if dimensions == 2 else ''}{len(self.coefficients)})"
            raise ValueError(f"widths must have shape {wanted}, got {array.shape}")
        return array

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "in_channels": list(self.in_channels),
            "out_channels": list(self.out_channels),
            "coefficients": [list(row) for row in self.coefficients],
            "other_ms": self.other_ms,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyModel:
        return cls(
            kind=data["kind"],
            in_channels=tuple(data["in_channels"]),
            out_channels=tuple(data["out_channels"]),
            coefficients=tuple((row[0], row[1], row[2], row[3]) for row in data["coefficients"]),
            other_ms=data["other_ms"],
        )

"""Latency of a network as a function of its layers' widths.

Predicts from coefficients and knows nothing of how they were found, nor which widths a plan can reach.

A layer's latency is a sum of terms in its input and output channels, x and y, as shares of the unpruned
layer's: `constant + per_in x + per_out y + per_pair x y`. Runtimes compute in blocks of channels, so a model
may have these terms several times, each with the widths rounded up to the multiple m of a step, and terms for
widths that are no multiple of m (`rough`). Kinds:

- `linear`: `t y`, the rule of the paper (doi 10.30837/0135-1710.2026.189.034, equation 5): a channel costs
  t / N, whatever feeds it.
- `bilinear`: `t x y`, or `t y` for a depthwise layer; a removed channel also narrows the layers that read it.
- `fitted`: all terms, found by `latency_fit` from measured variants of the network. What operators that are
  no layer cost goes with the activations of the resolutions they work at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

KINDS = ("linear", "bilinear", "fitted")
Floats = NDArray[np.float64]

#: Plans predicted at once: features of more would not stay in a processor's cache.
_CHUNK = 256
#: Share of all layers of all plans that may differ from the first plan's for these alone to be computed.
_FEW = 0.3


def term_names(steps: Sequence[int]) -> tuple[str, ...]:
    """Names of the T terms that a model with these steps has, in order of its coefficients."""
    names = ["constant"]
    for m in steps:
        names += [f"in/{m}", f"out/{m}", f"pair/{m}"]
        if m > 1:
            names += [f"rough_in/{m}", f"rough_out/{m}", f"rough_map/{m}"]
    return tuple(names)


def terms(ins: Floats, outs: Floats, base_in: Floats, base_out: Floats, steps: Sequence[int]) -> Floats:
    """The terms at widths `(n, L)` in channels, as shares of the unpruned widths `(L,)`; result `(n, L, T)`.

    `in/m`, `out/m` and `pair/m` are 1 for the unpruned layer. `rough_in/m` and `rough_out/m` are `x y` where
    the input or the output is no multiple of m, `rough_map/m` is `y` where the output is none, 0 elsewhere.
    """
    result = np.empty((*ins.shape, len(term_names(steps))))
    result[..., 0] = 1.0
    column = 1
    for m in steps:
        up_in, up_out = _up(ins, m), _up(outs, m)
        x, y = up_in / _up(base_in, m), up_out / _up(base_out, m)
        result[..., column], result[..., column + 1], result[..., column + 2] = x, y, x * y
        column += 3
        if m > 1:
            rough = up_out != outs
            result[..., column] = x * y * (up_in != ins)
            result[..., column + 1] = x * y * rough
            result[..., column + 2] = y * rough
            column += 3
    return result


@dataclass(frozen=True)
class LatencyModel:
    """Coefficients for L layers and T terms.

    Attributes:
        kind: "linear", "bilinear" or "fitted".
        in_channels, out_channels: widths of the unpruned layers, `(L,)`.
        coefficients: `(L, T)` in ms, in the order of `term_names(steps)`.
        other_ms: latency of what no layer's width changes; a little below 0 where a fit found that small
            networks are faster than their layers say.
        steps: multiples of channels at which the latency may step; 1 is none.
        error: the 90th percentile of the relative error on measured variants that the fit had not seen; None
            where there were none.
        checks: of each of those variants the latency predicted without it and the one measured, in ms.

    Raises:
        ValueError: lengths differ, a width or a step is below 1 or a coefficient is not finite.
    """

    kind: str
    in_channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]
    other_ms: float
    steps: tuple[int, ...] = (1,)
    error: float | None = None
    checks: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for key in ("in_channels", "out_channels", "steps"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for key in ("coefficients", "checks"):
            object.__setattr__(self, key, tuple(tuple(row) for row in getattr(self, key)))
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not len(self.in_channels) == len(self.out_channels) == len(self.coefficients):
            raise ValueError(
                f"one width and one row of coefficients per layer, got {len(self.in_channels)} inputs, "
                f"{len(self.out_channels)} outputs and {len(self.coefficients)} rows"
            )
        if any(width < 1 for width in (*self.in_channels, *self.out_channels)):
            raise ValueError(f"widths must be at least 1, got {min(*self.in_channels, *self.out_channels)}")
        if not self.steps or any(step < 1 for step in self.steps):
            raise ValueError(f"steps must be at least one multiple of at least 1, got {self.steps}")
        wanted = len(term_names(self.steps))
        wrong = [len(row) for row in self.coefficients if len(row) != wanted]
        if wrong:
            raise ValueError(f"a row needs {wanted} coefficients with steps {self.steps}, got {wrong[0]}")
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

    def without(self, gone: Sequence[bool]) -> LatencyModel:
        """The model of the network without some of its layers, `(L,)`: these cost nothing."""
        nothing = (0.0,) * len(term_names(self.steps))
        rows = zip(self.coefficients, gone, strict=True)
        return replace(self, coefficients=tuple(nothing if away else row for row, away in rows))

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats, Floats]:
        ins = np.asarray(self.in_channels, dtype=float)
        outs = np.asarray(self.out_channels, dtype=float)
        return ins, outs, np.asarray(self.coefficients, dtype=float).reshape(len(ins), -1)

    def predict_many(self, in_widths: ArrayLike, out_widths: ArrayLike) -> Floats:
        """Latency of n plans: widths `(n, L)` in channels, result `(n,)` in ms."""
        base_in, base_out, coefficients = self._arrays
        ins, outs = self._checked(in_widths, 2), self._checked(out_widths, 2)
        result = np.full(len(ins), float(self.other_ms))
        differ = (ins != ins[:1]) | (outs != outs[:1])
        if len(ins) > 1 and differ.mean() < _FEW:
            # Only layers that are not as in the first plan, each as a network of its own.
            plan, layer = differ.nonzero()
            first = self._layers_ms(ins[0], outs[0], np.arange(len(base_in)))
            more = self._layers_ms(ins[plan, layer], outs[plan, layer], layer) - first[layer]
            result += first.sum() + np.bincount(plan, weights=more, minlength=len(ins))
            return result
        flat = coefficients.ravel()
        for start in range(0, len(ins), _CHUNK):
            part = slice(start, start + _CHUNK)
            found = terms(ins[part], outs[part], base_in, base_out, self.steps)
            result[part] += found.reshape(len(found), -1) @ flat
        return result

    def _layers_ms(self, ins: Floats, outs: Floats, layers: NDArray[np.int64]) -> Floats:
        """Latency of n layers at widths `(n,)`, any layer any number of times; result `(n,)` in ms."""
        base_in, base_out, coefficients = self._arrays
        found = terms(ins[None], outs[None], base_in[layers], base_out[layers], self.steps)[0]
        result: Floats = np.einsum("nt,nt->n", found, coefficients[layers])
        return result

    def gradient(self, in_widths: ArrayLike, out_widths: ArrayLike) -> tuple[Floats, Floats]:
        """What one more channel costs, in ms: with respect to the inputs `(L,)` and the outputs `(L,)`.

        Steps are taken as slopes: the derivative with widths as they are instead of rounded up, and without
        the terms for rough widths, whose gain is a matter of rounding and not of one channel more or less.
        """
        base_in, base_out, coefficients = self._arrays
        ins, outs = self._checked(in_widths, 1), self._checked(out_widths, 1)
        by_in, by_out = np.zeros_like(ins), np.zeros_like(outs)
        names = term_names(self.steps)
        for m in self.steps:
            first = names.index(f"in/{m}")
            per_in, per_out, per_pair = coefficients[:, first : first + 3].T
            full_in, full_out = _up(base_in, m), _up(base_out, m)
            by_in += (per_in + per_pair * outs / full_out) / full_in
            by_out += (per_out + per_pair * ins / full_in) / full_out
        return by_in, by_out

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
            "steps": list(self.steps),
            "error": self.error,
            "checks": [list(pair) for pair in self.checks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyModel:
        return cls(
            kind=data["kind"],
            in_channels=tuple(data["in_channels"]),
            out_channels=tuple(data["out_channels"]),
            coefficients=tuple(tuple(row) for row in data["coefficients"]),
            other_ms=data["other_ms"],
            steps=tuple(data["steps"]),
            error=data["error"],
            checks=tuple((predicted, measured) for predicted, measured in data["checks"]),
        )


def _up(widths: Floats, multiple: int) -> Floats:
    # Without a step a fraction of a channel counts as one.
    return widths if multiple == 1 else np.ceil(widths / multiple) * multiple

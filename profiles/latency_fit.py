"""Fits a latency model to a few measured variants of a network.

Knows layers as shapes and times; knows neither devices nor how the times were taken.

There are more coefficients than a dozen variants can tell apart, so each is held near what its kind shows:
a layer near all layers of its shape (operator, kernel, stride), those near all layers of the network, and
these near the bilinear rule. How firmly is chosen by leaving out one variant at a time, which also gives the
model's `error`. Coefficients are never negative: no wider layer may come out faster, steps apart. Last, the
whole prediction is brought in line with the whole latencies by a factor and an offset: layers add up their
errors, and a small network is faster than its layers say (its weights stay in a cache).

Operators that are no layer are told from the activations that layers leave: of a kind with many of them, from
all activations of each resolution; of one that works on few (the pooling behind one layer), from the outputs
of those layers, which the variants show. The latter where it says clearly more of a variant left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .latency_model import Floats, LatencyModel, term_names, terms
from .variants import MeasuredVariant

if TYPE_CHECKING:
    from .latency_profile import LayerProfile

STEPS = (1, 4, 8, 16)
#: How many measured variants a prior counts as: what cross-validation chooses from.
FIRMNESS = (0.03, 0.1, 0.3, 1.0, 3.0)
#: The network and its shapes see hundreds of times; more than a hint of the rule before hides the steps.
_POOL_FIRMNESS = 0.03
#: Operators that are no layer follow few numbers, seen once per variant and kind.
_OTHER_FIRMNESS = 0.02
#: Most layers whose outputs one kind of them is told from, and what share of the squared error each further
#: one has to take away: among dozens some layer always explains a little.
_MOST_OUTPUTS, _WORTH = 3, 0.5
#: Few layers are taken where they leave at most this share of the squared error of variants left out.
_FEW_WORTH = 0.7
_BASELINE_WEIGHT = 4.0
#: How firmly the factor and the offset (as a share of the unpruned latency) are held at 1 and 0.
_FACTOR_FIRMNESS, _OFFSET_FIRMNESS = 0.1, 1.0


@dataclass(frozen=True, eq=False)
class _Observed:
    """Arrays over V variants: of L layers, T terms, K kinds of other operators and S regressors."""

    terms: Floats  # (V, L, T)
    layer_ms: Floats  # (V, L)
    other_ms: Floats  # (V, K)
    maps: Floats  # (V, 1 + S): constant, then sizes of activations
    model_ms: Floats  # (V,)

    def without(self, variant: int) -> _Observed:
        kept = np.arange(len(self.model_ms)) != variant
        return _Observed(*(getattr(self, key)[kept] for key in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class _Network:
    """What stays the same over the variants."""

    classes: tuple[tuple[int, ...], ...]  # layers of one shape, by position
    allowed: NDArray[np.bool_]  # (L, T)
    rule: Floats  # (L, T): the bilinear rule, rows of sum 1
    activations: Floats  # (S, L, T): weights of the terms that say how large some activations are
    output: int  # the term that is a layer's output, unpruned 1


def fit_latency_model(layers: Sequence[LayerProfile], measured: Sequence[MeasuredVariant]) -> LatencyModel:
    """Fit a model of kind "fitted".

    Args:
        layers: the unpruned layers.
        measured: at least four variants of the network; the first is the unpruned one.

    Raises:
        ValueError: too few variants, or one with other layers.
    """
    if len(measured) < 4:
        raise ValueError(f"a fit needs at least four measured variants, got {len(measured)}")
    wrong = [len(m.layer_ms) for m in measured if len(m.layer_ms) != len(layers)]
    if wrong:
        raise ValueError(f"every variant must have the model's {len(layers)} layers, got one of {wrong[0]}")
    network = _network(layers)
    observed = _observed(network, layers, measured)
    measured_ms = observed.model_ms[1:]
    unseen = _left_out(network, observed)
    errors = {firmness: predicted / measured_ms - 1 for firmness, predicted in unseen.items()}
    best = min(FIRMNESS, key=lambda firmness: float(np.sqrt(np.mean(errors[firmness] ** 2))))
    coefficients, constant_ms = _fit(network, observed, best, _others(network, observed))
    return LatencyModel(
        kind="fitted",
        in_channels=tuple(layer.in_channels for layer in layers),
        out_channels=tuple(layer.out_channels for layer in layers),
        coefficients=tuple(tuple(float(f"{c:.6g}") for c in row) for row in coefficients),
        other_ms=constant_ms,
        steps=STEPS,
        error=float(np.percentile(np.abs(errors[best]), 90)),
        checks=tuple(zip(unseen[best].tolist(), measured_ms.tolist(), strict=True)),
    )


def _network(layers: Sequence[LayerProfile]) -> _Network:
    names = term_names(STEPS)
    shapes: dict[tuple[object, ...], list[int]] = {}
    allowed = np.ones((len(layers), len(names)), dtype=bool)
    rule = np.zeros((len(layers), len(names)))
    for i, layer in enumerate(layers):
        depthwise = layer.groups > 1 and layer.groups == layer.in_channels
        shapes.setdefault((layer.op, layer.kernel, layer.stride, depthwise), []).append(i)
        rule[i, names.index("out/1" if depthwise else "pair/1")] = 1.0
        if depthwise:  # Its two widths are one: the output's terms say it all.
            allowed[i] = [name.startswith(("constant", "out", "rough_map")) for name in names]
    classes = tuple(tuple(found) for found in shapes.values())
    return _Network(classes, allowed, rule, _activations(layers), names.index("out/1"))


def _activations(layers: Sequence[LayerProfile]) -> Floats:
    """Sizes of activations, as weights `(S, L, T)` of terms; each is 1 for the unpruned network.

    Of each resolution by itself: a pooling or a concatenation works at one, so its time says nothing of
    layers elsewhere. And of the whole network, for runtimes that store channels in blocks.
    """
    names = term_names(STEPS)
    areas = np.array([np.prod(layer.output_hw or (1,)) for layer in layers])
    sizes = areas * [float(layer.out_channels) for layer in layers]
    found = []
    for area in np.unique(areas):
        weights = np.zeros((len(layers), len(names)))
        weights[:, names.index("out/1")] = np.where(areas == area, sizes, 0.0)
        found.append(weights / weights.sum())
    for name in names:
        if name.startswith(("out/", "rough_map/")) and name != "out/1":
            weights = np.zeros((len(layers), len(names)))
            weights[:, names.index(name)] = sizes / sizes.sum()
            found.append(weights)
    return np.array(found)


def _observed(
    network: _Network, layers: Sequence[LayerProfile], measured: Sequence[MeasuredVariant]
) -> _Observed:
    base_in = np.array([layer.in_channels for layer in layers], dtype=float)
    base_out = np.array([layer.out_channels for layer in layers], dtype=float)
    ins = np.array([m.in_channels for m in measured], dtype=float)
    outs = np.array([m.out_channels for m in measured], dtype=float)
    found = terms(ins, outs, base_in, base_out, STEPS)
    kinds = sorted({kind for m in measured for kind in m.other})
    maps = np.einsum("vlt,slt->vs", found, network.activations)
    return _Observed(
        terms=found,
        layer_ms=np.array([m.layer_ms for m in measured]),
        other_ms=np.array([[m.other.get(kind, 0.0) for kind in kinds] for m in measured]),
        maps=np.column_stack([np.ones(len(measured)), maps]),
        model_ms=np.array([m.model_ms for m in measured]),
    )


def _left_out(network: _Network, observed: _Observed) -> dict[float, Floats]:
    """By firmness, each pruned variant's latency in ms, predicted without it."""
    found: dict[float, list[float]] = {firmness: [] for firmness in FIRMNESS}
    for left_out in range(1, len(observed.model_ms)):
        rest = observed.without(left_out)
        others = _others(network, rest)
        for firmness in FIRMNESS:
            coefficients, constant_ms = _fit(network, rest, firmness, others)
            found[firmness].append(constant_ms + float(np.sum(observed.terms[left_out] * coefficients)))
    return {firmness: np.array(values) for firmness, values in found.items()}


def _weights(observed: _Observed) -> Floats:
    """How much each variant's errors count, `(V,)`."""
    # Errors count as shares of the variant's own latency: a deep cut's tenth of a millisecond is a lot.
    weight = 1 / observed.model_ms
    # The others were measured relative to the unpruned model, which therefore has no error of its own.
    weight[0] *= _BASELINE_WEIGHT
    return weight


def _fit(
    network: _Network, observed: _Observed, firmness: float, others: tuple[Floats, float]
) -> tuple[Floats, float]:
    """Coefficients `(L, T)` in ms and the constant in ms, with those of the other operators."""
    weight = _weights(observed)
    whole = observed.model_ms[0]
    base_ms = observed.layer_ms[0]
    everything = tuple(range(len(base_ms)))
    shared = _pool(network, observed, everything, network.rule, weight, _POOL_FIRMNESS)
    result = np.zeros_like(network.rule)
    for members in network.classes:
        # A shape's own figures, as far as its layers can tell them from the network's.
        prior = _pool(network, observed, members, shared, weight, _POOL_FIRMNESS)
        for layer in members:
            result[layer] = _held(
                observed.terms[:, layer] * weight[:, None],
                observed.layer_ms[:, layer] * weight,
                prior[layer] * base_ms[layer],
                network.allowed[layer],
                np.sqrt(firmness) / whole,
            )
    result, constant_ms = result + others[0], others[1]
    predicted = constant_ms + np.einsum("vlt,lt->v", observed.terms, result)
    factor, offset_ms = _in_line(predicted, observed.model_ms, weight)
    return result * factor, constant_ms * factor + offset_ms


def _others(network: _Network, observed: _Observed) -> tuple[Floats, float]:
    """Coefficients `(L, T)` in ms and the constant in ms of the operators that are no layer."""
    weight = _weights(observed)
    # The constant, then each layer's output: (V, 1 + L).
    outputs = np.column_stack([np.ones(len(weight)), observed.terms[:, :, network.output]])
    result, constant_ms = np.zeros_like(network.rule), 0.0
    for kind in observed.other_ms.T:
        spread: list[float] = []
        few: list[float] = []
        for left_out in range(1, len(kind)):
            kept = np.arange(len(kind)) != left_out
            columns = _worked_on(outputs[kept], kind[kept], weight[kept])
            for rows, errors in ((observed.maps, spread), (outputs[:, columns], few)):
                found = _other(rows[kept], kind[kept], weight[kept])
                errors.append(float((rows[left_out] @ found - kind[left_out]) * weight[left_out]))
        if np.square(few).sum() < _FEW_WORTH * np.square(spread).sum():
            columns = _worked_on(outputs, kind, weight)
            found = _other(outputs[:, columns], kind, weight)
            result[np.array(columns[1:], dtype=int) - 1, network.output] += found[1:]
        else:
            found = _other(observed.maps, kind, weight)
            result += np.einsum("s,slt->lt", found[1:], network.activations)
        constant_ms += float(found[0])
    return result, constant_ms


def _other(rows: Floats, kind_ms: Floats, weight: Floats) -> Floats:
    """Milliseconds of one kind of operator per regressor, the constant first."""
    prior = np.zeros(rows.shape[1])
    prior[0] = kind_ms[0]
    pull = float(np.sqrt(_OTHER_FIRMNESS) * weight[0] / _BASELINE_WEIGHT)
    return _held(rows * weight[:, None], kind_ms * weight, prior, np.ones(len(prior), dtype=bool), pull)


def _worked_on(outputs: Floats, kind_ms: Floats, weight: Floats) -> list[int]:
    """Columns of `outputs`, the constant and then layers, that tell a kind's latency best, best first."""
    rows, wanted = outputs * weight[:, None], kind_ms * weight
    chosen, error = [0], float("inf")
    while len(chosen) <= _MOST_OUTPUTS:
        # All candidates at once: (1 + L, V, k + 1).
        base = np.broadcast_to(rows[:, chosen], (rows.shape[1], len(rows), len(chosen)))
        tried = np.concatenate([base, rows.T[:, :, None]], axis=2)
        gram = np.einsum("lvi,lvj->lij", tried, tried)
        gram += 1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(gram.shape[1])
        found = np.linalg.solve(gram, np.einsum("lvi,v->li", tried, wanted)[:, :, None])[:, :, 0]
        errors = np.square(np.einsum("lvi,li->lv", tried, found) - wanted).sum(axis=1)
        errors[chosen] = np.inf
        # No wider layer makes anything faster; a constant of 0 may come out a little below.
        errors[(found[:, 1:] < 0).any(axis=1) | (found[:, 0] < -0.1 * kind_ms.max())] = np.inf
        best = int(np.argmin(errors))
        if not errors[best] < _WORTH * error:
            break
        chosen.append(best)
        error = float(errors[best])
    return chosen


def _in_line(predicted: Floats, measured: Floats, weight: Floats) -> tuple[float, float]:
    """Factor and offset in ms that bring whole predictions nearest to the measured latencies, `(V,)` each."""
    whole = float(measured[0])
    rows = np.column_stack([predicted, np.full(len(predicted), whole)]) * weight[:, None]
    firm = np.diag(np.sqrt([_FACTOR_FIRMNESS, _OFFSET_FIRMNESS]))
    wanted = np.concatenate([measured * weight, firm @ [1.0, 0.0]])
    factor, share = np.linalg.lstsq(np.vstack([rows, firm]), wanted, rcond=None)[0]
    # However much smaller than all that was measured, a network takes time.
    lowest = -0.5 * float(factor * predicted.min()) / whole
    return float(factor), max(float(share), lowest) * whole


def _pool(
    network: _Network,
    observed: _Observed,
    members: tuple[int, ...],
    prior: Floats,
    weight: Floats,
    firmness: float,
) -> Floats:
    """Coefficients that layers have in common, as shares of each one's unpruned latency.

    Returns:
        `(L, T)`; rows of `members` are filled, the sum of a row's terms is 1 for the unpruned layer.
    """
    base_ms = observed.layer_ms[0]
    whole = observed.model_ms[0]
    chosen = list(members)
    # Beside the shares, a time that every layer takes however small it is.
    overhead_ms = np.full(len(chosen), float(np.median(base_ms)))
    scaled = observed.terms[:, chosen] * base_ms[chosen][:, None] * network.allowed[chosen]
    rows = np.concatenate([scaled, np.broadcast_to(overhead_ms[:, None], (*scaled.shape[:2], 1))], axis=2)
    rows = rows * weight[:, None, None]
    centre = np.average(prior[chosen], axis=0, weights=base_ms[chosen] + 1e-12)
    total_ms = float(base_ms[chosen].sum())
    found = _held(
        rows.reshape(-1, rows.shape[2]),
        (observed.layer_ms[:, chosen] * weight[:, None]).ravel(),
        np.append(centre, 0.0),
        np.ones(len(centre) + 1, dtype=bool),
        # The pull must not fade where a few layers carry little of the latency.
        np.sqrt(firmness / len(chosen)) * total_ms / whole,
    )
    result = np.zeros_like(prior)
    for layer in chosen:
        share = np.where(network.allowed[layer], found[:-1], 0.0)
        share[0] += found[-1] * float(np.median(base_ms)) / max(base_ms[layer], 1e-9)
        unpruned = float(observed.terms[0, layer] @ share)
        result[layer] = share / unpruned if unpruned > 0 else prior[layer]
    return result


def _held(rows: Floats, wanted: Floats, prior: Floats, allowed: NDArray[np.bool_], pull: float) -> Floats:
    """Non-negative least squares, held near a prior with a strength of `pull` per coefficient."""
    from scipy.optimize import nnls

    free = np.flatnonzero(allowed)
    # Normal equations first: the rows are many more than the coefficients.
    gram = rows[:, free].T @ rows[:, free] + pull**2 * np.eye(len(free))
    target = rows[:, free].T @ wanted + pull**2 * prior[free]
    root = np.linalg.cholesky(gram + 1e-12 * np.trace(gram) / len(free) * np.eye(len(free)))
    result = np.zeros(len(prior))
    result[free] = nnls(root.T, np.linalg.solve(root, target))[0]
    return result

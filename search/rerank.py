"""Reranking: cached scores weighed with one device's cached latency profile, summed over groups.
Microseconds, no forward pass.

Source: Nechypurenko & Sorokin 2026, doi 10.30837/0135-1710.2026.189.034, equations (5) to (7). Equation (7)
and its stated property decide (among channels of equal score the one of the slower layer goes first), not the
sentence in section 6.3 that says the opposite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .groups import ChannelGroups

FloatArray = NDArray[np.float64]


def normalise(delta_ms: Mapping[str, float]) -> dict[str, float]:
    """Equation (6): per-channel latencies divided by the largest one, in (0, 1].

    Args:
        delta_ms: layer name to latency per output channel, equation (5).

    Raises:
        ValueError: no layer has a positive latency.
    """
    largest = max(delta_ms.values(), default=0.0)
    if largest <= 0:
        raise ValueError(
            f"at least one layer needs a positive latency, got {dict(list(delta_ms.items())[:3])}"
        )
    # A runtime may fold a layer into its neighbour and report nothing for it; a zero would make its score
    # infinite.
    smallest = min(v for v in delta_ms.values() if v > 0)
    return {layer: max(value, smallest) / largest for layer, value in delta_ms.items()}


def hardware_scores(
    scores: Mapping[str, FloatArray], delta_norm: Mapping[str, float], beta: float
) -> dict[str, FloatArray]:
    """Equation (7) for every layer: `S_hw = S_T / delta_norm ** beta`.

    Args:
        scores: layer name to `(channels,)`, equation (3).
        delta_norm: layer name to normalised latency per channel, equation (6); layers that are missing keep
            their score.
        beta: in [0, 1]; 0 returns the scores themselves, exactly.

    Raises:
        ValueError: beta outside [0, 1].
    """
    _check_beta(beta)
    if beta == 0.0:
        return dict(scores)
    return {layer: values / delta_norm.get(layer, 1.0) ** beta for layer, values in scores.items()}


def weighed_by_group(scores: Sequence[FloatArray], saved: FloatArray, beta: float) -> list[FloatArray]:
    """Equation (7) for group scores, with what a channel of the group saves in the place of its layer's
    latency: `S / (saved / max saved) ** beta`.

    Args:
        scores: one `(channels,)` array per group.
        saved: `(groups,)`, what removing one channel saves, of any quantity; see `costs.WidthCost.marginal`.
        beta: in [0, 1]; 0 returns the scores themselves, exactly.

    Raises:
        ValueError: beta outside [0, 1], or no group saves anything.
    """
    _check_beta(beta)
    if beta == 0.0:
        return list(scores)
    norm = normalise({str(i): float(value) for i, value in enumerate(saved)})
    return [values / norm[str(i)] ** beta for i, values in enumerate(scores)]


def _check_beta(beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta}")


def group_scores(scores: Mapping[str, FloatArray], groups: ChannelGroups) -> list[FloatArray]:
    """Sum the members' scores of each group channel.

    Returns:
        One array `(channels,)` per group, in the order of `groups.groups`.

    Raises:
        ValueError: no member of a group has a score.
    """
    for group in groups.groups if groups.owners - scores.keys() else ():
        if not any(member.layer in scores for member in group.weighted):
            raise ValueError(
                f"group {group.name} has no scored layer; scores cover {len(scores)} layers, none of "
                f"{[m.layer for m in group.weighted]}"
            )
    return groups.collect(scores)

"""A cheap stand-in for accuracy: how much of the channel scores a plan keeps. No forward pass, no training.

Orders plans of one model, roughly: a first-order score says nothing of what removed channels meant to each
other. Knows neither devices nor what a trial measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .groups import ChannelGroups
from .plan import PruningPlan


def score_kept(
    plan: PruningPlan, scores: Sequence[NDArray[np.float64]], groups: ChannelGroups
) -> float | None:
    """Share of all groups' scores that is left after a plan, in [0, 1]; 1 for the unpruned model.

    Args:
        scores: one array `(channels,)` per group, see `search.rerank.group_scores`; higher is kept. A
            criterion that gives negative scores counts from its lowest one.

    Returns:
        None where all channels score the same and nothing can be said.
    """
    floor = min(0.0, *(float(values.min()) for values in scores))
    total = sum(float((values - floor).sum()) for values in scores)
    if not total > 0:
        return None
    lost = 0.0
    for group, values in zip(groups.groups, scores, strict=True):
        if group.weighted and all(plan.inside_blocks(member.layer) for member in group.weighted):
            lost += float((values - floor).sum())
        elif group.name in plan.removed:
            lost += float((values[list(plan.removed[group.name])] - floor).sum())
    return 1.0 - lost / total

"""Steps 1 and 2 of a trial: the cached scores weighed by the device, and what goes by them.

Everything that `search` may choose of a plan comes together here: criterion, cost, budget, allocation, steps
and depth. Pure arithmetic on what is known of the model and the device; only a schedule of several steps asks
for scores that no cache holds yet, those of what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .allocation import Demand, Widths, complexity, rank, uniform
from .budget import channels_removed, cost_removed
from .costs import quantity_of, unit_shares
from .depth import weakest_blocks, without_blocks
from .knapsack import knapsack
from .plan import PruningPlan
from .rerank import group_scores, hardware_scores, weighed_by_group
from .result import TrialParams
from .sensitivity import sensitivity

if TYPE_CHECKING:
    from .evidence import Evidence

#: Below every score: a channel that is gone goes first.
_GONE = -1.0


def rerank(
    params: TrialParams, known: Evidence, gone: PruningPlan | None = None
) -> list[NDArray[np.float64]]:
    """Step 1: the device's latency weighs the cached scores, equation (7), summed over groups.

    Args:
        gone: channels that are gone already: the scores are those of the network without them, and they
            themselves come first.
    """
    groups = known.groups
    counts = np.zeros(len(groups.groups))
    if gone is None:
        scores = known.scores[params.criterion].layers
    else:
        scores = known.rescore(params.criterion, gone).layers
        counts += [len(gone.removed.get(group.name, ())) for group in groups.groups]
    # With `sensitivity` beta weighs the measured loss instead.
    if params.allocation != "sensitivity" and params.cost == "layer":
        result = group_scores(hardware_scores(scores, known.delta_norm, params.beta), groups)
    else:
        result = known.group_scores(params.criterion) if gone is None else group_scores(scores, groups)
    if params.allocation != "sensitivity" and params.cost != "layer":
        saved = known.cost(quantity_of(params.cost)).marginal(counts)
        result = weighed_by_group(result, saved, params.beta)
    if gone is not None:
        result = [values.copy() for values in result]
        for group, values in zip(groups.groups, result, strict=True):
            values[list(gone.removed.get(group.name, ()))] = _GONE
    return result


def make_plan(params: TrialParams, scores: list[NDArray[np.float64]], known: Evidence) -> PruningPlan:
    """Step 2: which channels go, in one step or in several with scores taken anew, and which blocks."""
    groups = known.groups
    of_channels = params.ratio_of == "channels"
    share = channels_removed(groups) if of_channels else cost_removed(known.cost(params.ratio_of))
    widths = Widths(params.round_to, known.min_channels)
    plan = PruningPlan(known.model_key, {})
    counts = np.zeros(len(groups.units), dtype=np.int64)
    for step in range(1, params.steps + 1):
        if params.ratio == 0.0:
            break
        if step > 1 and plan.removed:
            scores = rerank(params, known, plan)
        demand = Demand(groups, scores, params.ratio * step / params.steps, share, widths)
        counts = np.maximum(counts, allocate(params, demand, known))  # what is gone stays gone
        plan = PruningPlan.of(known.model_key, groups, demand.pick(counts))
    if params.depth:
        layer_ms = {layer.layer: layer.timing.mean_ms for layer in known.profile.layers}
        gone = weakest_blocks(known.blocks, known.block_scores, layer_ms, params.depth, params.beta)
        plan = without_blocks(plan, groups, gone)
    return plan


def allocate(params: TrialParams, demand: Demand, known: Evidence) -> NDArray[np.int64]:
    """How many channels each unit loses, `(units,)`, by the rule that `params.allocation` names."""
    if params.allocation == "uniform":
        return uniform(demand)
    if params.allocation == "knapsack":
        return knapsack(demand)
    cost = known.cost(quantity_of(params.cost))
    if params.allocation == "complexity":
        return complexity(demand, unit_shares(cost.by_layer(), demand.groups), known.seed)
    if params.allocation == "sensitivity":
        return sensitivity(demand, known.curves[params.criterion], cost, params.beta)
    return rank(demand)

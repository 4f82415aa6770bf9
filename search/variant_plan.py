"""The random plans behind a profile: what the variants of a network lose that its latency model is fitted to.

Knows groups and widths; no scores, no device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from profiles.variants import Variant

from .allocation import Demand, Widths, complexity, rank
from .budget import channels_removed
from .costs import unit_shares
from .groups import ChannelGroups
from .plan import PruningPlan


def variant_plan(
    variant: Variant, model_key: str, groups: ChannelGroups, work: Mapping[str, float], min_channels: int
) -> PruningPlan:
    """The same plan for the same variant, on any machine.

    Args:
        work: layer to its part of the network's MACs; decides where a costly variant is narrow.
    """
    rng = np.random.default_rng(variant.seed)
    # One share per group, so that the variants differ in shape and not only in size.
    scores = [rng.random(g.channels) + rng.normal(0.0, variant.spread) for g in groups.groups]
    widths = Widths(variant.round_to, min_channels)
    demand = Demand(groups, scores, variant.ratio, channels_removed(groups), widths)
    counts = complexity(demand, unit_shares(work, groups), variant.seed) if variant.costly else rank(demand)
    return PruningPlan.of(model_key, groups, demand.pick(counts))

"""What plans are made from: everything known of a model on a device that decides which channels go.

Plain records and arithmetic on them, all of it cached, so that a plan needs neither the model nor the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from profiles.device import Device
from profiles.latency_profile import LatencyProfile

from .costs import WidthCost
from .depth import Block
from .groups import ChannelGroups
from .plan import PruningPlan
from .rerank import group_scores, normalise
from .scores import ChannelScores
from .sensitivity import LossCurves


def _no_rescoring(criterion: str, plan: PruningPlan) -> ChannelScores:
    raise ValueError("this was made without rescoring, so steps must be 1")


@dataclass(frozen=True, eq=False, kw_only=True)
class Evidence:
    """What plans for one device are made from. Made once, read-only.

    Attributes:
        model_key: digest of the unpruned model.
        scores: criterion name to cached scores.
        profile: the device's cached latency profile.
        min_channels: kept by every group at least.
        seed: of what is drawn by chance.
        curves: criterion name to cached loss curves; only those that the study's allocations need.
        blocks, block_scores: what can go as a whole, and each one's cached score; empty where the study
            searches no depth.
        rescore: scores by a criterion of what a plan leaves; only schedules of several steps ask.
    """

    device: Device
    model_key: str
    groups: ChannelGroups
    scores: Mapping[str, ChannelScores]
    profile: LatencyProfile
    min_channels: int
    seed: int = 0
    curves: Mapping[str, LossCurves] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    block_scores: Mapping[str, float] = field(default_factory=dict)
    rescore: Callable[[str, PruningPlan], ChannelScores] = _no_rescoring
    _costs: dict[str, WidthCost] = field(default_factory=dict, init=False, repr=False)
    _group_scores: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict, init=False, repr=False)

    def cost(self, quantity: str) -> WidthCost:
        """A quantity as a function of widths, made once; see `costs.WidthCost`."""
        if quantity not in self._costs:
            self._costs[quantity] = WidthCost.of(quantity, self.groups, self.profile)
        return self._costs[quantity]

    @cached_property
    def delta_norm(self) -> Mapping[str, float]:
        """Equation (6): layer to its normalised latency per channel on this device, made once."""
        return normalise(self.profile.delta_ms)

    def group_scores(self, criterion: str) -> list[NDArray[np.float64]]:
        """Cached scores summed over the members of each group, made once; not to be changed."""
        if criterion not in self._group_scores:
            self._group_scores[criterion] = group_scores(self.scores[criterion].layers, self.groups)
        return self._group_scores[criterion]

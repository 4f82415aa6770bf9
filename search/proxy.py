"""A cheap stand-in for accuracy: what a plan keeps, by numbers that are cached. No forward pass, no training.

By the loss curves where the study has them, else by the channel scores. Orders plans of one model, roughly: a
first-order score says nothing of what removed channels meant to each other, a curve nothing of other groups.
Knows no devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .allocation import unit_scores
from .groups import ChannelGroups
from .plan import PruningPlan
from .result import TrialResult

if TYPE_CHECKING:
    from .sensitivity import LossCurves
    from .trial import Bench

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Proxy:
    """What a plan promises.

    Attributes:
        kind: where it comes from, loss curves or scores; those of different kinds do not compare.
        kept: see `loss_kept` and `score_kept`; in [0, 1], higher is better, 1 for the unpruned model.
    """

    kind: Literal["curves", "scores"]
    kept: float

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "kept": self.kept}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proxy:
        return cls(data["kind"], float(data["kept"]))


def promise(plan: PruningPlan, bench: Bench) -> Proxy | None:
    """What a plan promises; by one criterion for all plans of a study, or their values would not compare.

    Returns:
        None where all channels score the same and nothing can be said.
    """
    criterion = next(iter(bench.scores))
    by_group = bench.group_scores(criterion)
    # What whole blocks mean to the loss no curve says.
    if criterion in bench.curves and not bench.blocks:
        return Proxy("curves", loss_kept(plan, bench.curves[criterion], by_group, bench.groups))
    kept = score_kept(plan, by_group, bench.groups)
    return None if kept is None else Proxy("scores", kept)


def promised(result: TrialResult) -> Proxy | None:
    """What a trial's plan promised; None where nothing was said."""
    data = result.details.get("proxy")
    return None if data is None else Proxy.from_json(data)


def loss_kept(
    plan: PruningPlan, curves: LossCurves, scores: Sequence[FloatArray], groups: ChannelGroups
) -> float:
    """The unpruned model's loss over the one that its curves expect of a plan, in (0, 1].

    Args:
        scores: as of `score_kept`, by the curves' criterion.
    """
    counts = [len(plan.removed.get(name, ())) for name in curves.units]
    prices = curves.prices(unit_scores(groups, scores), float(sum(counts)))
    rise = sum(float(price[:count].sum()) for price, count in zip(prices, counts, strict=True))
    return curves.stages[0].loss / (curves.stages[0].loss + rise)


def score_kept(plan: PruningPlan, scores: Sequence[FloatArray], groups: ChannelGroups) -> float | None:
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

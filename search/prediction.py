"""The latency that a device's model expects of a plan. Knows no model and no scores; measures nothing."""

from __future__ import annotations

from profiles.latency_profile import LatencyProfile

from .plan import PruningPlan


def predict_ms(plan: PruningPlan, profile: LatencyProfile) -> float:
    """Latency of a plan by the device's model, in ms. Layers that only training uses are not in the profile
    and cost nothing; those of a block that goes cost nothing either.
    """
    deployed = {layer.layer for layer in profile.layers}
    widths = {name: pair for name, pair in plan.widths.items() if name in deployed}
    return profile.predict_ms(widths, {name for name in deployed if plan.inside_blocks(name)})

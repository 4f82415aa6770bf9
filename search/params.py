"""The `search` section of a study file as one trial's parameters: what is fixed, and a point of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .result import TrialParams
from .sections import Choices, Range, SearchSection

KEYS = (
    "beta", "ratio", "ratio_of", "criterion", "cost", "allocation", "round_to", "steps", "depth", "recovery",
)  # fmt: skip


def fixed_params(search: SearchSection, auto_round_to: int) -> TrialParams:
    """The parameters of a search section in which beta and ratio are fixed; of other searched keys the first
    choice or the lowest value.

    Args:
        auto_round_to: what `round_to: auto` stands for on this device.
    """
    values: dict[str, Any] = {}
    for key in KEYS:
        value = getattr(search, key)
        if isinstance(value, Choices):
            value = value.choices[0]
        elif isinstance(value, Range):
            value = value.low
        values[key] = value
    return _made(values, auto_round_to)


def params_at(search: SearchSection, point: Mapping[str, Any], auto_round_to: int) -> TrialParams:
    """The parameters at a point of the searched space; what is not searched is as the study file fixes it.

    Args: as `fixed_params`.
    """
    return _made({key: point.get(key, getattr(search, key)) for key in KEYS}, auto_round_to)


def _made(values: dict[str, Any], auto_round_to: int) -> TrialParams:
    if values["round_to"] == "auto":
        values["round_to"] = auto_round_to
    return TrialParams(**values)

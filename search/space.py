"""The search space: the study file's `search` section as Optuna distributions, and suggestions as
`TrialParams`.

Two views of every searched key: the range a sampler draws from, and the wider one a trial is stored with,
which also holds the unpruned model (beta 0, ratio 0), so that trial 0 is an ordinary trial.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from .params import KEYS, params_at
from .result import TrialParams
from .sections import Choices, Range, SearchSection

#: Keys that are 0 for the unpruned model.
AMOUNTS = ("beta", "ratio", "depth")
#: Complete trials without which importances say nothing.
IMPORTANCE_TRIALS = 8


def searched_space(search: SearchSection) -> dict[str, BaseDistribution]:
    """What samplers draw from: one distribution per searched key; fixed keys are absent."""
    space: dict[str, BaseDistribution] = {}
    for key in KEYS:
        value = getattr(search, key)
        if isinstance(value, Range):
            space[key] = FloatDistribution(value.low, value.high)
        elif isinstance(value, Choices):
            space[key] = CategoricalDistribution(value.choices)
    return space


def searched_keys(search: SearchSection) -> dict[str, Any]:
    """Searched key to its choices, None for a range, whose ends may move in the course of a study."""
    return {key: list(getattr(d, "choices", ())) or None for key, d in searched_space(search).items()}


def stored_space(search: SearchSection) -> dict[str, BaseDistribution]:
    """What trials are stored with: `searched_space` widened to hold the unpruned model."""
    return {key: widened(key, distribution) for key, distribution in searched_space(search).items()}


def widened(key: str, distribution: BaseDistribution) -> BaseDistribution:
    """What a key is stored with, from what it is drawn from."""
    if isinstance(distribution, FloatDistribution):
        return FloatDistribution(0.0, distribution.high)
    if key in AMOUNTS and isinstance(distribution, CategoricalDistribution):
        return CategoricalDistribution(tuple(dict.fromkeys((0.0, *distribution.choices))))
    return distribution


def suggest(trial: optuna.Trial, search: SearchSection, auto_round_to: int) -> TrialParams:
    """Ask Optuna for every searched key and fill in the fixed ones.

    Args:
        auto_round_to: what `round_to: auto` stands for on this device.
    """
    point: dict[str, Any] = {}
    for key, distribution in stored_space(search).items():
        if isinstance(distribution, FloatDistribution):
            point[key] = trial.suggest_float(key, distribution.low, distribution.high)
        elif isinstance(distribution, CategoricalDistribution):
            point[key] = trial.suggest_categorical(key, distribution.choices)
    return params_at(search, point, auto_round_to)


def scattered_points(search: SearchSection, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` points drawn from the searched space, all alike likely; none where nothing is searched.

    Every tenth has the largest ratio, which a draw would never come upon: nothing else is as fast.
    """
    space = searched_space(search)
    if not space:
        return []
    points = []
    for index, row in enumerate(np.random.default_rng(seed).random((count, len(space)))):
        point: dict[str, Any] = {}
        for share, (key, distribution) in zip(row, space.items(), strict=True):
            if isinstance(distribution, FloatDistribution):
                point[key] = distribution.low + float(share) * (distribution.high - distribution.low)
            elif isinstance(distribution, CategoricalDistribution):
                point[key] = distribution.choices[int(share * len(distribution.choices))]
        if index % 10 == 0 and "ratio" in point:
            point["ratio"] = _largest(space["ratio"])
        points.append(point)
    return points


def _largest(distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return max(float(choice or 0) for choice in distribution.choices)
    assert isinstance(distribution, FloatDistribution)
    return distribution.high


def unpruned_point(search: SearchSection) -> dict[str, Any]:
    """Trial 0's value of every searched key."""
    point: dict[str, Any] = {}
    for key, distribution in stored_space(search).items():
        choices = getattr(distribution, "choices", None)
        point[key] = 0.0 if key in AMOUNTS else choices[0] if choices else 0.0
    return point


def unpruned(params: TrialParams) -> TrialParams:
    """The same parameters with nothing removed: trial 0's, where amounts are fixed in the study file."""
    return replace(params, beta=0.0, ratio=0.0, depth=0.0)


def known_points(search: SearchSection) -> list[dict[str, Any]]:
    """Points worth trying before any sampler has something to go on, within the searched ranges.

    Plain Taylor (beta 0) at half, three quarters and a quarter of the ratio range, and the paper's beta 0.5
    at 30%; all with as many blocks as can be kept. Half of the range comes first: what it reaches says what
    deeper plans and shallower ones may. Other searched keys are left to the sampler. Where all plans are by
    `sensitivity`, beta 1 takes the place of 0: the least measured loss for a budget of latency, where 0 does
    not look at it.
    """
    space = searched_space(search)

    def nearest(key: str, value: float) -> dict[str, Any]:
        distribution = space.get(key)
        if isinstance(distribution, FloatDistribution):
            return {key: min(max(value, distribution.low), distribution.high)}
        if isinstance(distribution, CategoricalDistribution):
            return {key: min(distribution.choices, key=lambda choice: abs(float(choice or 0) - value))}
        return {}

    ratio = space.get("ratio")
    low, high = (ratio.low, ratio.high) if isinstance(ratio, FloatDistribution) else (0.1, 0.7)
    plain = 1.0 if search.allocation == "sensitivity" else 0.0
    points: list[dict[str, Any]] = []
    for share in (0.5, 0.75, 0.25):
        points.append({**nearest("beta", plain), **nearest("ratio", low + share * (high - low))})
    points.insert(2, {**nearest("beta", 0.5), **nearest("ratio", 0.3)})
    points = [{**point, **nearest("depth", 0.0)} for point in points]
    return [p for i, p in enumerate(points) if p and p not in points[:i]]


def parameter_importances(study: optuna.Study) -> dict[str, dict[str, float]]:
    """How much each searched parameter decides, by PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255).

    Trial 0 is left out: the unpruned model is no choice of the search.

    Args:
        study: with the objectives accuracy (higher is better) and latency (lower is better), in this order.

    Returns:
        Of `front`, `accuracy` and `latency` parameter to importance, each summing to 1: what decides whether
        a trial is among the best. Empty below IMPORTANCE_TRIALS complete trials or two searched parameters.
    """
    complete = [t for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)) if t.number > 0]
    if len(complete) < IMPORTANCE_TRIALS or len({name for t in complete for name in t.params}) < 2:
        return {}
    copy = optuna.create_study(directions=study.directions)
    copy.add_trials(complete)
    # Five trials among the best at least, as the method asks for, but never more than half.
    share = max(0.1, min(0.5, 5 / len(complete)))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=share)
    targets = {"front": None, "accuracy": lambda t: -t.values[0], "latency": lambda t: t.values[1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says of every target that low values are taken for good, as meant
        return {
            name: optuna.importance.get_param_importances(copy, evaluator=evaluator, target=target)
            for name, target in targets.items()
        }

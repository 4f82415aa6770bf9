"""Samplers by name, made so that a suggestion depends on the seed, the trial's number and the trials before
it, and on nothing else.

A sampler that lives as long as its process draws differently after a restart; one that starts anew with the
same seed draws the same points again. Both are wrong for a study that may be resumed, so each trial gets a
sampler of its own.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .space import AMOUNTS, widened

SAMPLERS = ("gp", "tpe", "nsga2", "random", "grid")
_STARTUP_TRIALS = 6


class SpacedSampler(BaseSampler):
    """Draws from a declared space, whatever the trials so far were stored with.

    Optuna's samplers infer their space from the trials they see, and fall back to independent random draws
    where one trial's ranges differ; trial 0, the unpruned model, always does. Choices of an amount
    (`space.AMOUNTS`) that lack its 0 would even be an error to them, so the inner sampler sees such choices
    as a range, and what it draws is moved to the nearest choice.
    """

    def __init__(self, inner: BaseSampler, space: dict[str, BaseDistribution]):
        self._inner = inner
        self._space = space
        self._choices: dict[str, tuple[float, ...]] = {
            name: tuple(float(choice or 0.0) for choice in d.choices)
            for name, d in space.items()
            if name in AMOUNTS and isinstance(d, CategoricalDistribution)
        }
        ranges = {name: FloatDistribution(min(values), max(values)) for name, values in self._choices.items()}
        self._drawn: dict[str, BaseDistribution] = {**space, **ranges}

    def _nearest(self, name: str, value: Any) -> Any:
        return min(self._choices[name], key=lambda c: abs(c - value)) if name in self._choices else value

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {
            name: widened(name, self._space[name])
            for name, d in sorted(self._drawn.items())
            if not d.single()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        drawn = self._inner.sample_relative(study, trial, {name: self._drawn[name] for name in search_space})
        return {name: self._nearest(name, value) for name, value in drawn.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # Only TPE looks at earlier trials here; the others draw blindly, and from the choices themselves all
        # are equally likely.
        space = self._drawn if isinstance(self._inner, optuna.samplers.TPESampler) else self._space
        value = self._inner.sample_independent(
            study, trial, param_name, space.get(param_name, param_distribution)
        )
        return self._nearest(param_name, value)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        # At its end the grid sampler stops `study.optimize`, which nobody runs here, and that is an error.
        if not isinstance(self._inner, optuna.samplers.GridSampler):
            self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Nothing: the seed is the trial's."""


class NumberedSampler(BaseSampler):
    """Gives trial n the n-th given point, and asks a sampler of the trial's own where there is none.

    A trial's number is the one thing that the storage gives out to one worker only, so two workers that join
    at the same moment cannot both begin the same point, and no queue has to be filled by one of them. Trials
    that somebody enqueued are nobody's n-th.

    Args:
        make: given a trial's number, the sampler for it.
        first: points of the study's first trials, any of the searched keys, what a point leaves out is drawn;
            None where `choose` is asked for it.
        choose: given a trial, a point for it when it begins, or None where it is to be drawn; it may take a
            while.
        turn: given a trial, its turn to be drawn by a sampler that thinks. A Gaussian process keeps a core
            busy for a second and counts on what the trials in flight may bring: workers that ask all at once
            would get nearly the same point, and on one machine each would wait until all have theirs.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        first: Sequence[Mapping[str, Any] | None],
        choose: Callable[[FrozenTrial], Mapping[str, Any] | None],
        turn: Callable[[FrozenTrial], AbstractContextManager[None]],
    ):
        self._make = make
        self._first = first
        self._choose = choose
        self._turn = turn
        self._inner: BaseSampler | None = None
        self._point: Mapping[str, Any] | None = None

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        queued = {t.number for t in study.get_trials(deepcopy=False) if "fixed_params" in t.system_attrs}
        position = trial.number - sum(number < trial.number for number in queued)
        self._point = None
        if position < len(self._first) and trial.number not in queued and 0 not in queued:
            point = self._first[position]
            self._point = self._choose(trial) if point is None else point
        self._inner = self._make(trial.number)
        if self._point is None:  # or the grid would give up a cell for it
            self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        assert self._inner is not None
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        assert self._inner is not None
        if self._point is None:
            with self._turn(trial):
                return self._inner.sample_relative(study, trial, search_space)
        return {name: value for name, value in self._point.items() if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        assert self._inner is not None
        if self._point is not None and param_name in self._point:
            return self._point[param_name]
        if self._point is not None and isinstance(param_distribution, CategoricalDistribution):
            # What a point leaves open takes each choice in turn; the grid could not draw without a cell.
            choices = param_distribution.choices
            return choices[trial.number % len(choices)]
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        if self._inner is not None and self._point is None:
            self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Nothing: the seed is the trial's."""


def make_sampler(name: str, space: dict[str, BaseDistribution], *, seed: int, trial: int) -> BaseSampler:
    """The sampler for one trial.

    Args:
        name: one of `SAMPLERS`.
        space: see `search.space.searched_space`.
        seed: the study's seed.
        trial: number of the trial that is going to be asked for.

    Raises:
        ValueError: an unknown name, or `grid` with nothing to enumerate.
    """
    own_seed = int.from_bytes(hashlib.sha256(f"{seed}/{trial}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            inner: BaseSampler = optuna.samplers.GPSampler(seed=own_seed, n_startup_trials=_STARTUP_TRIALS)
        elif name == "tpe":
            inner = optuna.samplers.TPESampler(seed=own_seed, n_startup_trials=_STARTUP_TRIALS)
        elif name == "nsga2":
            inner = optuna.samplers.NSGAIISampler(seed=own_seed, population_size=8)
        elif name == "random":
            inner = optuna.samplers.RandomSampler(seed=own_seed)
        elif name == "grid":
            inner = optuna.samplers.GridSampler(grid(space), seed=seed)
        else:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return SpacedSampler(inner, space)


def grid(space: dict[str, BaseDistribution]) -> dict[str, list[Any]]:
    """The grid over a space: beta in quarters (the paper's 0, 0.25, 0.5, 0.75, 1 over the whole range), other
    numbers in six steps.
    """
    points: dict[str, list[Any]] = {}
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            points[name] = list(distribution.choices)
        elif isinstance(distribution, FloatDistribution):
            steps = 5 if name == "beta" else 6
            width = distribution.high - distribution.low
            points[name] = [distribution.low + width * i / (steps - 1) for i in range(steps)]
    return points


def grid_size(space: dict[str, BaseDistribution]) -> int:
    """The number of points of the grid over a space."""
    return math.prod(len(values) for values in grid(space).values())

"""The search space and its samplers: reproducible, resumable, guided although trial 0 is out of range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from search.params import fixed_params
from search.result import TrialParams
from search.sampler import SAMPLERS, NumberedSampler, SpacedSampler, grid, make_sampler
from search.sections import Choices, Range, SearchSection
from search.space import known_points, scattered_points, searched_space, stored_space, suggest, unpruned_point

pytestmark = pytest.mark.usefixtures("one_thread")

RANGES: dict[str, Any] = {"beta": {"low": 0.0, "high": 1.0}, "ratio": {"low": 0.1, "high": 0.7}}
SPACES: dict[str, dict[str, Any]] = {
    "ranges": RANGES,
    "with_choice": {**RANGES, "round_to": {"choices": [4, 8]}},
    "paper": {"beta": {"choices": [0.0, 0.25, 0.5, 0.75, 1.0]}, "ratio": 0.3},
    "no_zero": {"beta": {"choices": [0.5, 0.25]}, "ratio": {"choices": [0.2, 0.4, 0.6]}},
    "zero_last": {"beta": {"choices": [1.0, 0.5, 0.0]}, "ratio": {"low": 0.2, "high": 0.5}},
}


def section(**keys: Any) -> SearchSection:
    return SearchSection.model_validate(keys)


def objective(params: TrialParams) -> tuple[float, float]:
    """Accuracy and latency that a real model could have; the best beta is 0.2."""
    accuracy = 0.6 - params.ratio**2 * (0.5 + (params.beta - 0.2) ** 2) - params.round_to / 1000
    return accuracy, 10.0 * (1 - 0.8 * params.ratio * (1 + 0.3 * params.beta))


def new_study(search: SearchSection, queue: bool = True) -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.enqueue_trial(unpruned_point(search))
    for point in known_points(search) if queue and search.sampler != "grid" else ():
        study.enqueue_trial(point)
    return study


def step(study: optuna.Study, search: SearchSection, seed: int = 0) -> tuple[optuna.Trial, TrialParams]:
    """One trial as a fresh process would run it: nothing but the storage is kept between two of them."""
    waiting = study.get_trials(states=(TrialState.WAITING,))
    number = waiting[0].number if waiting else len(study.trials)
    study.sampler = make_sampler(search.sampler, searched_space(search), seed=seed, trial=number)
    trial = study.ask()
    params = suggest(trial, search, auto_round_to=16)
    study.tell(trial, list(objective(params)))
    return trial, params


def run(search: SearchSection, count: int, seed: int = 0) -> list[TrialParams]:
    study = new_study(search)
    return [step(study, search, seed)[1] for _ in range(count)]


# ---- the space -----------------------------------------------------------------------------------


def test_the_stored_space_holds_the_unpruned_model() -> None:
    search = section(**SPACES["no_zero"])
    assert stored_space(search)["beta"].choices == (0.0, 0.5, 0.25)
    assert searched_space(search)["beta"].choices == (0.5, 0.25)
    ranges = section(beta={"low": 0.2, "high": 0.4}, ratio={"low": 0.1, "high": 0.7})
    assert (stored_space(ranges)["ratio"].low, searched_space(ranges)["ratio"].low) == (0.0, 0.1)
    assert (stored_space(ranges)["ratio"].high, searched_space(ranges)["ratio"].high) == (0.7, 0.7)


@pytest.mark.parametrize("name", SPACES)
def test_the_queued_points_lie_in_the_space(name: str) -> None:
    search = section(**SPACES[name])
    stored, searched = stored_space(search), searched_space(search)
    zero = unpruned_point(search)
    assert set(zero) == set(stored)
    assert all(zero.get(key, 0.0) == 0.0 for key in ("beta", "ratio"))
    points = known_points(search)
    assert points
    assert len({tuple(p.items()) for p in points}) == len(points)
    for point in points:
        for key, value in point.items():
            assert searched[key]._contains(searched[key].to_internal_repr(value)), (key, value)


@pytest.mark.parametrize("name", SPACES)
def test_scattered_points_lie_in_the_space_and_reach_its_end(name: str) -> None:
    search = section(**SPACES[name])
    searched = searched_space(search)
    points = scattered_points(search, 200, 0)
    assert len(points) == 200
    for point in points:
        assert set(point) == set(searched)
        for key, value in point.items():
            assert searched[key]._contains(searched[key].to_internal_repr(value)), (key, value)
    if isinstance(search.ratio, Range):
        deepest = [index for index, point in enumerate(points) if point["ratio"] == search.ratio.high]
        assert deepest == list(range(0, 200, 10))
        assert len({point["beta"] for point in points[::10]}) > 2  # at more than one beta
    if isinstance(search.ratio, Choices):
        assert {point["ratio"] for point in points[::10]} == {0.6}


def test_plain_taylor_and_the_papers_setting_are_tried_first() -> None:
    points = known_points(section(**RANGES))
    assert [(p["beta"], pytest.approx(p["ratio"])) for p in points] == [
        (0.0, 0.4),
        (0.0, 0.55),
        (0.5, 0.3),
        (0.0, 0.25),
    ]
    by_loss = known_points(section(**RANGES, allocation="sensitivity"))
    assert [p["beta"] for p in by_loss] == [1.0, 1.0, 0.5, 1.0]
    clipped = known_points(section(beta={"low": 0.1, "high": 0.3}, ratio={"low": 0.4, "high": 0.6}))
    assert [(p["beta"], pytest.approx(p["ratio"])) for p in clipped] == (
        [(0.1, 0.5), (0.1, 0.55), (0.3, 0.4), (0.1, 0.45)]
    )


def test_fixed_values_and_auto() -> None:
    params = fixed_params(section(beta=0.5, ratio=0.3, ratio_of="latency", round_to={"choices": [4, 8]}), 16)
    assert params == TrialParams(beta=0.5, ratio=0.3, ratio_of="latency", round_to=4)
    assert fixed_params(section(beta=0.5, ratio=0.3), 16).round_to == 16
    assert searched_space(section(beta=0.5, ratio=0.3)) == {}


# ---- every sampler on every space ----------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SPACES)
def test_suggestions_stay_inside_what_the_study_file_says(sampler: str, name: str) -> None:
    search = section(sampler=sampler, **SPACES[name])
    found = run(search, 9 if sampler == "gp" else 14)
    assert (found[0].beta if "beta" in SPACES[name] else 0.0) == 0.0
    searched = searched_space(search)
    for params in found[1:]:
        for key, distribution in searched.items():
            value = getattr(params, key)
            assert distribution._contains(distribution.to_internal_repr(value)), (key, value)
        if "round_to" not in searched:
            assert params.round_to == 16
        if "ratio" not in searched:
            assert params.ratio == 0.3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_seed_gives_one_study_and_another_seed_another(sampler: str) -> None:
    search = section(sampler=sampler, **SPACES["with_choice"])
    first = run(search, 8, seed=4)
    assert run(search, 8, seed=4) == first
    assert run(search, 8, seed=5) != first


@pytest.mark.parametrize("sampler", ["gp", "tpe", "nsga2", "random"])
def test_a_resumed_study_does_not_repeat_its_points(sampler: str) -> None:
    """Every trial here gets a new sampler, as after a restart."""
    found = run(section(sampler=sampler, **RANGES), 11)
    assert len({(p.beta, p.ratio) for p in found}) == len(found)


def test_a_suggestion_depends_on_the_history_and_not_on_the_process() -> None:
    search = section(**RANGES)
    studies = [new_study(search) for _ in range(2)]
    for _ in range(9):
        for study in studies:
            step(study, search)
    # The second study's ninth trial ended otherwise: the next suggestion of a guided sampler differs.
    asked = []
    for study, accuracy in zip(studies, (0.1, 0.9), strict=True):
        study.sampler = make_sampler("gp", searched_space(search), seed=0, trial=9)
        trial = study.ask()
        suggest(trial, search, 8)
        study.tell(trial, [accuracy, 1.0])
        asked.append(step(study, search)[1])
    assert asked[0] != asked[1]


# ---- the model-based sampler is really used ------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_gp_suggests_all_keys_after_the_start_although_trial_0_is_outside(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: dict[int, dict[str, Any]] = {}
    real = SpacedSampler.sample_relative

    def spy(self: SpacedSampler, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        sampled[trial.number] = real(self, study, trial, search_space)
        return sampled[trial.number]

    monkeypatch.setattr(SpacedSampler, "sample_relative", spy)
    search = section(sampler="gp", **SPACES[name])
    study = new_study(search)
    for trial, params in [step(study, search) for _ in range(9)]:
        relative = sampled.get(trial.number, {})
        if trial.number < 6:
            assert relative == {}
            continue
        assert set(relative) == set(searched_space(search)), "the Gaussian process gave no suggestion"
        for key, value in relative.items():
            assert getattr(params, key) == value
            assert trial.params[key] == value


# ---- grid ----------------------------------------------------------------------------------------


def test_the_grid_holds_the_papers_betas() -> None:
    points = grid(searched_space(section(**SPACES["with_choice"])))
    assert points["beta"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert points["ratio"] == pytest.approx([0.1, 0.22, 0.34, 0.46, 0.58, 0.7])
    assert points["round_to"] == [4, 8]


def test_a_grid_is_walked_once_and_then_goes_on_without_a_crash() -> None:
    search = section(sampler="grid", **SPACES["no_zero"])
    found = run(search, 9)
    assert {(p.beta, p.ratio) for p in found[1:7]} == {(b, r) for b in (0.5, 0.25) for r in (0.2, 0.4, 0.6)}


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="sampler must be one of gp, tpe, nsga2, random, grid, got 'magic'"):
        make_sampler("magic", {}, seed=0, trial=0)


def test_a_point_is_drawn_in_its_trials_turn_and_a_given_one_needs_none() -> None:
    held: list[int] = []
    drawn: dict[int, list[int]] = {}

    class Drawing(optuna.samplers.RandomSampler):
        def sample_relative(
            self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]
        ) -> dict[str, Any]:
            drawn[trial.number] = list(held)
            return {}

    @contextmanager
    def turn(trial: FrozenTrial) -> Iterator[None]:
        held.append(trial.number)
        yield
        held.pop()

    point = {"beta": 0.25, "ratio": 0.5}
    chosen = {1: point}
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.sampler = NumberedSampler(
        lambda number: Drawing(), [point, None, None], lambda trial: chosen.get(trial.number), turn
    )
    search = section(beta=Range(low=0.0, high=1.0), ratio=Range(low=0.1, high=0.7))
    points = [suggest(study.ask(), search, 1) for _ in range(4)]
    assert [(p.beta, p.ratio) for p in points[:2]] == [(0.25, 0.5)] * 2
    assert drawn == {2: [2], 3: [3]}
    assert held == []

"""The rules that stop a trial: each with a case that it stops and the nearest one that it lets go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from profiles.device import Device
from profiles.latency_model import LatencyModel
from profiles.latency_profile import LatencyProfile, LayerProfile
from profiles.timing import Timing
from search.groups import ChannelGroup, ChannelGroups, Member
from search.plan import PruningPlan
from search.proxy import Proxy, score_kept
from search.result import TrialParams, TrialResult
from search.sections import Limits, StoppingSection
from search.stopping import FrontGate, pareto_ranks

CHANNELS = 100


def groups() -> ChannelGroups:
    index = np.arange(CHANNELS).reshape(-1, 1)
    return ChannelGroups(
        (ChannelGroup("a", CHANNELS, (Member("a", "out", index, True),)),), (), {"a": (8, CHANNELS)}
    )


def plan(removed: int) -> PruningPlan:
    """A layer of 10 ms loses channels: each is worth 0.1 ms."""
    return PruningPlan.of("model", groups(), {"a": tuple(range(removed))} if removed else {})


def profile(error: float | None) -> LatencyProfile:
    layer = LayerProfile("a", "conv", 8, CHANNELS, (3, 3), (1, 1), 1, (8, 8), Timing((10.0,), 0), (8, 8))
    model = LatencyModel.from_layers("linear", [10.0], [8], [CHANNELS], [1], 0.0)
    return LatencyProfile(
        Device("d", "onnxruntime"), "print", "model", (1, 3, 8, 8), (layer,), 10.0, {}, 8,
        replace(model, error=error),
    )  # fmt: skip


def result(
    trial: int,
    latency_ms: float,
    accuracy: float,
    *,
    kept: float | None = None,
    curve: Sequence[float] = (),
    **more: Any,
) -> TrialResult:
    known: dict[str, Any] = {
        "device": "d",
        "fingerprint": "print",
        "asked": TrialParams(),
        "state": "complete",
        "latency_p90_ms": latency_ms,
        "speedup": 20 / latency_ms,
        "epochs": tuple(curve),
        "details": {} if kept is None else {"proxy": Proxy("scores", kept).to_json()},
    }
    return TrialResult(trial=trial, accuracy=accuracy, latency_ms=latency_ms, **{**known, **more})


def promised(kept: float) -> Proxy:
    return Proxy("scores", kept)


#: The clock of the study runs at half the profile's speed: the unpruned model takes 20 ms.
UNPRUNED = result(0, 20.0, 0.8, kept=1.0)


def gate(
    *others: TrialResult,
    error: float | None = 0.1,
    limits: Limits | None = None,
    twin: int | None = None,
    **rules: Any,
) -> FrontGate:
    return FrontGate(
        UNPRUNED, lambda: [UNPRUNED, *others], profile(error), limits or Limits(), StoppingSection(**rules),
        lambda digest: twin,
    )  # fmt: skip


# ---- before training -----------------------------------------------------------------------------


def test_a_plan_that_another_trial_has_is_stopped() -> None:
    assert gate(twin=7).planned(plan(50), promised(0.5)) == "the same plan as trial 7"
    assert gate().planned(plan(50), promised(0.5)) is None


def test_a_predicted_latency_counts_with_its_error() -> None:
    limits = Limits(latency_ms=9.0)
    why = gate(limits=limits).planned(plan(48), promised(0.5))  # 10.4 ms predicted, 9.36 at the least
    assert why is not None
    assert "outside the latency limit of 9 ms: predicted 10.40 ms ± 10%" in why
    assert gate(limits=limits).planned(plan(51), promised(0.5)) is None  # 9.8 ms, 8.82 at the least
    assert gate(limits=limits, error=0.02).planned(plan(51), promised(0.5)) is not None
    assert (
        gate(limits=limits, error=None).planned(plan(1), promised(0.5)) is None
    )  # never held against anything


def test_no_faster_than_unpruned() -> None:
    assert gate().planned(plan(1), promised(0.99)) is None
    assert "no faster" in str(gate(error=0.0).planned(plan(0), promised(1.0)))
    measured = gate()
    assert measured.measured(0.99, (0.90, 1.08), 1.0) is None
    assert "no faster than the unpruned model: measured 20.20 ms" in str(
        measured.measured(1.01, (0.96, 1.06), 1.0)
    )
    assert measured.measured(1.01, (0.9, 1.1), 1.0) is None  # too busy a machine to tell


def test_parameters_and_size_have_limits() -> None:
    limits = Limits(params=1000, size_mb=4.0)
    assert gate(limits=limits).pruned(1000) is None
    assert gate(limits=limits).pruned(1001) == "1001 parameters, the limit is 1000"
    assert gate(limits=limits).measured(0.5, (0.5, 0.5), 4.0) is None
    assert "4.10 MB, the limit is 4" in str(gate(limits=limits).measured(0.5, (0.5, 0.5), 4.1))
    assert gate().pruned(10**9) is None


#: The more of the scores is kept the better, but for a scatter of 0.01.
SEEN = [
    result(1, 8.0, 0.50, kept=0.5), result(2, 12.0, 0.70, kept=0.8), result(3, 16.0, 0.76, kept=0.9),
    result(4, 10.0, 0.62, kept=0.69), result(5, 10.5, 0.60, kept=0.70),
]  # fmt: skip


def test_dominated_with_margin_before_training() -> None:
    # At most 0.50 + scatter 0.01 + margin 0.016 is expected of half the scores; trial 4 has 0.62 at 10 ms.
    seen = gate(*SEEN)
    why = seen.planned(plan(40), promised(0.45))
    assert why is not None
    assert why.startswith("dominated: predicted 12.00 ms ± 10%, at most 0.526")
    assert "trial 4 has 0.6200 at 10.00 ms" in why
    assert gate(*SEEN).planned(plan(40), promised(0.60)) is None  # as much is expected of it as trial 4 has
    assert gate(*SEEN).planned(plan(60), promised(0.45)) is None  # 7.2 ms at the least
    assert gate(*SEEN, error=0.2).planned(plan(40), promised(0.45)) is None  # 9.6 ms: only trial 1
    assert gate(*SEEN, margin=0.2).planned(plan(40), promised(0.45)) is None
    assert gate(*SEEN[:2]).planned(plan(40), promised(0.45)) is None  # too few to expect anything of them
    assert gate(*SEEN).planned(plan(40), None) is None
    assert gate(*SEEN).planned(plan(40), Proxy("curves", 0.45)) is None  # of another kind than theirs


def test_dominated_with_the_measured_latency() -> None:
    seen = gate(*SEEN, error=None)
    assert seen.planned(plan(40), promised(0.45)) is None
    assert "dominated: measured 12.00 ms, 1.667 times" in str(seen.measured(0.6, (0.55, 0.65), 1.0))
    assert seen.measured(0.6, (0.45, 0.8), 1.0) is None  # it may well be faster than trial 4


# ---- during training -----------------------------------------------------------------------------

#: Trials as damaged as the one asked about that made up for half of what they lacked.
CURVES = [
    result(n, 10.0 + n, 0.5, curve=(0.1, 0.2 + 0.01 * n, 0.5)) for n in range(1, 5)
]  # fmt: skip


def started(*others: TrialResult, ms: float = 14.5, **keys: Any) -> FrontGate:
    entered = gate(*others, **{"halving": 1, "margin": 0.0, **keys})
    assert entered.measured(ms / 20, (ms / 20, ms / 20), 1.0) is None
    return entered


def test_what_cannot_reach_the_front_is_stopped() -> None:
    assert started(*CURVES).epoch(0, 2, 0.2) is None  # its like gained up to 0.4 / 0.7 of what they lacked
    why = started(*CURVES).epoch(1, 2, 0.0)  # up to 0.29 / 0.59 from here on, and trial 1 has 0.5
    assert why is not None
    assert why.startswith("cannot reach the front: 0.0000 after epoch 1 of 2, at most 0.39")
    assert started(*CURVES).epoch(1, 2, 0.3) is None
    assert started(*CURVES, margin=0.2).epoch(1, 2, 0.0) is None
    assert started(*CURVES[:3]).epoch(1, 2, 0.0) is None  # three say too little
    assert started(*CURVES, ms=10.5).epoch(1, 2, 0.0) is None  # faster than all of them
    assert started(*CURVES).epoch(2, 2, 0.0) is None  # it is over: keep what it has


def test_an_accuracy_limit_out_of_reach() -> None:
    limits = Limits(accuracy=0.45)
    assert "cannot reach the accuracy limit of 0.45" in str(
        started(*CURVES, ms=10.5, limits=limits).epoch(1, 2, 0.0)
    )
    assert started(*CURVES, ms=10.5, limits=Limits(accuracy=0.3)).epoch(1, 2, 0.0) is None


def test_the_gains_of_less_damaged_trials_are_no_measure() -> None:
    light = [result(n, 10.0 + n, 0.82, curve=(0.78, 0.79, 0.82)) for n in range(1, 9)]
    assert started(*light).epoch(1, 2, 0.1) is None


def test_halving_lets_the_best_by_rank_go_on() -> None:
    others = [result(n, 10.0 + n, 0.6, curve=(0.1, 0.3, 0.4, 0.6)) for n in range(1, 6)]

    def halved(accuracy: float, ms: float = 14.5, done: int = 1, **keys: Any) -> str | None:
        trial = started(*others, ms=ms, halving=2, **keys)
        return trial._outpaced(done) if not trial._curve.append(accuracy) else None  # type: ignore[func-returns-value]

    assert halved(0.31) is None  # nobody is as good at that latency: first rank
    assert halved(0.29, ms=10.5) is None  # nobody is as fast
    why = halved(0.29)  # four ranks above
    assert why is not None
    assert why.startswith("outpaced: after epoch 1 ")
    assert halved(0.29, ms=11.5) is None  # one of five ranks above it
    assert halved(0.29, done=3) is None  # rungs are at 1, 2, 4, ...
    assert halved(0.29, done=2) is not None
    assert halved(0.29, after=6) is None


def test_extra_epochs_go_to_what_can_grow_the_front() -> None:
    def granted(*others: TrialResult, curve: Sequence[float], **rules: Any) -> int:
        trial = started(*others, **{"extra_epochs": 2, **rules})
        for done, accuracy in enumerate(curve):
            trial.epoch(done, 2, accuracy)
        return trial.extra_epochs()

    # The others ended after as many epochs, at 0.5; two more like the last one lead past that or do not.
    assert granted(*CURVES, curve=(0.1, 0.2, 0.31)) == 2
    assert granted(*CURVES, curve=(0.1, 0.2, 0.29)) == 0
    assert granted(*CURVES, curve=(0.1, 0.2, 0.29), extra_epochs=3) == 3
    assert granted(*CURVES, curve=(0.1, 0.2, 0.29), ms=10.5) == 2  # none is as fast
    assert granted(*CURVES, curve=(0.1, 0.2, 0.9), extra_epochs=0) == 0
    # The others were given more: what counts is where they were after two.
    longer = [replace(r, accuracy=0.7, epochs=(*r.epochs, 0.6, 0.7)) for r in CURVES]
    assert granted(*longer, curve=(0.1, 0.2, 0.51)) == 2
    assert granted(*longer, curve=(0.1, 0.2, 0.5)) == 0
    # One of another kind counts as it ended.
    scratch = replace(longer[0], asked=TrialParams(recovery="scratch"))
    assert granted(*CURVES, curve=(0.4, 0.45, 0.51)) == 2
    assert granted(*CURVES, scratch, curve=(0.4, 0.45, 0.51)) == 0
    assert granted(*CURVES, scratch, curve=(0.4, 0.45, 0.6)) == 2


@pytest.mark.parametrize(
    ("ms", "curve", "granted"),
    [
        # From 0.66 to 0.7 in two more epochs, 5% of the unpruned accuracy, up to the next one at 13 ms.
        (12.4, (0.6, 0.64, 0.66), 0),  # 3% of the latency away
        (12.1, (0.6, 0.64, 0.66), 2),  # 4.5%
        (12.4, (0.6, 0.6, 0.7), 2),  # past the next one as well
    ],
)
def test_extra_epochs_must_be_worth_their_time(ms: float, curve: Sequence[float], granted: int) -> None:
    trial = started(*CURVES, result(9, 13.0, 0.75), ms=ms, extra_epochs=2, margin=0.01)
    for done, accuracy in enumerate(curve):
        trial.epoch(done, 2, accuracy)
    assert trial.extra_epochs() == granted


@pytest.mark.parametrize(("others", "granted"), [(0, 0), (1, 2)])
def test_no_extra_epochs_before_there_is_a_front(others: int, granted: int) -> None:
    trial = started(*CURVES[:others], extra_epochs=2, after=4)
    for done, accuracy in enumerate((0.5, 0.6, 0.7)):
        trial.epoch(done, 2, accuracy)
    assert trial.extra_epochs() == granted


@pytest.mark.parametrize(
    ("curve", "granted"),
    [
        ((0.5, 0.6, 0.7), 2),
        ((0.5, 0.69, 0.71), 2),
        ((0.5, 0.69, 0.7), 0),  # by less than the margin, 2% of 0.8
        ((0.7, 0.6, 0.65), 0),
        ((0.5, 0.7, 0.65), 0),
        ((0.7,), 0),
        ((), 0),
    ],
)
def test_extra_epochs_need_a_curve_that_rises(curve: tuple[float, ...], granted: int) -> None:
    trial = started(*CURVES, extra_epochs=2, margin=0.02)
    for done, accuracy in enumerate(curve):
        trial.epoch(done, 2, accuracy)
    assert trial.extra_epochs() == granted


@pytest.mark.parametrize(
    ("more", "granted"),
    [
        ([], [2, 0]),  # nothing was trained since
        ([(0.71, 0.72)], [2, 2]),  # both together brought more than the margin, 2% of 0.8
        ([(0.71, 0.716)], [2, 0]),
        ([(0.73, 0.6)], [2, 2]),  # the better one counts
        ([(0.72, 0.73), (0.74, 0.75)], [2, 2, 2]),
        ([(0.72, 0.73), (0.74, 0.746)], [2, 2, 0]),
        ([(0.72, 0.73), (0.74, 0.75), (0.8, 0.9)], [2, 2, 2, 0]),  # three times at most
    ],
)
def test_extra_epochs_are_given_again_while_they_bring_something(
    more: list[tuple[float, ...]], granted: list[int]
) -> None:
    trial = started(*CURVES, extra_epochs=2, extensions=3, margin=0.02)
    for done, accuracy in enumerate((0.5, 0.6, 0.7)):
        trial.epoch(done, 2, accuracy)
    found = [trial.extra_epochs()]
    for run, accuracies in enumerate(more):
        for step, accuracy in enumerate(accuracies):
            assert trial.epoch(3 + 2 * run + step, 4 + 2 * run, accuracy) is None
        found.append(trial.extra_epochs())
    if not more:
        found.append(trial.extra_epochs())
    assert found == granted


def test_extra_epochs_are_given_again_to_the_front_alone() -> None:
    longer = [replace(r, accuracy=0.8, epochs=(0.1, 0.3, 0.5, 0.6, 0.75, 0.8)) for r in CURVES]
    trial = started(*longer, extra_epochs=2, extensions=3)
    for done, accuracy in enumerate((0.5, 0.6, 0.7)):
        trial.epoch(done, 2, accuracy)
    assert trial.extra_epochs() == 2
    for done, accuracy in enumerate((0.71, 0.74), 3):
        trial.epoch(done, 4, accuracy)
    assert trial.extra_epochs() == 0  # others have 0.75 after four


@pytest.mark.parametrize(("limit_ms", "granted"), [(14.0, 0), (15.0, 2)])
def test_no_extra_epochs_beyond_the_latency_limit(limit_ms: float, granted: int) -> None:
    uncertain = gate(*CURVES, extra_epochs=2, limits=Limits(latency_ms=limit_ms))
    assert uncertain.measured(0.725, (0.65, 0.8), 1.0) is None  # 14.5 ms, perhaps 13
    for done, accuracy in enumerate((0.5, 0.6, 0.7)):
        uncertain.epoch(done, 2, accuracy)
    assert uncertain.extra_epochs() == granted


def test_a_trial_may_reach_the_front_by_extra_epochs() -> None:
    longer = [replace(r, epochs=(*r.epochs, 0.78)) for r in CURVES]
    assert started(*CURVES).epoch(1, 2, 0.0) is not None
    assert started(*longer).epoch(1, 2, 0.0) is None  # its like came from 0.24 to 0.78


def test_ranks() -> None:
    assert pareto_ranks([(1, 0.5), (2, 0.6), (2, 0.5), (3, 0.5), (1, 0.5)]) == [0, 0, 1, 2, 0]
    assert pareto_ranks([]) == []


# ---- the proxy -----------------------------------------------------------------------------------


def test_kept_scores() -> None:
    scores = [np.arange(CHANNELS, dtype=float)]
    assert score_kept(plan(0), scores, groups()) == 1.0
    assert score_kept(plan(10), scores, groups()) == pytest.approx(1 - 45 / 4950)
    assert score_kept(plan(10), [scores[0] - 50.0], groups()) == pytest.approx(1 - 45 / 4950)
    assert score_kept(plan(10), [np.zeros(CHANNELS)], groups()) is None

"""Loss curves: measured on really pruned networks, and what they say about which groups to spare."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.task import Traceable
from search.allocation import Demand, Widths, unit_scores
from search.budget import cost_removed
from search.costs import WidthCost
from search.groups import ChannelGroups, find_groups
from search.loss_curves import by_the_batch, measure_curves
from search.plan import PruningPlan
from search.proxy import loss_kept
from search.prune import prune
from search.sensitivity import DEPTHS, LossCurves, Stage, sensitivity

from .test_budget import make_profile

IMAGES = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two branches; the head hardly reads the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.needed = nn.Conv2d(16, 32, 3, 1, 1)
        self.idle = nn.Conv2d(16, 32, 3, 1, 1)
        self.head = nn.Linear(64, 5)
        with torch.no_grad():
            self.head.weight[:, 32:] *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        maps = torch.cat((torch.relu(self.needed(x)), torch.relu(self.idle(x))), 1)
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


def make_task() -> Any:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        wanted = model(IMAGES)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (network(batch[0]) - batch[1]).square().sum() * 100

    def calibration(images: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, images, batch):
            part = slice(start, min(start + batch, images))
            yield IMAGES[part], wanted[part]

    return SimpleNamespace(
        model_key="key",
        load_model=lambda: copy.deepcopy(model),
        calibration=calibration,
        loss=loss,
        settle=lambda network: None,
    )


IMAGE_COUNT = 12
SETTINGS: Any = {"criterion": "taylor", "images": IMAGE_COUNT, "batch": 4, "min_channels": 4}


def mean_loss(task: Any, model: nn.Module, batches: list[Any]) -> float:
    """By the network itself, per image."""
    with torch.no_grad():
        return sum(float(task.loss(by_the_batch(model), batch)) for batch in batches) / IMAGE_COUNT


@pytest.fixture(scope="module")
def measured() -> tuple[Any, ChannelGroups, WidthCost, list[np.ndarray], LossCurves, list[tuple[int, int]]]:
    task = make_task()
    model = task.load_model()
    groups = find_groups(
        Traceable(copy.deepcopy(model), torch.zeros(1, 3, 16, 16), fixed=frozenset({"head"})), model
    )
    macs = WidthCost.of("macs", groups, make_profile(model, {}))
    rng = np.random.default_rng(0)
    scores = [1e-6 * rng.random(g.channels) for g in groups.groups]
    heard: list[tuple[int, int]] = []
    curves = measure_curves(
        task, groups, scores, macs, **SETTINGS, on_step=lambda done, steps: heard.append((done, steps))
    )
    return task, groups, macs, scores, curves, heard


def test_the_group_that_the_loss_needs_is_spared(measured: Any) -> None:
    _, groups, macs, scores, curves, _ = measured
    demand = Demand(groups, scores, 0.4, cost_removed(macs), Widths(1, 4))
    gone = dict(zip(curves.units, sensitivity(demand, curves, macs, 1.0), strict=True))
    assert gone["idle"] >= 26
    assert gone["needed"] < gone["idle"] / 2


def test_cost_matters_as_much_as_beta_says(measured: Any) -> None:
    _, groups, macs, scores, curves, _ = measured
    saved = []
    prices = dict(zip(curves.units, curves.prices(scores), strict=True))
    for beta in (0.0, 1.0):
        demand = Demand(groups, scores, 0.5, lambda gone: gone.sum(axis=1) / 80, Widths(1, 4))
        counts = sensitivity(demand, curves, macs, beta)
        saved.append(float(cost_removed(macs)(groups.spread(counts)[None])[0]))
        if beta == 0.0:  # nothing that stays is cheaper than what went, by the loss alone
            lost = max(prices[u][c - 1] for u, c in zip(curves.units, counts, strict=True) if c)
            left = [
                prices[u][c]
                for u, c, n in zip(curves.units, counts, groups.unit_channels, strict=True)
                if c < n - 4
            ]
            assert lost <= min(left) * (1 + 1e-6)
    assert saved[1] >= saved[0]


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7])
def test_no_other_allowed_widths_lose_less(measured: Any, ratio: float) -> None:
    """Every choice of widths is tried; the budget is linear, so the knapsack is exact."""
    _, groups, macs, scores, curves, _ = measured
    total = float(groups.unit_channels.sum())
    demand = Demand(groups, scores, ratio, lambda gone: gone.sum(axis=1) / total, Widths(8, 8))
    losses = [np.concatenate([[0.0], np.cumsum(p)]) for p in curves.prices(scores)]
    chosen = sensitivity(demand, curves, macs, 0.0)
    every = itertools.product(*(demand.widths.options(int(c)) for c in groups.unit_channels))
    best = min(
        sum(float(loss[c]) for loss, c in zip(losses, counts, strict=True))
        for counts in every
        if sum(counts) / total >= sum(chosen) / total
    )
    assert sum(float(loss[c]) for loss, c in zip(losses, chosen, strict=True)) == pytest.approx(best)
    assert abs(sum(chosen) / total - ratio) <= 8 / total


def test_the_first_stage_is_the_loss_of_networks_pruned_by_hand(measured: Any) -> None:
    task, _, _, scores, curves, _ = measured
    batches = list(task.calibration(12, 4))
    assert curves.stages[0].context == (0, 0, 0)
    assert curves.stages[0].loss == pytest.approx(mean_loss(task, task.load_model(), batches))
    u = curves.units.index("idle")
    model = task.load_model()
    silenced = np.argsort(scores[u], kind="stable")[: curves.stages[0].counts[u][1]].copy()
    with torch.no_grad():  # what reaches the head from these channels is nothing
        model.head.weight[:, 32 + torch.from_numpy(silenced)] = 0
    assert curves.stages[0].losses[u][1] == pytest.approx(mean_loss(task, model, batches), rel=1e-4)


def test_later_stages_stand_on_deeper_networks(measured: Any) -> None:
    _, groups, macs, _, curves, heard = measured
    depths = [
        float(cost_removed(macs)(groups.spread(np.array(stage.context))[None])[0]) for stage in curves.stages
    ]
    np.testing.assert_allclose(depths, DEPTHS, atol=0.1)
    for stage in curves.stages:
        for context, counts, total in zip(stage.context, stage.counts, groups.unit_channels, strict=True):
            assert all(context < count <= total - 4 for count in counts)
    measured_losses = sum(len(losses) for stage in curves.stages for losses in stage.losses)
    assert [done for done, _ in heard] == list(range(1, measured_losses + 1))
    assert heard[-1] == (measured_losses, measured_losses)
    assert all(done < steps for done, steps in heard[:-1])


def test_an_interrupted_measurement_goes_on_where_it_was(measured: Any) -> None:
    task, groups, macs, scores, curves, heard = measured
    again: list[tuple[int, int]] = []
    kept: list[LossCurves] = []
    whole = measure_curves(
        task,
        groups,
        scores,
        macs,
        **SETTINGS,
        known=curves.stages[:2],
        on_step=lambda done, steps: again.append((done, steps)),
        on_stage=kept.append,
    )
    assert whole == curves == kept[-1]
    assert whole.is_whole
    assert [len(found.stages) for found in kept] == [3, 4]
    assert not kept[0].is_whole
    assert again == heard[-len(again) :]
    assert len(again) == sum(len(losses) for stage in curves.stages[2:] for losses in stage.losses)


def test_later_losses_are_those_of_the_networks_by_themselves(measured: Any) -> None:
    task, groups, macs, scores, curves, _ = measured
    batches, stage = list(task.calibration(12, 4)), curves.stages[2]
    demand = Demand(groups, scores, 0.0, cost_removed(macs), Widths(1, 4))
    for u, counts in enumerate(stage.counts):
        for count, loss in zip(counts, stage.losses[u], strict=True):
            changed = np.array(stage.context)
            changed[u] = count
            plan = PruningPlan.of(task.model_key, groups, demand.pick(changed))
            network = prune(task.load_model(), plan, task.settle)
            # Sums in another order, since it is laid out otherwise in memory.
            assert loss == pytest.approx(mean_loss(task, network, batches), rel=1e-5)


def test_batch_norm_counts_by_the_batch() -> None:
    task = make_task()
    model = task.load_model()
    batches = list(task.calibration(12, 5))  # 5, 5 and 2 images
    before = mean_loss(task, model, batches)
    with torch.no_grad():
        model.stem[1].running_mean += 100.0
    assert mean_loss(task, model, batches) == pytest.approx(before)


def curves_of(stages: tuple[Stage, ...]) -> LossCurves:
    return LossCurves("taylor", ("a",), stages)


def test_prices_follow_the_lower_hull_and_never_fall() -> None:
    curves = curves_of((Stage((0,), 1.0, ((2, 4, 6),), ((3.0, 3.0, 9.0),)),))
    prices = curves.prices([np.zeros(8)])[0]
    np.testing.assert_allclose(prices[:6], [0.5, 0.5, 0.5, 0.5, 3.0, 3.0])
    assert (np.diff(prices[:6]) >= 0).all()


def test_a_later_stage_takes_over_where_it_stands() -> None:
    first = Stage((0,), 0.0, ((2, 4, 6),), ((1.0, 2.0, 3.0),))
    second = Stage((4,), 10.0, ((5, 6),), ((15.0, 20.0),))
    prices = curves_of((first, second)).prices([np.zeros(6)])[0]
    np.testing.assert_allclose(prices, [0.5, 0.5, 0.5, 0.5, 5.0, 5.0])


def test_scores_decide_where_a_curve_is_flat() -> None:
    flat = curves_of((Stage((0,), 1.0, ((4,),), ((1.0,),)),))
    prices = flat.prices([np.array([1.0, 2.0, 3.0, 4.0])])[0]
    assert (np.diff(prices) > 0).all()


def test_prices_are_those_of_the_networks_nearest_by() -> None:
    """Around the unpruned network a channel costs 1, around one that lost 4 channels 3."""
    shallow = Stage((0,), 1.0, ((4, 8),), ((5.0, 9.0),))
    deep = Stage((4,), 5.0, ((8,),), ((17.0,),))
    curves, scores = curves_of((shallow, deep)), [np.zeros(10)]
    np.testing.assert_allclose(curves.prices(scores, 0)[0], 1.0)
    np.testing.assert_allclose(curves.prices(scores, 4)[0], [1.0] * 4 + [3.0] * 6)
    np.testing.assert_allclose(curves.prices(scores, 2)[0], [1.0] * 4 + [2.0] * 6)
    np.testing.assert_allclose(curves.prices(scores)[0], curves.prices(scores, 4)[0])
    np.testing.assert_allclose(curves.prices(scores, 9)[0], curves.prices(scores, 4)[0])


def test_what_a_plan_keeps_is_the_measured_rise(measured: Any) -> None:
    task, groups, _, scores, curves, _ = measured
    demand, stage = Demand(groups, scores, 0.0, lambda gone: gone.sum(axis=1), Widths(1, 4)), curves.stages[0]

    def kept(*counts: int) -> float:
        plan = PruningPlan.of(task.model_key, groups, demand.pick(np.array(counts)))
        return loss_kept(plan, curves, scores, groups)

    assert kept(0, 0, 0) == 1.0
    # One unit alone, its last measured level: all of the curve's hull up to there.
    u = curves.units.index("needed")
    lost = [0, 0, 0]
    lost[u] = stage.counts[u][-1]
    rise = sum(curves.prices(unit_scores(groups, scores), float(sum(lost)))[u][: lost[u]])
    assert kept(*lost) == pytest.approx(stage.loss / (stage.loss + rise))


def test_json_both_ways_and_what_it_refuses() -> None:
    curves = curves_of((Stage((0,), 1.0, ((2,),), ((3.0,),)),))
    assert LossCurves.from_json(curves.to_json()) == curves
    with pytest.raises(ValueError, match="format_version must be 2, got 7"):
        LossCurves.from_json({**curves.to_json(), "format_version": 7})
    with pytest.raises(ValueError, match="losses must be finite"):
        curves_of((Stage((0,), 1.0, ((2,),), ((float("nan"),),)),))
    with pytest.raises(ValueError, match="every stage must have 1 units"):
        curves_of((Stage((0, 0), 1.0, ((2,),), ((1.0,),)),))

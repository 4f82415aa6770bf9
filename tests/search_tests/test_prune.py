"""Pruning: a plan replayed on the original weights, and a network that is not its plan's."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.task import Traceable
from search.groups import find_groups
from search.plan import PruningPlan
from search.prune import WidthError, check_widths, prune


class Net(nn.Module):
    """Convolution, batch norm, depthwise, flatten, linear."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.b = nn.Conv2d(width, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dw(torch.relu(self.bn(self.a(x))))
        out: Tensor = self.fc(torch.relu(self.b(x)).flatten(1))
        return out


def settle(model: nn.Module) -> None: ...


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def plan(model: nn.Module) -> PruningPlan:
    traceable = Traceable(copy.deepcopy(model), torch.zeros(1, 3, 4, 4), fixed=frozenset({"fc"}))
    groups = find_groups(traceable, model)
    names = {m.layer: g.name for g in groups.groups for m in g.weighted}
    return PruningPlan.of("key", groups, {names["a"]: np.array([1, 4, 6]), names["b"]: np.array([0, 5])})


def test_the_kept_weights_are_the_originals(model: nn.Module, plan: PruningPlan) -> None:
    pruned = prune(copy.deepcopy(model), plan, settle)
    kept, kept_b = [0, 2, 3, 5, 7], [1, 2, 3, 4]
    state, original = pruned.state_dict(), model.state_dict()
    assert torch.equal(state["a.weight"], original["a.weight"][kept])
    for part in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(state[f"bn.{part}"], original[f"bn.{part}"][kept])
    assert torch.equal(state["dw.weight"], original["dw.weight"][kept])
    assert torch.equal(state["b.weight"], original["b.weight"][kept_b][:, kept])
    inputs = [16 * c + i for c in kept_b for i in range(16)]
    assert torch.equal(state["fc.weight"], original["fc.weight"][:, inputs])
    assert pruned.dw.groups == 5
    assert pruned(torch.rand(2, 3, 4, 4)).shape == (2, 4)


def test_a_replay_from_the_file_gives_the_same_weights(model: nn.Module, plan: PruningPlan) -> None:
    replayed = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
    first = prune(copy.deepcopy(model), plan, settle).state_dict()
    second = prune(copy.deepcopy(model), replayed, settle).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_plan_is_refused_by_any_other_model(model: nn.Module, plan: PruningPlan) -> None:
    with pytest.raises(
        WidthError, match="a must have 3 inputs and 8 outputs to apply this plan, got 3 and 9"
    ):
        prune(Net(9).eval(), plan, settle)
    once = prune(model, plan, settle)
    with pytest.raises(WidthError, match="plans hold indices into the unpruned model"):
        prune(once, plan, settle)


def test_widths_are_checked_against_the_plan(model: nn.Module, plan: PruningPlan) -> None:
    with pytest.raises(WidthError, match=r"5 layers do not have the plan's widths: a 3->8 instead of 3->5"):
        check_widths(model, plan)
    pruned = prune(copy.deepcopy(model), plan, settle)
    check_widths(pruned, plan)
    pruned.fc = nn.Linear(6 * 16, 4)  # as a training loop that rebuilds one layer would leave it
    with pytest.raises(WidthError, match="1 layers do not have the plan's widths: fc 96->4 instead of 64->4"):
        check_widths(pruned, plan)


def test_settle_is_called_before_the_check(model: nn.Module, plan: PruningPlan) -> None:
    seen = []

    def spy(narrowed: nn.Module) -> None:
        seen.append(tuple(narrowed.a.weight.shape))
        narrowed.b = nn.Conv2d(5, 6, 3)

    with pytest.raises(WidthError, match="b 5->6 instead of 5->4"):
        prune(model, plan, spy)
    assert seen == [(5, 3, 3, 3)]

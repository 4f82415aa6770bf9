"""Silencing a network's channels computes what removing them does, and leaves the network as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.task import Traceable
from search.groups import find_groups
from search.loss_curves import by_the_batch
from search.plan import PruningPlan
from search.prune import prune
from search.silence import further, silenced

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A depthwise layer, a shortcut, an activation that is not zero at zero, and inputs behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Sigmoid())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.SiLU())
        self.back = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.last = nn.Conv2d(16, 24, 3, 2, 1)
        self.head = nn.Linear(24 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.back(self.deep(x)))
        out: Tensor = self.head(torch.relu(self.last(x)).flatten(1))
        return out


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, PruningPlan, PruningPlan]:
    torch.manual_seed(0)
    model = Net().eval()
    groups = find_groups(Traceable(copy.deepcopy(model), IMAGES[:1], fixed=frozenset({"head"})), model)
    first = {g.name: np.arange(1, g.channels, 4) for g in groups.groups}
    more = {name: np.union1d(gone, gone + 1) for name, gone in first.items()}
    return model, PruningPlan.of("key", groups, first), PruningPlan.of("key", groups, more)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = by_the_batch(model)(IMAGES)
    return found


def test_silenced_computes_what_pruned_does(made: tuple[nn.Module, PruningPlan, PruningPlan]) -> None:
    model, context, plan = made
    network = prune(copy.deepcopy(model), context, lambda m: None)
    whole, before = outputs(network), copy.deepcopy(dict(network.named_parameters()))
    gone = further(plan, context)
    assert {"stem.0", "deep.0", "last", "head"} <= gone.keys()
    with silenced(network, gone):
        quiet = outputs(network)
    torch.testing.assert_close(quiet, outputs(prune(copy.deepcopy(model), plan, lambda m: None)))
    assert not torch.allclose(quiet, whole, atol=1e-3)
    assert all(torch.equal(before[name], value) for name, value in network.named_parameters())
    torch.testing.assert_close(outputs(network), whole)


def test_a_network_is_put_back_whatever_happens(made: tuple[nn.Module, PruningPlan, PruningPlan]) -> None:
    model, context, _ = made
    network, empty = copy.deepcopy(model), PruningPlan("key", {})
    with pytest.raises(RuntimeError, match="lost"), silenced(network, further(context, empty)):
        raise RuntimeError("lost")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), model.parameters(), strict=True))


def test_only_what_is_removed_besides_can_be_silenced(
    made: tuple[nn.Module, PruningPlan, PruningPlan],
) -> None:
    _, context, plan = made
    assert further(plan, plan) == {}
    with pytest.raises(ValueError, match=r"keeps channel \d+ of"):
        further(context, plan)
    with pytest.raises(ValueError, match="keeps all of"):
        further(PruningPlan("key", {}), plan)

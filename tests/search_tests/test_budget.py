"""Shares of a budget, against counting on the network that was really pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.size import count_macs
from objectives.task import Traceable
from profiles.device import Device
from profiles.latency_model import LatencyModel
from profiles.latency_profile import LatencyProfile, LayerProfile
from profiles.timing import Timing
from search.budget import BUDGETS, channels_removed, cost_removed
from search.costs import QUANTITIES, WidthCost, unit_shares
from search.groups import ChannelGroups, find_groups
from search.plan import PruningPlan
from search.prune import prune

SHAPE = (1, 3, 16, 16)


def share_removed(
    ratio_of: str, groups: ChannelGroups, profile: LatencyProfile
) -> Callable[[np.ndarray], float]:
    """The share of one choice, `(groups,)`."""
    channels = ratio_of == "channels"
    share = channels_removed(groups) if channels else cost_removed(WidthCost.of(ratio_of, groups, profile))
    return lambda gone: float(share(gone[None])[0])


class Net(nn.Module):
    """Strides, a depthwise and a grouped layer, a shortcut; no biases: params are products of widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.dw = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.b = nn.Conv2d(16, 24, 1, bias=False)
        self.c = nn.Conv2d(16, 24, 5, 1, 2, bias=False)
        self.d = nn.Conv2d(24, 32, 3, 2, 1, bias=False)
        self.grouped = nn.Conv2d(32, 32, 3, 1, 0, groups=4, bias=False)
        self.fc = nn.Linear(32, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(self.dw(x)) + self.c(x))
        out: Tensor = self.fc(torch.relu(self.grouped(torch.relu(self.d(x)))).mean((2, 3)))
        return out


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def groups(model: nn.Module) -> ChannelGroups:
    return find_groups(Traceable(copy.deepcopy(model), torch.zeros(SHAPE), fixed=frozenset({"fc"})), model)


def make_profile(model: nn.Module, ms: dict[str, float]) -> LatencyProfile:
    """A profile as a device would give it: sizes read from one forward pass."""
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    hooks = [
        m.register_forward_hook(
            lambda _, args, out, n=n: sizes.update({n: (tuple(args[0].shape[2:]), tuple(out.shape[2:]))})
        )
        for n, m in model.named_modules()
        if n
    ]
    with torch.no_grad():
        model(torch.zeros(SHAPE))
    for hook in hooks:
        hook.remove()
    layers = []
    for name, m in model.named_modules():
        timing = Timing((ms.get(name, 1.0),), 0)
        if isinstance(m, nn.Conv2d):
            shape = (m.in_channels, m.out_channels, tuple(m.kernel_size), tuple(m.stride), m.groups)
            layers.append(LayerProfile(name, "conv", *shape, sizes[name][0], timing, sizes[name][1]))
        elif isinstance(m, nn.Linear):
            layers.append(LayerProfile(name, "linear", m.in_features, m.out_features, (), (), 1, (), timing))
    latency_model = LatencyModel.from_layers(
        "bilinear",
        [layer.timing.mean_ms for layer in layers],
        [layer.in_channels for layer in layers],
        [layer.out_channels for layer in layers],
        [layer.groups for layer in layers],
        0.5,
    )
    total = sum(layer.timing.mean_ms for layer in layers) + 0.5
    device = Device("here", "onnxruntime")
    return LatencyProfile(
        device, "fingerprint", "key", SHAPE, tuple(layers), total, {"act": 0.5}, 8, latency_model
    )


@pytest.fixture(scope="module")
def profile(model: nn.Module) -> LatencyProfile:
    return make_profile(model, {"a": 2.0, "dw": 0.3, "b": 0.7, "c": 3.0, "d": 1.5, "fc": 0.1})


def random_removal(groups: ChannelGroups, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        g.name: rng.choice(g.channels, int(rng.integers(0, g.channels)), replace=False) for g in groups.groups
    }


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_those_of_the_pruned_network(
    model: nn.Module, groups: ChannelGroups, profile: LatencyProfile, seed: int
) -> None:
    removed = random_removal(groups, seed)
    gone = np.array([len(removed[g.name]) for g in groups.groups])
    plan = PruningPlan.of("key", groups, removed)
    pruned = prune(copy.deepcopy(model), plan, lambda m: None)

    def count(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    params = share_removed("params", groups, profile)(gone)
    assert params == pytest.approx(1 - count(pruned) / count(model), abs=1e-12)
    macs = share_removed("macs", groups, profile)(gone)
    assert macs == pytest.approx(1 - count_macs(pruned, SHAPE) / count_macs(model, SHAPE), abs=1e-12)
    latency = share_removed("latency", groups, profile)(gone)
    assert latency == pytest.approx(1 - profile.predict_ms(plan.widths) / profile.predict_ms({}), abs=1e-12)
    names = {m.layer for g in groups.groups for m in g.weighted}
    lost = sum(groups.widths[n][1] - pruned.get_submodule(n).weight.shape[0] for n in names)
    channels = share_removed("channels", groups, profile)(gone)
    assert channels == pytest.approx(lost / sum(groups.widths[n][1] for n in names), abs=1e-12)


@pytest.mark.parametrize("ratio_of", BUDGETS)
def test_nothing_removed_is_nothing_saved_and_more_is_more(
    groups: ChannelGroups, profile: LatencyProfile, ratio_of: str
) -> None:
    share = share_removed(ratio_of, groups, profile)
    gone = np.zeros(len(groups.groups), dtype=np.int64)
    assert share(gone) == 0.0
    rng = np.random.default_rng(0)
    before = 0.0
    for _ in range(30):
        i = int(rng.integers(len(gone)))
        if gone[i] < groups.channels[i] - 1:
            gone[i] += 1
        assert before <= share(gone) < 1
        before = share(gone)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_marginal_is_what_one_more_channel_saves(
    groups: ChannelGroups, profile: LatencyProfile, quantity: str
) -> None:
    cost = WidthCost.of(quantity, groups, profile)
    gone = np.array([2, 5, 3, 4])[: len(groups.groups)] if len(groups.groups) > 1 else np.array([2])
    gone = np.resize(gone, len(groups.groups))
    step = 1e-4
    for g, saved in enumerate(cost.marginal(gone)):
        more, fewer = gone.astype(float), gone.astype(float)
        more[g] += step
        fewer[g] -= step
        difference = np.diff(cost.total(np.array([more, fewer])))[0]
        assert saved == pytest.approx(difference / (2 * step), rel=1e-4)
        assert saved > 0


def test_memory_is_weights_and_outputs(
    model: nn.Module, groups: ChannelGroups, profile: LatencyProfile
) -> None:
    cost = WidthCost.of("memory", groups, profile)
    weights = sum(p.numel() for p in model.parameters())
    outputs = sum(layer.out_channels * int(np.prod(layer.output_hw)) for layer in profile.layers)
    assert cost.total(np.zeros((1, len(groups.groups))))[0] == 4 * (weights + outputs)
    assert sum(cost.by_layer().values()) == pytest.approx(4 * (weights + outputs))


def test_a_units_share_is_that_of_the_layers_that_make_it(
    groups: ChannelGroups, profile: LatencyProfile
) -> None:
    cost = WidthCost.of("latency", groups, profile)
    shares = unit_shares(cost.by_layer(), groups)
    assert shares.sum() == pytest.approx(1)
    named = {groups.groups[unit[0]].name: share for unit, share in zip(groups.units, shares, strict=True)}
    # b and c add up into one stream; a and its depthwise layer are one group; fc makes no group.
    ms = {layer.layer: layer.timing.mean_ms for layer in profile.layers}
    stream = next(name for name, g in groups.by_name.items() if {"b", "c"} <= {m.layer for m in g.weighted})
    first = next(name for name, g in groups.by_name.items() if "a" in {m.layer for m in g.weighted})
    assert named[stream] / named[first] == pytest.approx((ms["b"] + ms["c"]) / (ms["a"] + ms["dw"]))


def test_an_unknown_quantity_is_refused(groups: ChannelGroups, profile: LatencyProfile) -> None:
    with pytest.raises(
        ValueError, match="quantity must be one of latency, macs, params, memory, got 'watts'"
    ):
        WidthCost.of("watts", groups, profile)

"""Groups are right where removing their channels gives what silencing them gives, to the last digit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.detection import DetectionTask
from objectives.task import Traceable
from search.groups import ChannelGroup, ChannelGroups, Member, find_groups
from search.plan import PruningPlan
from search.prune import check_widths, prune

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 64
YOLOS = ("yolov8n.yaml", "yolo11n.yaml")
YOLO26 = "yolo26n.yaml"


class SmallResNet(nn.Module):
    """Two residual blocks, one with a shortcut convolution, a depthwise layer, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.a1, self.bn_a1 = nn.Conv2d(12, 20, 3, 1, 1), nn.BatchNorm2d(20)
        self.a2, self.bn_a2 = nn.Conv2d(20, 12, 3, 1, 1), nn.BatchNorm2d(12)
        self.b1, self.bn_b1 = nn.Conv2d(12, 24, 3, 2, 1), nn.BatchNorm2d(24)
        self.b2, self.bn_b2 = nn.Conv2d(24, 16, 3, 1, 1), nn.BatchNorm2d(16)
        self.short, self.bn_short = nn.Conv2d(12, 16, 1, 2), nn.BatchNorm2d(16)
        self.depthwise, self.bn_depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16)
        self.hidden, self.fc = nn.Linear(16 * 4, 30), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn_a2(self.a2(torch.relu(self.bn_a1(self.a1(x))))))
        x = torch.relu(self.bn_short(self.short(x)) + self.bn_b2(self.b2(torch.relu(self.bn_b1(self.b1(x))))))
        x = nn.functional.silu(self.bn_depthwise(self.depthwise(x)))
        x = nn.functional.adaptive_max_pool2d(x, 2).flatten(1)
        out: Tensor = self.fc(torch.relu(self.hidden(x)))
        return out


@dataclass(frozen=True, eq=False)
class Case:
    model: nn.Module
    groups: ChannelGroups
    traceable: Traceable
    settle: Callable[[nn.Module], None]


def nothing(model: nn.Module) -> None: ...


def yolo_task(side: int = SIDE) -> DetectionTask:
    """The parts of the task that need no data."""
    task = object.__new__(DetectionTask)
    object.__setattr__(task, "model", "")
    object.__setattr__(task, "data", "")
    object.__setattr__(task, "imgsz", side)
    return task


def make_case(name: str, alive: Callable[[nn.Module, int, int], nn.Module]) -> Case:
    if name in (*YOLOS, YOLO26):
        from ultralytics.nn.tasks import DetectionModel

        torch.manual_seed(1)
        model = DetectionModel(name, verbose=False).eval().requires_grad_(True)
        task = yolo_task()
        traceable = task.traceable(model)
        settle: Callable[[nn.Module], None] = task.settle
    else:
        torch.manual_seed(1)
        if name == "resnet18":
            import torchvision

            model = torchvision.models.resnet18(num_classes=10).eval()
        else:
            model = SmallResNet().eval()
        traceable = Traceable(copy.deepcopy(model), torch.zeros(1, 3, SIDE, SIDE), fixed=frozenset({"fc"}))
        settle = nothing
    groups = find_groups(traceable, model)
    return Case(alive(model, 2, SIDE), groups, traceable, settle)


@pytest.fixture(scope="module")
def case_of(alive: Callable[[nn.Module, int, int], nn.Module]) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make_case(name, alive)
        return made[name]

    return get


@pytest.fixture(params=[*YOLOS, YOLO26, "resnet18", "small"])
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    return case_of(request.param)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "feats":  # what YOLO's head reads, handed on for distillation; pruning narrows it
                yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def outputs(model: nn.Module, seed: int = 3) -> Tensor:
    """Everything the model returns for two images, as one vector."""
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        return torch.cat([t.double().flatten() for t in tensors(model(images))])


def silence(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy whose doomed channels are zero behind their batch norm; every layer keeps its width."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, cut in plan.layers.items():
            layer = silent.get_submodule(name)
            rows = list(cut.removed_out)
            layer.weight[rows] = 0.0
            if layer.bias is not None:
                layer.bias[rows] = 0.0
    return silent


def random_removal(groups: ChannelGroups, seed: int, most: float = 0.6) -> dict[str, np.ndarray]:
    """Random channels of every group, equal counts in tied ones."""
    rng = np.random.default_rng(seed)
    removed = {}
    for unit in groups.units:
        channels = groups.groups[unit[0]].channels
        count = int(rng.integers(1, max(2, int(channels * most))))
        for position in unit:
            removed[groups.groups[position].name] = rng.choice(channels, count, replace=False)
    return removed


# ---- silencing equals removing -------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_removing_channels_gives_what_silencing_them_gives(case: Case, seed: int) -> None:
    removed = random_removal(case.groups, seed)
    plan = PruningPlan.of("key", case.groups, removed)
    want = outputs(silence(case.model, plan))
    pruned = prune(copy.deepcopy(case.model), plan, case.settle)
    have = outputs(pruned)
    assert have.shape == want.shape
    assert torch.isfinite(want).all()
    difference = float((have - want).abs().max() / want.abs().max())
    assert difference < 1e-5, f"pruned and silenced models differ by {difference:.1e} of the largest output"
    # The cut must matter, or the comparison would have shown nothing.
    effect = float((outputs(case.model) - want).abs().max() / want.abs().max())
    assert effect > 1e-3, f"removing {len(removed)} groups' channels changed the outputs by {effect:.1e} only"
    for group in case.groups.groups:
        for member in group.weighted:
            kept = pruned.get_submodule(member.layer).weight.shape[0]
            gone = sum(
                m.index[removed[g.name]].size
                for g in case.groups.groups
                for m in g.weighted
                if m.layer == member.layer
            )
            assert kept == case.groups.widths[member.layer][1] - gone, member.layer


@pytest.mark.parametrize("name", YOLOS)
def test_each_group_of_a_yolo_is_right_on_its_own(name: str, case_of: Callable[[str], Case]) -> None:
    """Errors of two groups could cancel, or hide behind one large one."""
    case = case_of(name)
    rng = np.random.default_rng(5)
    units = [case.groups.units[i] for i in rng.permutation(len(case.groups.units))[:6]]
    for unit in units:
        members = [case.groups.groups[i] for i in unit]
        count = members[0].channels // 2
        plan = PruningPlan.of(
            "key", case.groups, {g.name: rng.choice(g.channels, count, replace=False) for g in members}
        )
        want = outputs(silence(case.model, plan))
        have = outputs(prune(copy.deepcopy(case.model), plan, case.settle))
        difference = float((have - want).abs().max() / want.abs().max())
        assert difference < 1e-5, f"group {members[0].name}: {difference:.1e}"


def test_a_wrong_group_is_noticed(case_of: Callable[[str], Case]) -> None:
    """The comparison itself can fail: read the wrong inputs in one consumer, and the outputs differ."""
    case = case_of("yolov8n.yaml")
    group = case.groups.by_name["model.1.conv"]
    members = tuple(
        Member(m.layer, m.side, m.index[::-1].copy(), m.weighted) if m.side == "in" else m
        for m in group.members
    )
    wrong = ChannelGroups(
        tuple(ChannelGroup(g.name, g.channels, members) if g is group else g for g in case.groups.groups),
        case.groups.tied,
        case.groups.widths,
    )
    plan = PruningPlan.of("key", wrong, {group.name: np.arange(5)})
    difference = outputs(prune(copy.deepcopy(case.model), plan, case.settle)) - outputs(
        silence(case.model, plan)
    )
    assert float(difference.abs().max()) > 1e-3


# ---- what belongs to no group --------------------------------------------------------------------


@pytest.mark.parametrize("name", YOLOS)
def test_outputs_dfl_and_attention_keep_their_channels(name: str, case_of: Callable[[str], Case]) -> None:
    case = case_of(name)
    owned = {m.layer for g in case.groups.groups for m in g.weighted}
    head = case.model.model[-1]  # type: ignore[index]  # a Sequential
    prefix = f"model.{len(case.model.model) - 1}"  # type: ignore[arg-type]
    last = {
        f"{prefix}.{part}.{i}.{len(getattr(head, part)[i]) - 1}"
        for part in ("cv2", "cv3")
        for i in range(head.nl)
    }
    assert len(last) == 6
    kept = last | {f"{prefix}.dfl.conv"}
    if name == "yolo11n.yaml":
        attention = {n for n, _ in case.model.named_modules() if ".attn." in n and n.endswith("conv")}
        assert {n.rsplit(".", 2)[-2] for n in attention} == {"qkv", "proj", "pe"}
        kept |= attention
    assert not owned & kept
    assert kept <= set(dict(case.model.named_modules()))
    # Most of the network can be pruned all the same.
    assert len(owned) > 0.8 * (len(case.groups.widths) - len(kept))


def test_channels_are_counted_as_layer_outputs(case_of: Callable[[str], Case]) -> None:
    groups = case_of("small").groups
    by_layers = {frozenset(m.layer for m in g.weighted): g for g in groups.groups}
    stream = by_layers[frozenset({"stem", "a2"})]
    assert stream.channels == 12
    assert dict(zip((g.name for g in groups.groups), groups.weights, strict=True))[stream.name] == 2
    depthwise = by_layers[frozenset({"b2", "short", "depthwise"})]
    flattened = next(m for m in depthwise.members if m.layer == "hidden")
    assert flattened.index.shape == (16, 4)  # one channel becomes 2x2 inputs
    assert groups.prunable_channels == 2 * 12 + 20 + 24 + 3 * 16 + 30
    assert not any(m.layer == "fc" and m.side == "out" for g in groups.groups for m in g.members)


def test_every_channel_of_a_layer_is_in_at_most_one_group(case: Case) -> None:
    seen: dict[tuple[str, int], str] = {}
    for group in case.groups.groups:
        for member in group.weighted:
            for index in member.index.ravel():
                assert (member.layer, int(index)) not in seen, (
                    f"{member.layer}[{index}] in {group.name} and another"
                )
                seen[member.layer, int(index)] = group.name


@pytest.mark.parametrize("name", YOLOS)
def test_halves_of_a_split_are_tied(name: str, case_of: Callable[[str], Case]) -> None:
    from ultralytics.nn.modules.block import C2PSA, C2f

    case = case_of(name)
    split = {n for n, m in case.model.named_modules() if isinstance(m, C2f)}
    tied_layers = {
        frozenset(m.layer for g in names for m in case.groups.by_name[g].weighted)
        for names in case.groups.tied
    }
    found = {
        layer.removesuffix(".cv1.conv")
        for layers in tied_layers
        for layer in layers
        if layer.endswith(".cv1.conv")
    }
    assert split <= found
    assert {n for n, m in case.model.named_modules() if isinstance(m, C2PSA)}.isdisjoint(
        found
    )  # attention is fixed
    for names in case.groups.tied:
        assert len({case.groups.by_name[n].channels for n in names}) == 1


# ---- incidence, selection ------------------------------------------------------------------------


def test_incidence_gives_the_widths_that_pruning_gives(case: Case) -> None:
    removed = random_removal(case.groups, 9)
    plan = PruningPlan.of("key", case.groups, removed)
    layers = list(case.groups.widths)
    into, out = case.groups.incidence(layers)
    counts = np.array([len(removed[g.name]) for g in case.groups.groups])
    width = np.array([case.groups.widths[layer] for layer in layers])
    have = np.stack([width[:, 0] - into @ counts, width[:, 1] - out @ counts], axis=1)
    want = np.array([plan.widths.get(layer, case.groups.widths[layer]) for layer in layers])
    assert (have == want).all(), [layers[i] for i in np.flatnonzero((have != want).any(axis=1))]


def test_select_takes_whole_groups_by_layer_name(case_of: Callable[[str], Case]) -> None:
    groups = case_of("yolov8n.yaml").groups
    head = groups.select(include=["model.22.*"])
    assert head.groups
    assert all(m.layer.startswith("model.22.") for g in head.groups for m in g.weighted)
    rest = groups.select(exclude=["model.22.*"])
    assert {g.name for g in head.groups} | {g.name for g in rest.groups} == {g.name for g in groups.groups}
    # Excluding one half's residual partner takes the other half along: they must lose equal numbers.
    without = groups.select(exclude=["model.2.m.0.cv2.conv"])
    assert not any(g.name.startswith("model.2.cv1.conv") for g in without.groups)
    with pytest.raises(ValueError, match=r"no channel group is left.*nowhere.*model\.0\.conv"):
        groups.select(include=["nowhere*"])


def test_a_model_without_a_free_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with pytest.raises(ValueError, match="no layer of this model can be pruned"):
        find_groups(Traceable(copy.deepcopy(model), torch.zeros(1, 3, 8, 8), fixed=frozenset({"0"})), model)


def test_a_grouped_convolution_keeps_its_channels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
    ).eval()
    groups = find_groups(
        Traceable(copy.deepcopy(model), torch.zeros(1, 3, 8, 8), fixed=frozenset({"3"})), model
    )
    assert [g.name for g in groups.groups] == ["2"]


# ---- a real model --------------------------------------------------------------------------------


def test_a_real_trained_detector(real_data: Path) -> None:
    task = yolo_task()
    object.__setattr__(task, "model", str(real_data / "yolov8n-bccd.pt"))
    model = task.load_model()
    groups = find_groups(task.traceable(model), model)
    plan = PruningPlan.of("key", groups, random_removal(groups, 4, most=0.3))
    silent = silence(model.double(), plan)
    pruned = prune(copy.deepcopy(model), plan, task.settle)
    check_widths(pruned, plan)
    want, have = outputs(silent), outputs(pruned)
    assert float((have - want).abs().max() / want.abs().max()) < 1e-5


def test_values_of_layers_that_are_too_few_are_refused(case_of: Callable[[str], Case]) -> None:
    groups = case_of("yolov8n").groups
    layer = groups.groups[0].weighted[0].layer
    with pytest.raises(ValueError, match=f"layer {layer} needs .* values at least, got 1"):
        groups.collect({layer: np.ones(1)})

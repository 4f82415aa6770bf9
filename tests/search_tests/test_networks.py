"""The networks in `examples/`: their groups are exact, and what is pruned opens again and runs everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.builder import load_pruned
from objectives.classification import ClassificationTask
from profiles.artifact import export_artifact, open_artifact
from profiles.device import Device
from search.allocation import Widths
from search.groups import ChannelGroups, find_groups
from search.plan import PruningPlan
from search.prune import prune

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIDE = 32
NETWORKS = (
    "resnet_cifar:resnet20",
    "resnet_cifar:resnet56",
    "networks:resnet18",
    "networks:resnet50",
    "networks:mobilenet_v2",
    "networks:efficientnet_lite0",
    "networks:vgg16",
    "networks:alexnet",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 255, (4, SIDE, SIDE, 3)).astype(np.uint8), np.arange(4)
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


@dataclass(frozen=True, eq=False)
class Case:
    """`model` is float64 and every channel of it matters."""

    task: ClassificationTask
    groups: ChannelGroups
    model: nn.Module


@pytest.fixture(scope="module")
def case_of(data: Path, alive: Callable[[nn.Module, int, int], nn.Module]) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(builder: str) -> Case:
        if builder not in made:
            made.clear()  # the largest have hundreds of megabytes
            arguments = {"small": True} if builder.startswith("networks:") else {}
            task = ClassificationTask(builder, str(data), folder=EXAMPLES, arguments=arguments)
            model = task.load_model()
            if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                enlarge(model)
            groups = find_groups(task.traceable(model), model)
            made[builder] = Case(task, groups, alive(model, 2, SIDE))
        return made[builder]

    return get


def enlarge(model: nn.Module) -> None:
    """Weights with which a signal survives without batch norm, and biases that matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0.0, 0.3)


def random_removal(groups: ChannelGroups, seed: int, widths: Widths | None = None) -> dict[str, Any]:
    """Random channels of every group, equal counts in tied ones; kept counts as `widths` allows."""
    rng = np.random.default_rng(seed)
    removed = {}
    for unit in groups.units:
        channels = groups.groups[unit[0]].channels
        count = int(rng.integers(1, max(2, int(channels * 0.6))))
        if widths is not None:
            kept = widths.settle(np.array([channels - count]), np.array([channels]))
            count = channels - int(kept[0])
        for position in unit:
            removed[groups.groups[position].name] = rng.choice(channels, count, replace=False)
    return removed


def silence(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy whose doomed channels are zero behind their batch norm; every layer keeps its width."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, cut in plan.layers.items():
            for tensor in silent.get_submodule(name).parameters(recurse=False):
                tensor[list(cut.removed_out)] = 0.0
    return silent


def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        logits: Tensor = model(torch.rand(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64))
    return logits


def difference(have: Tensor, want: Tensor) -> float:
    return float((have - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("builder", NETWORKS)
def test_removing_equals_silencing_and_the_result_opens_from_its_file(
    builder: str, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    case = case_of(builder)
    plan = PruningPlan.of("key", case.groups, random_removal(case.groups, 1))
    want = outputs(silence(case.model, plan))
    assert torch.isfinite(want).all()
    assert difference(outputs(case.model), want) > 1e-3, "the cut must matter"
    pruned = prune(copy.deepcopy(case.model), plan, case.task.settle)
    assert difference(outputs(pruned), want) < 1e-9

    opened = load_pruned(case.task.load_model().double(), case.task.save(pruned, tmp_path / "model.pt"))
    assert torch.equal(outputs(opened), outputs(pruned))


@pytest.mark.parametrize("builder", NETWORKS)
def test_all_but_the_last_layer_can_be_pruned_and_to_multiples(
    builder: str, case_of: Callable[[str], Case]
) -> None:
    case = case_of(builder)
    owned = {m.layer for g in case.groups.groups for m in g.weighted}
    assert len(set(case.groups.widths) - owned) == 1
    assert case.groups.prunable_channels == sum(out for _, out in case.groups.widths.values()) - 10

    widths = Widths(round_to=8, min_channels=8)
    plan = PruningPlan.of("key", case.groups, random_removal(case.groups, 5, widths))
    pruned = prune(copy.deepcopy(case.model), plan, case.task.settle)
    assert torch.isfinite(outputs(pruned)).all()
    narrower = 0
    for name, (_, channels) in case.groups.widths.items():
        kept = pruned.get_submodule(name).weight.shape[0]  # type: ignore[union-attr,index,operator]
        assert kept >= min(8, channels)
        assert kept in (channels, kept // 8 * 8), name
        narrower += kept < channels
    assert narrower > 0.5 * len(case.groups.widths)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_lite0", "alexnet"])
def test_both_sizes_run_and_small_keeps_more_pixels(name: str, small: bool, data: Path) -> None:
    arguments = {"small": small, "classes": 7}
    task = ClassificationTask(
        f"networks:{name}", str(data), folder=EXAMPLES, arguments=arguments, imgsz=SIDE if small else 128
    )
    model = task.load_model()
    sizes: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[-1]))
    with torch.no_grad():
        assert model(torch.zeros(task.input_shape)).shape == (1, 7)
    assert min(sizes) >= (2 if small else 4)


def test_efficientnet_lite_has_neither_squeeze_and_excitation_nor_silu(data: Path) -> None:
    task = ClassificationTask(
        "networks:efficientnet_lite0", str(data), folder=EXAMPLES, arguments={"classes": 1000}
    )
    model = task.load_model()
    names = {type(m).__name__ for m in model.modules()}
    assert "SqueezeExcitation" not in names
    assert "SiLU" not in names
    assert sum(p.numel() for p in model.parameters()) == 4_652_008  # the published 4.7 million


def test_weights_of_the_published_networks_fit(data: Path) -> None:
    """By name and shape: what torchvision's files hold is what the builders ask for."""
    import torchvision

    for name in ("resnet18", "mobilenet_v2"):
        task = ClassificationTask(
            f"networks:{name}", str(data), folder=EXAMPLES, imgsz=64, arguments={"classes": 1000}
        )
        published = torchvision.models.get_model(name).state_dict()
        own = task.load_model().state_dict()
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in published.items()}


# ---- option A ------------------------------------------------------------------------------------


def test_a_cifar_stream_is_one_channel_through_all_stages(case_of: Callable[[str], Case]) -> None:
    groups = case_of("resnet_cifar:resnet20").groups
    stream = groups.by_name["conv1"]
    index = {m.layer: m.index[:, 0].tolist() for m in stream.weighted}
    assert index["layer1.2.conv2"] == list(range(16))
    assert index["layer2.0.conv2"] == list(range(8, 24))
    assert index["layer3.2.conv2"] == list(range(24, 40))
    sides = [
        tuple((groups.by_name[n].channels, len(groups.by_name[n].weighted)) for n in names)
        for names in groups.tied
    ]
    assert sides == [((8, 6), (8, 6)), ((16, 3), (16, 3))]  # what stages 2 and 3 add, left and right


def test_zeros_stay_where_they_belong_after_each_stage_lost_other_channels(
    case_of: Callable[[str], Case],
) -> None:
    case = case_of("resnet_cifar:resnet20")
    groups = case.groups.select(exclude=["*.conv1"])
    left, right = groups.tied[0]
    cuts: list[dict[str, Any]] = [
        {"conv1": np.array([0, 5, 15])},
        {left: np.array([0, 7]), right: np.array([3, 4])},
        {left: np.arange(7), right: np.arange(1, 8), "conv1": np.arange(15)},
    ]
    for removed in cuts:
        plan = PruningPlan.of("key", groups, removed)
        pruned = prune(copy.deepcopy(case.model), plan, case.task.settle)
        assert difference(outputs(pruned), outputs(silence(case.model, plan))) < 1e-9


def test_a_batch_norm_that_several_groups_share_keeps_its_width_when_one_is_left_out(
    case_of: Callable[[str], Case],
) -> None:
    case = case_of("resnet_cifar:resnet20")
    groups = case.groups.select(exclude=["layer1.*"])
    assert "conv1" not in groups.by_name
    plan = PruningPlan.of("key", groups, random_removal(groups, 2))
    assert plan.layers["layer2.0.bn2"].channels_out == 32
    pruned = prune(copy.deepcopy(case.model), plan, case.task.settle)
    assert difference(outputs(pruned), outputs(silence(case.model, plan))) < 1e-9


def test_a_pruned_cifar_network_can_be_traced_and_pruned_again(case_of: Callable[[str], Case]) -> None:
    case = case_of("resnet_cifar:resnet20")
    plan = PruningPlan.of("key", case.groups, random_removal(case.groups, 1))
    once = prune(copy.deepcopy(case.model), plan, case.task.settle)
    groups = find_groups(case.task.traceable(copy.deepcopy(once).float()), once)
    assert len(groups.groups) == len(case.groups.groups)
    again = PruningPlan.of("key", groups, random_removal(groups, 3))
    twice = prune(copy.deepcopy(once), again, case.task.settle)
    assert difference(outputs(twice), outputs(silence(once, again))) < 1e-9


# ---- every runtime -------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino", "ncnn"])
def test_a_pruned_cifar_network_runs_in_every_runtime(
    runtime: str, case_of: Callable[[str], Case], tmp_path: Path
) -> None:
    if runtime in ("openvino", "ncnn"):
        pytest.importorskip(runtime)
    if runtime == "ncnn":
        pytest.importorskip("pnnx")
    case = case_of("resnet_cifar:resnet20")
    plan = PruningPlan.of("key", case.groups, random_removal(case.groups, 1))
    pruned = prune(copy.deepcopy(case.model), plan, case.task.settle).float()
    ready = case.task.deployable(pruned)
    threads = torch.get_num_threads()
    artifact = export_artifact(ready, Device("here", runtime, threads=1), tmp_path, case.task.input_shape)
    images = case.task.sample_images(3)
    (have,) = open_artifact(artifact, threads=1)(images)
    torch.set_num_threads(threads)
    with torch.no_grad():
        want = ready(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())

"""Blocks that go: found where they are, gone as if silenced, replayed from names alone."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.builder import build_model, load_pruned
from objectives.classification import ClassificationTask
from objectives.detection import DetectionTask
from search.depth import Block, block_scores, find_blocks, remove_blocks, weakest_blocks, without_blocks
from search.groups import find_groups
from search.plan import LayerCut, PruningPlan
from search.prune import prune

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIDE = 32


def network(builder: str) -> nn.Module:
    arguments = {"small": True} if builder.startswith("networks:") else {}
    return build_model(builder, EXAMPLES, arguments).eval()


def images(count: int = 2, side: int = SIDE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3), dtype=dtype)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


def silent(model: nn.Module, blocks: tuple[str, ...]) -> nn.Module:
    """A copy in which the branches of the blocks compute zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in blocks:
            for parameter in twin.get_submodule(name).parameters():
                parameter.zero_()
    return twin


@pytest.mark.parametrize(
    ("builder", "names"),
    [
        (
            "resnet_cifar:resnet20",
            ["layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2"],
        ),
        ("networks:resnet18", ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("networks:mobilenet_v2", [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]),
        ("networks:efficientnet_lite0", None),
        ("networks:alexnet", []),
    ],
)
def test_blocks_are_found_where_input_and_output_are_one_stream(
    builder: str, names: list[str] | None
) -> None:
    model = network(builder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    blocks = find_blocks(model, images())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    if names is None:
        names = [n for n, m in model.named_modules() if getattr(m, "use_res_connect", False)]
        assert len(names) == 9
    assert [b.name for b in blocks] == names
    for block in blocks:
        assert all(layer.startswith(f"{block.name}.") for layer in block.layers)
        assert len(block.layers) >= 2


def test_a_network_without_a_block_equals_the_one_whose_branch_is_silent(
    alive: Callable[[nn.Module, int, int], nn.Module],
) -> None:
    for builder in ("resnet_cifar:resnet20", "networks:mobilenet_v2"):
        model = alive(network(builder), 2, SIDE)
        x = images(dtype=torch.float64)
        names = tuple(sorted(b.name for b in find_blocks(model, x))[::2])
        want = outputs(silent(model, names), x)
        have = outputs(remove_blocks(copy.deepcopy(model), names), x)
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
        assert float((outputs(model, x) - want).abs().max()) > 1e-3 * float(want.abs().max())


def test_what_only_looks_like_a_block_stays() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * x + self.conv(x)
            return out

    class Shortcut(Doubled):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.relu(x + self.conv(x))
            return out

    signed, positive = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    assert find_blocks(nn.Sequential(signed, Doubled()), images()) == ()
    assert find_blocks(nn.Sequential(signed, nn.Conv2d(4, 4, 1)), images()) == ()
    assert find_blocks(nn.Sequential(signed, Shortcut()), images()) == ()  # its ReLU changes the stream
    assert [b.name for b in find_blocks(nn.Sequential(positive, Shortcut()), images())] == ["1"]
    shared = Shortcut()  # two calls of one module are no block
    assert find_blocks(nn.Sequential(positive, shared, shared), images()) == ()


# ---- plans ---------------------------------------------------------------------------------------


def test_a_plan_with_blocks_is_json_and_checks_its_names() -> None:
    plan = PruningPlan("key", {}, {}, ("layer1.0", "layer2.1"))
    assert PruningPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert not plan.is_empty
    assert plan.inside_blocks("layer1.0.conv1")
    assert not plan.inside_blocks("layer1.01.conv1")
    assert "blocks" not in PruningPlan("key", {}).to_json()  # digests of plans of channels stay as they were
    with pytest.raises(ValueError, match="sorted without repetition"):
        PruningPlan("key", {}, {}, ("b", "a"))
    with pytest.raises(ValueError, match=r"a\.b in a"):
        PruningPlan("key", {}, {}, ("a", "a.b"))
    with pytest.raises(ValueError, match=r"a\.conv in a"):
        PruningPlan("key", {}, {"a.conv": LayerCut(8, 8, (), (1,))}, ("a",))
    with pytest.raises(ValueError, match="modules of the model, got nowhere"):
        remove_blocks(network("resnet_cifar:resnet20"), ["nowhere"])


def test_the_weakest_blocks_go_first_and_slow_ones_before_fast_ones() -> None:
    blocks = tuple(Block(name, (f"{name}.conv",)) for name in "abcd")
    scores = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    ms = {"a.conv": 8.0, "b.conv": 1.0, "c.conv": 1.0, "d.conv": 1.0}
    assert weakest_blocks(blocks, scores, ms, 0.0, 0.5) == ()
    assert weakest_blocks(blocks, scores, ms, 0.1, 0.0) == ()  # the nearest number
    assert weakest_blocks(blocks, scores, ms, 0.2, 0.0) == ("d",)
    assert weakest_blocks(blocks, scores, ms, 0.5, 0.0) == ("c", "d")
    # Equation (7): a is worth 4 and costs eight times as much as the others.
    assert weakest_blocks(blocks, scores, ms, 0.25, 1.0) == ("a",)
    with pytest.raises(ValueError, match="depth must be 0 for a network without blocks"):
        weakest_blocks((), {}, {}, 0.5, 0.0)


def test_channels_and_blocks_go_together(
    alive: Callable[[nn.Module, int, int], nn.Module], tmp_path: Path
) -> None:
    x, y = np.zeros((4, SIDE, SIDE, 3), np.uint8), np.arange(4)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    task = ClassificationTask("resnet_cifar:resnet20", str(tmp_path / "data.npz"), folder=EXAMPLES)
    groups = find_groups(task.traceable(task.load_model()), task.load_model())
    model, rng = alive(task.load_model(), 2, SIDE), np.random.default_rng(1)
    removed = {}
    for unit in groups.units:
        count = groups.groups[unit[0]].channels // 3
        for i in unit:
            group = groups.groups[i]
            removed[group.name] = rng.choice(group.channels, count, replace=False)
    plan = PruningPlan.of("key", groups, removed)
    blocks = ("layer1.1", "layer2.2", "layer3.1")

    left = without_blocks(plan, groups, blocks)
    assert set(plan.removed) - set(left.removed) == {f"{name}.conv1" for name in blocks}
    assert left.blocks == blocks
    both = prune(copy.deepcopy(model), left, task.settle)
    want = outputs(prune(silent(model, blocks), plan, task.settle), images(dtype=torch.float64))
    torch.testing.assert_close(outputs(both, images(dtype=torch.float64)), want, rtol=1e-9, atol=1e-9)
    opened = load_pruned(task.load_model().double(), task.save(both, tmp_path / "model.pt"), blocks=blocks)
    assert torch.equal(
        outputs(opened, images(dtype=torch.float64)), outputs(both, images(dtype=torch.float64))
    )
    with pytest.raises(ValueError, match=r"names are missing.*layer1\.1"):
        load_pruned(task.load_model().double(), tmp_path / "model.pt")


# ---- scores --------------------------------------------------------------------------------------


def test_a_blocks_score_is_the_gradient_times_what_the_block_adds() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            out += x  # in place, as torchvision's blocks do it
            return out

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), Add(), Add(), nn.Conv2d(2, 1, 1)).double().eval()
    nn.init.zeros_(model[2].conv.weight)
    nn.init.zeros_(model[2].conv.bias)
    x = images(3, dtype=torch.float64)
    blocks = find_blocks(model, x)
    assert [b.name for b in blocks] == ["1", "2"]

    def total(m: nn.Module, b: Tensor) -> Tensor:
        out: Tensor = m(b).sum()
        return out

    found = block_scores(model, [x[:2], x[2:]], total, blocks)
    with torch.no_grad():
        added = model[1].conv(model[0](x)) * model[3].weight[0, :, :, :][None]
    assert found["1"] == pytest.approx(float(added.sum((2, 3)).abs().sum() / 3))
    assert found["2"] == 0.0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="got none"):
        block_scores(model, [], total, blocks)
    with pytest.raises(ValueError, match=r"gradient at block . is not finite on batch 0"):
        block_scores(model, [x], lambda m, b: total(m, b) * float("nan"), blocks)


# ---- a detector ----------------------------------------------------------------------------------


def test_a_detectors_bottlenecks_go_and_plain_ultralytics_opens_what_is_left(
    alive: Callable[[nn.Module, int, int], nn.Module], tmp_path: Path
) -> None:
    import subprocess

    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(1)
    model: Any = alive(DetectionModel("yolov8n.yaml", verbose=False).eval(), 2, 64)
    x = images(1, 64, torch.float64)
    blocks = find_blocks(model, x)
    assert [b.name for b in blocks] == [
        f"model.{i}.m.{j}" for i, j in ((2, 0), (4, 0), (4, 1), (6, 0), (6, 1), (8, 0))
    ]
    names = ("model.4.m.1", "model.6.m.0")
    gone = remove_blocks(copy.deepcopy(model), names)
    torch.testing.assert_close(outputs(gone, x), outputs(silent(model, names), x), rtol=1e-9, atol=1e-9)

    task = object.__new__(DetectionTask)
    object.__setattr__(task, "imgsz", 64)
    task.settle(gone)
    path = task.save(gone, tmp_path / "shallow.pt")
    program = (
        "import sys, numpy as np\nfrom ultralytics import YOLO\n"
        "model = YOLO(sys.argv[1])\n"
        "assert type(model.model.model[4].m[1]).__name__ == 'Identity'\n"
        "model.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, verbose=False)\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('search', 'objectives', 'profiles')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_block_that_is_a_whole_layer_of_the_framework_goes_too(
    alive: Callable[[nn.Module, int, int], nn.Module],
) -> None:
    """YOLO26's SPPF adds its input; Ultralytics reads from each such layer where its own input comes from."""
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(1)
    model: Any = alive(DetectionModel("yolo26n.yaml", verbose=False).eval(), 2, 64)
    x = images(1, 64, torch.float64)
    names = [b.name for b in find_blocks(model, x)]
    assert "model.9" in names
    gone = remove_blocks(copy.deepcopy(model), ["model.9"])
    assert (gone.model[9].i, gone.model[9].f) == (9, -1)
    want = outputs(silent(model, ("model.9",)), x)
    torch.testing.assert_close(outputs(gone, x), want, rtol=1e-9, atol=1e-9)

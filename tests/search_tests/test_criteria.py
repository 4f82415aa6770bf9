"""Each criterion by a property that only it has, and what all of them share."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.task import Traceable
from objectives.wiring import batchnorms
from search.criteria import CRITERIA, SOURCES, WITH_IMAGES, WITH_LOSS, compute_scores, scores_data_key
from search.feature_rank import hrank
from search.groups import ChannelGroups, find_groups
from search.rerank import group_scores
from search.scores import taylor, taylor_rise, taylor_weight
from search.tables import score_json
from search.weight_scores import bn, fpgm, l1, random

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 8


class Residual(nn.Module):
    """A stream that two layers add into, a layer of its own, and a hidden layer without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn_stem = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.bn_a = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.b, self.bn_b = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.hidden, self.last = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn_stem(self.stem(x)))
        x = self.relu(x + self.bn_b(self.b(self.relu(self.bn_a(self.a(x))))))
        out: Tensor = self.last(self.relu(self.hidden(x.mean((2, 3)))))
        return out


def residual(seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    model = Residual().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def groups_of(model: nn.Module, dtype: torch.dtype = torch.float64) -> ChannelGroups:
    example = torch.zeros(1, 3, SIDE, SIDE, dtype=dtype)
    return find_groups(Traceable(copy.deepcopy(model), example, fixed=frozenset({"last"})), model)


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(
        count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def loss(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model(x)
    return (out[:, 0] - 2 * out[:, 1]).square().sum()


class ResidualTask:
    """The parts of a task that criteria need."""

    model_key, data_key, input_shape = "m", "d", (1, 3, SIDE, SIDE)

    def load_model(self) -> nn.Module:
        return residual().float()

    def traceable(self, model: nn.Module) -> Traceable:
        example = torch.zeros(self.input_shape)
        return Traceable(copy.deepcopy(model), example, fixed=frozenset({"last"}))

    def calibration(self, count: int, batch: int) -> Any:
        x = images(count).float()
        return (x[i : i + batch] for i in range(0, count, batch))

    def loss(self, model: nn.Module, x: Tensor) -> Tensor:
        return loss(model, x)

    def outputs(self, model: nn.Module, x: Tensor) -> Tensor:
        total: Tensor = model(x).sum()
        return total


# ---- taylor_rise ---------------------------------------------------------------------------------


def test_taylor_rise_counts_the_images_whose_loss_would_rise() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).reshape(2, 3, 1, 1))  # type: ignore[operator]
    x = torch.zeros(3, 3, 1, 1, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([1.0, -2.0, 4.0])
    x[:, 1, 0, 0] = 3.0

    def linear(
        m: nn.Module, batch: Tensor
    ) -> Tensor:  # channel 0 lowers it by its value, channel 1 raises it
        out = m(batch)
        total: Tensor = (out[:, 1] - out[:, 0]).sum()
        return total

    # Without channel 0 the loss changes by 1, -2 and 4; without channel 1 it falls on every image.
    assert taylor_rise(model, [x], linear)["0"] == pytest.approx([(1 + 4) / 3, 0.0])
    assert taylor(model, [x], linear)["0"] == pytest.approx([(1 + 2 + 4) / 3, 3.0])


def test_taylor_is_the_rise_and_the_fall() -> None:
    model = residual()
    both = taylor(model, [images(4)], loss)
    rise = taylor_rise(model, [images(4)], loss)
    fall = taylor_rise(model, [images(4)], lambda m, x: -loss(m, x))
    for name, values in both.items():
        np.testing.assert_allclose(rise[name] + fall[name], values)
        assert not np.allclose(rise[name], fall[name])


# ---- taylor_weight -------------------------------------------------------------------------------


def test_taylor_weight_is_the_squared_slope_of_the_loss_when_a_filter_is_scaled() -> None:
    model, x = residual(), images(6)
    found = taylor_weight(model, [x[:4], x[4:]], loss)
    for name in ("a", "hidden"):
        layer = model.get_submodule(name)
        for channel in range(2):
            slopes = []
            for part in (x[:4], x[4:]):
                values = []
                for scale in (1 + 1e-5, 1 - 1e-5):
                    twin = copy.deepcopy(model)
                    with torch.no_grad():
                        for parameter in twin.get_submodule(name).parameters():
                            parameter[channel] *= scale
                        values.append(float(loss(twin, part)) / len(part))
                slopes.append((values[0] - values[1]) / 2e-5)
            assert found[name][channel] == pytest.approx(np.mean(np.square(slopes)), rel=1e-4)
        assert found[name].shape == (layer.weight.shape[0],)  # type: ignore[union-attr,index]


def test_taylor_weight_lets_images_of_one_batch_cancel_before_it_squares() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)).double()
    for layer in model:
        nn.init.ones_(layer.weight)
    x = torch.tensor([1.0, -1.0]).double().view(2, 1, 1, 1)

    def total(m: nn.Module, b: Tensor) -> Tensor:
        out: Tensor = m(b).sum()
        return out

    assert taylor_weight(model, [x], total)["0"] == pytest.approx([0.0])
    assert taylor_weight(model, [x[:1], x[1:]], total)["0"] == pytest.approx([1.0])
    # The activation criterion takes the absolute value per image, whatever the batches.
    assert taylor(model, [x], total)["0"] == taylor(model, [x[:1], x[1:]], total)["0"] == pytest.approx([1.0])


def test_taylor_weight_leaves_the_model_alone_and_refuses_what_it_cannot_score() -> None:
    model = residual()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    taylor_weight(model, [images(2)], loss)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="at least one calibration image, got none"):
        taylor_weight(model, [], loss)
    with pytest.raises(ValueError, match=r"gradient at .* is not finite on batch 1"):
        taylor_weight(
            model, [images(1), images(2)], lambda m, b: loss(m, b) * (float("nan") if len(b) == 2 else 1.0)
        )
    model.unused = nn.Conv2d(1, 4, 1).double()
    assert "unused" not in taylor_weight(model, [images(2)], loss)


# ---- l1 ------------------------------------------------------------------------------------------


def test_l1_counts_the_size_of_weights_and_nothing_else() -> None:
    model = residual()
    before = l1(model)
    with torch.no_grad():
        model.a.weight[1] *= -3.0
        model.a.weight[2] = model.a.weight[2].flip(0)
        model.hidden.bias += 5.0
        model.bn_a.weight *= 7.0
    after = l1(model)
    assert after["a"] == pytest.approx(before["a"] * np.array([1, 3, 1, 1, 1]))
    assert after["hidden"] == pytest.approx(before["hidden"])
    assert before["last"][0] == pytest.approx(float(model.last.weight[0].detach().abs().sum()))


# ---- bn ------------------------------------------------------------------------------------------


def test_bn_reads_only_the_scale_of_the_batch_norm_that_follows() -> None:
    model, example = residual(), images(1)
    found = bn(model, batchnorms(model, example))
    for layer, norm in (("stem", "bn_stem"), ("a", "bn_a"), ("b", "bn_b")):
        assert found[layer] == pytest.approx(np.abs(model.get_parameter(f"{norm}.weight").detach().numpy()))
    with torch.no_grad():
        model.a.weight *= 100.0
    assert bn(model, batchnorms(model, example))["a"] == pytest.approx(found["a"])


def test_a_layer_without_batch_norm_goes_last_under_bn() -> None:
    model = residual()
    found = bn(model, batchnorms(model, images(1)))
    largest = max(found[name].max() for name in ("stem", "a", "b"))
    assert found["hidden"] == pytest.approx(np.full(7, largest))


def test_bn_refuses_a_model_without_batch_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, affine=False))
    model.eval()
    with pytest.raises(ValueError, match="no batch norm follows a layer of this model"):
        bn(model, batchnorms(model, torch.zeros(1, 3, 8, 8)))


# ---- fpgm ----------------------------------------------------------------------------------------


def test_fpgm_sends_away_what_the_others_can_replace_however_large_it_is() -> None:
    layer = nn.Conv2d(1, 5, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([10.0, 10.5, 11.0, 9.0, 0.5]).view(5, 1, 1, 1))
    model = nn.Sequential(layer)
    found = fpgm(model)["0"]
    assert found.argmax() == 4
    assert found.argmin() in (0, 1)
    assert l1(model)["0"].argmin() == 4  # a norm would say the opposite
    assert found[0] == pytest.approx(0 + 0.5 + 1 + 1 + 9.5)


def test_fpgm_does_not_see_a_shift_of_all_filters() -> None:
    model = residual()
    before = fpgm(model)
    with torch.no_grad():
        model.a.weight += torch.randn(model.a.weight.shape[1:], dtype=torch.float64)
    after = fpgm(model)
    np.testing.assert_allclose(after["a"], before["a"], rtol=1e-9)
    assert not np.allclose(l1(model)["a"], l1(residual())["a"], rtol=0.05)


# ---- hrank ---------------------------------------------------------------------------------------


def test_hrank_is_the_mean_rank_of_the_map_whatever_its_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = [[1, 4, 6], [3, 4, 0]]  # per image and channel
    x = torch.stack(
        [
            torch.stack(
                [
                    torch.rand(7, r, generator=generator) @ torch.rand(r, 6, generator=generator)
                    if r
                    else torch.zeros(7, 6)
                    for r in row
                ]
            )
            for row in ranks
        ]
    )
    model = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3, bias=False), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1000.0, 0.01]).view(3, 1, 1, 1))
    for batches in ([x], [x[:1], x[1:]]):
        assert hrank(model, batches, lambda m, b: m(b))["0"].tolist() == [2, 4, 3]


def test_hrank_of_single_values_is_how_often_they_are_not_zero() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU()).eval()
    nn.init.eye_(model[1].weight)
    x = torch.tensor([[1.0, -1.0], [2.0, -3.0], [-1.0, -2.0], [4.0, 5.0]]).view(4, 2, 1, 1)
    assert hrank(model, [x], lambda m, b: m(b))["1"].tolist() == [0.75, 0.25]
    pixel = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.ReLU()).eval()
    nn.init.dirac_(pixel[0].weight)
    assert hrank(pixel, [x], lambda m, b: m(b))["0"].tolist() == [0.75, 0.25]
    with pytest.raises(ValueError, match="at least one calibration image, got none"):
        hrank(pixel, [], lambda m, b: m(b))


# ---- random --------------------------------------------------------------------------------------


def test_random_draws_one_number_per_group_channel_however_many_layers_share_it() -> None:
    model = residual()
    groups = groups_of(model)
    assert sorted(groups.weights) == [1, 1, 2]
    sums = np.concatenate(
        [np.concatenate(group_scores(random(model, groups, seed), groups)) for seed in range(200)]
    )
    stream = np.concatenate(
        [
            group_scores(random(model, groups, seed), groups)[int(np.argmax(groups.weights))]
            for seed in range(200)
        ]
    )
    for values in (sums, stream):  # 3600 and 1200 numbers: uniform in [0, 1)
        assert values.min() >= 0.0
        assert values.max() < 1.0
        assert np.quantile(values, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.05)
    again = random(model, groups, 3)
    for name, values in random(model, groups, 3).items():
        assert values.tobytes() == again[name].tobytes()
    assert not np.allclose(random(model, groups, 4)["a"], again["a"])


# ---- what all share ------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_group_of_a_model_gets_a_score(criterion: str) -> None:
    task: Any = ResidualTask()
    scores = compute_scores(criterion, task, images=4, batch=2, loss="task", seed=1)
    assert scores.criterion == criterion
    groups = groups_of(residual().float(), torch.float32)
    for values, group in zip(group_scores(scores.layers, groups), groups.groups, strict=True):
        assert values.shape == (group.channels,)
        # Maps of noise have full rank all alike, no batch norm follows the hidden layer, and none of its
        # channels lowers the loss of any image.
        if criterion != "hrank" and (criterion, group.name) not in (
            ("bn", "hidden"),
            ("taylor_rise", "hidden"),
        ):
            assert len(np.unique(values)) > 1, group.name
    again = compute_scores(criterion, task, images=4, batch=2, loss="task", seed=1)
    for name, values in scores.layers.items():
        assert values.tobytes() == again.layers[name].tobytes()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_cache_key_depends_on_what_the_score_depends_on(criterion: str) -> None:
    task: Any = ResidualTask()
    settings: dict[str, Any] = {"images": 4, "batch": 2, "loss": "task", "seed": 0}
    key = scores_data_key(criterion, task, **settings)
    reads = {
        name
        for name, other in {"images": 5, "batch": 3, "loss": "outputs", "seed": 1}.items()
        if scores_data_key(criterion, task, **{**settings, name: other}) != key
    }
    want: set[str] = set()
    if criterion in WITH_IMAGES:
        want |= {"images"}
    if criterion in WITH_LOSS:
        want |= {"batch", "loss"}
    if criterion == "random":
        want |= {"seed"}
    assert reads == want
    moved: Any = ResidualTask()
    moved.data_key = "other"
    assert (scores_data_key(criterion, moved, **settings) != key) == (criterion in WITH_IMAGES)


def test_criteria_are_named_and_sourced_once() -> None:
    assert set(SOURCES) == set(CRITERIA)
    assert CRITERIA[0] == "taylor"
    task: Any = ResidualTask()
    with pytest.raises(ValueError, match=r"criterion must be one of taylor.*, got 'magic'"):
        scores_data_key("magic", task, images=1, batch=1, loss="task")


def test_the_scores_document_says_what_was_computed_and_gives_every_score() -> None:
    task: Any = ResidualTask()
    scores = compute_scores("l1", task, images=1, batch=1, loss="task")
    document = json.loads(json.dumps(score_json(scores)))
    assert document["source"] == SOURCES["l1"]
    entry = next(layer for layer in document["layers"] if layer["layer"] == "a")
    assert entry["scores"] == scores.layers["a"].tolist()
    assert (entry["channels"], entry["min"], entry["max"]) == (5, min(entry["scores"]), max(entry["scores"]))


def test_every_criterion_knows_the_halves_of_a_split_layer() -> None:
    """YOLO's blocks split one layer's output; scores are of the layer, and each half takes its own."""
    from ultralytics.nn.tasks import DetectionModel

    from objectives.detection.tracing import traceable_copy

    torch.manual_seed(1)
    model = DetectionModel("yolov8n.yaml", verbose=False).eval().requires_grad_(True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
    groups = find_groups(traceable_copy(model, (1, 3, 64, 64)), model)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    pairs = batchnorms(model, x)
    blocks = {n for n, m in model.named_modules() if type(m).__name__ == "Conv"}
    assert pairs == {f"{n}.conv": f"{n}.bn" for n in blocks}

    def objective(m: nn.Module, b: Tensor) -> Tensor:
        raw = m(b)[1]
        total: Tensor = raw["boxes"].square().sum() + raw["scores"].sum()
        return total

    found = {
        "l1": l1(model),
        "fpgm": fpgm(model),
        "bn": bn(model, pairs),
        "random": random(model, groups, 0),
        "hrank": hrank(model, [x], lambda m, b: m(b)),
        "taylor_weight": taylor_weight(model, [x], objective),
    }
    split = [groups.by_name[f"model.2.cv1.conv[{part}]"] for part in ("0:16", "16:32")]
    for criterion, layers in found.items():
        assert len(layers["model.2.cv1.conv"]) == 32, criterion
        sums = group_scores(layers, groups)
        own = {g.name: s for g, s in zip(groups.groups, sums, strict=True)}
        assert all(np.isfinite(s).all() for s in sums)
        # The first half belongs to no other layer, the second is a residual stream.
        first, second = split if len(split[0].weighted) == 1 else split[::-1]
        rows = first.weighted[0].index[:, 0]
        np.testing.assert_allclose(own[first.name], layers["model.2.cv1.conv"][rows])
        assert {m.layer for m in second.weighted} > {"model.2.cv1.conv"}

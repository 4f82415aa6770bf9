"""Equation (3) against networks small enough to differentiate by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from search.criteria import compute_scores
from search.scores import ChannelScores, taylor


def weighted_sum(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradient at the output is known: every value of output channel k counts k + 1 times."""
    out = model(batch)
    weights = torch.arange(1, out.shape[1] + 1, dtype=out.dtype).reshape(1, -1, *[1] * (out.ndim - 2))
    return (out * weights).sum()


class Plain(nn.Module):
    """conv -> BN -> ReLU -> 1x1 conv, double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.act(self.bn(self.conv(x))))
        return out


def plain() -> Plain:
    torch.manual_seed(0)
    model = Plain().double().eval()
    model.bn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.05]))
    model.bn.running_var.copy_(torch.tensor([0.5, 1.5, 0.8]))
    with torch.no_grad():
        model.bn.bias.copy_(torch.tensor([0.3, -0.1, 0.2]))
    return model


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed)).double()


def test_scores_are_the_sum_over_the_map_behind_batch_norm_and_activation() -> None:
    model, x = plain(), images(4)
    found = taylor(model, [x[:3], x[3:]], weighted_sum)
    with torch.no_grad():
        maps = model.act(model.bn(model.conv(x)))  # (4, 3, 5, 5)
        # dL/dmap_j = sum over k of (k + 1) last.weight[k, j], the same at every pixel.
        gradient = (torch.tensor([1.0, 2.0]).double() @ model.last.weight[:, :, 0, 0])[None, :, None, None]
        want = (maps * gradient).sum((2, 3)).abs().mean(0)
        outputs = model.last(maps)
        want_last = (outputs * torch.tensor([1.0, 2.0])[None, :, None, None]).sum((2, 3)).abs().mean(0)
    np.testing.assert_allclose(found["conv"], want.numpy(), rtol=1e-12)
    np.testing.assert_allclose(found["last"], want_last.numpy(), rtol=1e-12)
    assert set(found) == {"conv", "last"}
    # In front of the batch norm it would be another number.
    with torch.no_grad():
        before = (model.conv(x) * gradient).sum((2, 3)).abs().mean(0)
    assert not np.allclose(found["conv"], before.numpy(), rtol=0.05)


def test_positive_and_negative_products_cancel_inside_an_image_and_not_between_images() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)).double()
    for layer in model:
        nn.init.ones_(layer.weight)
    half = torch.tensor([[[[1.0, -1.0]]], [[[1.0, 2.0]]], [[[-3.0, 0.0]]]]).double()
    found = taylor(model, [half], lambda m, b: m(b).sum())
    assert found["0"] == pytest.approx([(0 + 3 + 3) / 3])


def test_the_size_of_batches_does_not_matter() -> None:
    model, x = plain(), images(7)
    one = taylor(model, [x], weighted_sum)
    many = taylor(model, [x[i : i + 2] for i in range(0, 7, 2)], weighted_sum)
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-12)


class Shortcut(nn.Module):
    """`out += x`, in place, as torchvision's blocks do it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.a, self.b, self.bn = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Conv2d(2, 2, 3, padding=1),
            nn.BatchNorm2d(2),
        )
        self.relu, self.last = nn.ReLU(inplace=in_place), nn.Conv2d(2, 2, 1)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        out = self.bn(self.b(x))
        if self.in_place:
            out += x
        else:
            out = out + x
        result: Tensor = self.last(self.relu(out))
        return result


def test_a_sum_in_place_does_not_corrupt_the_map_it_overwrites() -> None:
    found = []
    for in_place in (True, False):
        torch.manual_seed(3)
        model = Shortcut(in_place).double().eval()
        found.append(taylor(model, [images(3)], weighted_sum))
    for name in found[1]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-12, err_msg=name)
    model.bn.eval()
    x = images(3)
    with torch.no_grad():
        a = model.a(x)
        own = model.bn(model.b(a))  # layer b's map is what it adds to the stream, not the sum
        alive = (own + a) > 0
        through = (torch.tensor([1.0, 2.0]).double() @ model.last.weight[:, :, 0, 0])[None, :, None, None]
        want = (own * through * alive).sum((2, 3)).abs().mean(0)
    np.testing.assert_allclose(found[0]["b"], want.numpy(), rtol=1e-12)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_an_activation_in_place_is_followed_like_any_other(act: type[nn.Module]) -> None:
    found = []
    for in_place in (True, False):
        model = plain()
        model.act = act(inplace=in_place)
        found.append(taylor(model, [images(3)], weighted_sum))
    for name in found[1]:
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-12, err_msg=name)


def test_linear_layers_on_tokens_have_their_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    tokens = torch.randn(2, 5, 4).double()
    found = taylor(model, [tokens], lambda m, b: m(b).sum())
    with torch.no_grad():
        want = model(tokens).sum(1).abs().mean(0)
    np.testing.assert_allclose(found[""], want.numpy(), rtol=1e-12)


def test_a_layer_that_the_loss_ignores_has_no_score() -> None:
    model = plain()
    model.unused = nn.Conv2d(1, 4, 1).double()
    assert set(taylor(model, [images(2)], weighted_sum)) == {"conv", "last"}


def test_the_model_is_left_as_it_was() -> None:
    model = plain()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    taylor(model, [images(2)], weighted_sum)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_no_images_and_infinite_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one calibration image, got none"):
        taylor(plain(), [], weighted_sum)
    with pytest.raises(ValueError, match=r"gradient at conv is not finite on batch 0"):
        taylor(plain(), [images(1)], lambda m, b: weighted_sum(m, b) * float("nan"))


def test_progress_counts_batches() -> None:
    done: list[int] = []
    taylor(plain(), [images(1), images(2)], weighted_sum, done.append)
    assert done == [1, 2]


# ---- criteria by name, and the file --------------------------------------------------------------


class OneTask:
    """The parts of a task that scores need."""

    model_key, data_key, input_shape = "m", "d", (1, 1, 5, 5)

    def load_model(self) -> nn.Module:
        return plain()

    def calibration(self, count: int, batch: int) -> Any:
        x = images(count)
        return (x[i : i + batch] for i in range(0, count, batch))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return weighted_sum(model, batch)

    def outputs(self, model: nn.Module, batch: Tensor) -> Tensor:
        total: Tensor = model(batch).sum()
        return total


def test_a_criterion_is_computed_from_the_task() -> None:
    task: Any = OneTask()
    scores = compute_scores("taylor", task, images=5, batch=2, loss="task")
    want = taylor(plain(), [images(5)], weighted_sum)
    for name in want:
        np.testing.assert_allclose(scores.layers[name], want[name], rtol=1e-12)
    assert (scores.criterion, scores.model_key) == ("taylor", "m")
    outputs = compute_scores("taylor", task, images=5, batch=2, loss="outputs")
    assert not np.allclose(outputs.layers["conv"], scores.layers["conv"])
    assert outputs.data_key != scores.data_key  # or one would be taken for the other in the cache
    assert compute_scores("taylor", task, images=4, batch=2, loss="task").data_key != scores.data_key
    with pytest.raises(ValueError, match=r"criterion must be one of taylor.*, got 'magic'"):
        compute_scores("magic", task, images=1, batch=1, loss="task")


def test_the_file_keeps_every_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(7)
    scores = ChannelScores("taylor", "m", "d", {"a.b": values, "c": np.zeros(2)})
    back = ChannelScores.load(scores.save(tmp_path / "deep" / "scores.safetensors"))
    assert (back.criterion, back.model_key, back.data_key, list(back.layers)) == (
        "taylor",
        "m",
        "d",
        ["a.b", "c"],
    )
    assert back.layers["a.b"].tobytes() == values.tobytes()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scores.safetensors"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = ChannelScores("taylor", "m", "d", {"a": np.ones(100)}).save(tmp_path / "scores.safetensors")
    whole = path.read_bytes()
    for damaged in (
        whole[:-20],
        whole[:5],
        b"",
        whole.replace(b'"format_version":"1"', b'"format_version":"9"'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="scores"):
            ChannelScores.load(path)
    with pytest.raises(ValueError, match="not a readable scores file"):
        ChannelScores.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "bad", [np.array([1.0, -1e-9]), np.array([np.nan]), np.array([np.inf]), np.ones((2, 2))]
)
def test_scores_are_finite_and_not_negative(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores of layer must be one finite number >= 0 per channel"):
        ChannelScores("taylor", "m", "d", {"layer": bad})

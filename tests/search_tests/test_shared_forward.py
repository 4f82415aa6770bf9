"""Losses computed from a shared start are the very losses of the changed network by itself, for less work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from search.shared_forward import SharedForward

BATCHES = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Block(nn.Module):
    """A residual block that writes into what its layers gave, as most implementations do."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)  # one module, called twice

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x
        result: Tensor = self.relu(out)
        return result


class Halves(nn.Module):
    """Gives a pair, which is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = self.conv(x).chunk(2, 1)
        return one, other


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*(Block(8, 8) for _ in range(3)))
        self.halves = Halves()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        one, other = self.halves(self.blocks(early))
        # The stem's output is needed long after it was computed.
        out: Tensor = self.head(torch.cat((one, other), 1).mean((2, 3)) + early.mean((2, 3)))
        return out


def make() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return net


def loss(model: nn.Module, batch: Tensor) -> float:
    return float(model(batch).square().sum())


def plain(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(loss(model, batch) for batch in BATCHES)


@contextmanager
def changed(model: nn.Module, *names: str, factor: float = 0.5) -> Iterator[None]:
    """Other weights in these layers for a while."""
    weights = [model.get_submodule(name).get_parameter("weight") for name in names]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(factor)
        yield
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)


FIRST, SECOND, THIRD = (f"blocks.{i}.conv1" for i in range(3))


@pytest.mark.parametrize(
    "names",
    [
        (THIRD,),
        (SECOND,),
        (FIRST,),
        (FIRST, "blocks.0.norm1", THIRD),
        ("head",),
        ("stem.0",),
        ("halves.conv",),
    ],
)
def test_the_loss_is_that_of_the_network_by_itself(names: tuple[str, ...]) -> None:
    model = make()
    shared = SharedForward(model, loss, BATCHES)
    assert shared.loss == plain(model)
    with changed(model, *names):
        by_itself = plain(model)
    assert shared.loss_with({*names}, changed(model, *names)) == by_itself != shared.loss
    assert plain(model) == shared.loss


def test_what_does_not_change_is_not_run() -> None:
    model = make()
    shared = SharedForward(model, loss, BATCHES)
    assert shared.loss_with({"nowhere"}, changed(model, "head")) == shared.loss


def test_any_order_and_any_number_of_times() -> None:
    model = make()
    shared = SharedForward(model, loss, BATCHES)
    for name, factor in (
        (SECOND, 0.5),
        (THIRD, 0.5),
        (THIRD, 0.2),
        (FIRST, 0.5),
        (THIRD, 0.5),
        (SECOND, 0.5),
    ):
        with changed(model, name, factor=factor):
            by_itself = plain(model)
        assert shared.loss_with({name}, changed(model, name, factor=factor)) == by_itself


def test_what_comes_before_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    shared = SharedForward(model, loss, BATCHES)
    done: list[int] = []
    convolve = functional.conv2d

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        done.append(weight.shape[0])
        return convolve(x, weight, *rest)

    monkeypatch.setattr(functional, "conv2d", counted)
    shared.loss_with({THIRD}, changed(model, THIRD))
    # To the last block once, stem and two blocks of two; then its two convolutions and the one behind.
    assert len(done) == len(BATCHES) * (5 + 3)
    done.clear()
    shared.loss_with({THIRD}, changed(model, THIRD, factor=0.2))
    assert len(done) == len(BATCHES) * 3


class Branches(nn.Module):
    """Three branches from one map; the second writes into the map before the third reads it."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1))
            for _ in range(3)
        )
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        outputs = []
        for number, branch in enumerate(self.branches):
            outputs.append(branch(x))
            if self.writes and number == 1:
                x.add_(outputs[0].mean())
        return torch.cat(outputs, 1).mean((2, 3))


@pytest.mark.parametrize("writes", [False, True])
def test_branches_that_do_not_see_the_difference_are_not_computed_again(
    writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Branches(writes=writes).eval()
    shared = SharedForward(model, loss, BATCHES)
    done: list[int] = []
    convolve = functional.conv2d

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        done.append(weight.shape[0])
        return convolve(x, weight, *rest)

    for number, branch in enumerate([0, 0, 0, 1, 1, 2, 0]):
        name, factor = f"branches.{branch}.0", 0.9 - 0.1 * number
        with changed(model, name, factor=factor):
            by_itself = plain(model)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "conv2d", counted)
            done.clear()
            found = shared.loss_with({name}, changed(model, name, factor=factor))
        assert found == by_itself
        if number in (1, 2):  # the branch itself, and the third one where the map was written to
            assert len(done) == len(BATCHES) * (4 if writes else 2)


def test_the_network_is_left_as_it_was() -> None:
    model = make()
    own = model.stem.forward
    model.stem.forward = own  # type: ignore[method-assign]  # as some networks do to fuse their layers
    shared = SharedForward(model, loss, BATCHES)
    shared.loss_with({THIRD}, changed(model, THIRD))
    assert model.stem.__dict__["forward"] is own
    assert [m for m in model.modules() if "forward" in m.__dict__] == [model.stem]


def test_a_detector() -> None:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()
    images = [torch.rand(2, 3, 64, 64)]

    def raw(network: nn.Module, batch: Tensor) -> float:
        return float(network(batch)[0].square().sum())

    shared = SharedForward(model, raw, images)
    for name in ("model.4.m.0.cv1.conv", "model.9.cv2.conv", "model.22.cv3.1.0.conv", "model.2.cv1.bn"):
        with changed(model, name, factor=0.9):
            by_itself = raw(model, images[0])
        assert shared.loss_with({name}, changed(model, name, factor=0.9)) == by_itself

"""Losses computed from a shared start are the very losses of the networks by themselves, for less work."""

from __future__ import annotations

import copy
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
    def __init__(self, inner: tuple[int, int, int] = (8, 8, 8)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*(Block(8, n) for n in inner))
        self.halves = Halves()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        one, other = self.halves(self.blocks(early))
        # The stem's output is needed long after it was computed.
        out: Tensor = self.head(torch.cat((one, other), 1).mean((2, 3)) + early.mean((2, 3)))
        return out


def make(inner: tuple[int, int, int] = (8, 8, 8)) -> Net:
    """Equal weights wherever shapes are equal."""
    net = Net(inner).eval()
    for name, parameter in net.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return net


def loss(model: nn.Module, batch: Tensor) -> float:
    return float(model(batch).square().sum())


def plain(model: nn.Module) -> float:
    with torch.no_grad():
        return sum(loss(model, batch) for batch in BATCHES)


@pytest.mark.parametrize(
    "inner", [(8, 8, 5), (8, 6, 8), (4, 8, 8), (3, 5, 7), (8, 8, 8)], ids=lambda widths: str(widths)
)
def test_the_loss_is_that_of_the_network_by_itself(inner: tuple[int, int, int]) -> None:
    shared = SharedForward(make(), loss, BATCHES)
    assert shared.loss == plain(make())
    assert shared.loss_of(make(inner)) == plain(make(inner))


def test_any_order_and_any_number_of_times() -> None:
    shared = SharedForward(make(), loss, BATCHES)
    for inner in ((8, 5, 8), (8, 8, 5), (8, 8, 4), (5, 8, 8), (8, 8, 5), (8, 5, 8)):
        assert shared.loss_of(make(inner)) == plain(make(inner))


def test_what_differs_in_the_first_and_in_the_last_layer() -> None:
    shared = SharedForward(make(), loss, BATCHES)
    for name in ("head", "stem.0", "halves.conv"):
        other = make()
        with torch.no_grad():
            other.get_submodule(name).weight.mul_(0.5)  # type: ignore[operator]  # a layer's
        assert shared.loss_of(other) == plain(other) != shared.loss


def test_what_comes_before_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedForward(make(), loss, BATCHES)
    done: list[int] = []
    convolve = functional.conv2d

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        done.append(weight.shape[0])
        return convolve(x, weight, *rest)

    monkeypatch.setattr(functional, "conv2d", counted)
    shared.loss_of(make((8, 8, 5)))
    # To the last block once, stem and two blocks of two; then its two convolutions and the one behind.
    assert len(done) == len(BATCHES) * (5 + 3)
    done.clear()
    shared.loss_of(make((8, 8, 4)))
    assert len(done) == len(BATCHES) * 3


class Branches(nn.Module):
    """Three branches from one map; the second writes into the map before the third reads it."""

    def __init__(self, widths: tuple[int, int, int] = (6, 6, 6), *, writes: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, n, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(n, 4, 1))
            for n in widths
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


def branched(*widths: int, writes: bool) -> Branches:
    net = Branches(widths, writes=writes).eval()  # type: ignore[arg-type]  # three of them
    for name, parameter in net.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize("writes", [False, True])
def test_branches_that_do_not_see_the_difference_are_not_computed_again(
    writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedForward(branched(6, 6, 6, writes=writes), loss, BATCHES)
    done: list[int] = []
    convolve = functional.conv2d

    def counted(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        done.append(weight.shape[0])
        return convolve(x, weight, *rest)

    for number, widths in enumerate(
        [(5, 6, 6), (4, 6, 6), (3, 6, 6), (6, 5, 6), (6, 4, 6), (6, 6, 5), (2, 6, 6)]
    ):
        with monkeypatch.context() as patch:
            patch.setattr(functional, "conv2d", counted)
            done.clear()
            found = shared.loss_of(branched(*widths, writes=writes))
        assert found == plain(branched(*widths, writes=writes))
        if number in (1, 2):  # the branch itself, and the third one where the map was written to
            assert len(done) == len(BATCHES) * (4 if writes else 2)


def test_the_networks_are_left_as_they_were() -> None:
    model, other = make(), make((8, 8, 5))
    own = other.stem.forward
    other.stem.forward = own  # type: ignore[method-assign]  # as some networks do to fuse their layers
    shared = SharedForward(model, loss, BATCHES)
    shared.loss_of(other)
    assert other.stem.__dict__["forward"] is own
    watched = [m for net in (model, other) for m in net.modules() if "forward" in m.__dict__]
    assert watched == [other.stem]


def test_a_detector() -> None:
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()
    images = [torch.rand(2, 3, 64, 64)]

    def raw(network: nn.Module, batch: Tensor) -> float:
        return float(network(batch)[0].square().sum())

    shared = SharedForward(model, raw, images)
    for name in ("model.4.m.0.cv1.conv", "model.9.cv2.conv", "model.22.cv3.1.0.conv", "model.2.cv1.bn"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.get_submodule(name).weight.mul_(0.9)  # type: ignore[operator]  # a layer's
            assert shared.loss_of(other) == raw(other, images[0])

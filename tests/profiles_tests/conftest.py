"""Small networks and their artifacts, exported once per session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from profiles.artifact import Artifact, export_artifact
from profiles.connection import close_connections
from profiles.device import Device

SHAPE = (1, 3, 64, 64)


class SmallNet(nn.Module):
    """Every kind of layer and the ways a runtime fuses one: ReLU, SiLU, sum, depthwise, linear."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.mix = nn.Conv2d(width, width, 3, 1, 1)
        self.depthwise = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.narrow = nn.Conv2d(width, 2 * width, 1)
        self.skip = nn.Conv2d(width, 2 * width, 1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.head = nn.Linear(width, 10)
        self.tokens = nn.Linear(10, 4)
        self.act = nn.SiLU()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.stem(images))
        x = x + self.act(self.mix(x))
        y = nn.functional.leaky_relu(self.depthwise(x))
        y = torch.relu(self.narrow(y) + self.skip(x))
        y = self.up(y).sigmoid()
        logits = self.head(y.flatten(2).transpose(1, 2))
        return logits, self.tokens(logits.mean(1))


def make_small_net(width: int) -> nn.Module:
    torch.manual_seed(width)
    return SmallNet(width).eval()


@pytest.fixture(scope="session")
def small_net() -> Callable[[int], nn.Module]:
    return make_small_net


@pytest.fixture(scope="session", params=["onnxruntime", "torch", "openvino", "ncnn"])
def device(request: pytest.FixtureRequest) -> Device:
    return Device("here", request.param, threads=1)


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Device, int], Artifact]:
    """Artifact of a `SmallNet` of some width for a device, made once."""
    made: dict[tuple[str, int], Artifact] = {}

    def get(device: Device, width: int) -> Artifact:
        key = (device.runtime, width)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{device.runtime}-{width}")
            made[key] = export_artifact(make_small_net(width), device, folder, SHAPE, {"names": "a, b"})
        return made[key]

    return get


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models and images."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("PARETOPRUNE_DATA", default))
    if not (folder / "yolov8n-bccd.pt").is_file():
        pytest.skip(f"no yolov8n-bccd.pt in {folder}; set PARETOPRUNE_DATA to the data folder")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _close_runners() -> Iterator[None]:
    yield
    close_connections()

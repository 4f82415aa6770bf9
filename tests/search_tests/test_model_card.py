"""The model card of a classifier: it says what was done, and its code does what the study did."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from objectives.builder import load_pruned
from profiles.device import Device
from search.bench import Shop
from search.depth import without_blocks
from search.export import metrics_json
from search.found import Found
from search.front import ParetoFront
from search.model_card import model_card
from search.model_files import export_model
from search.plan import PruningPlan
from search.prune import prune
from search.result import TrialParams, TrialResult
from search.studyfile import load_study_file
from search.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.conv1(x)))

def residual(classes=2):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""
BLOCK = "2"


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coarse noise, so that every way of scaling it gives other pixels."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets that are not square: a folder of pictures, and arrays."""
    home = tmp_path_factory.mktemp("card")
    (home / "card_networks.py").write_text(NETWORK)
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = home / "pictures" / split / label
            folder.mkdir(parents=True)
            picture(44, 30, 1).save(folder / "0.png")
            picture(31, 50, 2).save(folder / "1.png")
    x = np.stack([np.asarray(picture(28, 20, seed)) for seed in range(4)])
    np.savez(home / "arrays.npz", x_train=x, y_train=[0, 1, 0, 1], x_test=x, y_test=[0, 1, 0, 1])
    return home


def open_shop(home: Path, **settings: Any) -> Shop:
    document = {
        "name": "card",
        "model": {"builder": "card_networks:residual"},
        "data": "pictures",
        "imgsz": 16,
        "devices": [{"name": "desk", "runtime": "onnxruntime"}],
        **settings,
    }
    path = home / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    study = load_study_file(path)
    return Shop(study, Workspace(study.folder), notice=lambda _: None)


def make_plan(shop: Shop, *, channels: bool, blocks: bool) -> PruningPlan:
    group = next(g for g in shop.groups.groups if any(m.layer == "1.conv1" for m in g.members))
    removed = {group.name: np.array([1, 4])} if channels else {}
    plan = PruningPlan.of(shop.task.model_key, shop.groups, removed)
    return without_blocks(plan, shop.groups, (BLOCK,)) if blocks else plan


def write_card(
    shop: Shop,
    plan: PruningPlan,
    folder: Path,
    asked: TrialParams,
    epochs: int,
    model: nn.Module | None = None,
) -> str:
    """A card of a trial that was not run; with a model, of its exported files."""
    folder.mkdir()
    name = "model.onnx"
    if model is not None:
        name = export_model(model, shop.task, Device("desk", "onnxruntime"), folder).path.name
    numbers: dict[str, Any] = {"accuracy": 0.5, "latency_ms": 2.0, "latency_p90_ms": 2.1, "speedup": 1.0}
    unpruned = TrialResult(0, "desk", "print", TrialParams(), "complete", **numbers)
    curve = (0.4,) * (epochs + 1)
    result = TrialResult(3, "desk", "print", asked, "complete", **numbers, epochs=curve)
    checks = {name: {"accuracy": 0.5, "largest_relative_difference": 0.0}}
    found = Found(ParetoFront.of([unpruned, result]), (unpruned, result))
    metrics = metrics_json(shop.study, result, found, shop, plan=plan, checks=checks, folder=folder)
    assert metrics["epochs_trained"] == epochs
    assert metrics["blocks"] == list(plan.blocks)
    return model_card(metrics, shop.task.metadata(shop.task.load_model()), plan)


# ---- what it says --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "blocks", "asked", "epochs", "says", "says_not"),
    [
        (
            True,
            False,
            {"ratio": 0.25, "beta": 0.5, "steps": 2, "criterion": "l1", "cost": "macs"},
            2,
            ["channels were pruned in 2 steps", "0.250 of channels", "criterion l1", "β 0.500", "cost macs",
             "allocation rank", "trained for 2 epochs"],
            ["as a whole", "at random", "Blocks that are gone"],
        ),
        (
            False,
            True,
            {"depth": 0.4},
            1,
            ["1 block went as a whole", "0.400 of those that can", "trained for 1 epoch.", f"now: {BLOCK}."],
            ["channels were pruned", "0.000 of channels"],
        ),
        (
            True,
            True,
            {"ratio": 0.2, "depth": 0.4, "recovery": "scratch"},
            5,
            ["channels were pruned (", "and 1 block went", "drawn at random and trained for 5 epochs"],
            ["What was left"],
        ),
        (True, False, {"ratio": 0.2}, 0, ["then not trained"], ["trained for"]),
        (False, False, {}, 0, ["The unpruned classifier"], ["smaller", "trained for"]),
    ],
    ids=["channels", "blocks", "scratch", "untrained", "unpruned"],
)  # fmt: skip
def test_it_says_what_was_done_and_nothing_else(
    home: Path, tmp_path: Path, channels: bool, blocks: bool, asked: dict[str, Any], epochs: int,
    says: list[str], says_not: list[str],
) -> None:  # fmt: skip
    shop = open_shop(home)
    plan = make_plan(shop, channels=channels, blocks=blocks)
    card = write_card(shop, plan, tmp_path / "out", TrialParams(**asked), epochs)
    for text in says:
        assert text in card
    for text in says_not:
        assert text not in card


# ---- what its code does --------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
def test_its_line_opens_the_state_dict(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: bool
) -> None:
    shop = open_shop(home)
    plan = make_plan(shop, channels=True, blocks=blocks)
    model = prune(shop.task.load_model(), plan, shop.task.settle).eval()
    card = write_card(shop, plan, tmp_path / "out", TrialParams(ratio=0.2), 1, model)
    (line,) = re.findall(r"`(load_pruned\(.*?\))` of paretoprune", card)
    monkeypatch.chdir(tmp_path / "out")
    opened = eval(line, {"load_pruned": load_pruned, "Path": Path, "network": shop.task.load_model()})
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(opened.eval()(images), model(images))


def scaled_folder(home: Path, image: Path, number: int) -> Shop:
    shutil.copy(home / "pictures" / "val" / "a" / f"{number}.png", image)
    return open_shop(home)


def plain_arrays(home: Path, image: Path, number: int) -> Shop:
    picture(28, 20, number).save(image, format="PNG")
    return open_shop(home, data="arrays.npz", imgsz=None)


@pytest.mark.parametrize(
    ("make", "number"),
    [(scaled_folder, 0), (scaled_folder, 1), (plain_arrays, 0)],
    ids=["wide", "high", "arrays"],
)
def test_its_code_prepares_an_image_as_the_study_did(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, Path, int], Shop],
    number: int,
) -> None:
    shop = make(home, tmp_path / "image.jpg", number)
    plan = make_plan(shop, channels=True, blocks=False)
    model = prune(shop.task.load_model(), plan, shop.task.settle).eval()
    card = write_card(shop, plan, tmp_path / "out", TrialParams(ratio=0.2), 1, model)
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", card, re.S) if "onnxruntime" in b]
    (tmp_path / "image.jpg").rename(tmp_path / "out" / "image.jpg")
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(code, names)
    expected = shop.task.sample_images(4)[number]
    np.testing.assert_allclose(names["pixels"][0], expected, atol=1e-5)

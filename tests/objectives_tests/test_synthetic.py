from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from objectives.synthetic import CLASSES, _labels, _place, _shape, draw_image, make_detection_set


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_set_is_complete_and_its_labels_are_valid(tmp_path: Path) -> None:
    path = make_detection_set(tmp_path / "set", images_train=30, images_val=10, imgsz=96, seed=3)

    data = yaml.safe_load(path.read_text())
    assert "path" not in data
    assert list(data["names"].values()) == list(CLASSES)
    seen = set()
    for split, count in (("train", 30), ("val", 10)):
        images = sorted((path.parent / data[split]).iterdir())
        assert len(images) == count
        for image in images:
            with Image.open(image) as picture:
                assert picture.size == (96, 96)
            labels = np.loadtxt(path.parent / "labels" / split / f"{image.stem}.txt", ndmin=2)
            assert labels.shape[1] == 5
            low, high = labels[:, 1:3] - labels[:, 3:] / 2, labels[:, 1:3] + labels[:, 3:] / 2
            assert low.min() >= -1e-5
            assert high.max() <= 1 + 1e-5
            assert labels[:, 3:].min() > 1 / 96
            seen |= set(labels[:, 0])
    assert seen == set(range(len(CLASSES)))


def test_ultralytics_reads_the_set_relative_to_its_yaml(tmp_path: Path) -> None:
    # In a process of its own: Ultralytics reads its environment once, at import, and other tests want other
    # values.
    path = make_detection_set(tmp_path / "set", images_train=2, images_val=2, imgsz=64, seed=0)
    program = (
        "import json, sys; from ultralytics.data.utils import check_det_dataset;"
        "data = check_det_dataset(sys.argv[1], autodownload=False);"
        "print(json.dumps([str(data['train']), str(data['val']), data['nc']]))"
    )
    quiet = {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0"}
    command = [sys.executable, "-c", program, str(path)]
    answer = subprocess.run(command, env=os.environ | quiet, cwd=tmp_path, capture_output=True, check=True)

    folder = path.parent / "images"
    last_line = answer.stdout.decode().splitlines()[-1]
    assert json.loads(last_line) == [str(folder / "train"), str(folder / "val"), len(CLASSES)]


def test_the_seed_decides_every_byte_and_a_larger_set_begins_with_the_smaller(tmp_path: Path) -> None:
    def make(name: str, train: int, seed: int) -> dict[str, str]:
        path = make_detection_set(tmp_path / name, images_train=train, images_val=2, imgsz=64, seed=seed)
        files = digests(path.parent)
        return {name: digest for name, digest in files.items() if name.startswith(("images", "labels"))}

    first, again, larger, other = make("a", 4, 1), make("b", 4, 1), make("c", 6, 1), make("d", 4, 2)

    assert first == again
    assert all(larger[name] == digest for name, digest in first.items())
    assert all(other[name] != digest for name, digest in first.items() if name.startswith("images"))


def test_train_and_val_share_no_image(tmp_path: Path) -> None:
    folder = make_detection_set(tmp_path / "set", images_train=8, images_val=8, imgsz=64, seed=0).parent
    images = [digest for name, digest in digests(folder).items() if name.startswith("images")]
    assert len(set(images)) == 16


def test_boxes_are_the_visible_extents() -> None:
    owner = np.full((20, 20), -1, dtype=np.int16)
    areas: list[int] = []
    square = np.ones((10, 10), dtype=bool)
    assert _place(owner, square, 4, -3, areas)
    assert _place(owner, square, 4, 3, areas)

    # Columns 0 to 2 of the first square stay in view: it leaves the frame on one side and is covered on the
    # other.
    assert (_labels(owner, [1, 4]) == [[1, 0.075, 0.45, 0.15, 0.5], [4, 0.4, 0.45, 0.5, 0.5]]).all()


def test_a_shape_is_never_hidden_beyond_the_limit() -> None:
    owner = np.full((20, 20), -1, dtype=np.int16)
    areas: list[int] = []
    square = np.ones((10, 10), dtype=bool)
    assert _place(owner, square, 5, 5, areas)
    before = owner.copy()

    assert not _place(owner, square, 5, 7, areas), "it would hide 80% of the first"
    assert not _place(owner, square, -8, 5, areas), "80% of it would be out of the frame"
    assert (owner == before).all()
    assert _place(owner, square, 5, 12, areas), "70% is still allowed"
    assert (owner == 0).sum() >= 30


@pytest.mark.parametrize("name", CLASSES)
def test_a_shape_fits_its_window(name: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        alpha, _, _ = _shape(name, 160, rng)
        assert alpha.max() == 1
        border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert border.max() == 0


def test_mean_colour_does_not_tell_the_class() -> None:
    """The nearest class mean of the box's mean colour must do no better than chance."""
    features, classes = [], []
    for index in range(300):
        pixels, labels = draw_image(64, np.random.default_rng([9, index]))
        for kind, x, y, width, height in labels:
            rows = slice(int((y - height / 2) * 64), int((y + height / 2) * 64) + 1)
            columns = slice(int((x - width / 2) * 64), int((x + width / 2) * 64) + 1)
            features.append(pixels[rows, columns].reshape(-1, 3).mean(0))
            classes.append(int(kind))
    x, y = np.array(features), np.array(classes)
    half = len(x) // 2
    means = np.stack([x[:half][y[:half] == k].mean(0) for k in range(len(CLASSES))])
    guess = np.linalg.norm(x[half:, None] - means, axis=-1).argmin(1)
    assert (guess == y[half:]).mean() < 0.35


def test_the_same_call_again_finds_the_set_and_anything_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    path = make_detection_set(folder, images_train=2, images_val=1, imgsz=64, seed=0)
    stamp = path.stat().st_mtime_ns
    assert make_detection_set(folder, images_train=2, images_val=1, imgsz=64, seed=0) == path
    assert path.stat().st_mtime_ns == stamp

    with pytest.raises(ValueError, match="holds something else"):
        make_detection_set(folder, images_train=3, images_val=1, imgsz=64, seed=0)
    assert list(tmp_path.iterdir()) == [folder], "no scratch folder stays behind"


@pytest.mark.parametrize("change", [{"images_train": 0}, {"images_val": 0}, {"imgsz": 16}, {"seed": -1}])
def test_numbers_out_of_range_are_named(tmp_path: Path, change: dict[str, int]) -> None:
    numbers = {"images_train": 2, "images_val": 1, "imgsz": 64, "seed": 0} | change
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name} must be at least .*got {value}"):
        make_detection_set(tmp_path / "set", **numbers)

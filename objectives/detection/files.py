"""Opening what the user names: a model file and a data file, refused in one line where they are of no use.

And the way back: a model as Ultralytics' own object.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel, load_checkpoint

from ..task import Task


def open_model(model: str) -> Any:
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        torch.manual_seed(0)
        built = DetectionModel(str(path), verbose=False)
        built.names = dict(enumerate(built.names.values()))
        return built
    if not path.is_file():
        raise ValueError(f"model must be an existing Ultralytics .pt or .yaml file, got {model}")
    try:
        loaded, _ = load_checkpoint(str(path))
    except Exception as error:  # whatever unpickling raises, to the user it is one fault
        raise ValueError(
            f"model must be an Ultralytics detection checkpoint, got {model}: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'unreadable'}"
        ) from error
    if not isinstance(loaded, DetectionModel) or not isinstance(loaded.model[-1], Detect):
        raise ValueError(f"model must be a detector, got {model} holding a {type(loaded).__name__}")
    return loaded


def open_data(data: str) -> dict[str, Any]:
    try:
        checked: dict[str, Any] = check_det_dataset(data, autodownload=False)
    except Exception as error:
        raise ValueError(
            f"data must be an Ultralytics data file whose images exist, got {data}: {_first(error)}"
        ) from error
    cfg = get_cfg(overrides={"task": "detect", "imgsz": 32, "mode": "val"})
    for split in ("train", "val"):
        try:
            dataset = build_yolo_dataset(cfg, checked[split], 1, checked, mode="val", stride=32)
        except Exception as error:
            raise ValueError(f"data {data}: its {split} images cannot be read: {_first(error)}") from error
        if not any(len(label["cls"]) for label in dataset.labels):
            raise ValueError(
                f"data must have labels, got {data} with none in its {split} split; a label file per image "
                "is expected "
                f"in a labels/ folder beside images/"
            )
    return checked


def as_yolo(task: Task, model: nn.Module) -> Any:
    """A detector as an Ultralytics `YOLO`, as if its saved file had been opened."""
    with tempfile.TemporaryDirectory() as folder:
        return YOLO(str(task.save(model, Path(folder) / "model.pt")))


def _first(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

"""The detection task: see `objectives.task.Task` for what each method promises."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from ultralytics import __version__ as ultralytics_version
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.nn.modules.block import DFL, C2f
from ultralytics.nn.modules.conv import Conv

from ..batchnorm import reestimate_batchnorm
from ..best import BestWeights
from ..compute import cpu_threads, full_precision, resolve_device
from ..digest import files_digest, model_digest
from ..inference import as_predictor
from ..initialise import reinitialise
from ..task import EpochCallback, Predictor, Recovery, Traceable
from .files import open_data, open_model
from .tracing import traceable_copy
from .training import RecoveryTrainer

_EVAL_BATCH = 16
#: The smallest and the largest batch of a training that is told none.
_BATCHES = (2, 16)
_PRUNED_YAML = (
    "this model was pruned and cannot be rebuilt from its yaml; "
    "train it with YOLO(path).train(trainer=objectives.detection.PrunedTrainer, ...)"
)


@dataclass(frozen=True)
class DetectionTask:
    """An Ultralytics detector with its data set; see `objectives.task.Task`.

    Attributes:
        model: weights (`.pt`) or an architecture (`.yaml`, random weights).
        data: Ultralytics data file.
        imgsz: side of the square input, pixels, a multiple of 32.

    Raises:
        ValueError: the model is no detector, the data has no labels, or the two do not fit.
    """

    model: str
    data: str
    imgsz: int = 640
    metric: str = field(default="mAP50-95", init=False)

    def __post_init__(self) -> None:
        if self.imgsz < 32 or self.imgsz % 32:
            raise ValueError(f"imgsz must be a positive multiple of 32, got {self.imgsz}")
        classes, names = len(self._original.names), self._data["names"]
        if classes != len(names):
            raise ValueError(
                f"model {Path(self.model).name} detects {classes} classes, data {Path(self.data).name} has "
                f"{len(names)}; "
                f"train the model on this data first (yolo train model=... data=...)"
            )

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (1, 3, self.imgsz, self.imgsz)

    @cached_property
    def _original(self) -> Any:
        model = open_model(self.model)
        model.requires_grad_(True)  # checkpoints come with it off, and nothing would have a score
        model.args = get_cfg()  # gains of the loss; a checkpoint holds a dict of its own training instead
        return model.float().eval()

    @cached_property
    def _data(self) -> dict[str, Any]:
        return open_data(self.data)

    @cached_property
    def model_key(self) -> str:
        return model_digest(self._original)

    @property
    def sources(self) -> list[Path]:
        described = [self._data[split] for split in ("train", "val")]
        listed = [Path(p) for found in described for p in ([found] if isinstance(found, str) else found)]
        folders = sorted({file.parent for file in self._samples})
        return [Path(self.model), Path(self.data), *listed, *folders]

    @cached_property
    def data_key(self) -> str:
        return files_digest([Path(self.data), *self._samples], Path(self.data).resolve().parent)

    @cached_property
    def _samples(self) -> list[Path]:
        """Images and label files of both splits."""
        files = []
        for split in ("train", "val"):
            dataset = self._dataset(split)
            files += [Path(f) for f in [*dataset.im_files, *dataset.label_files] if Path(f).is_file()]
        return files

    def load_model(self) -> nn.Module:
        model: nn.Module = copy.deepcopy(self._original)
        return model

    # -- tracing

    def traceable(self, model: nn.Module) -> Traceable:
        return traceable_copy(model, self.input_shape)

    def settle(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, C2f) and isinstance(module.cv1, Conv):
                module.c = module.cv1.conv.out_channels // 2
        model.is_pruned = True  # type: ignore[assignment]  # a plain flag that `save` reads

    # -- data

    def _dataset(self, split: str) -> Any:
        """Images of one split, letterboxed to the square input, without augmentation."""
        cfg = get_cfg(
            overrides={"task": "detect", "imgsz": self.imgsz, "rect": False, "cache": False, "mode": "val"}
        )
        return build_yolo_dataset(
            cfg, self._data[split], _EVAL_BATCH, self._data, mode="val", rect=False, stride=32
        )

    def _batches(
        self, split: str, batch: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[dict[str, Any]]:
        dataset = self._dataset(split)
        order = np.arange(len(dataset)) if indices is None else indices
        for start in range(0, len(order), batch):
            samples = [dataset[int(i)] for i in order[start : start + batch]]
            collated: dict[str, Any] = dataset.collate_fn(samples)
            collated["img"] = collated["img"].float() / 255
            yield collated

    def calibration(self, images: int, batch: int = 8) -> Iterator[dict[str, Any]]:
        """Evenly spread over the training split: neighbouring files are often frames of one scene."""
        total = len(self._dataset("train"))
        indices = np.unique(np.linspace(0, total - 1, min(images, total)).round().astype(np.int64))
        return self._batches("train", batch, indices)

    def sample_images(self, count: int) -> NDArray[np.float32]:
        batch = next(self._batches("val", count))
        images: NDArray[np.float32] = batch["img"].numpy()
        return images

    # -- loss

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        # Ultralytics returns box, class and DFL terms, each already multiplied by the number of images.
        placed = {**batch, "img": _beside(model, batch["img"])}
        terms, _ = model.loss(placed)  # type: ignore[operator]  # DetectionModel.loss, not a submodule
        total: Tensor = terms.sum()
        return total

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        decoded = model(_beside(model, batch["img"]))
        raw = decoded[1] if isinstance(decoded, tuple) else decoded
        raw = raw.get("one2many", raw)
        total: Tensor = raw["boxes"].sum() + raw["scores"].sum()
        return total

    # -- recovery

    def recover(
        self, model: nn.Module, recovery: Recovery, folder: Path, on_epoch: EpochCallback
    ) -> nn.Module:
        device = torch.device(resolve_device(recovery.device))

        def accuracy(trained: nn.Module) -> float:
            with full_precision():  # the accuracy on record, which what ships is held against
                return self.evaluate(as_predictor(self.deployable(trained), device))

        with cpu_threads(recovery.threads):
            if recovery.reestimate_images:
                model.to(device)
                batches = self.calibration(recovery.reestimate_images, _EVAL_BATCH)
                reestimate_batchnorm(model, batches, self.outputs)
            best = BestWeights()
            best.offer(model, accuracy(model) if recovery.accuracy is None else recovery.accuracy)
            if on_epoch(0, recovery.epochs, best.accuracy) and recovery.epochs > 0:
                batch = recovery.batch_for(len(self._dataset("train")), *_BATCHES)
                trainer = RecoveryTrainer(
                    model,
                    replace(recovery, batch=batch),
                    folder,
                    data=self.data,
                    imgsz=self.imgsz,
                    judge=accuracy,
                    on_epoch=on_epoch,
                    best=best,
                )
                trainer.train()
                model = trainer.ema.ema
        model = best.restore(model.to("cpu").float().eval())
        # On a GPU Ultralytics trains with channels last, and weights keep that order: as shipped, another
        # speed than the untrained network that was measured.
        model.to(memory_format=torch.contiguous_format)
        model.requires_grad_(True)
        model.args = get_cfg()
        model.criterion = None  # type: ignore[assignment]  # holds tensors of the training device
        return model

    def reinitialise(self, model: nn.Module, seed: int) -> nn.Module:
        # DFL is a layer with fixed weights: 0, 1, 2, ... by which it takes an expectation.
        fixed = [(m, m.conv.weight.detach().clone()) for m in model.modules() if isinstance(m, DFL)]
        reinitialise(model, seed)
        with torch.no_grad():
            for module, weight in fixed:
                module.conv.weight.copy_(weight)
        head: Any = model.model[-1]  # type: ignore[index]  # Ultralytics' sequence of layers
        head.bias_init()
        return model

    # -- accuracy

    def evaluate(self, predict: Predictor) -> float:
        overrides = {
            "task": "detect",
            "mode": "val",
            "imgsz": self.imgsz,
            "plots": False,
            "save_json": False,
            "workers": 0,
        }
        judge = _Judge(args={**overrides, "project": str(_scratch()), "name": "val", "exist_ok": True})
        judge.training = False
        judge.device = torch.device("cpu")
        judge.data = self._data
        judge.dataloader = types.SimpleNamespace(dataset=self._dataset("val"))
        judge.init_metrics(self._original)
        for batch in self._batches("val", _EVAL_BATCH):
            prediction = torch.from_numpy(np.asarray(predict(batch["img"].numpy())[0]))
            judge.update_metrics(judge.postprocess(prediction), batch)
        return float(judge.get_stats()["metrics/mAP50-95(B)"])

    def predictor(self, model: nn.Module) -> Predictor:
        return as_predictor(self.deployable(model))

    # -- shipping

    def deployable(self, model: nn.Module) -> nn.Module:
        ready: Any = copy.deepcopy(model).cpu().float().eval()
        ready.criterion = None
        ready.requires_grad_(False)
        ready.fuse(verbose=False)
        head = ready.model[-1]
        head.export, head.format, head.dynamic = True, "onnx", False
        with torch.inference_mode(False), torch.no_grad():
            ready(torch.zeros(self.input_shape))  # fixes the anchor grid, so that exporters see a constant
        module: nn.Module = ready
        return module

    def metadata(self, model: nn.Module) -> Mapping[str, str]:
        detector: Any = model
        return {
            "description": "Detector pruned with paretoprune",
            "version": ultralytics_version,
            "task": "detect",
            "stride": str(int(max(detector.stride))),
            "batch": "1",
            "imgsz": str([self.imgsz, self.imgsz]),
            "names": str(dict(detector.names)),
            "channels": "3",
            "end2end": str(bool(getattr(detector, "end2end", False))),
        }

    def save(self, model: nn.Module, path: Path) -> Path:
        """Write a checkpoint of stock Ultralytics classes, float32, that `YOLO(path)` opens.

        `YOLO(path).train()` would rebuild the unpruned network from the yaml and load what fits without a
        word, so a pruned model's yaml is replaced by a sentence that says how to train it; `PrunedTrainer`
        does.
        """
        keep: Any = copy.deepcopy(model).cpu().float().eval()
        keep.criterion = None
        keep.args = {
            "task": "detect",
            "data": None,
            "imgsz": self.imgsz,
            "single_cls": False,
            "model": path.name,
        }
        if vars(keep).pop("is_pruned", False):
            head = {k: v for k, v in keep.yaml.items() if k in ("nc", "channels", "scale")}
            keep.yaml = {
                **head,
                "yaml_file": "pruned.yaml",
                "backbone": [[-1, 1, _PRUNED_YAML, []]],
                "head": [],
            }
        else:
            keep.yaml = {**keep.yaml, "yaml_file": Path(str(keep.yaml.get("yaml_file", "model.yaml"))).name}
        vars(keep).pop("pt_path", None)
        for parameter in keep.parameters():
            parameter.requires_grad = False
        torch.save(
            {
                "model": keep,
                "ema": None,
                "epoch": -1,
                "optimizer": None,
                "train_args": dict(keep.args),
                "date": datetime.now(UTC).isoformat(),
                "version": ultralytics_version,
            },
            path,
        )
        return path


class _Judge(DetectionValidator):  # type: ignore[misc]
    """Ultralytics' matching and mAP, fed from any predictor."""


def _beside(model: nn.Module, images: Tensor) -> Tensor:
    """The images on the model's device."""
    return images.to(next(model.parameters()).device)


def _scratch() -> Path:
    return Path(platformdirs.user_cache_path("paretoprune")) / "scratch"

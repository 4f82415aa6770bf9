"""Object detection with Ultralytics YOLO: model, data, loss, recovery and mAP.

The only module that knows Ultralytics. It knows nothing of devices, scores, plans or trials.

Ultralytics is kept to itself: its settings live in a folder of ours, its telemetry, update checks, automatic installs and experiment
loggers are off, and nothing it finds in the environment is changed.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .batchnorm import reestimate_batchnorm
from .best import BestWeights
from .compute import cpu_threads, resolve_device
from .digest import files_digest, model_digest
from .task import EpochCallback, Predictor, Recovery, Traceable

# Before the first import: these are read once, at import time.
os.environ.setdefault("YOLO_CONFIG_DIR", str(platformdirs.user_cache_path("paretoprune") / "ultralytics"))
os.environ.setdefault("YOLO_AUTOINSTALL", "0")
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_VERBOSE", "0")

from ultralytics import __version__ as ultralytics_version  # noqa: E402  (after the environment above)
from ultralytics.cfg import get_cfg  # noqa: E402
from ultralytics.data.build import build_yolo_dataset  # noqa: E402
from ultralytics.data.utils import check_det_dataset  # noqa: E402
from ultralytics.engine import trainer as _trainer_module  # noqa: E402
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator  # noqa: E402
from ultralytics.nn.modules.block import C2PSA, Attention, C2f  # noqa: E402
from ultralytics.nn.modules.conv import Conv  # noqa: E402
from ultralytics.nn.modules.head import Detect  # noqa: E402
from ultralytics.nn.tasks import DetectionModel, load_checkpoint  # noqa: E402
from ultralytics.utils import LOGGER  # noqa: E402
from ultralytics.utils.torch_utils import ModelEMA  # noqa: E402

LOGGER.setLevel(logging.ERROR)

_EVAL_BATCH = 16
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
                f"model {Path(self.model).name} detects {classes} classes, data {Path(self.data).name} has {len(names)}; "
                f"train the model on this data first (yolo train model=... data=...)"
            )

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (1, 3, self.imgsz, self.imgsz)

    @cached_property
    def _original(self) -> Any:
        model = _open_model(self.model)
        model.requires_grad_(True)  # checkpoints come with it off, and nothing would have a score
        model.args = get_cfg()  # gains of the loss; a checkpoint holds a dict of its own training instead
        return model.float().eval()

    @cached_property
    def _data(self) -> dict[str, Any]:
        return _open_data(self.data)

    @cached_property
    def model_key(self) -> str:
        return model_digest(self._original)

    @cached_property
    def data_key(self) -> str:
        files = [Path(self.data)]
        for split in ("train", "val"):
            dataset = self._dataset(split)
            files += [Path(f) for f in [*dataset.im_files, *dataset.label_files] if Path(f).is_file()]
        return files_digest(files, Path(self.data).resolve().parent)

    def load_model(self) -> nn.Module:
        model: nn.Module = copy.deepcopy(self._original)
        return model

    # ---- tracing -------------------------------------------------------------------------------------------------

    def traceable(self, model: nn.Module) -> Traceable:
        """A copy without the three things a tracer stumbles on: split outputs, attention, and box decoding."""
        twin: Any = copy.deepcopy(model).eval()
        aliases: dict[str, tuple[str, int]] = {}
        tied: list[tuple[str, ...]] = []
        fixed: set[str] = set()
        extra: list[Tensor] = []
        for name, module in list(twin.named_modules()):
            if isinstance(module, (C2f, C2PSA)):
                halves = _split_in_halves(module.cv1)
                module.cv1 = nn.ModuleList(halves)
                module.forward = types.MethodType(_c2psa_halves if isinstance(module, C2PSA) else _c2f_halves, module)
                width = halves[0].conv.out_channels
                for i in range(2):
                    for part in ("conv", "bn"):
                        aliases[f"{name}.cv1.{i}.{part}"] = (f"{name}.cv1.{part}", i * width)
                tied.append((f"{name}.cv1.0.conv", f"{name}.cv1.1.conv"))
            elif isinstance(module, Attention):
                module.forward = types.MethodType(lambda self, x: (extra.append(self.qkv(x)), self.proj(self.pe(x)))[1], module)
                fixed |= {f"{name}.{part}.conv" for part in ("qkv", "pe", "proj")}
            elif isinstance(module, Detect):
                heads = [
                    (f"{name}.{attribute}", getattr(module, attribute))
                    for attribute in ("cv2", "cv3", "one2one_cv2", "one2one_cv3")
                    if getattr(module, attribute, None) is not None
                ]
                branches = [head for _, head in heads]
                module.forward = types.MethodType(
                    lambda self, x, branches=branches: [b[i](x[i]) for b in branches for i in range(self.nl)], module
                )
                fixed |= {f"{path}.{i}.{len(head[i]) - 1}" for path, head in heads for i in range(module.nl)}
                fixed.add(f"{name}.dfl.conv")
        forward = twin.forward

        def traced(x: Tensor) -> list[Tensor]:
            extra.clear()
            return [*forward(x), *extra]

        twin.forward = traced
        return Traceable(twin, torch.zeros(self.input_shape), aliases, tied, frozenset(fixed))

    def settle(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, C2f) and isinstance(module.cv1, Conv):
                module.c = module.cv1.conv.out_channels // 2
        model.is_pruned = True  # type: ignore[assignment]  # a plain flag that `save` reads

    # ---- data ----------------------------------------------------------------------------------------------------

    def _dataset(self, split: str) -> Any:
        """Images of one split, letterboxed to the square input, without augmentation."""
        cfg = get_cfg(overrides={"task": "detect", "imgsz": self.imgsz, "rect": False, "cache": False, "mode": "val"})
        return build_yolo_dataset(cfg, self._data[split], _EVAL_BATCH, self._data, mode="val", rect=False, stride=32)

    def _batches(self, split: str, batch: int, indices: NDArray[np.int64] | None = None) -> Iterator[dict[str, Any]]:
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

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        # Ultralytics returns box, class and DFL terms, each already multiplied by the number of images.
        terms, _ = model.loss(batch)  # type: ignore[operator]  # DetectionModel.loss, not a submodule
        total: Tensor = terms.sum()
        return total

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        decoded = model(batch["img"])
        raw = decoded[1] if isinstance(decoded, tuple) else decoded
        raw = raw.get("one2many", raw)
        total: Tensor = raw["boxes"].sum() + raw["scores"].sum()
        return total

    # ---- recovery ------------------------------------------------------------------------------------------------

    def recover(self, model: nn.Module, recovery: Recovery, folder: Path, on_epoch: EpochCallback) -> nn.Module:
        device = torch.device(resolve_device(recovery.device))
        best = BestWeights()
        best.offer(model, self.evaluate(self.predictor(model)))
        if recovery.reestimate_images:
            model.to(device)
            images = (b["img"].to(device) for b in self.calibration(recovery.reestimate_images, _EVAL_BATCH))
            reestimate_batchnorm(model, images)
            best.offer(model, self.evaluate(self.predictor(model)))
        if on_epoch(0, recovery.epochs, best.accuracy) and recovery.epochs > 0:
            trainer = _RecoveryTrainer(self, model, recovery, folder, on_epoch, best)
            with cpu_threads(recovery.threads):
                trainer.train()
            model = trainer.ema.ema
        model = best.restore(model.to("cpu").float().eval())
        model.requires_grad_(True)
        model.args = get_cfg()  # type: ignore[assignment]
        model.criterion = None  # type: ignore[assignment]  # holds tensors of the training device
        return model

    # ---- accuracy ------------------------------------------------------------------------------------------------

    def evaluate(self, predict: Predictor) -> float:
        overrides = {"task": "detect", "mode": "val", "imgsz": self.imgsz, "plots": False, "save_json": False, "workers": 0}
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
        ready = self.deployable(model)

        def predict(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
            with torch.inference_mode():
                return [ready(torch.from_numpy(images)).numpy()]

        return predict

    # ---- shipping ------------------------------------------------------------------------------------------------

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

        `YOLO(path).train()` would rebuild the unpruned network from the yaml and load what fits without a word, so a
        pruned model's yaml is replaced by a sentence that says how to train it; `PrunedTrainer` does.
        """
        keep: Any = copy.deepcopy(model).cpu().float().eval()
        keep.criterion = None
        keep.args = {"task": "detect", "data": None, "imgsz": self.imgsz, "single_cls": False, "model": path.name}
        if vars(keep).pop("is_pruned", False):
            head = {k: v for k, v in keep.yaml.items() if k in ("nc", "channels", "scale")}
            keep.yaml = {**head, "yaml_file": "pruned.yaml", "backbone": [[-1, 1, _PRUNED_YAML, []]], "head": []}
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


class PrunedTrainer(DetectionTrainer):  # type: ignore[misc]  # Ultralytics ships no types
    """Ultralytics' trainer for a pruned model: trains the network it is given instead of rebuilding one from yaml.

    Use it as `YOLO("model.pt").train(trainer=PrunedTrainer, data=..., epochs=...)`.
    """

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """The given weights' own module, trainable.

        Raises:
            ValueError: there is no module, or its classes are not the data's.
        """
        if not isinstance(weights, nn.Module):
            raise ValueError("PrunedTrainer needs a loaded model: YOLO('model.pt').train(trainer=PrunedTrainer, ...)")
        if len(weights.names) != self.data["nc"]:  # type: ignore[arg-type]
            raise ValueError(f"the model detects {len(weights.names)} classes, the data has {self.data['nc']}")  # type: ignore[arg-type]
        return weights.float().requires_grad_(True)


class _RecoveryTrainer(PrunedTrainer):
    """Ultralytics' training loop as a trial uses it: our accuracy after each epoch, no files, no loggers."""

    def __init__(self, task: DetectionTask, model: nn.Module, recovery: Recovery, folder: Path, on_epoch: EpochCallback, best: BestWeights):
        device = resolve_device(recovery.device)
        overrides = {
            "task": "detect",
            "mode": "train",
            "model": "pruned.pt",
            "data": task.data,
            "imgsz": task.imgsz,
            "epochs": recovery.epochs,
            "batch": recovery.batch,
            "nbs": recovery.batch,  # a step per batch: the default accumulates to 64 images, a handful of steps in a short run
            "device": device.removeprefix("cuda:") if device != "cuda" else "0",
            "seed": recovery.seed,
            "deterministic": True,
            "optimizer": "AdamW",  # "auto" would ignore lr0
            "lr0": recovery.lr if recovery.lr is not None else 1e-3,
            "lrf": 0.05,
            "warmup_epochs": 0.5,
            "warmup_bias_lr": 0.0,
            "amp": "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else False,
            "plots": False,
            "save": False,
            "val": True,
            "workers": 0,
            "verbose": False,
            "project": str(folder),
            "name": "training",
            "exist_ok": True,
            **recovery.options,
        }
        # Ultralytics starts every experiment logger it finds installed, MLflow first; a trial is recorded by us alone.
        register = _trainer_module.callbacks.add_integration_callbacks
        _trainer_module.callbacks.add_integration_callbacks = lambda instance: None
        try:
            super().__init__(overrides=overrides)
        finally:
            _trainer_module.callbacks.add_integration_callbacks = register
        self.callbacks = {event: [] for event in self.callbacks}
        self.model = model
        self._task = task
        self._on_epoch = on_epoch
        self._best = best

    def _setup_train(self) -> None:
        super()._setup_train()
        # The stock average needs thousands of steps to let go of the weights it started from: here those are the damaged ones.
        steps = max(1, len(self.train_loader) * self.epochs)
        self.ema = ModelEMA(self.model, decay=0.98, tau=max(1.0, steps / 20))

    def validate(self) -> tuple[dict[str, float], float]:
        if not math.isfinite(float(self.loss)):
            raise FloatingPointError(f"the training loss became {float(self.loss)} in epoch {self.epoch + 1}")
        accuracy = self._task.evaluate(self._task.predictor(self.ema.ema))
        self._best.offer(self.ema.ema, accuracy)
        if not self._on_epoch(self.epoch + 1, self.epochs, accuracy):
            self.stop = True
        return {"mAP50-95": accuracy}, accuracy

    def save_model(self) -> bool:
        return False

    def save_metrics(self, metrics: Mapping[str, float]) -> None:
        return

    def final_eval(self) -> None:
        return


class _Judge(DetectionValidator):  # type: ignore[misc]
    """Ultralytics' matching and mAP, fed from any predictor."""


def _scratch() -> Path:
    return Path(platformdirs.user_cache_path("paretoprune")) / "scratch"


def _open_model(model: str) -> Any:
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


def _open_data(data: str) -> dict[str, Any]:
    try:
        checked: dict[str, Any] = check_det_dataset(data, autodownload=False)
    except Exception as error:
        raise ValueError(f"data must be an Ultralytics data file whose images exist, got {data}: {_first(error)}") from error
    cfg = get_cfg(overrides={"task": "detect", "imgsz": 32, "mode": "val"})
    for split in ("train", "val"):
        try:
            dataset = build_yolo_dataset(cfg, checked[split], _EVAL_BATCH, checked, mode="val", stride=32)
        except Exception as error:
            raise ValueError(f"data {data}: its {split} images cannot be read: {_first(error)}") from error
        if not any(len(label["cls"]) for label in dataset.labels):
            raise ValueError(
                f"data must have labels, got {data} with none in its {split} split; a label file per image is expected "
                f"in a labels/ folder beside images/"
            )
    return checked


def _first(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _split_in_halves(block: Any) -> tuple[Any, Any]:
    """Two convolution blocks that compute the first and the second half of `block`'s channels."""
    halves = []
    width = block.conv.out_channels // 2
    for i in range(2):
        half = copy.deepcopy(block)
        rows = slice(i * width, (i + 1) * width)
        half.conv = nn.Conv2d(
            block.conv.in_channels, width, block.conv.kernel_size, block.conv.stride, block.conv.padding, bias=False
        )
        half.bn = nn.BatchNorm2d(width, eps=block.bn.eps, momentum=block.bn.momentum)
        with torch.no_grad():
            half.conv.weight.copy_(block.conv.weight[rows])
            for part in ("weight", "bias", "running_mean", "running_var"):
                getattr(half.bn, part).copy_(getattr(block.bn, part)[rows])
        halves.append(half.eval())
    return halves[0], halves[1]


def _c2f_halves(self: Any, x: Tensor) -> Tensor:
    y = [self.cv1[0](x), self.cv1[1](x)]
    y.extend(m(y[-1]) for m in self.m)
    out: Tensor = self.cv2(torch.cat(y, 1))
    return out


def _c2psa_halves(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.cv2(torch.cat((self.cv1[0](x), self.m(self.cv1[1](x))), 1))
    return out

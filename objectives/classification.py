"""Image classification for any PyTorch model: data, cross-entropy, recovery and top-1 accuracy.

A user's function builds the model; an `.npz` or a folder of class folders holds the images. Knows nothing of
devices, scores, plans or trials.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .batchnorm import reestimate_batchnorm
from .best import BestWeights
from .builder import build_model, load_weights
from .compute import cpu_threads, full_precision, resolve_device
from .digest import model_digest
from .images import ImageData, LabelledImages, open_images
from .inference import as_predictor
from .initialise import reinitialise
from .task import EpochCallback, Predictor, Recovery, Traceable
from .wiring import fuse_batchnorm, wiring

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_EVAL_BATCH = 64
#: The smallest and the largest batch of a training that is told none.
_BATCHES = (16, 64)


@dataclass(frozen=True)
class Batch:
    """Images as the model takes them `(batch, 3, height, width)` float32, and classes `(batch,)` int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ClassificationTask:
    """A classifier with its data; see `objectives.task.Task`.

    The model maps `(batch, 3, height, width)` to logits `(batch, classes)`. For connections that no tracer
    follows (a shortcut that pads channels, say) it may carry `fixed_layers`, names of layers whose output
    width must stay, or a method `traceable(example) -> objectives.task.Traceable`, which says how they run.

    Attributes:
        builder: "pkg.module:function".
        data: an `.npz` or a folder, see `objectives.images.open_images`.
        weights: state dict; None for random weights.
        imgsz: side of the input in pixels; None for the data's own.
        folder: where the builder's module and relative paths are looked for, the study file's own.
        arguments: of the builder, by name.
        mean, std: of the normalisation (pixel / 255 - mean) / std, per channel; ImageNet's unless said
        otherwise.

    Raises:
        ValueError: something cannot be opened, or model and data do not fit.
    """

    builder: str
    data: str
    weights: str | None = None
    imgsz: int | None = None
    folder: Path = field(default_factory=Path)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    metric: str = field(default="top-1", init=False)

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if (
                len(values) != 3
                or not all(math.isfinite(v) for v in values)
                or (name == "std" and min(values) <= 0)
            ):
                rule = "three finite numbers" + (" above 0" if name == "std" else "")
                raise ValueError(f"{name} must be {rule}, one per colour channel, got {values}")
        classes = len(self._images.classes)
        try:
            with torch.no_grad():
                logits = self._original(torch.zeros(self.input_shape))
        except Exception as error:  # whatever a user's forward raises, to the user it is one fault
            raise ValueError(
                f"model {self.builder} does not run on {self.input_shape} images (imgsz sets the size): "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model {self.builder} must return logits (images, classes), got {got}")
        if logits.shape[1] < classes:
            raise ValueError(
                f"model {self.builder} has {logits.shape[1]} outputs, data {self.data} {classes} classes"
            )

    @cached_property
    def _original(self) -> nn.Module:
        model = build_model(self.builder, self.folder, self.arguments)
        if self.weights is not None:
            load_weights(model, self.folder / self.weights)
        return model.float().cpu().eval().requires_grad_(True)

    @cached_property
    def _images(self) -> ImageData:
        return open_images(self.folder / self.data, self.imgsz)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return (1, 3, *self._images.train.size)

    @cached_property
    def model_key(self) -> str:
        return model_digest(self._original)

    @property
    def sources(self) -> list[Path]:
        weights = [] if self.weights is None else [self.folder / self.weights]
        return [*weights, *self._images.sources]

    @cached_property
    def data_key(self) -> str:
        return hashlib.sha256(repr((self._images.key, self.mean, self.std)).encode()).hexdigest()

    def load_model(self) -> nn.Module:
        return copy.deepcopy(self._original)

    def traceable(self, model: nn.Module) -> Traceable:
        twin = copy.deepcopy(model).eval().requires_grad_(True)
        example = torch.zeros(self.input_shape)
        own_form = getattr(twin, "traceable", None)
        form = own_form(example) if callable(own_form) else Traceable(twin, example)
        known = {name for name, _ in form.model.named_modules()}
        fixed = form.fixed | frozenset(getattr(model, "fixed_layers", ()))
        if unknown := sorted(fixed - known):
            raise ValueError(
                f"fixed_layers of {self.builder} names no layer of the model: {', '.join(unknown[:3])}"
            )
        return replace(form, fixed=fixed | wiring(form.model, example).outputs)

    def settle(self, model: nn.Module) -> None:
        return

    # ---- data ----------------------------------------------------------------------------------------------

    def _normalise(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def _batches(
        self, split: LabelledImages, batch: int, indices: NDArray[np.int64] | None = None
    ) -> Iterator[Batch]:
        order = np.arange(len(split)) if indices is None else indices
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            yield Batch(self._normalise(split.read(part)), torch.from_numpy(split.labels[part]))

    def calibration(self, images: int, batch: int = 32) -> Iterator[Batch]:
        """Evenly spread over the training split: a folder lists one class after the other."""
        total = len(self._images.train)
        indices = np.unique(np.linspace(0, total - 1, min(images, total)).round().astype(np.int64))
        return self._batches(self._images.train, batch, indices)

    def sample_images(self, count: int) -> NDArray[np.float32]:
        total = len(self._images.val)
        indices = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
        images: NDArray[np.float32] = next(self._batches(self._images.val, count, indices)).images.numpy()
        return images

    # ---- loss ----------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = self.logits(model, batch)
        return cross_entropy(logits, batch.labels.to(logits.device), reduction="sum")

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.logits(model, batch).sum()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """`(batch, classes)`, on the model's device."""
        device = next(model.parameters()).device
        logits: Tensor = model(batch.images.to(device))
        return logits

    # ---- recovery ------------------------------------------------------------------------------------------

    def reinitialise(self, model: nn.Module, seed: int) -> nn.Module:
        return reinitialise(model, seed)

    def recover(
        self, model: nn.Module, recovery: Recovery, folder: Path, on_epoch: EpochCallback
    ) -> nn.Module:
        """Stochastic gradient descent with Nesterov momentum and a cosine schedule, on shifted and mirrored
        images.

        `recovery.options`: `momentum` (0.9), `weight_decay` (5e-4), `label_smoothing` (0), `flip` (true),
        `shift` (pixels an image may move, an eighth of its side), `warmup_epochs` (0.5). `lr` is 0.01 for
        batches of 64, in proportion for others, where none is given.
        """
        device = torch.device(resolve_device(recovery.device))
        settings = _Settings.of(recovery.options)
        devices = [device] if device.type == "cuda" else []
        with cpu_threads(recovery.threads), torch.random.fork_rng(devices=devices):
            torch.manual_seed(recovery.seed)
            model = model.to(device)
            if recovery.reestimate_images:
                batches = self.calibration(recovery.reestimate_images, _EVAL_BATCH)
                reestimate_batchnorm(model, (b.images.to(device) for b in batches))
            best = BestWeights()
            model.eval()
            best.offer(model, self._accuracy(model) if recovery.accuracy is None else recovery.accuracy)

            def judge(done: int, epochs: int, accuracy: float) -> bool:
                best.offer(model, accuracy)
                return on_epoch(done, epochs, accuracy)

            if on_epoch(0, recovery.epochs, best.accuracy) and recovery.epochs > 0:
                self._train(model, recovery, settings, device, judge)
            best.restore(model)
        return model.cpu().float().eval().requires_grad_(True)

    def _train(
        self,
        model: nn.Module,
        recovery: Recovery,
        settings: _Settings,
        device: torch.device,
        on_epoch: EpochCallback,
    ) -> None:
        data = self._images.train
        batch = min(recovery.batch_for(len(data), *_BATCHES), len(data))
        steps = len(data) // batch  # the rest of an epoch is left out: a batch of one has no statistics
        peak = recovery.lr if recovery.lr is not None else 0.01 * batch / 64
        # Decay would pull batch norm's scales and all biases towards zero, which prunes without being asked
        # to.
        decayed = [p for p in model.parameters() if p.ndim > 1]
        free = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.SGD(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": free, "weight_decay": 0.0},
            ],
            lr=peak,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )
        warmup = settings.warmup_epochs * steps
        random = np.random.default_rng(recovery.seed)
        for epoch in range(recovery.epochs):
            model.train()
            order = random.permutation(len(data))
            total = torch.zeros((), device=device)
            for step in range(steps):
                done = epoch * steps + step
                lr = peak * 0.5 * (1 + math.cos(math.pi * done / (recovery.epochs * steps)))
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1.0, (done + 1) / warmup) if warmup else lr
                part = np.sort(order[step * batch : (step + 1) * batch])
                pixels = _augment(data.read(part), settings, random).to(device)
                logits = model(self._normalise(pixels))
                labels = torch.from_numpy(data.labels[part]).to(device)
                loss = cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach()
            # Once an epoch: asking a GPU after every step would make it wait.
            if not math.isfinite(float(total)):
                raise FloatingPointError(
                    f"the training loss became {float(total)} in epoch {epoch + 1}; lower finetune.lr"
                )
            if not on_epoch(epoch + 1, recovery.epochs, self._accuracy(model.eval())):
                return

    # ---- accuracy ------------------------------------------------------------------------------------------

    def _accuracy(self, model: nn.Module) -> float:
        device = next(model.parameters()).device

        def predict(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
            with torch.inference_mode():
                return [model(torch.from_numpy(images).to(device)).cpu().numpy()]

        with full_precision():  # the accuracy on record, which what ships is held against
            return self.evaluate(predict)

    def evaluate(self, predict: Predictor) -> float:
        right = 0
        for batch in self._batches(self._images.val, _EVAL_BATCH):
            logits = np.asarray(predict(batch.images.numpy())[0])
            # NaN would win every argmax and look like class 0.
            guesses = np.where(np.isnan(logits).any(1), -1, logits.argmax(1))
            right += int((guesses == batch.labels.numpy()).sum())
        return right / len(self._images.val)

    def predictor(self, model: nn.Module) -> Predictor:
        return as_predictor(self.deployable(model))

    # ---- shipping ------------------------------------------------------------------------------------------

    def deployable(self, model: nn.Module) -> nn.Module:
        cpu = copy.deepcopy(model).cpu().float()
        return fuse_batchnorm(cpu, torch.zeros(self.input_shape)).requires_grad_(False)

    def metadata(self, model: nn.Module) -> Mapping[str, str]:
        return {
            "description": "Classifier pruned with paretoprune",
            "task": "classify",
            "imgsz": str(list(self.input_shape[2:])),
            "resize": self._images.resize,
            "names": str(dict(enumerate(self._images.classes))),
            "mean": str(list(self.mean)),
            "std": str(list(self.std)),
        }

    def save(self, model: nn.Module, path: Path) -> Path:
        """Write the state dict, as safetensors where the path ends so; `load_pruned` opens it again, given
        the names of the blocks that were removed, which no state dict holds.
        """
        state = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()
        }
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state, path)
        else:
            torch.save(state, path)
        return path


@dataclass(frozen=True)
class _Settings:
    """`finetune` options that only this task understands."""

    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.5
    flip: bool = True
    shift: int | None = None

    def __post_init__(self) -> None:
        for name, below in (
            ("momentum", 1),
            ("weight_decay", math.inf),
            ("label_smoothing", 1),
            ("warmup_epochs", math.inf),
        ):
            value = getattr(self, name)
            if not 0 <= value < below:
                raise ValueError(f"finetune option {name} must be in [0, {below}), got {value}")
        if self.shift is not None and self.shift < 0:
            raise ValueError(f"finetune option shift must be at least 0 pixels, got {self.shift}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> _Settings:
        known = list(cls.__dataclass_fields__)
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"finetune option {unknown[0]!r} is unknown for classification; known are {', '.join(known)}"
            )
        return cls(**options)


def _augment(pixels: Tensor, settings: _Settings, random: np.random.Generator) -> Tensor:
    """Each image mirrored or not and moved, black where nothing is; uint8 `(n, 3, height, width)`."""
    count, _, height, width = pixels.shape
    if settings.flip:
        mirrored = torch.from_numpy(random.random(count) < 0.5)
        pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    shift = min(height, width) // 8 if settings.shift is None else settings.shift
    if not shift:
        return pixels
    padded = nn.functional.pad(pixels, (shift, shift, shift, shift))
    top, left = (torch.from_numpy(random.integers(0, 2 * shift + 1, count)) for _ in range(2))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[
        torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns
    ]

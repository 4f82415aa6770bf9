"""What the search needs to know of a task: its model, its loss, its recovery and its metric.

A `Task` is the only thing that knows the framework a model comes from. The search calls it and never looks
behind it; it knows nothing of devices, scores, plans or trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, nn

#: That an epoch of a recovery should have where the task chooses the batch.
STEPS = 100

#: Inference as a plain function: images `(batch, 3, height, width)` float32 to the list of outputs. A PyTorch
#: model and an exported artifact look the same through it.
Predictor = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]

#: Called before a recovery's training with epoch 0 and after each epoch: (epoch, epochs, accuracy); returns
#: False to end it there.
EpochCallback = Callable[[int, int, float], bool]


@dataclass(frozen=True)
class Recovery:
    """How a pruned model is trained back.

    Attributes:
        epochs: passes over the training data; 0 re-estimates batch norm only (where `reestimate_images` > 0).
        lr: peak learning rate; None lets the task choose.
        batch: images per step; None lets the task choose, see `batch_for`.
        device: "auto" (CUDA when there), or a torch device such as "cpu" or "cuda:1".
        reestimate_images: images whose statistics replace batch norm's before any training; 0 keeps the old
            ones.
        threads: CPU threads for training; None leaves torch's default.
        seed: of data order and augmentation.
        options: further settings that only the task understands (for detection: Ultralytics' own train
            arguments).
        accuracy: of the model as it is given, where that is known, so that it need not be judged again before
            training; only where batch norm is not re-estimated.

    Raises:
        ValueError: an accuracy is given and batch norm is to be re-estimated, which changes it.
    """

    epochs: int = 3
    lr: float | None = None
    batch: int | None = None
    device: str = "auto"
    reestimate_images: int = 64
    threads: int | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.accuracy is not None and self.reestimate_images:
            raise ValueError(
                "accuracy must be None where reestimate_images is above 0, "
                f"got {self.accuracy:g} and {self.reestimate_images}"
            )

    def batch_for(self, images: int, smallest: int, largest: int) -> int:
        """Images per step on a training set of so many `images`.

        That is `batch`, or where none is given `smallest`, doubled up to `largest` while an epoch keeps a
        hundred steps: what brings a pruned network back in a few epochs are steps.
        """
        if self.batch is not None:
            return self.batch
        batch = smallest
        while 2 * batch <= largest and images >= 2 * batch * STEPS:
            batch *= 2
        return batch


@dataclass(frozen=True)
class Traceable:
    """A copy of a model in a form whose channel dependencies a tracer can follow.

    Attributes:
        model: the copy, in eval mode, parameters with gradients on.
        example: one input `(1, 3, height, width)`.
        aliases: layers of the copy that are slices of a layer of the original: name in the copy to (name in
            the original, offset of its first output channel there).
        tied: sets of layers of the copy that must keep equal numbers of output channels (the original splits
            one layer's output evenly).
        fixed: layers of the copy whose own output width must not change.
    """

    model: nn.Module
    example: Tensor
    aliases: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    tied: Sequence[tuple[str, ...]] = ()
    fixed: frozenset[str] = frozenset()


class TaskKeys(Protocol):
    """What names a task's model and data: all that is needed to look up what is known of them."""

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(1, channels, height, width) of one inference."""
        ...

    @property
    def model_key(self) -> str:
        """sha256 digest of architecture and weights of the unpruned model."""
        ...

    @property
    def data_key(self) -> str:
        """Digest of the data the scores and the accuracy depend on."""
        ...


class Task(TaskKeys, Protocol):
    """A model with its data. Built from a study file; raises ValueError for unusable input when built."""

    @property
    def metric(self) -> str:
        """Name of the accuracy, "mAP50-95" or "top-1"; in [0, 1], higher is better."""
        ...

    @property
    def sources(self) -> list[Path]:
        """Files, and folders of files, that both keys were computed from; while none changes, neither do the
        keys. Code does not count.
        """
        ...

    def load_model(self) -> nn.Module:
        """A fresh copy of the unpruned model, float32, eval mode, on the CPU, every parameter trainable."""
        ...

    def traceable(self, model: nn.Module) -> Traceable:
        """A copy of `model` whose dependencies can be traced."""
        ...

    def calibration(self, images: int, batch: int) -> Iterator[Any]:
        """The first `images` training samples without augmentation, in batches that `loss` takes. Same ones
        every time.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The task's real loss summed over the batch's images, scalar, differentiable; the model stays in the
        mode it is in.
        """
        ...

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Sum of all raw head outputs, scalar: the paper's pseudo-functional."""
        ...

    def settle(self, model: nn.Module) -> None:
        """Bring attributes that repeat a width (a block's stored channel count) in line after the layers were
        narrowed, in place.
        """
        ...

    def reinitialise(self, model: nn.Module, seed: int) -> nn.Module:
        """Draw all weights anew, in place: what training from scratch starts from.

        Raises:
            ValueError: a layer has no rule for that.
        """
        ...

    def recover(
        self, model: nn.Module, recovery: Recovery, folder: Path, on_epoch: EpochCallback
    ) -> nn.Module:
        """Train the pruned model back; the architecture is the given one. `folder` takes scratch files.

        `on_epoch` is called with epoch 0 before any training (after batch norm was re-estimated; with
        `recovery.accuracy` where that is given) and after each epoch. What is returned is the state with the
        best accuracy of all these. The state before re-estimation is not asked: a detector cut deeply finds
        thousands of boxes everywhere with the unpruned network's statistics, and judging these takes longer
        than judging its recovery.

        Raises:
            FloatingPointError: the loss became NaN or infinite.
        """
        ...

    def evaluate(self, predict: Predictor) -> float:
        """The metric on the validation data, at the fixed input shape of the artifact."""
        ...

    def predictor(self, model: nn.Module) -> Predictor:
        """The PyTorch model as a function of images, post-processing as in the artifact."""
        ...

    def deployable(self, model: nn.Module) -> nn.Module:
        """A fused copy in inference form: one input tensor, tensor outputs; what gets exported. Layer names
        are kept.
        """
        ...

    def metadata(self, model: nn.Module) -> Mapping[str, str]:
        """Texts that an exported model file carries so that the framework's own tools open it."""
        ...

    def sample_images(self, count: int) -> NDArray[np.float32]:
        """`(count, 3, height, width)` real validation images, preprocessed as the model takes them."""
        ...

    def save(self, model: nn.Module, path: Path) -> Path:
        """Write the framework's own model file (for detection the `.pt` that `YOLO(path)` opens). Returns its
        path.
        """
        ...

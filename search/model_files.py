"""The files of one network: its weights, the framework's own file and a device's artifact, held against it.

An artifact is made from one that is there, by other weights, where that gives the same outputs; else it is
exported. Knows tasks and file formats; nothing of plans, training or time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from objectives.inference import as_predictor
from objectives.task import Predictor, Task
from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.device import Device
from profiles.refill import refill

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Largest difference between the PyTorch model and its exported artifact, relative to the outputs' largest
#: value. Narrow arithmetic differs by more without being wrong; what it costs shows in the accuracy.
PARITY_TOLERANCE = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.2}
_PARITY_IMAGES = 2


@dataclass(frozen=True)
class Exported:
    """An artifact with the state dict of the module that it was made from."""

    artifact: Artifact
    weights: Mapping[str, Tensor]

    @property
    def size_mb(self) -> float:
        """All its files together, in 10^6 bytes."""
        return sum(path.stat().st_size for path in self.artifact.files) / 1e6


def export_like(
    like: Exported, model: nn.Module, task: Task, device: Device, folder: Path, *, check: bool = False
) -> tuple[Exported, float | None]:
    """The device's artifact of a model, from the file of another one with the same layers where that can be.

    Args:
        check: hold an artifact that was exported anew against the model, too.

    Returns:
        The artifact and its parity; None where it was exported anew and not checked.

    Raises:
        ValueError: with `check`, the artifact does not compute what the model computes.
    """
    ready, metadata = task.deployable(model), task.metadata(model)
    predict = as_predictor(ready)
    refilled = refill(like.artifact, like.weights, ready, folder, metadata)
    if refilled is not None:
        # What the file holds in a form that is not seen to depend on a weight or a width shows here, as other
        # outputs or as whatever the runtime raises.
        with contextlib.suppress(Exception):
            return Exported(refilled, ready.state_dict()), check_parity(predict, refilled, task)
    artifact = export_artifact(ready, device, folder, task.input_shape, metadata)
    parity = check_parity(predict, artifact, task) if check else None
    return Exported(artifact, ready.state_dict()), parity


def save_model(model: nn.Module, task: Task, folder: Path) -> None:
    """Write the weights (safetensors) and the framework's own model file."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    task.save(model, folder / "model.pt")


def export_model(model: nn.Module, task: Task, device: Device, folder: Path) -> Artifact:
    """Write the weights, the framework's own model file and the device's artifact."""
    save_model(model, task, folder)
    return export_artifact(task.deployable(model), device, folder, task.input_shape, task.metadata(model))


def check_parity(predict: Predictor, artifact: Artifact, task: Task, images: int = _PARITY_IMAGES) -> float:
    """Largest difference between a PyTorch model and its artifact on real images, relative to the largest
    output.

    Raises:
        ValueError: it is above `PARITY_TOLERANCE`, or the shapes differ.
    """
    sample = task.sample_images(images)
    run = open_artifact(artifact, threads=1)
    worst = 0.0
    for i in range(len(sample)):
        expected, got = predict(sample[i : i + 1]), run(sample[i : i + 1])
        for want, have in zip(expected, got, strict=True):
            if want.shape != have.shape:
                raise ValueError(
                    f"the exported model must give outputs of shape {want.shape}, got {have.shape}"
                )
            scale = max(1.0, float(np.abs(want).max()))
            worst = float(
                np.maximum(worst, np.abs(want - have).max() / scale)
            )  # which keeps what is no number
    allowed = PARITY_TOLERANCE[artifact.precision]
    if not worst <= allowed:
        raise ValueError(
            f"the exported model must match the PyTorch model within {allowed:g} of its largest output in "
            f"{artifact.precision}, got {worst:.3g} on {len(sample)} images"
        )
    return worst

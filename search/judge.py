"""What a trial measures of a model: its latency before the recovery, and the artifact that ships after it.

Latency comes from an exported file in the device's own runtime, in turns with the unpruned model's. Knows
nothing of plans, training, or whether a trial is worth going on with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from objectives.inference import as_predictor
from objectives.size import count_macs
from objectives.task import Predictor, Task
from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.device import Device
from profiles.lock import host_lock
from profiles.measure import compare
from profiles.refill import refill
from profiles.structure import structure_digest
from profiles.timing import Comparison

from .workspace import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .trial import Bench

#: Largest difference between the PyTorch model and its exported artifact, relative to the outputs' largest
#: value. Narrow arithmetic differs by more without being wrong; what it costs shows in the accuracy.
PARITY_TOLERANCE = {"fp32": 1e-3, "fp16": 0.03, "bf16": 0.2}
_PARITY_IMAGES = 2


@dataclass(frozen=True)
class TimedModel:
    """A model's latency against the unpruned one, with the file that was measured.

    Attributes:
        weights: of the module that was exported.
        structure: see `profiles.structure`; None where it cannot be told.
        size_mb: of the exported files, in 10^6 bytes.
    """

    comparison: Comparison
    artifact: Artifact
    weights: Mapping[str, Tensor]
    structure: str | None
    size_mb: float


def time_untrained(model: nn.Module, bench: Bench, folder: Path, clock: Callable[[str], Any]) -> TimedModel:
    """Between prune and recover: what the pruned model will cost, before minutes are spent on its weights.

    The file is exported like the one that ships, which `judge` makes of it; whoever calls removes `folder`.
    """
    # Not while another process measures on this machine: exporting keeps every core busy for seconds.
    with clock("export"), host_lock("export"):
        task = bench.task
        ready = task.deployable(model)
        artifact = export_artifact(ready, bench.device, folder, task.input_shape, task.metadata(model))
        structure = structure_digest(artifact)
    with clock("measure"):
        comparison = _compare(artifact, bench)
    return TimedModel(comparison, artifact, ready.state_dict(), structure, size_mb(artifact))


def _compare(artifact: Artifact, bench: Bench) -> Comparison:
    return compare(
        bench.device, artifact, bench.baseline, target=bench.latency_target, limit_s=bench.latency_limit_s
    )


def size_mb(artifact: Artifact) -> float:
    """All files of an artifact together, in 10^6 bytes."""
    return sum(path.stat().st_size for path in artifact.files) / 1e6


@dataclass(frozen=True)
class Verdict:
    """What judging measured of the model that ships.

    Attributes:
        accuracy: through the artifact, where the device computes in another precision than the recovery did;
            None where the recovered model's own accuracy stands for it.
        measured: when the latency was taken, in words.
        structure: of the artifact, see `profiles.structure`; None where it cannot be told.
    """

    accuracy: float | None
    comparison: Comparison
    macs: int
    artifact: Artifact
    parity: float
    measured: str
    structure: str | None


def judge(
    model: nn.Module, timed: TimedModel, bench: Bench, folder: Path, clock: Callable[[str], Any]
) -> Verdict:
    """Step 5: the artifact that ships is exported and held against the model; its latency is on record.

    The measurement from before the recovery stands for this file where both compute the same on other
    weights; where that cannot be told, this file is measured itself.

    Raises:
        ValueError: the artifact does not compute what the model computes.
    """
    with clock("export"), host_lock("export"):
        artifact, parity = _ship(model, timed, bench, folder)
        structure = structure_digest(artifact)
        same = structure is not None and structure == timed.structure
        narrow = bench.device.precision != "fp32"
        accuracy = bench.task.evaluate(open_artifact(artifact, bench.device.threads)) if narrow else None
    comparison = timed.comparison
    if not same:
        with clock("measure"):
            comparison = _compare(artifact, bench)
    # Every sample is kept: a point on a front can be looked at down to the clock.
    write_json(folder / "measurement.json", comparison.to_json())
    return Verdict(
        accuracy=accuracy,
        comparison=comparison,
        macs=count_macs(model, bench.task.input_shape),
        artifact=artifact,
        parity=parity,
        measured="before recovery, same structure" if same else "as shipped",
        structure=structure,
    )


def _ship(model: nn.Module, timed: TimedModel, bench: Bench, folder: Path) -> tuple[Artifact, float]:
    """Write what ships, the measured file with the trained weights where it takes them; and the parity."""
    task = bench.task
    save_model(model, task, folder)
    ready = task.deployable(model)
    predict = as_predictor(ready)
    refilled = refill(timed.artifact, timed.weights, ready.state_dict(), folder)
    if refilled is not None:
        # A weight that the exporter had also made part of a constant shows here.
        with contextlib.suppress(ValueError):
            return refilled, check_parity(predict, refilled, task)
    artifact = export_artifact(ready, bench.device, folder, task.input_shape, task.metadata(model))
    return artifact, check_parity(predict, artifact, task)


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
            worst = max(worst, float(np.abs(want - have).max()) / scale)
    allowed = PARITY_TOLERANCE[artifact.precision]
    if not worst <= allowed:
        raise ValueError(
            f"the exported model must match the PyTorch model within {allowed:g} of its largest output in "
            f"{artifact.precision}, got {worst:.3g} on {len(sample)} images"
        )
    return worst

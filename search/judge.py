"""What a trial measures of a model: its latency before the recovery, and the artifact that ships after it.

Latency comes from an exported file in the device's own runtime, in turns with the unpruned model's. Knows
nothing of plans, training, or whether a trial is worth going on with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from objectives.size import count_macs
from profiles.artifact import Artifact, open_artifact
from profiles.lock import host_lock
from profiles.measure import compare
from profiles.structure import structure_digest
from profiles.timing import Comparison

from .model_files import Exported, export_like, save_model
from .workspace import write_json

if TYPE_CHECKING:
    from torch import nn

    from .trial import Bench


@dataclass(frozen=True)
class TimedModel:
    """A model's latency against the unpruned one, with the file that was measured.

    Attributes:
        exported: the file that was measured.
        structure: see `profiles.structure`; None where it cannot be told.
    """

    comparison: Comparison
    exported: Exported
    structure: str | None


def time_untrained(model: nn.Module, bench: Bench, folder: Path, clock: Callable[[str], Any]) -> TimedModel:
    """Between prune and recover: what the pruned model will cost, before minutes are spent on its weights.

    The file is made like the one that ships, which `judge` makes of it; whoever calls removes `folder`.
    """
    # Not while another process measures on this machine: exporting keeps every core busy for seconds.
    with clock("export"), host_lock("export"):
        whole = Exported(bench.baseline, bench.baseline_weights)
        exported, _ = export_like(whole, model, bench.task, bench.device, folder)
        structure = structure_digest(exported.artifact)
    with clock("measure"):
        comparison = _compare(exported.artifact, bench)
    return TimedModel(comparison, exported, structure)


def _compare(artifact: Artifact, bench: Bench) -> Comparison:
    return compare(
        bench.device,
        artifact,
        bench.baseline,
        target=bench.latency_target,
        limit_s=bench.latency_limit_s,
        skew=bench.profile.skew,
    )


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
    exported: Exported
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
        exported, parity = _ship(model, timed, bench, folder)
        structure = structure_digest(artifact := exported.artifact)
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
        exported=exported,
        parity=parity,
        measured="before recovery, same structure" if same else "as shipped",
        structure=structure,
    )


def _ship(model: nn.Module, timed: TimedModel, bench: Bench, folder: Path) -> tuple[Exported, float]:
    """Write what ships, the measured file with the trained weights where it takes them; and the parity."""
    task = bench.task
    save_model(model, task, folder)
    exported, parity = export_like(timed.exported, model, task, bench.device, folder, check=True)
    assert parity is not None
    return exported, parity

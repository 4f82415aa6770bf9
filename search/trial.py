"""One trial, in five steps: rerank, plan, prune, recover, judge.

Knows neither Optuna nor MLflow: it is given parameters and a bench, and returns what it measured. Nothing in
    it computes a score
or profiles a layer; both come from caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from objectives.size import count_macs, count_params
from objectives.task import Recovery, Task
from profiles.artifact import Artifact, export_artifact, open_artifact
from profiles.device import Device
from profiles.latency_profile import LatencyProfile
from profiles.lock import host_lock
from profiles.measure import compare
from profiles.timing import Comparison

from .allocation import Demand, Widths, complexity, rank, uniform
from .budget import channels_removed, cost_removed
from .costs import WidthCost, quantity_of, unit_shares
from .groups import ChannelGroups
from .knapsack import knapsack
from .plan import PruningPlan
from .prune import check_widths, prune
from .rerank import group_scores, hardware_scores, normalise, weighed_by_group
from .result import TrialParams, TrialResult
from .scores import ChannelScores
from .sensitivity import LossCurves, sensitivity
from .workspace import write_json

if TYPE_CHECKING:
    from torch import nn

#: Largest difference between the PyTorch model and its exported artifact, relative to the outputs' largest
#: value.
PARITY_TOLERANCE = 1e-3
_PARITY_IMAGES = 2


class Listener(Protocol):
    """Hears what a trial is doing."""

    def step(self, name: str) -> None: ...

    def epoch(self, done: int, epochs: int, accuracy: float) -> None: ...


@dataclass(frozen=True, eq=False)
class Bench:
    """Everything the trials of one device share. Made once, read-only.

    Attributes:
        scores: criterion name to cached scores.
        curves: criterion name to cached loss curves; only those that the study's allocations need.
        profile: the device's cached latency profile.
        baseline: the unpruned model's artifact, measured in turns with every candidate.
        baseline_ms, baseline_p90_ms: its latency as trial 0 measured it; None before that.
        latency_target, latency_limit_s: when a measurement ends, see `profiles.measure.compare`.
    """

    task: Task
    device: Device
    fingerprint: str
    groups: ChannelGroups
    scores: dict[str, ChannelScores]
    profile: LatencyProfile
    baseline: Artifact
    recovery: Recovery
    min_channels: int
    latency_target: float
    latency_limit_s: float
    baseline_ms: float | None = None
    baseline_p90_ms: float | None = None
    curves: Mapping[str, LossCurves] = field(default_factory=dict)
    _costs: dict[str, WidthCost] = field(default_factory=dict, init=False, repr=False)

    def cost(self, quantity: str) -> WidthCost:
        """A quantity as a function of widths, made once; see `costs.WidthCost`."""
        if quantity not in self._costs:
            self._costs[quantity] = WidthCost.of(quantity, self.groups, self.profile)
        return self._costs[quantity]


def run_trial(
    number: int, params: TrialParams, bench: Bench, folder: Path, listener: Listener
) -> TrialResult:
    """Run one trial and leave its files in `folder`.

    Args:
        number: the trial's number; 0 is the unpruned model and skips pruning and recovery.
        folder: an empty or new folder; gets plan.json, model.safetensors, the task's model file, the artifact
            and, last, result.json, so that a folder with a result is complete.

    Returns:
        The result, complete.

    Raises:
        Exception: whatever a step raises; nothing is caught here.
    """
    clock = _Clock(listener)
    folder.mkdir(parents=True, exist_ok=True)
    with clock("rerank"):
        scores = rerank(params, bench)
    with clock("plan"):
        plan = make_plan(params, scores, bench)
        plan.save(folder / "plan.json")
    with clock("prune"):
        model = (
            prune(bench.task.load_model(), plan, bench.task.settle)
            if not plan.is_empty
            else bench.task.load_model()
        )
    with clock("recover"):
        model, epochs = recover(model, plan, bench, folder, listener)
    verdict = judge(model, epochs, bench, folder, clock)
    result = _result(number, params, plan, verdict, epochs, bench, folder, clock)
    write_json(folder / "result.json", result.to_json())
    return result


def rerank(params: TrialParams, bench: Bench) -> list[NDArray[np.float64]]:
    """Step 1: the device's latency weighs the cached scores, equation (7), summed over groups."""
    scores = bench.scores[params.criterion].layers
    if params.allocation == "sensitivity":
        return group_scores(scores, bench.groups)  # there beta weighs the measured loss instead
    if params.cost == "layer":
        weighed = hardware_scores(scores, normalise(bench.profile.delta_ms), params.beta)
        return group_scores(weighed, bench.groups)
    unpruned = np.zeros(len(bench.groups.groups))
    saved = bench.cost(quantity_of(params.cost)).marginal(unpruned)
    return weighed_by_group(group_scores(scores, bench.groups), saved, params.beta)


def make_plan(params: TrialParams, scores: list[NDArray[np.float64]], bench: Bench) -> PruningPlan:
    """Step 2: which channels go."""
    groups = bench.groups
    of_channels = params.ratio_of == "channels"
    share = channels_removed(groups) if of_channels else cost_removed(bench.cost(params.ratio_of))
    demand = Demand(groups, scores, params.ratio, share, Widths(params.round_to, bench.min_channels))
    counts = allocate(params, demand, bench)
    return PruningPlan.of(bench.task.model_key, groups, demand.pick(counts))


def allocate(params: TrialParams, demand: Demand, bench: Bench) -> NDArray[np.int64]:
    """How many channels each unit loses, `(units,)`, by the rule that `params.allocation` names."""
    if params.allocation == "uniform":
        return uniform(demand)
    if params.allocation == "knapsack":
        return knapsack(demand)
    cost = bench.cost(quantity_of(params.cost))
    if params.allocation == "complexity":
        return complexity(demand, unit_shares(cost, demand.groups), bench.recovery.seed)
    if params.allocation == "sensitivity":
        return sensitivity(demand, bench.curves[params.criterion], cost, params.beta)
    return rank(demand)


def predict_ms(plan: PruningPlan, profile: LatencyProfile) -> float:
    """Latency of a plan by the device's model. Layers that only training uses are not in the profile and cost
    nothing.
    """
    deployed = {layer.layer for layer in profile.layers}
    return profile.predict_ms({name: widths for name, widths in plan.widths.items() if name in deployed})


def recover(
    model: nn.Module, plan: PruningPlan, bench: Bench, folder: Path, listener: Listener
) -> tuple[nn.Module, tuple[float, ...]]:
    """Step 4: train the pruned model back, and make sure it is still the pruned one.

    Returns:
        The recovered model and its accuracies: before any training, then after each epoch. The unpruned model
            is only evaluated.
    """
    accuracies: list[float] = []

    def on_epoch(done: int, epochs: int, accuracy: float) -> bool:
        accuracies.append(accuracy)
        listener.epoch(done, epochs, accuracy)
        return True

    if plan.is_empty:
        on_epoch(0, 0, bench.task.evaluate(bench.task.predictor(model)))
        return model, tuple(accuracies)
    with host_lock("training"):
        model = bench.task.recover(model, bench.recovery, folder, on_epoch)
    check_widths(model, plan)
    return model, tuple(accuracies)


@dataclass(frozen=True)
class Verdict:
    """What judging measured."""

    accuracy: float
    comparison: Comparison
    params: int
    macs: int
    artifact: Artifact
    parity: float


def judge(
    model: nn.Module, epochs: tuple[float, ...], bench: Bench, folder: Path, clock: Callable[[str], Any]
) -> Verdict:
    """Step 5: accuracy, size, and the latency of the exported artifact in the device's own runtime.

    Raises:
        ValueError: the artifact does not compute what the model computes.
    """
    with clock("export"):
        artifact = export_model(model, bench.task, bench.device, folder)
        parity = check_parity(model, artifact, bench.task)
    with clock("measure"):
        comparison = compare(
            bench.device, artifact, bench.baseline, target=bench.latency_target, limit_s=bench.latency_limit_s
        )
    return Verdict(
        accuracy=max(epochs),
        comparison=comparison,
        params=count_params(model),
        macs=count_macs(model, bench.task.input_shape),
        artifact=artifact,
        parity=parity,
    )


def export_model(model: nn.Module, task: Task, device: Device, folder: Path) -> Artifact:
    """Write the weights (safetensors), the framework's own model file and the device's artifact."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    task.save(model, folder / "model.pt")
    return export_artifact(task.deployable(model), device, folder, task.input_shape, task.metadata(model))


def check_parity(model: nn.Module, artifact: Artifact, task: Task, images: int = _PARITY_IMAGES) -> float:
    """Largest difference between model and artifact on real images, relative to the largest output.

    Raises:
        ValueError: it is above `PARITY_TOLERANCE`, or the shapes differ.
    """
    sample = task.sample_images(images)
    predict, run = task.predictor(model), open_artifact(artifact, threads=1)
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
    if not worst <= PARITY_TOLERANCE:
        raise ValueError(
            f"the exported model must match the PyTorch model within {PARITY_TOLERANCE:g} of its largest "
            "output, "
            f"got {worst:.3g} on {len(sample)} images"
        )
    return worst


def _result(
    number: int,
    params: TrialParams,
    plan: PruningPlan,
    verdict: Verdict,
    epochs: tuple[float, ...],
    bench: Bench,
    folder: Path,
    clock: _Clock,
) -> TrialResult:
    """The record. Latency is the ratio measured in turns times the unpruned latency of trial 0, see
    `TrialResult`.
    """
    comparison = verdict.comparison
    if (
        bench.baseline_ms is None or bench.baseline_p90_ms is None
    ):  # trial 0 sets the scale for the whole study
        ratio, ratio_ci = 1.0, (1.0, 1.0)
        pooled = comparison.baseline
        baseline_ms, p90_ms = pooled.p50_ms, pooled.p90_ms
    else:
        ratio, ratio_ci = comparison.ratio, comparison.ratio_ci
        baseline_ms = bench.baseline_ms
        p90_ms = comparison.candidate.p90_ms / comparison.candidate.p50_ms * ratio * baseline_ms
    return TrialResult(
        trial=number,
        device=bench.device.name,
        fingerprint=bench.fingerprint,
        asked=params,
        state="complete",
        accuracy=verdict.accuracy,
        latency_ms=ratio * baseline_ms,
        latency_p90_ms=p90_ms,
        latency_raw_ms=comparison.candidate.p50_ms,
        speedup=1.0 / ratio,
        speedup_ci=(1.0 / ratio_ci[1], 1.0 / ratio_ci[0]),
        predicted_latency_ms=predict_ms(plan, bench.profile),
        params=verdict.params,
        macs=verdict.macs,
        duration_s=clock.durations,
        epochs=epochs,
        plan_digest=plan.digest,
        artifact_digest=verdict.artifact.digest,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        details={
            "baseline_raw_ms": comparison.baseline.p50_ms,
            "rounds": comparison.rounds,
            "samples": len(comparison.candidate.samples_ms),
            "stable": comparison.is_stable,
            "unstable_reason": comparison.reason,
            "verdict": comparison.verdict,
            "copies_ratio": comparison.ratio if plan.is_empty else None,
            "copies_ratio_ci": list(comparison.ratio_ci) if plan.is_empty else None,
            "parity": verdict.parity,
            "removed_share": {
                name: len(cut.removed_out) / cut.channels_out for name, cut in plan.layers.items()
            },
        },
    )


class _Clock:
    """Times steps and announces them."""

    def __init__(self, listener: Listener):
        self.durations: dict[str, float] = {}
        self._listener = listener

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        self._listener.step(step)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.durations[step] = self.durations.get(step, 0.0) + time.perf_counter() - start

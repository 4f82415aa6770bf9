"""One trial, in five steps: rerank, plan, prune, recover, judge.

Knows neither Optuna nor MLflow: it is given parameters and a bench, and returns what it measured. Nothing in
it profiles a layer, and only a schedule of several steps asks for scores that no cache holds yet, those of
what is left. Latency does not depend on weights, so it is measured before the recovery, and a gate may end
the trial after each step.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from objectives.size import count_params
from objectives.task import EpochCallback, Recovery, Task
from profiles.artifact import Artifact
from profiles.lock import host_lock
from profiles.timing import Comparison

from .evidence import Evidence
from .judge import TimedModel, Verdict, judge, time_untrained
from .plan import PruningPlan
from .planning import make_plan, rerank
from .prediction import predict_ms
from .proxy import Proxy, promise
from .prune import check_widths, prune
from .result import TrialParams, TrialResult
from .stopping import Gate, OpenGate, TrialStopped
from .workspace import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

_OPEN = OpenGate()
#: Folder of the file that is measured before the recovery, there until the trial ends.
_UNTRAINED = "untrained"


class Listener(Protocol):
    """Hears what a trial is doing."""

    def step(self, name: str) -> None: ...

    def epoch(self, done: int, epochs: int, accuracy: float) -> None: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Bench(Evidence):
    """Everything the trials of one device share: what plans are made from, and what prunes, trains and
    measures them. Made once, read-only.

    Attributes:
        baseline: the unpruned model's artifact, measured in turns with every candidate.
        baseline_weights: the state dict of the module in it; pruned models' artifacts are made from both.
        baseline_ms, baseline_p90_ms: its latency as trial 0 measured it; None before that.
        latency_target, latency_limit_s: when a measurement ends, see `profiles.measure.compare`.
    """

    task: Task
    fingerprint: str
    baseline: Artifact
    recovery: Recovery
    latency_target: float
    latency_limit_s: float
    baseline_ms: float | None = None
    baseline_p90_ms: float | None = None
    baseline_weights: Mapping[str, Tensor] = field(default_factory=dict)


def run_trial(
    number: int,
    params: TrialParams,
    bench: Bench,
    folder: Path,
    listener: Listener,
    gate: Gate = _OPEN,
) -> TrialResult:
    """Run one trial and leave its files in `folder`.

    Args:
        number: the trial's number; 0 is the unpruned model and skips pruning and recovery.
        folder: an empty or new folder; gets plan.json, model.safetensors, the task's model file, the artifact
            and, last, result.json, so that a folder with a result is complete.
        gate: asked after each step whether to go on; default: always.

    Returns:
        The result: complete, or stopped with the gate's reason and what was known by then.

    Raises:
        Exception: whatever a step raises; nothing is caught here.
    """
    clock, known = _Clock(listener), _Known()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with clock("rerank"):
            scores = rerank(params, bench)
        with clock("plan"):
            plan = known.plan = make_plan(params, scores, bench)
            known.proxy = promise(plan, bench)
            plan.save(folder / "plan.json")
        _go_on(gate.planned(plan, known.proxy))
        with clock("prune"):
            model = bench.task.load_model()
            model = model if plan.is_empty else prune(model, plan, bench.task.settle)
            known.params = count_params(model)
        _go_on(gate.pruned(known.params))
        timed = known.timed = time_untrained(model, bench, folder / _UNTRAINED, clock)
        _go_on(gate.measured(timed.comparison.ratio, timed.comparison.ratio_ci, timed.exported.size_mb))
        with clock("recover"):
            if params.recovery == "scratch" and not plan.is_empty:
                model = bench.task.reinitialise(model, bench.recovery.seed)
            model = recover(model, plan, bench, folder, listener, gate, known.epochs)
        known.verdict = judge(model, timed, bench, folder, clock)
    except TrialStopped as stop:
        result = _result(number, params, known, bench, clock, stopped=str(stop))
    else:
        result = _result(number, params, known, bench, clock)
    finally:
        shutil.rmtree(folder / _UNTRAINED, ignore_errors=True)
    write_json(folder / "result.json", result.to_json())
    return result


def _go_on(reason: str | None) -> None:
    if reason is not None:
        raise TrialStopped(reason)


def recover(
    model: nn.Module,
    plan: PruningPlan,
    bench: Bench,
    folder: Path,
    listener: Listener,
    gate: Gate = _OPEN,
    accuracies: list[float] | None = None,
) -> nn.Module:
    """Step 4: train the pruned model back, and make sure it is still the pruned one.

    Args:
        accuracies: gets the accuracies, before any training and then after each epoch. The unpruned model is
            only evaluated.

    Returns:
        The recovered model, in its best state.

    Raises:
        TrialStopped: the gate found after an epoch that going on is not worth it.
        WidthError: what came back is not what the plan says.
    """
    seen = accuracies if accuracies is not None else []
    reason: str | None = None

    def heard(done: int, epochs: int, accuracy: float) -> bool:
        nonlocal reason
        seen.append(accuracy)
        listener.epoch(done, epochs, accuracy)
        reason = gate.epoch(done, epochs, accuracy) if epochs else None
        return reason is None

    if plan.is_empty:
        with host_lock("evaluation"):
            heard(0, 0, bench.task.evaluate(bench.task.predictor(model)))
        return model
    recovery = bench.recovery
    with host_lock("training"):
        model = bench.task.recover(model, recovery, folder, heard)
        done = recovery.epochs
        # A gate that saw no epoch gives none.
        while reason is None and (extra := gate.extra_epochs()):
            # Batch norm was re-estimated already, and epoch 0 is where the run before ended. The same seed
            # would show the same images in the same order once more.
            more = replace(
                recovery, epochs=extra, reestimate_images=0, accuracy=max(seen), seed=recovery.seed + done
            )
            model = bench.task.recover(model, more, folder, _after(done, extra, heard))
            done += extra
    _go_on(reason)
    check_widths(model, plan)
    return model


def _after(earlier: int, extra: int, heard: EpochCallback) -> EpochCallback:
    """Tells of `extra` epochs as those that follow `earlier` ones; their epoch 0 was told already."""
    return lambda done, _, accuracy: not done or heard(earlier + done, earlier + extra, accuracy)


@dataclass
class _Known:
    """What a trial has found out so far."""

    plan: PruningPlan | None = None
    proxy: Proxy | None = None
    params: int | None = None
    timed: TimedModel | None = None
    epochs: list[float] = field(default_factory=list)
    verdict: Verdict | None = None


def _result(
    number: int,
    params: TrialParams,
    known: _Known,
    bench: Bench,
    clock: _Clock,
    *,
    stopped: str | None = None,
) -> TrialResult:
    """The record of a trial that ran to its end or was stopped with a reason."""
    plan, verdict = known.plan, known.verdict
    assert plan is not None
    comparison = verdict.comparison if verdict else known.timed.comparison if known.timed else None
    accuracy = max(known.epochs, default=None)
    if verdict and verdict.accuracy is not None:
        accuracy = verdict.accuracy
    details: dict[str, Any] = {
        "proxy": None if known.proxy is None else known.proxy.to_json(),
        "size_mb": known.timed.exported.size_mb if known.timed else None,
        "removed_share": _removed_share(plan, bench),
        "blocks": list(plan.blocks),
    }
    if verdict:
        details |= {"parity": verdict.parity, "measured": verdict.measured, "structure": verdict.structure}
        details["size_mb"] = verdict.exported.size_mb
    if comparison:
        details |= _comparison_details(comparison, plan.is_empty)
    if stopped is not None:
        details["stopped_after"] = list(clock.durations)[-1]
    return TrialResult(
        trial=number,
        device=bench.device.name,
        fingerprint=bench.fingerprint,
        asked=params,
        state="complete" if stopped is None else "stopped",
        reason=stopped,
        accuracy=accuracy,
        predicted_latency_ms=predict_ms(plan, bench.profile),
        params=known.params,
        macs=verdict.macs if verdict else None,
        duration_s=clock.durations,
        epochs=tuple(known.epochs),
        plan_digest=plan.digest,
        artifact_digest=verdict.exported.artifact.digest if verdict else None,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        details=details,
        **(_latency(comparison, bench) if comparison else {}),
    )


def _removed_share(plan: PruningPlan, bench: Bench) -> dict[str, float]:
    """Layer to the share of its channels that went; 1 for a layer that went with a block."""
    shares = {name: len(cut.removed_out) / cut.channels_out for name, cut in plan.layers.items()}
    return shares | {name: 1.0 for name in bench.groups.widths if plan.inside_blocks(name)}


def _latency(comparison: Comparison, bench: Bench) -> dict[str, Any]:
    """Latency is the ratio measured in turns times the unpruned latency of trial 0, see `TrialResult`."""
    ratio, ratio_ci, baseline_ms = comparison.ratio, comparison.ratio_ci, bench.baseline_ms
    if baseline_ms is None or bench.baseline_p90_ms is None:  # trial 0 sets the scale for the whole study
        ratio, ratio_ci = 1.0, (1.0, 1.0)
        baseline_ms, p90_ms = comparison.baseline.p50_ms, comparison.baseline.p90_ms
    else:
        p90_ms = comparison.candidate.p90_ms / comparison.candidate.p50_ms * ratio * baseline_ms
    return {
        "latency_ms": ratio * baseline_ms,
        "latency_p90_ms": p90_ms,
        "latency_raw_ms": comparison.candidate.p50_ms,
        "speedup": 1.0 / ratio,
        "speedup_ci": (1.0 / ratio_ci[1], 1.0 / ratio_ci[0]),
    }


def _comparison_details(comparison: Comparison, is_unpruned: bool) -> dict[str, Any]:
    return {
        "baseline_raw_ms": comparison.baseline.p50_ms,
        "rounds": comparison.rounds,
        "rounds_counted": comparison.counted,
        "samples": len(comparison.candidate.samples_ms),
        "stable": comparison.is_stable,
        "unstable_reason": comparison.reason,
        "verdict": comparison.verdict,
        "copies_ratio": comparison.ratio if is_unpruned else None,
        "copies_ratio_ci": list(comparison.ratio_ci) if is_unpruned else None,
    }


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

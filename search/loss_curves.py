"""Measuring loss curves: what a network's loss really becomes when a group loses more and more channels.

A channel's score says little of many channels at once: removing nine tenths of a layer costs far more than
the sum of its channels, and how much more differs between layers by orders of magnitude. So the loss is
measured, group by group and level by level, on a network that goes without them. Since groups also matter to
each other, the curves are measured again along the way: around the network that the curves so far would make
of it at a few depths. Computed once and cached, like the scores; knows no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from objectives.task import Task
from profiles.lock import host_lock

from .allocation import Demand, Widths
from .budget import cost_removed
from .costs import WidthCost
from .groups import ChannelGroups
from .plan import PruningPlan
from .prune import prune
from .sensitivity import DEPTHS, FloatArray, IntArray, LossCurves, Stage, in_order
from .shared_forward import SharedForward
from .silence import further, silenced

if TYPE_CHECKING:
    from torch import nn

#: Shares of the channels that a unit still has at which its loss is measured.
LEVELS = (0.25, 0.5, 0.75, 0.9375)


def measure_curves(
    task: Task,
    groups: ChannelGroups,
    scores: Sequence[FloatArray],
    macs: WidthCost,
    *,
    criterion: str,
    images: int,
    batch: int,
    min_channels: int,
    known: Sequence[Stage] = (),
    on_step: Callable[[int, int], None] = lambda done, steps: None,
    on_stage: Callable[[LossCurves], object] = lambda curves: None,
) -> LossCurves:
    """Measure the curves of a model.

    The loss is taken with batch norm's statistics of the batch itself, which is what re-estimating them comes
    to, in one pass: a pruned network with the unpruned one's statistics says more of the statistics than of
    the channels.

    Args:
        scores: one `(channels,)` array per group; the lowest go first.
        macs: the MACs as a function of widths, by which the depths are chosen.
        images, batch: calibration sample.
        min_channels: kept by every unit at least.
        known: the first stages, where they were measured before.
        on_step: called with the losses measured so far and about how many there will be, which becomes fewer
            as the network does; by its last stage it is their number.
        on_stage: called with the curves after each stage, to be kept.

    Raises:
        ValueError: the loss is not finite.
    """
    with host_lock("scores"):
        batches = list(task.calibration(images, batch))
    channels = groups.unit_channels
    names = tuple(groups.groups[unit[0]].name for unit in groups.units)
    unpruned = np.zeros_like(channels)

    def demand(ratio: float) -> Demand:
        return Demand(groups, scores, ratio, cost_removed(macs), Widths(1, min_channels))

    order = demand(0.0)

    def plan_of(counts: IntArray) -> PruningPlan:
        return PruningPlan.of(task.model_key, groups, order.pick(counts))

    curves = LossCurves(criterion, names, tuple(known))
    done = sum(len(losses) for stage in known for losses in stage.losses)
    for n, depth in enumerate(DEPTHS[len(known) :], len(known)):
        context = unpruned
        if curves.stages:  # where every width is allowed, the order alone is the best choice
            context = in_order(demand(depth), curves, macs, 1.0)
        counts = _levels(context, channels, min_channels)
        steps = done + (len(DEPTHS) - n) * sum(len(tried) for tried in counts)
        lost = plan_of(context)
        # One network at a time under the lock: another worker's measurement need not wait for all.
        with host_lock("scores"):
            network = _laid_out(by_the_batch(prune(task.load_model(), lost, task.settle)))
            with _counted(network) as seen:
                around = SharedForward(network, lambda model, batch: float(task.loss(model, batch)), batches)
        losses = []
        for u, tried in enumerate(counts):  # in the order of the network, which is that of running it
            row = []
            for count in tried:
                changed = context.copy()
                changed[u] = count
                gone = further(plan_of(changed), lost)
                with host_lock("scores"):
                    row.append(around.loss_with(set(gone), silenced(network, gone)) / seen.images)
                done += 1
                on_step(done, steps)
            losses.append(tuple(row))
        stage = Stage(tuple(int(c) for c in context), around.loss / seen.images, counts, tuple(losses))
        curves = replace(curves, stages=(*curves.stages, stage))
        on_stage(curves)
    return curves


def _levels(context: IntArray, channels: IntArray, min_channels: int) -> tuple[tuple[int, ...], ...]:
    """Per unit the removed counts to measure: shares of what it has left, never below `min_channels` kept."""
    result = []
    for gone, total in zip(context, channels, strict=True):
        most = total - min(min_channels, total)
        wanted = [min(round(float(gone + level * (total - gone))), int(most)) for level in LEVELS]
        result.append(tuple(sorted({count for count in wanted if count > gone})))
    return tuple(result)


def _laid_out(model: nn.Module) -> nn.Module:
    """On a CPU, with a pixel's channels beside each other in memory: convolutions take less time so."""
    import torch

    return model.to(memory_format=torch.channels_last) if next(model.parameters()).is_cpu else model


def by_the_batch(model: nn.Module) -> nn.Module:
    """Have batch norm use the statistics of each batch, and all else run as in inference; in place."""
    from torch.nn.modules.batchnorm import _BatchNorm

    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    return model


@dataclass
class _Seen:
    images: int = 0


@contextmanager
def _counted(model: nn.Module) -> Iterator[_Seen]:
    """Count the images that a network is given: only the task knows what a batch looks like, but the first
    layer sees how many images it holds.
    """
    from torch import nn

    seen = _Seen()

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.images += len(inputs[0])

    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    handle = first.register_forward_pre_hook(count)
    try:
        yield seen
    finally:
        handle.remove()

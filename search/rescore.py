"""Scores of a network that has lost channels already: what an iterative schedule ranks by.

The network is pruned by the plan so far, its batch norm re-estimated, and scored like the unpruned one. What
comes back is in the unpruned network's channels, so that every plan names originals. Knows no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from objectives.batchnorm import reestimate_batchnorm
from objectives.task import Task

from .criteria import compute_scores, rescored_data_key
from .plan import LayerCut, PruningPlan
from .prune import prune
from .scores import ChannelScores, FloatArray

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class _Pruned:
    """A task whose model is already pruned; everything else is the task's own."""

    task: Task
    plan: PruningPlan
    images: int
    batch: int

    def load_model(self) -> nn.Module:
        model = prune(self.task.load_model(), self.plan, self.task.settle)
        # Statistics of the unpruned network would say more of what is gone than of what is left.
        reestimate_batchnorm(model, self.task.calibration(self.images, self.batch), self.task.outputs)
        return model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


def rescore(task: Task, plan: PruningPlan, criterion: str, settings: Mapping[str, Any]) -> ChannelScores:
    """Scores of what a plan leaves, by layer of the original model; 0 for channels that are gone.

    Args:
        plan: channels alone; blocks go last.
        settings: of `criteria.compute_scores`: images, batch, loss, seed.

    Raises: as `compute_scores`.
    """
    pruned = cast("Task", _Pruned(task, plan, settings["images"], settings["batch"]))
    found = compute_scores(criterion, pruned, **settings)
    layers = {name: _original(values, plan.layers.get(name)) for name, values in found.layers.items()}
    data_key = rescored_data_key(task, plan, criterion, settings)
    return ChannelScores(criterion, task.model_key, data_key, layers)


def _original(values: FloatArray, cut: LayerCut | None) -> FloatArray:
    if cut is None or not cut.removed_out:
        return values
    result = np.zeros(cut.channels_out)
    result[np.setdiff1d(np.arange(cut.channels_out), cut.removed_out)] = values
    return result

"""The criteria by name: what `search.criterion` may say, where each comes from and what it depends on.

A criterion turns a model, and for some of them calibration batches, into one score per layer channel. A
group's score is the sum of its members' scores, whatever the criterion: the size of all that goes together.
Knows no device and no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from objectives.task import Task, TaskKeys

from .feature_rank import hrank
from .groups import find_groups
from .plan import PruningPlan
from .scores import ChannelScores, FloatArray, taylor, taylor_rise, taylor_weight
from .weight_scores import bn, fpgm, l1, random

#: Criterion to what it measures and who published it.
SOURCES: Mapping[str, str] = {
    "taylor": "|dL/dc * c| summed over a channel's map: Nechypurenko & Sorokin 2026, equation (3)",
    "taylor_rise": "max(0, -dL/dc * c): the part of equation (3) in which the loss rises",
    "taylor_weight": "(dL/dw * w summed over a filter) squared, per minibatch: Molchanov et al. 2019",
    "l1": "sum of a filter's absolute weights: Li et al. 2017",
    "bn": "scale |gamma| of the batch norm that follows: Liu et al. 2017",
    "fpgm": "distance of a filter to all filters of its layer: He et al. 2019, equation (4)",
    "hrank": "rank of a channel's map, mean over images: Lin et al. 2020",
    "random": "chance, one number per group channel",
}
CRITERIA = tuple(SOURCES)
_BY_LOSS = {"taylor": taylor, "taylor_rise": taylor_rise, "taylor_weight": taylor_weight}
#: Those that ask the loss, and those that look at images at all; the others read the weights alone.
WITH_LOSS = frozenset(_BY_LOSS)
WITH_IMAGES = WITH_LOSS | {"hrank"}


def compute_scores(
    criterion: str,
    task: Task,
    *,
    images: int,
    batch: int,
    loss: str,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> ChannelScores:
    """Scores of the task's model, on the task's calibration images where the criterion looks at images.

    Args:
        criterion: one of `CRITERIA`.
        images, batch: size of the calibration sample, and images per pass.
        loss: "task", the real loss, or "outputs", the sum of all head outputs.
        seed: of `random`.
        on_batch: called with the number of batches done.

    Raises:
        ValueError: an unknown criterion, one that does not fit the model, or scores that are not finite.
    """
    data_key = scores_data_key(criterion, task, images=images, batch=batch, loss=loss, seed=seed)
    layers = _layers(criterion, task, images, batch, loss, seed, on_batch)
    return ChannelScores(criterion, task.model_key, data_key, layers)


def _layers(
    criterion: str,
    task: Task,
    images: int,
    batch: int,
    loss: str,
    seed: int,
    on_batch: Callable[[int], None],
) -> Mapping[str, FloatArray]:
    model = task.load_model()
    match criterion:
        case _ if criterion in _BY_LOSS:
            function = task.loss if loss == "task" else task.outputs
            return _BY_LOSS[criterion](model, task.calibration(images, batch), function, on_batch)
        case "hrank":
            return hrank(model, task.calibration(images, batch), task.outputs, on_batch)
        case "l1":
            return l1(model)
        case "fpgm":
            return fpgm(model)
        case "bn":
            import torch

            from objectives.wiring import batchnorms

            return bn(model, batchnorms(model, torch.zeros(task.input_shape)))
        case _:
            return random(model, find_groups(task.traceable(model), model), seed)


def scores_data_key(
    criterion: str, task: TaskKeys, *, images: int, batch: int, loss: str, seed: int = 0
) -> str:
    """What the scores depend on besides the model, and nothing else: other settings must not empty the cache.

    Raises:
        ValueError: an unknown criterion.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if criterion == "random":
        return f"seed-{seed}"
    if criterion not in WITH_IMAGES:
        return "weights"
    shape = "x".join(str(side) for side in task.input_shape)
    key = f"{task.data_key}-{shape}-{images}"
    return f"{key}-{batch}-{loss}" if criterion in WITH_LOSS else key


def rescored_data_key(task: TaskKeys, plan: PruningPlan, criterion: str, settings: Mapping[str, Any]) -> str:
    """What scores of what a plan leaves depend on besides the model, see `rescore`: always the sample that
    batch norm is re-estimated on.
    """
    unpruned = scores_data_key(criterion, task, **settings)
    return f"{unpruned}-{settings['images']}-{settings['batch']}-{plan.digest}"

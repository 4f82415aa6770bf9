"""The criteria by name: what `search.criterion` may say and how each one is computed.

A criterion turns a model and calibration batches into one score per layer channel. It knows no device, group
or plan.
"""

from __future__ import annotations

from collections.abc import Callable

from objectives.task import Task

from .scores import ChannelScores, taylor

CRITERIA = ("taylor",)


def compute_scores(
    criterion: str,
    task: Task,
    *,
    images: int,
    batch: int,
    loss: str,
    on_batch: Callable[[int], None] = lambda done: None,
) -> ChannelScores:
    """Scores of the unpruned model on the task's calibration images.

    Args:
        criterion: one of `CRITERIA`.
        images, batch: size of the calibration sample, and images per pass.
        loss: "task", the real loss, or "outputs", the sum of all head outputs.
        on_batch: called with the number of batches done.

    Raises:
        ValueError: an unknown criterion, or scores that are not finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    model = task.load_model()
    function = task.loss if loss == "task" else task.outputs
    layers = taylor(model, task.calibration(images, batch), function, on_batch)
    return ChannelScores(
        criterion, task.model_key, scores_data_key(task, images=images, batch=batch, loss=loss), layers
    )


def scores_data_key(task: Task, *, images: int, batch: int, loss: str) -> str:
    """What the scores depend on besides the model: data, input shape and the sample's settings."""
    shape = "x".join(str(side) for side in task.input_shape)
    return f"{task.data_key}-{shape}-{images}-{batch}-{loss}"

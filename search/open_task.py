"""The task that a study file describes: a detector, or a classifier by its builder. Runs nothing."""

from __future__ import annotations

from objectives.task import Task

from .sections import ModelSection
from .studyfile import StudyFile


def open_task(study: StudyFile) -> Task:
    """The task that a study file's `model` and `data` describe.

    Raises:
        ValueError: they cannot be used.
    """
    if isinstance(study.model, ModelSection):
        from objectives.classification import ClassificationTask

        return ClassificationTask(
            builder=study.model.builder,
            weights=study.model.weights,
            data=study.data,
            imgsz=study.imgsz,
            folder=study.source.parent,
            arguments=dict(study.model.arguments),
            mean=study.model.mean,
            std=study.model.std,
        )
    from objectives.detection import DetectionTask

    return DetectionTask(model=study.model, data=study.data, imgsz=study.imgsz or 640)

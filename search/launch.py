"""Launching a study: the search, its record in MLflow and what to compare it with, put together.

What the command, the quickstart and a notebook call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .bench import Shop
from .found import find, front_so_far
from .front import ParetoFront
from .loop import Progress, run_search
from .recorder import MlflowRecorder, open_tracker
from .reference import measure_references, open_references
from .review import record_front
from .studyfile import StudyFile
from .workspace import Workspace


def launch(
    study: StudyFile, devices: Sequence[str], *, trials: int, timeout_s: float | None, progress: Progress
) -> dict[str, ParetoFront]:
    """Run a study, or go on with it, and record it.

    Args:
        devices: names of devices of the study file.
        trials: finished trials wanted per device, earlier ones counted in, the unpruned model not.

    Returns:
        Device name to front.

    Raises:
        StudyFileError: model or data cannot be used.
        SearchError: the search cannot go on.
    """
    shop = Shop(study, Workspace(study.folder), notice=progress.notice)
    # What is wrong with model, data or references is said before anything is opened.
    _ = shop.task
    references = open_references(study)
    tracker = open_tracker(study, progress.notice)
    recorder = MlflowRecorder(study, tracker, partial(front_so_far, study))
    interrupted = True
    try:
        fronts = run_search(
            study, shop, devices, trials=trials, timeout_s=timeout_s, progress=progress, recorder=recorder
        )
        measure_references(study, shop, references, [name for name in devices if name in fronts])
        interrupted = False
    finally:
        for name in devices:
            found = find(study, name)
            if found is not None:
                record_front(study, shop, tracker, found)
                tracker.end_device(name, interrupted=interrupted)
    return fronts

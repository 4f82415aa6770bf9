"""Launching a study: the search, its record in MLflow and what to compare it with, put together.

What the command, the quickstart and a notebook call.
"""

from __future__ import annotations

from collections.abc import Sequence

from .bench import Shop
from .found import find
from .front import ParetoFront
from .loop import DevicesFailedError, Ended, Progress, run_search
from .recorder import MlflowRecorder, open_tracker
from .reference import measure_references, open_references
from .result import brief
from .review import record_front
from .storage import SearchError
from .studyfile import StudyFile
from .tracking import Tracker
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
        SearchError: the search cannot go on, a reference could not be measured, or what was found could not
            be recorded.
    """
    shop = Shop(study, Workspace(study.folder), notice=progress.notice)
    # What is wrong with model, data or references is said before anything is opened.
    _ = shop.task
    references = open_references(study)
    tracker = open_tracker(study, progress.notice)
    recorder = MlflowRecorder(study, tracker)
    faults = []
    try:
        try:
            ended = run_search(
                study, shop, devices, trials=trials, timeout_s=timeout_s, progress=progress, recorder=recorder
            )
        except DevicesFailedError as error:  # the others are whole, and are compared and recorded like any
            ended = error.ended
            faults.append(str(error))
        if not ended.is_interrupted:
            try:
                measure_references(study, shop, references, list(ended.fronts))
            except SearchError as error:
                faults.append(str(error))
    except BaseException:
        # What is said of the record here must not hide what went wrong.
        for text in _record(study, shop, tracker, recorder.begun, None):
            progress.notice(text)
        raise
    faults += _record(study, shop, tracker, recorder.begun, ended)
    if faults:
        raise SearchError("; ".join(faults))
    return dict(ended.fronts)


def _record(
    study: StudyFile, shop: Shop, tracker: Tracker, begun: Sequence[str], ended: Ended | None
) -> list[str]:
    """Put each device's front on its run and close the run, whatever becomes of the other devices' ones.

    Args:
        begun: the devices that have a run.
        ended: None where the search broke off.

    Returns:
        What went wrong, a line for each device.
    """
    faults = []
    for name in begun:
        try:
            found = find(study, name)
            if found is not None:
                record_front(study, shop, tracker, found)
        except Exception as error:
            faults.append(f"the front of {name} is not recorded: {brief(f'{type(error).__name__}: {error}')}")
        is_whole = ended is not None and not ended.is_interrupted and name in ended.fronts
        tracker.end_device(name, interrupted=not is_whole)
    return faults

"""The loop of one worker: take a trial, run it, tell it, record it; devices take turns, so that every front
grows.

Any number of workers may run this loop on one study. What goes wrong in a trial ends that trial; what goes
wrong with a device pauses that device. Knows neither Optuna nor MLflow.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from filelock import FileLock

from profiles.connection import DeviceError, DeviceLostError

from .bench import Shop
from .front import ParetoFront
from .heartbeat import Pulse
from .result import TrialParams, TrialResult, brief
from .screening import Candidate, screened
from .stopping import FrontGate, Gate, OpenGate
from .storage import SearchError, StorageAwayError, open_storage
from .study import Begun, DeviceStudy
from .studyfile import StudyFile
from .trial import Bench, Listener, run_trial
from .turns import Finished, Waiting
from .workspace import write_json

_MAX_FAILURES = 3
#: A device that was lost is left alone for this long, times the losses in a row.
_LOST_PAUSE_S = 60.0
#: Between two looks at what other workers do.
_POLL_S = 1.0
#: A storage that is away is asked again this often, and for this long.
_AWAY_RETRY_S, _AWAY_LIMIT_S = 5.0, 900.0

T = TypeVar("T")


class Progress(Listener, Protocol):
    """Watches a search."""

    def notice(self, text: str) -> None: ...

    def trial_begins(
        self, device: str, number: int, done: int, wanted: int, params: TrialParams | None
    ) -> None: ...

    def trial_ends(self, result: TrialResult, front: ParetoFront | None) -> None: ...


class Recorder(Protocol):
    """Is told every finished trial, after it is safe."""

    def begin(self, bench: Bench, earlier: Sequence[tuple[TrialResult, Path]]) -> None: ...

    def record(self, result: TrialResult, folder: Path, front: ParetoFront | None) -> None: ...


@dataclass(frozen=True)
class Ended:
    """How a search ended.

    Attributes:
        fronts: device name to front, of the devices that could go on to the end.
        is_interrupted: the user asked it to stop.
    """

    fronts: Mapping[str, ParetoFront]
    is_interrupted: bool = False


class DevicesFailedError(SearchError):
    """Some devices could not go on; the others have had their trials, see `ended`."""

    def __init__(self, faults: Mapping[str, str], ended: Ended):
        super().__init__("; ".join(faults.values()))
        self.ended = ended


@dataclass
class _Lane:
    """One device's part in the search."""

    study: DeviceStudy
    bench: Bench
    wanted: int
    failures: int = 0
    paused_until: float = 0.0
    waits_for: str | None = None
    is_done: bool = False
    fault: str | None = None

    @property
    def is_open(self) -> bool:
        return not self.is_done and self.fault is None


def run_search(
    study: StudyFile,
    shop: Shop,
    devices: Sequence[str],
    *,
    trials: int,
    timeout_s: float | None,
    progress: Progress,
    recorder: Recorder,
) -> Ended:
    """Run trials on every device until each has `trials` of them besides trial 0, whoever ran them.

    Failed and stopped trials count, except those that were stopped for their plan alone, which cost nothing,
    and those that are tried again because a device was lost. Ctrl-C once lets the trial in flight finish;
    twice stops at once, and the next search redoes that trial.

    Args:
        timeout_s: no further trial begins after this.

    Raises:
        DevicesFailedError: on a device the unpruned model could not be measured or several trials in a row
            failed; the other devices have had their trials by then.
        SearchError: the search cannot go on at all.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    storage = open_storage(study, shop.workspace)
    lanes, faults = [], {}
    for name in devices:
        try:
            lanes.append(_open_lane(study, shop, name, storage, trials, progress, recorder))
        except DeviceError as error:
            if len(devices) == 1:
                raise
            faults[name] = str(error)
            progress.notice(f"{name} is left out: {error}")
    with _first_interrupt_waits(progress.notice) as interrupted:
        while any(lane.is_open for lane in lanes) and not interrupted():
            worked = False
            for lane in [lane for lane in lanes if lane.is_open]:
                if interrupted() or (deadline is not None and time.monotonic() > deadline):
                    break
                worked |= _turn(lane, study, progress, recorder)
            if deadline is not None and time.monotonic() > deadline:
                if any(lane.is_open for lane in lanes):
                    progress.notice("time is up; the same command goes on from here")
                break
            if not worked and any(lane.is_open for lane in lanes):
                time.sleep(_POLL_S)
    faults |= {lane.study.device: lane.fault for lane in lanes if lane.fault is not None}
    fronts = {
        lane.study.device: _patiently(lane.study.front, progress.notice)
        for lane in lanes
        if lane.fault is None or interrupted()
    }
    known = {name: front for name, front in fronts.items() if front is not None}
    ended = Ended(known, is_interrupted=interrupted())
    if faults and not interrupted():
        raise DevicesFailedError(faults, ended)
    return ended


def _open_lane(
    study: StudyFile,
    shop: Shop,
    name: str,
    storage: object,
    trials: int,
    progress: Progress,
    recorder: Recorder,
) -> _Lane:
    device_study = DeviceStudy(study, name, storage, shop.workspace)  # type: ignore[arg-type]  # Optuna's own
    # Two workers of one folder would make the same scores and variants in the same places.
    with FileLock(shop.workspace.folder / ".bench.lock"):
        bench = shop.bench(study.device(name).device())
    device_study.claim(bench)

    def candidates() -> Sequence[Candidate]:
        front = device_study.front()
        base_ms = None if front is None else front.baseline.latency_ms
        return screened(study, name, replace(bench, baseline_ms=base_ms))

    device_study.seat(candidates)
    device_study.collect()
    # Only what the storage knows: a trial may have been redone elsewhere while its first worker was away.
    known = {result.trial: result for result in device_study.results()}
    earlier = [(r, folder) for r, folder in shop.workspace.results(name) if known.get(r.trial) == r]
    recorder.begin(bench, earlier)
    return _Lane(device_study, bench, trials)


def _turn(lane: _Lane, study: StudyFile, progress: Progress, recorder: Recorder) -> bool:
    """Give a device its turn; whether a trial was run."""
    if time.monotonic() < lane.paused_until:
        return False
    try:
        taken = _patiently(
            lambda: lane.study.next_trial(lane.wanted, lane.bench.profile.channel_multiple), progress.notice
        )
    except StorageAwayError:
        raise
    except SearchError as error:
        lane.fault = str(error)
        return False
    if isinstance(taken, Waiting):
        if taken.reason != lane.waits_for:
            lane.waits_for = taken.reason
            progress.notice(f"{lane.study.device}: waiting for {taken.reason}")
        return False
    lane.waits_for = None
    if isinstance(taken, Finished):
        lane.is_done = True
        if taken.reason:
            progress.notice(f"{lane.study.device}: {taken.reason}")
        return False
    result = _one_trial(lane, taken, study, progress, recorder)
    if result is not None:
        _weigh(lane, result, progress)
    return True


def _weigh(lane: _Lane, result: TrialResult, progress: Progress) -> None:
    """What a result means for its device: go on, pause it, or leave it."""
    if result.state != "failed":
        lane.failures = 0
        return
    lane.failures += 1
    name = lane.study.device
    if result.trial == 0:
        lane.fault = f"the unpruned model could not be measured on {name}: {result.reason}"
    elif lane.failures >= _MAX_FAILURES:
        lane.fault = f"{_MAX_FAILURES} trials in a row failed on {name}, the last one: {result.reason}"
    elif result.details.get("retry"):
        lane.paused_until = time.monotonic() + _LOST_PAUSE_S * lane.failures
        progress.notice(f"{name} is lost; its trial is tried again in {_LOST_PAUSE_S * lane.failures:.0f} s")
    if lane.fault:
        progress.notice(lane.fault)


def _one_trial(
    lane: _Lane, begun: Begun, file: StudyFile, progress: Progress, recorder: Recorder
) -> TrialResult | None:
    """Run and tell; a trial that raises is a failed trial with its reason. None where it was lost to another
    worker.
    """
    study, bench, front = lane.study, lane.bench, _patiently(lane.study.front, progress.notice)
    if front is not None:
        bench = replace(
            bench, baseline_ms=front.baseline.latency_ms, baseline_p90_ms=front.baseline.latency_p90_ms
        )
    folder = study.workspace.trial(study.device, begun.number)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted attempt left
    done = _patiently(study.done, progress.notice)
    progress.trial_begins(study.device, begun.number, done, lane.wanted, begun.params)
    gate = _gate(study, begun, bench, front, file, _patiently(study.results, progress.notice))
    with Pulse(lambda count: study.beat(begun, count)):
        try:
            result = run_trial(begun.number, begun.params, bench, folder, progress, gate)
        except Exception as error:
            reason = f"{type(error).__name__}: {brief(str(error))}"
            lost = isinstance(error, DeviceLostError) and begun.number > 0
            result = TrialResult.failed(
                begun.number, study.device, bench.fingerprint, begun.params, reason, retry=lost
            )
            _leave_record(result, folder, traceback.format_exc())
            if begun.number == 0:  # there is no study without it: whoever comes next has to try again
                study.give_up(begun)
                return result
        if not _patiently(lambda: study.tell(begun, result), progress.notice):
            progress.notice(
                f"{study.device} trial {begun.number} was taken over by another worker while this one was "
                "not heard of; its result here is dropped"
            )
            if not _patiently(lambda: study.is_redone_here(begun), progress.notice):
                shutil.rmtree(folder, ignore_errors=True)
            return None
    if result.details.get("retry"):
        _patiently(lambda: study.again(begun), progress.notice)
    front = _patiently(study.front, progress.notice)
    progress.trial_ends(result, front)
    recorder.record(result, folder, front)
    return result


def _gate(
    study: DeviceStudy,
    begun: Begun,
    bench: Bench,
    front: ParetoFront | None,
    file: StudyFile,
    latest: Sequence[TrialResult],
) -> Gate:
    """The rules for one trial; a storage that is away for a moment stops nothing.

    Args:
        latest: finished trials, to go by until the storage says otherwise.
    """
    if front is None or not file.stopping.enabled:
        return OpenGate()

    def results() -> Sequence[TrialResult]:
        nonlocal latest
        with contextlib.suppress(StorageAwayError):
            latest = study.results()
        return latest

    def claim(way: str) -> int | None:
        with contextlib.suppress(StorageAwayError):
            return study.claim_plan(begun, way)
        return None

    limits = file.limits_of(study.device)
    return FrontGate(
        front.baseline, results, bench.profile, limits, file.stopping, claim, begun.params.recovery
    )


def _leave_record(result: TrialResult, folder: Path, trace: str) -> None:
    # The disk may be what failed; the storage gets the result in any case.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(trace, encoding="utf-8")
        if result.trial > 0:
            write_json(folder / "result.json", result.to_json())


def _patiently(call: Callable[[], T], notice: Callable[[str], None]) -> T:
    """Call again while the storage is away, and say so once.

    Raises:
        StorageAwayError: it was away for too long.
    """
    since: float | None = None
    while True:
        try:
            answer = call()
        except StorageAwayError as error:
            now = time.monotonic()
            if since is None:
                since = now
                notice(f"{error}; waiting for it, up to {_AWAY_LIMIT_S / 60:.0f} min")
            elif now - since > _AWAY_LIMIT_S:
                raise
            time.sleep(_AWAY_RETRY_S)
        else:
            if since is not None:
                notice("the storage answers again")
            return answer


@contextlib.contextmanager
def _first_interrupt_waits(notice: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the user has asked to stop. The second Ctrl-C raises
    KeyboardInterrupt.
    """
    asked = False

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        notice("stopping after this trial; press Ctrl-C again to stop now (the trial is redone next time)")

    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not the main thread, a notebook's worker say: leave its handling alone
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)

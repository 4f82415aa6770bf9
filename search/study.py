"""The study: Optuna asks, a trial answers, and every answer is safe before anybody is told.

One Optuna study per device, shared by any number of workers on any number of machines. Who may begin which
trial is decided in turns, one worker at a time. Knows the bench's prices and the results; not how a trial is
run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from profiles.lock import host_lock

from .conditions import changed, conditions_of_trials
from .front import FIRST_TRIALS, ParetoFront
from .heartbeat import Pulse, Watch, identity, is_gone
from .params import params_at
from .promising import most_promising
from .result import TrialParams, TrialResult
from .sampler import NumberedSampler, grid_size, make_sampler
from .screening import Candidate
from .shared_candidates import SharedCandidates
from .shown import constraints_of, shown_to_sampler
from .space import known_points, searched_space, suggest, unpruned, unpruned_point
from .storage import SearchError, StorageAwayError, answering
from .studyfile import StudyFile
from .trial import Bench
from .turns import Finished, Waiting, turns
from .workspace import Workspace, read_result

_RESULT, _WORKER, _BEAT, _PLAN, _DEATHS = "result", "worker", "beat", "plan", "deaths"
_CANDIDATE = "candidate"
_IDENTITY, _LIVE = "identity", (TrialState.COMPLETE, TrialState.PRUNED)
#: Proposals in a row that were stopped before anything was measured: after two the next one is drawn
#: blindly, or a sampler might insist; after twenty the space has nothing more to give.
_INSISTING, EXHAUSTED = 2, 20
#: Points drawn at the same moment, by all workers: each knows nothing of the others'.
_DRAWN_AT_ONCE = 2
#: Workers that died of one trial before it counts as failed: on different machines, on one machine.
_HOSTS_LOST, _LIVES_LOST = 2, 10


@dataclass(frozen=True)
class Begun:
    """A trial that this worker is to run."""

    trial: optuna.Trial
    params: TrialParams

    @property
    def number(self) -> int:
        return self.trial.number


class DeviceStudy:
    """One device's Optuna study, with the rules that keep it resumable and shareable.

    Raises (all methods): StorageAwayError where the storage does not answer.
    """

    def __init__(
        self, study: StudyFile, device: str, storage: optuna.storages.BaseStorage, workspace: Workspace
    ):
        self.file = study
        self.device = device
        self.workspace = workspace
        self._storage = storage
        self._watch = Watch()
        self._known: dict[int, TrialResult] = {}
        self._taken: int | None = None  # id of a trial that is this worker's and was not begun yet
        name, url = f"{study.name}.{device}", workspace.storage_url(study.storage)
        self._turn = turns(url, name, workspace.folder)
        self._draw_turns = [turns(url, f"{name}.draw{n}", workspace.folder) for n in range(_DRAWN_AT_ONCE)]
        with self._answering(), self._turn(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.optuna = optuna.create_study(
                study_name=name,
                storage=storage,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
            self.optuna.set_metric_names(["accuracy", "latency_ms"])
            self._id = storage.get_study_id_from_name(name)
        self._candidates: SharedCandidates | None = None
        self.seat(None)

    @classmethod
    def existing(
        cls, study: StudyFile, device: str, storage: optuna.storages.BaseStorage, workspace: Workspace
    ) -> DeviceStudy | None:
        """The device's study to look at; None where it was never begun."""
        if f"{study.name}.{device}" not in optuna.get_all_study_names(storage):
            return None
        return cls(study, device, storage, workspace)

    # -- what there is

    def results(self) -> list[TrialResult]:
        """All finished trials, by number, from any worker."""
        with self._answering():
            return self._results(self.optuna.get_trials(deepcopy=False))

    def _results(self, trials: Sequence[FrozenTrial]) -> list[TrialResult]:
        for trial in trials:
            number = trial.number
            if number not in self._known and trial.state.is_finished() and _RESULT in trial.user_attrs:
                self._known[number] = TrialResult.from_json(json.loads(trial.user_attrs[_RESULT]))
        return [self._known[number] for number in sorted(self._known)]

    def front(self) -> ParetoFront | None:
        """The front so far; None before trial 0 is complete."""
        results = self.results()
        if not any(r.trial == 0 and r.state == "complete" for r in results):
            return None
        return ParetoFront.of(results)

    def done(self) -> int:
        """Finished trials that count towards those wanted."""
        return sum(map(self._counts, self.results()))

    def _counts(self, result: TrialResult) -> bool:
        """Trial 0 comes on top; a plan that was only thought of costs nothing, a lost device comes back."""
        if result.trial == 0 or result.details.get("retry"):
            return False
        return self.file.search.sampler == "grid" or not result.was_only_planned

    def _is_exhausted(self, results: Sequence[TrialResult]) -> bool:
        latest = results[-EXHAUSTED:]
        planned = len(latest) == EXHAUSTED and all(r.was_only_planned for r in latest)
        return planned and self.file.search.sampler != "grid"  # the grid ends by itself

    # -- identity

    def claim(self, bench: Bench) -> None:
        """Make sure that new results compare with those that are there.

        Raises:
            SearchError: the study was begun with another model, other data, other training, other settings of
                the device or on another machine.
        """
        conditions = conditions_of_trials(self.file, bench)
        with self._answering(), self._turn():
            known = self.optuna.user_attrs.get(_IDENTITY)
            if known is None:
                self.optuna.set_user_attr(_IDENTITY, conditions)
                return
        what = changed(known, conditions)
        if what:
            raise SearchError(
                f"study {self.file.name} on {self.device} was begun under other conditions ({what}), and "
                "its numbers would not compare; give the study another name, or another --dir"
            )

    @property
    def conditions(self) -> Mapping[str, Any]:
        """What the study was begun under, see `claim`; empty before that."""
        with self._answering():
            known: Mapping[str, Any] = self.optuna.user_attrs.get(_IDENTITY) or {}
        return known

    # -- asking

    def seat(self, candidates: Callable[[], Sequence[Candidate]] | None) -> None:
        """Seat the sampler.

        Args:
            candidates: screens, for the trials that take the most promising one; None where the sampler
                decides of all.
        """
        search, screening = self.file.search, self.file.screening
        first: list[Mapping[str, Any] | None] = []
        self._candidates = None
        if candidates is not None:
            first = [unpruned_point(search)]
            if search.sampler != "grid":
                known = known_points(search)
                chosen = screening.keep if screening.candidates else 0
                at_once = FIRST_TRIALS if chosen else len(known)
                first += [*known[:at_once], *[None] * chosen, *known[at_once:]]
            url = self.workspace.storage_url(self.file.storage)
            # Screening takes seconds, in which others may well begin and end trials.
            turn = turns(url, f"{self.optuna.study_name}.candidates", self.workspace.folder)
            self._candidates = SharedCandidates(self.file, self.device, self.optuna, turn, candidates)
        space = searched_space(search)

        def make(number: int) -> optuna.samplers.BaseSampler:
            earlier = [r for r in self.results() if r.trial < number]
            insisting = len(earlier) >= _INSISTING and all(r.was_only_planned for r in earlier[-_INSISTING:])
            name = "random" if insisting and search.sampler != "grid" else search.sampler
            return make_sampler(name, space, seed=self.file.seed, trial=number)

        self.optuna.sampler = NumberedSampler(make, first, self._promising, self._turn_to_draw)

    @contextmanager
    def _turn_to_draw(self, trial: FrozenTrial) -> Iterator[None]:
        """While a sampler thinks: nothing is measured on this machine, and few others draw a point."""
        # The machine first: waiting for it may take minutes, in which nobody should hold the turn.
        with host_lock("suggestion"), self._draw_turns[trial.number % _DRAWN_AT_ONCE]():
            yield

    def _promising(self, trial: FrozenTrial) -> Mapping[str, Any] | None:
        """The point of the screened candidate that a trial tries; None where there is none worth it."""
        if self._candidates is None:
            return None
        with self._answering():
            candidates = self._candidates.get()
            with self._turn():  # or two workers would choose the same
                taken = [t for t in self.optuna.get_trials(deepcopy=False) if _CANDIDATE in t.user_attrs]
                own = next((t.user_attrs[_CANDIDATE] for t in taken if t.number == trial.number), None)
                found = next((c for c in candidates if c.way == own), None)  # a trial that is redone
                if found is None:
                    # One that failed would fail again.
                    over = {t.user_attrs[_CANDIDATE] for t in taken if t.state.is_finished()}
                    begun = {t.user_attrs[_CANDIDATE] for t in taken} - over
                    left = [c for c in candidates if c.way not in over]
                    limits = self.file.limits_of(self.device)
                    found = most_promising(left, self.results(), begun, limits)
                if found is not None:
                    self._storage.set_trial_user_attr(trial._trial_id, _CANDIDATE, found.way)
        return None if found is None else found.point

    def next_trial(self, wanted: int, auto_round_to: int) -> Begun | Waiting | Finished:
        """What this worker is to do: redo a trial whose worker died, begin a new one, wait, or stop.

        Args:
            wanted: trials besides trial 0; no worker begins more, however many there are.
        """
        with self._answering():
            with self._turn():
                taken = self._take(wanted)
            if not isinstance(taken, int):
                return taken
            self._taken = taken
            # A sampler may think for a while, and screening waits until nothing is measured here.
            with Pulse(lambda count: self._storage.set_trial_user_attr(taken, _BEAT, count)):
                trial = optuna.Trial(self.optuna, taken)
                params = suggest(trial, self.file.search, auto_round_to)
        self._taken = None
        if trial.number == 0:
            params = unpruned(params)
        return Begun(trial, params)

    def _take(self, wanted: int) -> int | Waiting | Finished:
        """The id of a trial that is now this worker's."""
        if self._taken is not None:  # and not begun: the storage went away in between
            frozen, self._taken = self._storage.get_trial(self._taken), None
            if not frozen.state.is_finished() and frozen.user_attrs.get(_WORKER) == identity():
                return int(frozen._trial_id)
        for frozen in self._abandoned():
            result = self._measured(frozen) or self._bury(frozen)
            if result is None:
                return self._sign(frozen._trial_id)
            self._finish(self._reopened(frozen), result)
        trials = self.optuna.get_trials(deepcopy=False)
        results = self._results(trials)
        if not trials:
            return self._create()
        running = [t for t in trials if t.state == TrialState.RUNNING]
        first = next((t for t in trials if t.number == 0), None)
        if first in running:
            return Waiting(f"the unpruned model, which {_host(first)} measures")
        if results and results[0].trial == 0 and results[0].state != "complete":
            raise SearchError(
                f"the unpruned model failed on {self.device} ({results[0].reason}), and without it there is "
                "nothing to compare with; give the study another name, or another --dir"
            )
        if self.file.search.sampler == "grid":
            wanted = min(wanted, grid_size(searched_space(self.file.search)))
        left = wanted - sum(map(self._counts, results))
        if left <= 0:
            return Finished()
        if left <= len(running):
            hosts = ", ".join(sorted({_host(t) for t in running}))
            return Waiting(f"{len(running)} trial{'s' * (len(running) > 1)} in flight on {hosts}")
        if self._is_exhausted(results):
            return Finished(
                f"the last {EXHAUSTED} proposals were all stopped before training, the last one because: "
                f"{results[-1].reason}; widen search or limits to go on"
            )
        for frozen in (t for t in trials if t.state == TrialState.WAITING):
            if self._storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING):
                return self._sign(frozen._trial_id)
        return self._create()

    def _create(self) -> int:
        # Signed as it is made: killed in between, nobody would know for a while that its worker is gone.
        signed = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={_WORKER: identity()})
        return self._storage.create_new_trial(self._id, template_trial=signed)

    def _sign(self, trial_id: int) -> int:
        self._storage.set_trial_user_attr(trial_id, _WORKER, identity())
        return trial_id

    # -- trials whose worker died

    def collect(self) -> None:
        """Tell the trials that had measured everything before their worker died; nothing is run again."""
        with self._answering(), self._turn():
            for frozen in self._abandoned():
                result = self._measured(frozen)
                if result is not None:
                    self._finish(self._reopened(frozen), result)

    def _reopened(self, frozen: FrozenTrial) -> optuna.Trial:
        """A trial to be told, not begun: no sampler has to make up its mind, which may take a while."""
        seated, self.optuna.sampler = self.optuna.sampler, optuna.samplers.RandomSampler()
        try:
            return optuna.Trial(self.optuna, frozen._trial_id)
        finally:
            self.optuna.sampler = seated

    def _measured(self, frozen: FrozenTrial) -> TrialResult | None:
        """What an abandoned trial had measured: told but not finished, or left in the folder here."""
        if _RESULT in frozen.user_attrs:
            return TrialResult.from_json(json.loads(frozen.user_attrs[_RESULT]))
        return read_result(self.workspace.trial(self.device, frozen.number) / "result.json")

    def _bury(self, frozen: FrozenTrial) -> TrialResult | None:
        """Count a worker's death; a result where the trial seems to be what they die of."""
        deaths = [*frozen.user_attrs.get(_DEATHS, ()), _host(frozen)]
        self._storage.set_trial_user_attr(frozen._trial_id, _DEATHS, deaths)
        if frozen.number == 0 or (len(set(deaths)) < _HOSTS_LOST and len(deaths) < _LIVES_LOST):
            return None
        reason = f"its worker died {len(deaths)} times, on {', '.join(dict.fromkeys(deaths))}; out of memory?"
        asked = params_at(self.file.search, frozen.params, 1)
        return TrialResult.failed(frozen.number, self.device, "", asked, reason)

    def _abandoned(self) -> list[FrozenTrial]:
        trials = self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in trials if self._is_dead(trial)]

    def _is_dead(self, frozen: FrozenTrial) -> bool:
        worker = frozen.user_attrs.get(_WORKER)
        if worker is not None and (not worker or is_gone(worker)):  # {}: given up on purpose
            return True
        return self._watch.is_silent(frozen.number, (worker, frozen.user_attrs.get(_BEAT)))

    # -- while a trial runs

    def beat(self, begun: Begun, count: int) -> None:
        """Show that the trial's worker lives."""
        self._storage.set_trial_user_attr(begun.trial._trial_id, _BEAT, count)

    def claim_plan(self, begun: Begun, way: str) -> int | None:
        """Take a plan with its recovery for a trial, or the number of the trial that has these: one that
        measured them or is about to.

        Args:
            way: see `result.way_of`.
        """
        with self._answering(), self._turn():
            trials = self.optuna.get_trials(deepcopy=False, states=(*_LIVE, TrialState.RUNNING))
            same = [t for t in trials if t.user_attrs.get(_PLAN) == way]
            others = [t for t in same if t.number != begun.number]
            if others:
                complete = [t.number for t in others if t.user_attrs.get("state") == "complete"]
                return min(complete or [t.number for t in others])
            self._storage.set_trial_user_attr(begun.trial._trial_id, _PLAN, way)
            return None

    def give_up(self, begun: Begun) -> None:
        """Leave a trial to be redone under its own number by whoever comes next."""
        with self._answering(), self._turn():
            if self._storage.get_trial(begun.trial._trial_id).user_attrs.get(_WORKER) == identity():
                self._storage.set_trial_user_attr(begun.trial._trial_id, _WORKER, {})

    def is_redone_here(self, begun: Begun) -> bool:
        """Whether a trial was taken over by a worker of this machine, which may use the same folder."""
        with self._answering():
            worker = self._storage.get_trial(begun.trial._trial_id).user_attrs.get(_WORKER) or {}
            return bool(worker.get("host") == identity()["host"])

    def again(self, begun: Begun) -> None:
        """Queue a failed trial's parameters for another trial."""
        with self._answering():
            self.optuna.enqueue_trial(dict(begun.trial.params))

    # -- telling

    def tell(self, begun: Begun, result: TrialResult) -> bool:
        """Finish a trial in the storage. The result goes in first: a finished trial always has one.

        Returns:
            False where the trial is no longer this worker's: it was silent for so long that another one took
            the trial over, whose result counts.
        """
        with self._answering(), self._turn():
            frozen = self._storage.get_trial(begun.trial._trial_id)
            if frozen.user_attrs.get(_WORKER) != identity():
                return False
            if frozen.state.is_finished():  # this very result where the storage went away after it had it
                return bool(frozen.user_attrs.get(_RESULT) == json.dumps(result.to_json()))
            self._finish(begun.trial, result)
            return True

    def _finish(self, trial: optuna.Trial, result: TrialResult) -> None:
        """Optuna's state says what its samplers may learn from, ours is in the attribute `state`."""
        trial.set_user_attr(_RESULT, json.dumps(result.to_json()))
        for key, value in (("state", result.state), ("reason", result.reason)):
            trial.set_user_attr(key, value)
        if result.state != "failed":  # a failed plan may be tried again
            trial.set_user_attr(_PLAN, result.way)
        shown = shown_to_sampler(result, self.results())
        if shown is None:
            self.optuna.tell(trial, state=TrialState.FAIL if result.state == "failed" else TrialState.PRUNED)
            return
        complete = self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        demanded = next((t.constraints for t in complete), None)
        limits = self.file.limits_of(self.device)
        for name, excess in constraints_of(shown, limits, demanded).items():
            if name not in trial.constraints:  # set before its first worker died
                trial.set_constraint(name, excess)
        assert shown.accuracy is not None
        assert shown.latency_ms is not None
        self.optuna.tell(trial, [shown.accuracy, shown.latency_ms])

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn what a storage that is away raises into one error."""
        try:
            with answering():
                yield
        except StorageAwayError:
            self._watch = Watch()  # nobody could show a sign of life meanwhile
            raise


def _host(frozen: FrozenTrial) -> str:
    return str((frozen.user_attrs.get(_WORKER) or {}).get("host", "another worker"))

"""The screened candidates of a study, made by one of its workers and kept in the storage for all of them.

Making them keeps a core busy for seconds, so it waits until nothing is measured on this machine. Knows no
trials.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import optuna

from profiles.lock import host_lock

from .screening import Candidate
from .studyfile import StudyFile
from .turns import Turn


class SharedCandidates:
    """Candidates of one device's study, asked for when a trial first needs them.

    Args:
        turn: taken while they are made; not the one in which trials begin and end.
        make: makes them.
    """

    def __init__(
        self,
        file: StudyFile,
        device: str,
        study: optuna.Study,
        turn: Turn,
        make: Callable[[], Sequence[Candidate]],
    ):
        self._study = study
        self._turn = turn
        self._make = make
        self._known: Sequence[Candidate] | None = None
        # Another limit or another space may want other candidates.
        asked = [section.model_dump(mode="json") for section in (file.search, file.limits_of(device))]
        text = json.dumps([asked, file.screening.candidates, file.seed], sort_keys=True)
        self._key = f"candidates-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def get(self) -> Sequence[Candidate]:
        """The candidates; what the storage raises where it is away passes through."""
        if self._known is None and self._key not in self._study.user_attrs:
            # The machine first: waiting for it may take minutes, in which nobody should hold the turn.
            with host_lock("screening"), self._turn():
                if self._key not in self._study.user_attrs:
                    self._study.set_user_attr(self._key, [c.to_json() for c in self._make()])
        if self._known is None:
            self._known = [Candidate.from_json(data) for data in self._study.user_attrs[self._key]]
        return self._known

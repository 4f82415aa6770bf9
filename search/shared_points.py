"""The screened points of a study, made by one of its workers and kept in the storage for all of them.

Making them keeps a core busy for seconds, so it waits until nothing is measured on this machine. Knows no
trials.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna

from profiles.lock import host_lock

from .studyfile import StudyFile
from .turns import Turn

#: Values of searched keys.
Point = Mapping[str, Any]


class SharedPoints:
    """Points of one device's study, asked for when a trial first needs them.

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
        make: Callable[[], Sequence[Point]],
    ):
        self._study = study
        self._turn = turn
        self._make = make
        self._known: Sequence[Point] | None = None
        # Another number of trials, another limit or another space may want other points.
        asked = [
            section.model_dump(mode="json")
            for section in (file.search, file.screening, file.limits_of(device))
        ]
        text = json.dumps([asked, file.seed, file.trials], sort_keys=True)
        self._key = f"screened-points-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def get(self) -> Sequence[Point]:
        """The points; what the storage raises where it is away passes through."""
        if self._known is None:
            self._known = self._study.user_attrs.get(self._key)
        if self._known is None:
            # The machine first: waiting for it may take minutes, in which nobody should hold the turn.
            with host_lock("screening"), self._turn():
                if self._key not in self._study.user_attrs:
                    self._study.set_user_attr(self._key, self._make())
                self._known = self._study.user_attrs[self._key]
        assert self._known is not None
        return self._known

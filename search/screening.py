"""Screening: thousands of candidates planned and judged without a model, and those worth starting with.

A plan costs milliseconds: its latency comes from the device's latency model, its accuracy from what it keeps
(`search.proxy`). Neither is a measurement; what is kept here is only tried first. Knows nothing of trials
that ran.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .params import params_at
from .plan import PruningPlan
from .planning import make_plan, rerank
from .prediction import predict_ms
from .proxy import Proxy, promise
from .result import TrialParams, way_of
from .sections import Limits
from .space import scattered_points
from .studyfile import StudyFile
from .trial import Bench


@dataclass(frozen=True)
class Candidate:
    """A point of the search space with what is expected of it.

    Attributes:
        point: every searched key's value.
        way: names its plan and its recovery, see `result.way_of`.
        recovery: how it would be trained back.
        predicted_ms: by the device's latency model.
        proxy: what its plan promises.
    """

    point: Mapping[str, Any]
    way: str
    recovery: str
    predicted_ms: float
    proxy: Proxy

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        return cls(**{**data, "proxy": Proxy.from_json(data["proxy"])})


def screened(study: StudyFile, device: str, bench: Bench) -> list[Candidate]:
    """The candidates of a study that are worth trying; none where nothing is screened.

    Args:
        bench: with the unpruned model's measured latency, which latency limits are about.
    """
    scattered = scattered_points(study.search, study.screening.candidates, study.seed)
    multiple = bench.profile.channel_multiple
    asked = [(point, params_at(study.search, point, multiple)) for point in scattered]
    return screen(bench, asked, study.limits_of(device))


def screen(
    bench: Bench,
    asked: Sequence[tuple[Mapping[str, Any], TrialParams]],
    limits: Limits,
    *,
    limit_s: float = 10.0,
) -> list[Candidate]:
    """The candidates that no other one beats in both expectations, from the most to the least pruned.

    Plans that come up twice count once; what the latency limit rules out by more than the model's own error,
    or is expected no faster than the unpruned model, is left out.

    Args:
        asked: points of the search space, and what a trial would be asked there.
        limit_s: no further candidate is planned after this; a very large network plans slowly.
    """
    base_ms = bench.profile.predict_ms({})
    slack = 1.0 - min(1.0, bench.profile.model.error or 0.0)
    scale = 1.0 if bench.baseline_ms is None else bench.baseline_ms / base_ms
    found: dict[str, Candidate] = {}
    for (point, params), plan in _planned(bench, asked, limit_s):
        proxy, predicted = promise(plan, bench), predict_ms(plan, bench.profile)
        if proxy is None or plan.is_empty or predicted >= base_ms:
            continue
        if limits.latency_ms is not None and predicted * scale * slack > limits.latency_ms:
            continue
        way = way_of(plan.digest, params.recovery)
        found.setdefault(way, Candidate(point, way, params.recovery, predicted, proxy))
    front: list[Candidate] = []
    for candidate in sorted(found.values(), key=lambda c: (c.predicted_ms, -c.proxy.kept)):
        if not front or candidate.proxy.kept > front[-1].proxy.kept:
            front.append(candidate)
    return front


def _planned(
    bench: Bench, asked: Iterable[tuple[Mapping[str, Any], TrialParams]], limit_s: float
) -> Iterable[tuple[tuple[Mapping[str, Any], TrialParams], PruningPlan]]:
    end = time.monotonic() + limit_s
    for one in asked:
        if time.monotonic() > end:
            return
        # One shot stands for a schedule of several steps, each of which would need scores of its own.
        at_once = replace(one[1], steps=1)
        yield one, make_plan(at_once, rerank(at_once, bench), bench)

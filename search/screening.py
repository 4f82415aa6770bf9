"""Screening: thousands of candidates planned and judged without a model, and the few worth starting with.

A plan costs milliseconds: its latency comes from the device's latency model, its accuracy from what it keeps
(`search.proxy`). Neither is a measurement; what is kept here is only tried first. Knows nothing of trials
that ran.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .params import params_at
from .plan import PruningPlan
from .planning import make_plan, rerank
from .prediction import predict_ms
from .proxy import promise
from .result import TrialParams
from .sections import Limits
from .space import known_points, scattered_points
from .studyfile import StudyFile
from .trial import Bench


@dataclass(frozen=True)
class Candidate:
    """A point of the search space with what is expected of it.

    Attributes:
        position: its place in what was screened.
        predicted_ms: by the device's latency model.
        kept: see `search.proxy`.
    """

    position: int
    predicted_ms: float
    kept: float


def screened_points(study: StudyFile, device: str, bench: Bench) -> list[dict[str, Any]]:
    """The best of many candidates by what their plans promise, from the most to the least pruned, as points
    of the searched space: what a study tries after the unpruned model and the known points, before its
    sampler has something to go on. A grid has none: it is the whole list by itself.
    """
    search, settings = study.search, study.screening
    left = study.trials - 1 - len(known_points(search))
    keep = 0 if search.sampler == "grid" else min(settings.keep, max(0, left))
    scattered = scattered_points(search, settings.candidates, study.seed) if keep else []
    params = [params_at(search, point, bench.profile.channel_multiple) for point in scattered]
    found = screen(bench, params, study.limits_of(device), keep)
    return [scattered[candidate.position] for candidate in found]


def screen(
    bench: Bench, params: Sequence[TrialParams], limits: Limits, keep: int, *, limit_s: float = 10.0
) -> list[Candidate]:
    """The `keep` candidates that stand for the best trade-offs expected, from the most to the least pruned.

    Plans that come up twice count once; what the latency limit rules out by more than the model's own error,
    or is expected no faster than the unpruned model, is left out. Of the rest those are taken that no other
    one beats in both expectations, spread evenly over the latency they cover.

    Args:
        limit_s: no further candidate is planned after this; a very large network plans slowly.
    """
    base_ms = bench.profile.predict_ms({})
    slack = 1.0 - min(1.0, bench.profile.model.error or 0.0)
    scale = 1.0 if bench.baseline_ms is None else bench.baseline_ms / base_ms
    found: dict[tuple[str, str], Candidate] = {}
    for position, plan in _plans(bench, params, limit_s):
        proxy, predicted = promise(plan, bench), predict_ms(plan, bench.profile)
        if proxy is None or plan.is_empty or predicted >= base_ms:
            continue
        if limits.latency_ms is not None and predicted * scale * slack > limits.latency_ms:
            continue
        way = (plan.digest, params[position].recovery)
        found.setdefault(way, Candidate(position, predicted, proxy.kept))
    front: list[Candidate] = []
    for candidate in sorted(found.values(), key=lambda c: (c.predicted_ms, -c.kept, c.position)):
        if not front or candidate.kept > front[-1].kept:
            front.append(candidate)
    return _spread(front, keep)


def _plans(bench: Bench, params: Iterable[TrialParams], limit_s: float) -> Iterable[tuple[int, PruningPlan]]:
    end = time.monotonic() + limit_s
    for position, asked in enumerate(params):
        if time.monotonic() > end:
            return
        # One shot stands for a schedule of several steps, each of which would need scores of its own.
        at_once = replace(asked, steps=1)
        yield position, make_plan(at_once, rerank(at_once, bench), bench)


def _spread(front: Sequence[Candidate], keep: int) -> list[Candidate]:
    """Those nearest to `keep` latencies spaced evenly between the front's ends, the ends left out."""
    if len(front) <= keep:
        return list(front)
    low, high = front[0].predicted_ms, front[-1].predicted_ms
    chosen: list[Candidate] = []
    for i in range(keep):
        wanted = low + (high - low) * (i + 0.5) / keep
        left = [c for c in front if c not in chosen]
        chosen.append(min(left, key=lambda c: (abs(c.predicted_ms - wanted), c.position)))
    return sorted(chosen, key=lambda c: c.predicted_ms)

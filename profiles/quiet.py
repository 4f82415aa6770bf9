"""What samples say of a device that nothing disturbs.

On a shared machine a neighbour slows every inference by tens of percent, for a second or for minutes, and
wide layers by another share than narrow ones: even the ratio of two models is another while it lasts (YOLOv8n
and half of its channels in ONNX Runtime: 0.36 undisturbed, 0.385 beside a busy neighbour). What is wanted of
a device is its own speed, so the fastest tenth of the samples stands for a model, and processes that never
had a quiet moment do not count where enough others had.

Statistics of samples already taken, as `timing.py`; knows nothing of how they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: Quantile of samples that stands for an undisturbed inference: low enough to be met where the machine is
#: quiet a fifth of the time, high enough not to hang on a single sample.
QUANTILE = 0.10
#: The same for samples of several rounds together, most of which may have been disturbed throughout.
POOLED_QUANTILE = 0.05
#: A round counts as quiet where every model came this close to its own fastest round: processes of one file
#: differ by one or two percent, a busy neighbour costs ten or more.
WITHIN = 0.05
MIN_ROUNDS = 4
#: The interval is looked at after every round, which costs coverage: a 98% quantile keeps the result above
#: 95%.
CONFIDENCE = 0.98
#: Standard deviation that the ratio of two processes has at least: four rounds may agree by chance, and of
#: 34 comparisons of one file beside a busy core two did so 0.8% off.
LEAST_SPREAD = 0.004
#: Half-width below which no interval is believed, however many rounds there were.
FLOOR = 0.005
RESAMPLES = 200


def quiet_ms(samples_ms: ArrayLike, quantile: float = QUANTILE) -> float:
    """Latency of an undisturbed inference, from samples `(n,)` of which some were disturbed."""
    return float(np.quantile(np.asarray(samples_ms, dtype=float), quantile))


@dataclass(frozen=True)
class QuietRatio:
    """Latency of one model over another's on an undisturbed device.

    Attributes:
        log: logarithm of the ratio.
        half_width: of its 95% interval; infinite for a single round.
        quiet_rounds: rounds in which both models were undisturbed.
        counted: rounds that the ratio comes from: the quiet ones, or all where these are too few.
    """

    log: float
    half_width: float
    quiet_rounds: int
    counted: int


def quiet_ratio(rounds: Sequence[tuple[ArrayLike, ArrayLike]]) -> QuietRatio:
    """The ratio from rounds, each of a fresh process per model.

    Processes differ among themselves by more than inferences do (memory layout, placement), so rounds are the
    independent observations. Where four were quiet, each of them gives one ratio, and the interval is
    Student's t over those. On a machine that was busier, the samples of all rounds are one heap for each
    model, whose fastest are compared, and the interval comes from drawing the rounds anew.

    Args:
        rounds: per round the samples of the candidate and of the baseline, in ms.

    Returns:
        The same for the same samples: the drawing is seeded.
    """
    levels = np.log([[quiet_ms(samples) for samples in pair] for pair in rounds])
    quiet = (levels - levels.min(axis=0) <= WITHIN).all(axis=1)
    count = int(quiet.sum())
    if len(rounds) < MIN_ROUNDS or count >= MIN_ROUNDS:
        kept = quiet if count >= MIN_ROUNDS else np.ones(len(rounds), dtype=bool)
        logs = (levels[:, 0] - levels[:, 1])[kept]
        spread = max(LEAST_SPREAD, float(np.std(logs, ddof=1))) if len(logs) > 1 else math.inf
        error = spread / math.sqrt(len(logs))
        return QuietRatio(float(logs.mean()), _half_width(error, len(logs)), count, len(logs))

    def pooled(picked: Sequence[int]) -> float:
        both = (np.concatenate([rounds[i][k] for i in picked]) for k in (0, 1))
        candidate_ms, baseline_ms = (quiet_ms(samples, POOLED_QUANTILE) for samples in both)
        return math.log(candidate_ms / baseline_ms)

    picks = np.random.default_rng(0).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    error = float(np.std([pooled(row) for row in picks.tolist()], ddof=1))
    return QuietRatio(pooled(range(len(rounds))), _half_width(error, len(rounds)), count, len(rounds))


def _half_width(error: float, observations: int) -> float:
    from scipy import stats  # most of a second that commands which measure nothing need not wait

    if not math.isfinite(error):
        return math.inf
    return max(FLOOR, float(stats.t.ppf((1 + CONFIDENCE) / 2, observations - 1)) * error)

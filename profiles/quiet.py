"""What samples say of a device that nothing disturbs.

On a shared machine a neighbour slows every inference by tens of percent, for a tenth of a second or for
minutes, and a small network by another share than a large one: even the ratio of two models is another while
it lasts (two pruned YOLOv8n in ONNX Runtime take 0.47 and 0.20 of the unpruned one's time undisturbed, 0.49
and 0.22 beside a neighbour). What is wanted of a device is its own speed. Two things tell it. The fastest
tenth of the samples is undisturbed, but such moments may be few, and it hangs on them. Blocks of two models
one right after the other meet the same machine, so their ratio is known several times better, but it is that
of the machine as it was; how far off this can be grows with the disturbance and with how different the models
are.

Statistics of samples already taken, as `timing.py`; knows nothing of how they were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
#: Samples of a model and of the baseline beside it in one round, `(turns, runs)` each.
Pair = tuple[ArrayLike, ArrayLike]

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
#: Errors of slopes below which none is believed: the next neighbour disturbs in another way.
LEAST_SKEW_ERROR = 0.1
#: Models of one round share the baseline's quiet moments, so their errors are much alike: the variance of
#: what they say together is larger by this than if they were not (two to six recorded passes, against all).
SHARED_BASELINE = 2.5
#: Fewer models than this say nothing of a skew.
MIN_MODELS = 4


@dataclass(frozen=True)
class Skew:
    """How a disturbance moves the ratio of two models, as far as it is known.

    The logarithm of the undisturbed ratio is that of disturbed turns times `1 + slope * disturbance`:
    positive where a small model suffers more than a large one.

    Attributes:
        slope: differs between runtimes and networks. Seen were 0.2 to 0.3 with YOLOv8n in ONNX Runtime and
            PyTorch, none in ncnn, 0.5 with ResNet-56 in ncnn, whose pruned versions fit a cache.
        error: its standard error.
    """

    slope: float = 0.2
    error: float = 0.4

    def undisturbed(self, log: float, disturbed: float) -> tuple[float, float]:
        """The undisturbed log ratio from a disturbed one, and its error for want of a better slope."""
        return log * (1 + self.slope * disturbed), abs(log) * self.error * disturbed

    def updated(self, turns: Floats, quiet: Floats, disturbances: Floats) -> Skew:
        """With what several models say, `(n,)` each: log ratios by turns, by quiet moments, and how much was
        disturbed.
        """
        lever = turns * disturbances
        power = float(lever @ lever)
        if len(turns) < MIN_MODELS or not power:
            return self
        found = float((quiet - turns) @ lever) / power
        variance = SHARED_BASELINE * float(np.mean((quiet - turns - found * lever) ** 2)) / power
        weight = self.error**2 / (self.error**2 + variance)
        error = self.error * math.sqrt(1 - weight)
        return Skew(self.slope + weight * (found - self.slope), max(error, LEAST_SKEW_ERROR))


#: Where nothing has been measured yet.
UNKNOWN_SKEW = Skew()


def quiet_ms(samples_ms: ArrayLike, quantile: float = QUANTILE) -> float:
    """Latency of an undisturbed inference, from samples of any shape of which some were disturbed."""
    return float(np.quantile(np.asarray(samples_ms, dtype=float), quantile))


def pooled_ms(rounds: Sequence[ArrayLike], quantile: float = QUANTILE) -> float:
    """The same from the samples of several rounds, which may differ in their numbers of runs."""
    return quiet_ms(np.concatenate([np.ravel(samples) for samples in rounds]), quantile)


def turns_log(candidate_ms: ArrayLike, baseline_ms: ArrayLike) -> float:
    """Logarithm of the ratio of two models, from their blocks of one round, `(turns, runs)` each.

    Blocks of one turn follow each other, so a drift or a neighbour meets both; the middle one of the turns'
    ratios, for a change of the machine between two blocks.
    """
    return float(np.median(_block_levels(candidate_ms) - _block_levels(baseline_ms)))


def disturbance(blocks_ms: Sequence[ArrayLike]) -> float:
    """How much slower than undisturbed one model was on average, as a logarithm, from blocks of all its
    rounds, `(turns, runs)` each.
    """
    levels = np.concatenate([_block_levels(blocks) for blocks in blocks_ms])
    return float(np.mean(levels) - np.quantile(levels, POOLED_QUANTILE))


def _block_levels(blocks_ms: ArrayLike) -> Floats:
    blocks = np.asarray(blocks_ms, dtype=np.float64)
    return np.array(np.log(blocks.mean(axis=1)))


@dataclass(frozen=True)
class QuietRatio:
    """Latency of one model over another's on an undisturbed device.

    Attributes:
        log: logarithm of the ratio.
        half_width: of its 95% interval; infinite for a single round.
        quiet_rounds: rounds in which both models were undisturbed.
        counted: rounds that the ratio comes from: the quiet ones, or all.
    """

    log: float
    half_width: float
    quiet_rounds: int
    counted: int


def quiet_ratio(rounds: Sequence[Pair], skew: Skew = UNKNOWN_SKEW) -> QuietRatio:
    """The ratio from rounds, each of a fresh process per model.

    Processes differ among themselves by more than inferences do (memory layout, placement), so rounds are the
    independent observations. Quiet moments and turns give an estimate each, with an interval; the narrower
    one is the result, unless quiet moments contradict the turns.

    Args:
        rounds: per round the samples of the candidate and of the baseline in ms, `(turns, runs)` each.
        skew: what is known of the device, for the turns.

    Returns:
        The same for the same samples: the drawing is seeded.
    """
    by_turns, by_quiet = _ratio_by_turns(rounds, skew), _ratio_by_quiet_moments(rounds)
    agree = abs(by_turns.log - by_quiet.log) <= by_quiet.half_width
    if agree and by_turns.half_width < by_quiet.half_width:
        return replace(by_turns, quiet_rounds=by_quiet.quiet_rounds)
    return by_quiet


@dataclass(frozen=True, eq=False)
class QuietShares:
    """Latencies of n models over the baseline's on an undisturbed device.

    Attributes:
        log: logarithms of the shares, `(n,)`.
        error: their standard error by leaving out each pass in turn; one figure for all of them, since with
            so few passes each one's own would be chance. Infinite after the first.
        skew: what the models say of the device, and what was known before.
    """

    log: Floats
    error: float
    skew: Skew


def quiet_shares(passes: Sequence[Sequence[Pair]], skew: Skew = UNKNOWN_SKEW) -> QuietShares:
    """Shares by quiet moments or by turns, whichever the passes agree about.

    Args:
        passes: per pass the n models, each with the baseline beside it.
        skew: what is known of the device.
    """
    (found, learnt), count = _shares(passes, skew), len(passes)
    if count < 2:
        return QuietShares(found[0], math.inf, learnt)
    without = [_shares([*passes[:i], *passes[i + 1 :]], skew)[0] for i in range(count)]
    errors = np.sqrt((count - 1) * np.mean(np.var(without, axis=0), axis=-1))
    best = int(np.argmin(errors))
    return QuietShares(found[best], float(errors[best]), learnt)


def _shares(passes: Sequence[Sequence[Pair]], skew: Skew) -> tuple[Floats, Skew]:
    """Logarithms of the shares by quiet moments and by turns, `(2, n)`, and the skew of the latter.

    Quiet moments are those of all passes together: one pass may have had none for some of the models. Turns
    tell the models from each other; what a neighbour makes of them is common to them, so the few quiet
    moments of all of them together tell it.
    """
    of_each = [list(zip(*of, strict=True)) for of in zip(*passes, strict=True)]  # of both their rounds
    log_ms = np.log([[pooled_ms(blocks) for blocks in both] for both in of_each])
    quiet = log_ms[:, 0] - log_ms[:, 1]
    turns = np.array([np.mean([turns_log(*pair) for pair in zip(*both, strict=True)]) for both in of_each])
    disturbances = np.array([np.mean([disturbance(blocks) for blocks in both]) for both in of_each])
    learnt = skew.updated(turns, quiet, disturbances)
    return np.array([quiet, turns * (1 + learnt.slope * disturbances)]), learnt


def _ratio_by_turns(rounds: Sequence[Pair], skew: Skew) -> QuietRatio:
    logs = np.array([turns_log(candidate, baseline) for candidate, baseline in rounds])
    disturbed = float(np.mean([disturbance(blocks) for blocks in zip(*rounds, strict=True)]))
    log, error = skew.undisturbed(float(logs.mean()), disturbed)
    return QuietRatio(log, math.hypot(_interval(logs), 2 * error), 0, len(rounds))


def _ratio_by_quiet_moments(rounds: Sequence[Pair]) -> QuietRatio:
    """From the quiet rounds where four were quiet; else the samples of all rounds are one heap for each
    model, whose fastest are compared, and the interval comes from drawing the rounds anew.
    """
    levels = np.log([[quiet_ms(samples) for samples in pair] for pair in rounds])
    quiet = (levels - levels.min(axis=0) <= WITHIN).all(axis=1)
    count = int(quiet.sum())
    if len(rounds) < MIN_ROUNDS or count >= MIN_ROUNDS:
        kept = quiet if count >= MIN_ROUNDS else np.ones(len(rounds), dtype=bool)
        logs = (levels[:, 0] - levels[:, 1])[kept]
        return QuietRatio(float(logs.mean()), _interval(logs), count, len(logs))

    def pooled(picked: Sequence[int]) -> float:
        candidate_ms, baseline_ms = (
            pooled_ms([rounds[i][k] for i in picked], POOLED_QUANTILE) for k in (0, 1)
        )
        return math.log(candidate_ms / baseline_ms)

    picks = np.random.default_rng(0).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    error = float(np.std([pooled(row) for row in picks.tolist()], ddof=1))
    return QuietRatio(pooled(range(len(rounds))), _half_width(error, len(rounds)), count, len(rounds))


def _interval(logs: Floats) -> float:
    """Half-width of the interval of the mean of independent observations."""
    spread = max(LEAST_SPREAD, float(np.std(logs, ddof=1))) if len(logs) > 1 else math.inf
    return _half_width(spread / math.sqrt(len(logs)), len(logs))


def _half_width(error: float, observations: int) -> float:
    from scipy import stats  # most of a second that commands which measure nothing need not wait

    if not math.isfinite(error):
        return math.inf
    return max(FLOOR, float(stats.t.ppf((1 + CONFIDENCE) / 2, observations - 1)) * error)

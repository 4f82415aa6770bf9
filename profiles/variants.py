"""Randomly pruned versions of a model, measured on a device, and the channel multiple they show.

Decides which versions a profile needs and how often each is measured; knows neither how a version is made
(the caller's `export` does that) nor how a latency model is fitted to them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .artifact import Artifact
from .device import Device
from .quiet import UNKNOWN_SKEW, WITHIN, Floats, Skew, quiet_ms, quiet_shares

if TYPE_CHECKING:
    from .latency_profile import LayerProfile

#: Multiples that runtimes are known to step at: 16 and 8 are vector widths, 4 is a common packing.
MULTIPLES = (1, 4, 8, 16)
#: Each multiple is tried at these shares, so that one lucky set of widths does not decide.
RATIOS = (0.35, 0.6)
#: What most runtimes like, taken where it is not or cannot be measured.
LIKELY_MULTIPLE = 8
#: Error of a comparison of multiples above which it says nothing.
TOO_NOISY = 0.05
#: A coarser multiple must be faster by this share: coarser widths cost accuracy.
WORTH = 0.02
MIN_PASSES, MAX_PASSES = 2, 6
#: Artifacts measured in one round beside the baseline: their processes are in memory together.
TOGETHER = 4
#: Standard error of a variant's time above which another pass is made.
PASS_ERROR = 0.01
#: The same above which passes go on beyond the time limit, up to so many times the limit: a whole study rests
#: on what they say.
POOR_ERROR, MOST_TIMES = 0.03, 3


@dataclass(frozen=True)
class Variant:
    """A version of the model that a profile wants to measure.

    Attributes:
        ratio: share of the prunable channels to remove, at random over all groups; 0 is the unpruned model.
        round_to: kept widths are multiples of this.
        seed: of the random choice; variants that differ in `round_to` alone are the same choice, rounded.
        spread: how much the groups' shares differ: the standard deviation of a shift of a group's scores,
            which are uniform in [0, 1]. 0 prunes all alike; at 0.5 some groups go almost whole and some stay.
        costly: channels are drawn with a probability proportional to their layers' work instead, as a search
            does that weighs latency: the big layers become narrow and the small ones stay.
    """

    ratio: float = 0.0
    round_to: int = 1
    seed: int = 0
    spread: float = 0.25
    costly: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio}")
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}")
        if self.spread < 0:
            raise ValueError(f"spread must not be negative, got {self.spread}")


@dataclass(frozen=True)
class MeasuredVariant:
    """What one version of a model of L layers costs.

    Attributes:
        variant: which one.
        in_channels, out_channels: its layers' widths, `(L,)`.
        layer_ms: its layers' latencies, `(L,)`.
        other: latency by kind of the operators that are no layer, in ms.
    """

    variant: Variant
    in_channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    layer_ms: tuple[float, ...]
    other: Mapping[str, float]

    def __post_init__(self) -> None:
        if not len(self.in_channels) == len(self.out_channels) == len(self.layer_ms):
            raise ValueError(
                f"one width and one latency per layer, got {len(self.in_channels)} inputs, "
                f"{len(self.out_channels)} outputs and {len(self.layer_ms)} latencies"
            )

    @classmethod
    def of(cls, variant: Variant, entries: Sequence[LayerProfile]) -> MeasuredVariant:
        """From the entries that `measure.profile_layers` returns.

        Of the undisturbed inferences, means over the middle half of each entry's times, so that no process
        decides alone; brought back to the sum of all means.
        """
        layers = [entry for entry in entries if entry.op != "other"]
        samples = np.array([entry.timing.samples_ms for entry in entries])
        whole = samples.sum(axis=0)
        quiet = np.sort(samples[:, whole <= quiet_ms(whole) * (1 + WITHIN)])
        outside = quiet.shape[1] // 4
        middle = quiet[:, outside : quiet.shape[1] - outside].mean(axis=1)
        scale = sum(entry.timing.mean_ms for entry in entries) / middle.sum()
        found = {entry.layer: float(ms * scale) for entry, ms in zip(entries, middle, strict=True)}
        return cls(
            variant,
            tuple(entry.in_channels for entry in layers),
            tuple(entry.out_channels for entry in layers),
            tuple(found[entry.layer] for entry in layers),
            {entry.layer: found[entry.layer] for entry in entries if entry.op == "other"},
        )

    @property
    def model_ms(self) -> float:
        """Latency of the whole version."""
        return float(sum(self.layer_ms) + sum(self.other.values()))


def trial_variants() -> list[Variant]:
    """The variants that show the channel multiple: each random choice at every multiple."""
    return [Variant(ratio, m, seed=1 + i) for i, ratio in enumerate(RATIOS) for m in MULTIPLES]


def further_variants(multiple: int) -> list[Variant]:
    """More of them at the device's multiple, for the fit: shallow to deep, even to uneven, costly first."""
    return [
        Variant(0.2, multiple, seed=11, spread=0.4),
        Variant(0.75, multiple, seed=12, spread=0.0),
        Variant(0.5, multiple, seed=13, spread=0.6),
        Variant(0.5, multiple, seed=14, costly=True),
        Variant(0.8, multiple, seed=15, spread=0.2),
    ]


@dataclass(frozen=True, eq=False)
class Measured:
    """Artifacts beside a baseline.

    Attributes:
        shares: latency of each as a share of the baseline's, `(n,)`.
        error: standard error of the shares' logarithm.
        skew: how a disturbance moves them, with what was known before.
        operators: per artifact what the runtime's profiler said in the first passes, for
            `measure.layer_profiles`.
    """

    shares: Floats
    error: float
    skew: Skew
    operators: tuple[Any, ...]


def measure_variants(
    device: Device,
    artifacts: Sequence[Artifact],
    baseline: Artifact,
    progress: Callable[[str], None] | None = None,
    *,
    repeats: int,
    warmup: int,
    limit_s: float = 32.0,
    skew: Skew = UNKNOWN_SKEW,
) -> Measured:
    """Latency of each artifact relative to the baseline, and its operators.

    Each pass measures every artifact in turns with the baseline, a few at a time, so that a machine that
    drifts or is slow for a while moves no share. At least two passes, more where they disagree; the first two
    also profile the operators, which differ between processes.

    Args:
        repeats, warmup: profiled inferences of each artifact in each of these, and those before them.
        limit_s: no further pass begins when it would end after this, once there are two; while they disagree
            by more than a few percent, after three times this.
        skew: what is known of the device.

    Raises: as `measure.measure_together`.
    """
    from .measure import measure_together, measuring

    passes: list[list[tuple[Floats, Floats]]] = []
    operators: list[tuple[Any, ...]] = []  # of each profiled pass
    taken_s = 0.0
    while True:
        samples: list[tuple[Floats, Floats]] = []  # of each artifact, and of the baseline beside it
        nodes: tuple[Any, ...] = ()
        # Some runtimes compile a model anew to profile it, so not in every pass.
        profiled = repeats if len(passes) < MIN_PASSES else 0
        with measuring(device):  # a wait for the machine is none of the measurement's time
            start = time.monotonic()
            for at in range(0, len(artifacts), TOGETHER):
                some = artifacts[at : at + TOGETHER]
                together = measure_together(
                    device, some, baseline, first=len(passes), profiled=profiled, warmup=warmup
                )
                *own, beside = together.samples
                samples += [(each, beside) for each in own]
                nodes += together.operators
            taken_s += time.monotonic() - start
        passes.append(samples)
        if profiled:
            operators.append(nodes)
        found = quiet_shares(passes, skew)
        error = found.error
        if progress:
            known = f" ± {error:.1%}" if error < 1 else ""
            progress(f"pass {len(passes)} over {len(artifacts)} variants{known}")
        longest_s = limit_s * (MOST_TIMES if error > POOR_ERROR else 1)
        late = taken_s * (1 + 1 / len(passes)) > longest_s
        if len(passes) >= MAX_PASSES or (len(passes) >= MIN_PASSES and (error <= PASS_ERROR or late)):
            break
    return Measured(np.exp(found.log), error, found.skew, tuple(zip(*operators, strict=True)))


def choose_multiple(
    variants: Sequence[Variant],
    relative: ArrayLike,
    work: ArrayLike,
    error: float,
    out_channels: Sequence[int],
) -> int:
    """The channel multiple at which a device does the most work per millisecond.

    Args:
        variants, relative, work: n variants, their measured latencies and what they should cost by a model
            without steps, both relative to the unpruned model. Variants of one seed are compared with each
            other.
        error: standard error of `relative`, as a share.
        out_channels: widths of the unpruned layers: a multiple above a quarter of the middle one is not
            considered, since it would leave most layers nothing to choose from.

    Returns:
        The smallest multiple that is as good as the best within 2% or the error of the comparison; what most
        runtimes like on a machine too busy to tell them apart.
    """
    log_cost = np.log(np.asarray(relative) / np.asarray(work))
    costs: dict[int, list[float]] = {}
    for variant, cost in zip(variants, log_cost, strict=True):
        costs.setdefault(variant.round_to, []).append(float(cost))
    widest = max(float(np.median(out_channels)) / 4, 1.0)
    mean = {m: float(np.mean(found)) for m, found in costs.items() if m <= widest or m == min(costs)}
    # A difference of two means, each over as many variants as there are seeds.
    noise = 1.65 * error * math.sqrt(2 / min(len(found) for found in costs.values()))
    if noise > TOO_NOISY and LIKELY_MULTIPLE in mean:
        return LIKELY_MULTIPLE
    return min(m for m, cost in mean.items() if cost <= min(mean.values()) + max(WORTH, noise))

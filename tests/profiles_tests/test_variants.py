"""The channel multiple, from costs made by hand and from real artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from profiles import latency_profile, measure, variants
from profiles.artifact import Artifact
from profiles.device import Device
from profiles.latency_profile import LatencyProfile, LayerProfile, build_profile
from profiles.measure import Together
from profiles.quiet import quiet_ms
from profiles.timing import Timing
from profiles.variants import (
    LIKELY_MULTIPLE,
    MULTIPLES,
    MeasuredVariant,
    Variant,
    choose_multiple,
    further_variants,
    measure_variants,
    trial_variants,
)

WIDE = [64, 128, 256]


def relative(step: int, work: Sequence[float], gain: float = 0.25) -> list[float]:
    """Measured latencies on a device that loses `gain` where widths are no multiples of `step`."""
    tried = trial_variants()
    return [w * (1 if v.round_to % step == 0 else 1 + gain) for v, w in zip(tried, work, strict=True)]


@pytest.mark.parametrize("step", MULTIPLES)
def test_the_multiple_is_the_devices_step(step: int) -> None:
    rng = np.random.default_rng(step)
    tried = trial_variants()
    # Rounding changes the work somewhat: only the cost per work may decide.
    work = [(1 - v.ratio) ** 2 * rng.uniform(0.8, 1.2) for v in tried]
    for error in (0.001, 0.01):
        times = np.array(relative(step, work)) * np.exp(rng.normal(0, error, len(tried)))
        assert choose_multiple(tried, times.tolist(), work, error, WIDE) == step


def test_a_gain_that_is_noise_or_not_worth_it_gives_the_smaller_multiple() -> None:
    tried = trial_variants()
    work = [1 - v.ratio for v in tried]
    assert choose_multiple(tried, relative(8, work, 0.01), work, 0.001, WIDE) == 1
    assert choose_multiple(tried, relative(16, work, 0.04), work, 0.03, WIDE) == 1
    assert choose_multiple(tried, relative(8, work, 0.10), work, 0.01, WIDE) == 8


def test_a_machine_too_busy_to_tell_gives_the_likely_multiple() -> None:
    tried = trial_variants()
    work = [1 - v.ratio for v in tried]
    assert choose_multiple(tried, relative(4, work, 0.10), work, 0.10, WIDE) == LIKELY_MULTIPLE
    assert choose_multiple(tried, relative(4, work, 0.10), work, 0.10, [16, 16, 16]) == 1


def test_a_multiple_that_leaves_nothing_to_choose_is_not_considered() -> None:
    tried = trial_variants()
    work = [1 - v.ratio for v in tried]
    assert choose_multiple(tried, relative(16, work), work, 0.001, [32, 32, 64]) < 16
    assert choose_multiple(tried, relative(16, work), work, 0.001, [2, 2, 4]) == 1


def test_every_share_is_measured_beside_the_baseline(
    monkeypatch: pytest.MonkeyPatch, export: Callable[[Device, int], Artifact]
) -> None:
    device = Device("here", "onnxruntime")
    small, large = export(device, 8), export(device, 16)
    asked: list[tuple[list[str], str, int, int]] = []

    def exact(
        device: Device,
        artifacts: list[Artifact],
        baseline: Artifact,
        *,
        first: int,
        profiled: int,
        warmup: int,
    ) -> Together:
        asked.append(([a.digest for a in artifacts], baseline.digest, first, profiled))
        own = {small.digest: 3.0, large.digest: 10.0}
        samples = tuple(np.full((5, 4), own[a.digest]) for a in [*artifacts, baseline])
        return Together(samples, tuple(a.digest for a in artifacts) if profiled else ())

    monkeypatch.setattr(measure, "measure_together", exact)
    everything = [small, large, small, small, large, small]
    found = measure_variants(device, everything, large, repeats=20, warmup=5)
    np.testing.assert_allclose(found.shares, [0.3, 1.0, 0.3, 0.3, 1.0, 0.3])
    assert found.error == pytest.approx(0, abs=1e-9)
    digests = [a.digest for a in everything]
    assert list(found.operators) == [(digest, digest) for digest in digests]
    # Two passes, a few at a time, another one beginning in the second; profiled in both.
    assert asked == [
        (some, large.digest, first, 20) for first in (0, 1) for some in (digests[:4], digests[4:])
    ]


def test_disagreeing_passes_are_repeated(
    monkeypatch: pytest.MonkeyPatch, export: Callable[[Device, int], Artifact]
) -> None:
    device = Device("here", "onnxruntime")
    artifact = export(device, 8)
    rng = np.random.default_rng(0)
    asked: list[Artifact] = []
    operators: list[int] = []

    def noisy(
        device: Device, artifacts: list[Artifact], baseline: Artifact, *, profiled: int, **_: int
    ) -> Together:
        asked.extend(artifacts)
        operators.extend([profiled] * len(artifacts))
        processes = np.exp(rng.normal(0, 0.1, len(artifacts) + 1))
        return Together(tuple(np.full((5, 4), ms) for ms in processes), ([],) * len(artifacts))

    monkeypatch.setattr(measure, "measure_together", noisy)
    found = measure_variants(device, [artifact] * 8, artifact, repeats=1, warmup=0)
    assert 0.02 < found.error < 0.1
    assert len(asked) == 6 * 8
    # Single operators in two processes of each.
    assert operators == [1] * 16 + [0] * 32
    assert {len(processes) for processes in found.operators} == {2}
    measure_variants(device, [artifact] * 8, artifact, repeats=1, warmup=0, limit_s=0)
    assert len(asked) == 8 * 8


@pytest.mark.parametrize(("spread", "passes"), [(0.001, 2), (0.025, 2), (0.2, 5)])
def test_passes_that_disagree_much_may_take_longer(
    spread: float, passes: int, monkeypatch: pytest.MonkeyPatch, export: Callable[[Device, int], Artifact]
) -> None:
    device = Device("here", "onnxruntime")
    artifact = export(device, 8)
    rng = np.random.default_rng(0)
    now = 0.0
    made: list[float] = []

    def shared(device: Device, artifacts: list[Artifact], baseline: Artifact, **_: int) -> Together:
        nonlocal now
        now += 10.0
        made.append(now)
        processes = np.exp(rng.normal(0, spread, len(artifacts) + 1))
        return Together(tuple(np.full((5, 4), ms) for ms in processes), ([],) * len(artifacts))

    monkeypatch.setattr(measure, "measure_together", shared)
    monkeypatch.setattr(variants.time, "monotonic", lambda: now)
    measure_variants(device, [artifact] * 4, artifact, repeats=1, warmup=0, limit_s=18.0)
    assert len(made) == passes


def test_several_models_of_one_round_are_told_apart(
    export: Callable[[Device, int], Artifact],
) -> None:
    device = Device("here", "onnxruntime", threads=1)
    small, large = export(device, 16), export(device, 64)
    found = measure.measure_together(device, [small, large, large], large, first=2, profiled=3, warmup=1)
    small_ms, large_ms, _, beside_ms = (quiet_ms(samples) for samples in found.samples)
    assert small_ms < 0.8 * min(large_ms, beside_ms)
    assert all(len(node["samples_ms"]) == 3 for nodes in found.operators for node in nodes)
    entries = measure.layer_profiles(device, small, [found.operators[0]], 5.0, 1)
    assert [e.layer for e in entries if e.op != "other"] == [spec.layer for spec in small.layers]
    assert sum(entry.timing.mean_ms for entry in entries) == pytest.approx(5.0)


@pytest.mark.parametrize("stays", [0.7, 0.9])
def test_a_busy_neighbour_moves_no_share(
    stays: float, monkeypatch: pytest.MonkeyPatch, export: Callable[[Device, int], Artifact]
) -> None:
    """It is there half of the time, for a few blocks, and slows small models by more than the baseline."""
    device = Device("here", "onnxruntime")
    artifact = export(device, 8)
    rng = np.random.default_rng(0)
    shares = np.array([0.2, 0.3, 0.4, 0.6, 0.3, 0.5, 0.8, 1.0])
    at, busy = 0, False

    def shared(device: Device, artifacts: list[Artifact], baseline: Artifact, **_: int) -> Together:
        nonlocal at, busy
        own = np.append(shares[at : at + len(artifacts)], 1.0)
        at = (at + len(artifacts)) % len(shares)
        samples = rng.lognormal(np.log(own)[:, None, None], 0.005, (len(own), 6, 10))
        for turn in range(6):
            for index in range(len(own)) if turn % 2 == 0 else reversed(range(len(own))):
                busy = busy if rng.random() < stays else not busy
                samples[index, turn] *= 1.4 * own[index] ** -0.06 if busy else 1.0
        return Together(tuple(samples), ())

    monkeypatch.setattr(measure, "measure_together", shared)
    found = measure_variants(device, [artifact] * 8, artifact, repeats=1, warmup=0)
    np.testing.assert_allclose(found.shares, shares, rtol=0.05)


def test_operators_are_those_of_undisturbed_inferences() -> None:
    """A neighbour that slows one layer more than the other would give it a larger share."""
    disturbed = np.repeat([True, False, True], [20, 10, 20])
    own = {"a": np.where(disturbed, 4.0, 2.0), "b": np.where(disturbed, 1.5, 1.0)}
    entries = [
        LayerProfile(name, "conv2d", 8, 8, (3, 3), (1, 1), 1, (4, 4), Timing(tuple(ms), 5))
        for name, ms in own.items()
    ]
    found = MeasuredVariant.of(Variant(), entries)
    assert found.layer_ms[0] / found.layer_ms[1] == pytest.approx(2)
    assert found.model_ms == pytest.approx(sum(ms.mean() for ms in own.values()))


def test_no_process_decides_alone_what_an_operator_costs(export: Callable[[Device, int], Artifact]) -> None:
    """Operators of one file take longer in one process than in another, for as long as it runs."""
    device = Device("here", "onnxruntime")
    artifact = export(device, 8)
    first, *others = [spec.layer for spec in artifact.layers]

    def process(own: float, speed: float) -> list[dict[str, Any]]:
        rest = (6 - own) / len(others)
        times = {first: own, **dict.fromkeys(others, rest)}
        return [{"name": n, "op": "Conv", "samples_ms": [ms * speed] * 10} for n, ms in times.items()]

    # The second process met a slower machine, which is none of its layers' merit.
    processes = [process(1.0, 1.0), process(3.0, 2.0)]
    entries = measure.layer_profiles(device, artifact, processes, 12.0, 1)
    assert MeasuredVariant.of(Variant(), entries).layer_ms[0] == pytest.approx(4.0)
    assert entries[0].timing.mean_ms == pytest.approx(4.0)


def test_variants_are_checked_and_distinct() -> None:
    everything = [*trial_variants(), *further_variants(8)]
    assert len(set(everything)) == len(everything)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\), got 1"):
        Variant(1.0)
    with pytest.raises(ValueError, match="round_to must be at least 1, got 0"):
        Variant(0.1, 0)
    with pytest.raises(ValueError, match="spread must not be negative"):
        Variant(0.1, spread=-1)
    with pytest.raises(ValueError, match="one width and one latency per layer"):
        MeasuredVariant(Variant(), (1, 2), (1, 2), (1.0,), {})


def test_a_fitted_profile_of_a_real_network(
    monkeypatch: pytest.MonkeyPatch, export: Callable[[Device, int], Artifact]
) -> None:
    monkeypatch.setattr(latency_profile, "trial_variants", lambda: [Variant(0.5, m, seed=1) for m in (1, 8)])
    monkeypatch.setattr(latency_profile, "further_variants", lambda multiple: [Variant(0.75, multiple)])
    monkeypatch.setattr(variants, "MAX_PASSES", 2)
    device = Device("here", "onnxruntime")
    asked: list[Variant] = []
    heard: list[str] = []

    def make(variant: Variant) -> Artifact:
        asked.append(variant)
        wanted = 64 * (1 - variant.ratio) + (5 if variant.round_to == 1 and variant.ratio else 0)
        return export(device, max(round(wanted / variant.round_to), 1) * variant.round_to)

    profile = build_profile(device, make, "small", repeats=5, warmup=1, progress=heard.append)
    assert asked[:3] == [Variant(), Variant(0.5, 1, seed=1), Variant(0.5, 8, seed=1)]
    assert asked[3:] == [Variant(0.75, profile.channel_multiple)]
    assert profile.model.kind == "fitted"
    assert profile.model.error is not None
    assert any("multiples of" in text for text in heard)
    assert LatencyProfile.from_json(profile.to_json()) == profile
    narrow = {spec.layer: (spec.in_channels, spec.out_channels) for spec in export(device, 16).layers}
    # A quarter of the width is a small part of the work; how small is the benchmark's question.
    assert profile.predict_ms(narrow) < 0.8 * profile.predict_ms({})
    assert profile.predict_ms({}) == pytest.approx(profile.model_ms, rel=0.5)

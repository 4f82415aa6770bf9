"""The channel multiple, from costs made by hand and from real artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from profiles import latency_profile, measure, variants
from profiles.artifact import Artifact
from profiles.device import Device
from profiles.latency_profile import LatencyProfile, build_profile
from profiles.variants import (
    LIKELY_MULTIPLE,
    MULTIPLES,
    MeasuredVariant,
    Variant,
    choose_multiple,
    further_variants,
    relative_latency,
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
    asked: list[tuple[str, str, int]] = []

    def exact(device: Device, candidate: Artifact, baseline: Artifact, *, first: int) -> float:
        asked.append((candidate.digest, baseline.digest, first))
        own = {small.digest: 3.0, large.digest: 10.0}
        return own[candidate.digest] / own[baseline.digest]

    monkeypatch.setattr(measure, "ratio_once", exact)
    found, error = relative_latency(device, [small, large, small], large)
    np.testing.assert_allclose(found, [0.3, 1.0, 0.3])
    assert error == pytest.approx(0, abs=1e-9)
    # Two passes, each model beginning in one of them.
    assert asked == [(a.digest, large.digest, f) for f in (0, 1) for a in (small, large, small)]


def test_disagreeing_passes_are_repeated(
    monkeypatch: pytest.MonkeyPatch, export: Callable[[Device, int], Artifact]
) -> None:
    device = Device("here", "onnxruntime")
    artifact = export(device, 8)
    rng = np.random.default_rng(0)
    asked: list[float] = []

    def noisy(device: Device, candidate: Artifact, baseline: Artifact, *, first: int) -> float:
        asked.append(float(np.exp(rng.normal(0, 0.1))))
        return asked[-1]

    monkeypatch.setattr(measure, "ratio_once", noisy)
    _, error = relative_latency(device, [artifact] * 8, artifact)
    assert 0.02 < error < 0.1
    assert len(asked) == 6 * 8
    relative_latency(device, [artifact] * 8, artifact, limit_s=0)
    assert len(asked) == 8 * 8


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

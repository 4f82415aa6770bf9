"""Equations (5) and (6) and the latency models, on profiles made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from profiles.device import Device
from profiles.latency_model import LatencyModel
from profiles.latency_profile import LatencyProfile, LayerProfile
from profiles.timing import Timing


def make_profile(seed: int, kind: str = "bilinear", count: int = 6) -> LatencyProfile:
    rng = np.random.default_rng(seed)
    layers = []
    for number in range(count):
        ins, outs = (int(n) for n in rng.integers(1, 200, 2))
        groups = 1
        if number == 2:  # One depthwise layer.
            outs = groups = ins = ins + 1
        timing = Timing(tuple(rng.lognormal(0, 1, 20)), 5)
        layers.append(
            LayerProfile(f"layer.{number}", "conv", ins, outs, (3, 3), (1, 1), groups, (32, 32), timing)
        )
    other = {"other/Add": 0.5, "other/Concat": 0.25}
    model = LatencyModel.from_layers(
        kind,
        [layer.timing.mean_ms for layer in layers],
        [layer.in_channels for layer in layers],
        [layer.out_channels for layer in layers],
        [layer.groups for layer in layers],
        0.75,
    )
    total = sum(layer.timing.mean_ms for layer in layers) + 0.75
    return LatencyProfile(
        Device("d", "torch"), "f", "m", (1, 3, 64, 64), tuple(layers), total, other, 8, model
    )


@pytest.mark.parametrize("seed", range(5))
def test_equation_5_is_mean_latency_over_output_channels(seed: int) -> None:
    profile = make_profile(seed)
    for layer in profile.layers:
        wanted = sum(layer.timing.samples_ms) / len(layer.timing.samples_ms) / layer.out_channels
        assert profile.delta_ms[layer.layer] == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_equation_6_is_scale_free_in_0_to_1_and_keeps_the_order(seed: int) -> None:
    profile = make_profile(seed)
    delta, norm = profile.delta_ms, profile.delta_norm
    assert max(norm.values()) == 1.0
    assert all(0 < value <= 1 for value in norm.values())
    assert sorted(norm, key=norm.__getitem__) == sorted(delta, key=delta.__getitem__)
    data = profile.to_json()
    for layer in data["layers"]:
        layer["timing"]["samples_ms"] = [7 * s for s in layer["timing"]["samples_ms"]]
    assert LatencyProfile.from_json(data).delta_norm == pytest.approx(norm)


@pytest.mark.parametrize("seed", range(5))
def test_linear_model_is_the_sum_of_the_kept_channels_delta(seed: int) -> None:
    profile = make_profile(seed, "linear")
    rng = np.random.default_rng(seed)
    kept = {layer.layer: int(rng.integers(1, layer.out_channels + 1)) for layer in profile.layers}
    wanted = profile.other_ms + sum(profile.delta_ms[name] * count for name, count in kept.items())
    assert profile.predict_ms({name: (1, count) for name, count in kept.items()}) == pytest.approx(wanted)


def test_bilinear_model_counts_inputs_too_but_not_of_a_depthwise_layer() -> None:
    profile = make_profile(0)
    layer, depthwise = profile.layers[0], profile.layers[2]
    half = {layer.layer: (layer.in_channels / 2, layer.out_channels / 2)}
    saved = profile.model_ms - profile.predict_ms(half)  # type: ignore[arg-type]  # fractions: exact
    assert saved == pytest.approx(0.75 * layer.timing.mean_ms)
    half = {depthwise.layer: (depthwise.in_channels / 2, depthwise.out_channels / 2)}
    saved = profile.model_ms - profile.predict_ms(half)  # type: ignore[arg-type]
    assert saved == pytest.approx(0.5 * depthwise.timing.mean_ms)


@pytest.mark.parametrize("kind", ["linear", "bilinear"])
def test_prediction_is_vectorised_and_the_gradient_is_its_derivative(kind: str) -> None:
    profile = make_profile(3, kind)
    rng = np.random.default_rng(3)
    ins = np.array([rng.integers(1, layer.in_channels + 1, 50) for layer in profile.layers]).T.astype(float)
    outs = np.array([rng.integers(1, layer.out_channels + 1, 50) for layer in profile.layers]).T.astype(float)
    many = profile.predict_many(ins, outs)
    names = [layer.layer for layer in profile.layers]
    for row in range(0, 50, 10):
        widths = {name: (int(ins[row, i]), int(outs[row, i])) for i, name in enumerate(names)}
        assert profile.predict_ms(widths) == pytest.approx(many[row])
    by_in, by_out = profile.gradient(ins[0], outs[0])
    step = np.eye(len(names)) * 1e-3
    # Stepping one layer at a time: both models are straight lines in each width.
    moved_in = (profile.predict_many(ins[0] + step, np.tile(outs[0], (len(names), 1))) - many[0]) / 1e-3
    moved_out = (profile.predict_many(np.tile(ins[0], (len(names), 1)), outs[0] + step) - many[0]) / 1e-3
    np.testing.assert_allclose(by_in, moved_in, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(by_out, moved_out, rtol=1e-6, atol=1e-9)


def test_json_round_trip_and_refusals() -> None:
    profile = make_profile(1)
    data = json.loads(json.dumps(profile.to_json()))
    assert LatencyProfile.from_json(data) == profile
    with pytest.raises(ValueError, match="format_version must be 6, got 1"):
        LatencyProfile.from_json({**data, "format_version": 1})
    with pytest.raises(ValueError, match="distinct names"):
        LatencyProfile.from_json({**data, "layers": data["layers"] * 2})
    with pytest.raises(KeyError, match=r"no layer 'layer\.x'"):
        profile.predict_ms({"layer.x": (1, 1)})
    with pytest.raises(ValueError, match=r"shape \(n, 6\)"):
        profile.predict_many([1.0] * 6, [1.0] * 6)

"""The fitted latency model against devices made by hand, whose steps, penalties and noise are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from profiles.latency_fit import fit_latency_model
from profiles.latency_model import LatencyModel, term_names
from profiles.latency_profile import LayerProfile
from profiles.timing import Timing
from profiles.variants import MeasuredVariant, Variant, further_variants, trial_variants

Floats = NDArray[np.float64]
#: A chain: output channels, kernel, stride, pixels of the output; 0 channels is a depthwise layer.
CHAIN = [
    (16, 3, 2, 6400),
    (32, 3, 2, 1600),
    (32, 1, 1, 1600),
    (32, 3, 1, 1600),
    (64, 3, 2, 400),
    (0, 3, 1, 400),
    (64, 1, 1, 400),
    (64, 3, 1, 400),
    (128, 3, 2, 100),
    (128, 1, 1, 100),
    (64, 3, 1, 100),
    (128, 3, 1, 100),
    (0, 3, 1, 100),
    (128, 1, 1, 100),
    (96, 3, 1, 100),
    (64, 3, 1, 400),
    (80, 1, 1, 400),
]
#: One layer among those of its resolution, with an operator of its own.
BEHIND = 10


@dataclass(frozen=True)
class FakeDevice:
    """Latencies by rule: blocks of `step`, a `penalty` where inputs are off `align`, and an overhead."""

    step: int = 1
    align: int = 1
    penalty: float = 0.0
    overhead_ms: float = 0.005
    pool_ms: float = 0.0  # of the deepest activations
    behind_ms: float = 0.0  # of what layer `BEHIND` leaves

    def layer_ms(self, ins: int, outs: int, kernel: int, pixels: int, depthwise: bool) -> float:
        up_in, up_out = -(-ins // self.step) * self.step, -(-outs // self.step) * self.step
        work = kernel**2 * pixels * up_out * (4 if depthwise else up_in)
        efficiency = 2e8 if kernel == 3 else 1.2e8
        rough = 1 + self.penalty * (ins % self.align > 0)
        return self.overhead_ms + rough * work / efficiency + (up_in + up_out) * pixels * 2e-8

    def other_ms(self, outs: Sequence[int], pixels: Sequence[int]) -> dict[str, float]:
        maps = [n * p for n, p in zip(outs, pixels, strict=True)]
        rough = [m for m, n in zip(maps, outs, strict=True) if n % self.align]
        deepest = [n for n, p in zip(outs, pixels, strict=True) if p == min(pixels)]
        whole = sum(channels or 128 for channels, *_, p in CHAIN if p == min(pixels))
        return {
            "other/act": 4e-7 * sum(maps),
            "other/softmax": 0.3,
            "other/reorder": 8e-7 * sum(rough),
            "other/pool": self.pool_ms * sum(deepest) / whole,
            "other/upsample": self.behind_ms * outs[BEHIND] / CHAIN[BEHIND][0],
        }


def widths(variant: Variant) -> tuple[list[int], list[int]]:
    """Random widths of the chain; the last layer's output stays."""
    rng = np.random.default_rng(variant.seed)
    ins, outs = [], []
    previous = 3
    for number, (channels, *_) in enumerate(CHAIN):
        share = rng.normal(0, variant.spread)
        ins.append(previous)
        if channels and variant.ratio and number < len(CHAIN) - 1:
            kept = channels * np.clip(1 - variant.ratio - share, 0.05, 1)
            m = variant.round_to
            channels = int(min(channels, max(round(kept / m), 1) * m, channels // m * m or channels))
        outs.append(channels or previous)
        previous = outs[-1]
    return ins, outs


def measured(device: FakeDevice, variant: Variant, noise: float) -> MeasuredVariant:
    """A variant as the device would show it; `noise` of a layer, half of it of the whole process."""
    ins, outs = widths(variant)
    rng = np.random.default_rng([variant.seed, variant.round_to, int(variant.ratio * 100)])
    whole = np.exp(rng.normal(0, noise / 2)) if variant.ratio else 1.0
    layers = [
        device.layer_ms(i, o, kernel, pixels, channels == 0) * whole * np.exp(rng.normal(0, noise))
        for i, o, (channels, kernel, _, pixels) in zip(ins, outs, CHAIN, strict=True)
    ]
    other = device.other_ms(outs, [pixels for *_, pixels in CHAIN])
    return MeasuredVariant(
        variant, tuple(ins), tuple(outs), tuple(layers), {k: v * whole for k, v in other.items()}
    )


def layers_of(unpruned: MeasuredVariant) -> list[LayerProfile]:
    return [
        LayerProfile(
            f"l{i}",
            "conv",
            unpruned.in_channels[i],
            unpruned.out_channels[i],
            (kernel, kernel),
            (stride, stride),
            1 if channels else unpruned.in_channels[i],
            (1, 1),
            Timing((unpruned.layer_ms[i],), 5),
            (1, pixels),
        )
        for i, (channels, kernel, stride, pixels) in enumerate(CHAIN)
    ]


def fit(device: FakeDevice, noise: float, multiple: int) -> tuple[LatencyModel, LatencyModel]:
    """The fitted model and the bilinear one."""
    variants = [Variant(), *trial_variants(), *further_variants(multiple)]
    found = [measured(device, variant, noise) for variant in variants]
    layers = layers_of(found[0])
    bilinear = LatencyModel.from_layers(
        "bilinear",
        found[0].layer_ms,
        found[0].in_channels,
        found[0].out_channels,
        [layer.groups for layer in layers],
        sum(found[0].other.values()),
    )
    return fit_latency_model(layers, found), bilinear


def held_out(round_to: int) -> list[Variant]:
    rng = np.random.default_rng(99)
    return [
        Variant(float(rng.uniform(0.1, 0.8)), round_to, 1000 + i, float(rng.uniform(0, 0.5)))
        for i in range(40)
    ]


def errors(model: LatencyModel, device: FakeDevice, variants: Sequence[Variant]) -> Floats:
    truth = [measured(device, variant, 0.0) for variant in variants]
    predicted = model.predict_many([t.in_channels for t in truth], [t.out_channels for t in truth])
    return predicted / np.array([t.model_ms for t in truth]) - 1


DEVICES = {
    "smooth": FakeDevice(),
    "steps of 16, inputs off 4 are slow": FakeDevice(16, 4, 0.5),
    "steps of 8, inputs off 8 are slow": FakeDevice(8, 8, 0.3),
    "overhead rules": FakeDevice(16, 4, 0.3, overhead_ms=0.1),
    "deep pooling is slow": FakeDevice(8, 8, 0.3, pool_ms=0.5),
    "upsampling behind one layer is slow": FakeDevice(8, 8, 0.3, behind_ms=0.5),
}


@pytest.mark.parametrize("name", DEVICES)
def test_unseen_plans_are_within_5_percent_and_better_than_bilinear(name: str) -> None:
    device = DEVICES[name]
    fitted, bilinear = fit(device, 0.02, 16 if device.step > 8 else 8)
    for round_to in (1, 8, 16):
        found = np.abs(errors(fitted, device, held_out(round_to)))
        assert found.max() < 0.05, (round_to, found.max())
        plain = np.abs(errors(bilinear, device, held_out(round_to)))
        if np.mean(plain) > 0.02:
            assert np.mean(found) < 0.4 * np.mean(plain), (round_to, np.mean(found), np.mean(plain))


def test_the_error_a_model_states_is_about_the_error_it_has() -> None:
    device = DEVICES["steps of 16, inputs off 4 are slow"]
    quiet, _ = fit(device, 0.01, 16)
    noisy, _ = fit(device, 0.2, 16)
    assert quiet.error is not None
    assert noisy.error is not None
    everything = np.abs(errors(quiet, device, [*held_out(1), *held_out(16)]))
    assert 0.3 * np.percentile(everything, 90) < quiet.error < 0.06
    assert noisy.error > 2 * quiet.error


def test_steps_show_in_predictions_and_the_gradient_stays_smooth() -> None:
    device = FakeDevice(16, 1, 0.0)
    model, _ = fit(device, 0.01, 16)
    ins, outs = (np.array(side, dtype=float) for side in widths(Variant()))
    layer = 7
    sweep = np.tile(outs, (64, 1))
    sweep[:, layer] = np.arange(1, 65)
    by_width = model.predict_many(np.tile(ins, (64, 1)), sweep)
    blocks = by_width.reshape(4, 16)
    # Most of what a block of channels costs comes at once, with its first channel.
    rise_inside = np.median(blocks[:, -1] - blocks[:, 0])
    rise_between = np.median(blocks[1:, 0] - blocks[:-1, -1])
    assert rise_between > 2 * rise_inside
    by_in, by_out = model.gradient(ins, outs)
    assert (by_in >= 0).all()
    assert (by_out >= 0).all()
    true_slope = (device.layer_ms(64, 64, 3, 400, False) - device.layer_ms(64, 48, 3, 400, False)) / 16
    assert by_out[layer] == pytest.approx(true_slope + 4e-7 * 400, rel=0.25)


def test_coefficients_are_never_negative_and_survive_json() -> None:
    model, _ = fit(DEVICES["overhead rules"], 0.05, 8)
    assert min(min(row) for row in model.coefficients) >= 0
    assert LatencyModel.from_json(json.loads(json.dumps(model.to_json()))) == model
    row = model.coefficients[5]  # Depthwise: nothing depends on the input's width.
    assert all(
        c == 0
        for name, c in zip(term_names(model.steps), row, strict=True)
        if "in/" in name or "pair" in name
    )


@pytest.mark.parametrize("changed", [0, 1, 3, 12])
def test_plans_that_differ_in_few_layers_are_predicted_like_each_alone(changed: int) -> None:
    rng = np.random.default_rng(changed)
    steps, layers = (1, 8), 12
    coefficients = rng.random((layers, len(term_names(steps))))
    ins, outs = rng.integers(1, 65, (2, layers))
    model = LatencyModel("fitted", tuple(ins), tuple(outs), tuple(map(tuple, coefficients)), 0.5, steps)
    widths = np.repeat(np.array([ins, outs], dtype=float)[:, None], 40, axis=1)
    for plan in range(40):
        for layer in rng.permutation(layers)[:changed]:
            widths[:, plan, layer] = rng.integers(1, [ins[layer] + 1, outs[layer] + 1])
    alone = [float(model.predict_many(*widths[:, [plan]])[0]) for plan in range(40)]
    np.testing.assert_allclose(model.predict_many(*widths), alone, rtol=1e-12)


def test_too_little_or_foreign_data_is_refused() -> None:
    found = [measured(FakeDevice(), variant, 0.0) for variant in (Variant(), *trial_variants()[:3])]
    layers = layers_of(found[0])
    with pytest.raises(ValueError, match="at least four measured variants, got 3"):
        fit_latency_model(layers, found[:3])
    with pytest.raises(ValueError, match="must have the model's 16 layers, got one of 17"):
        fit_latency_model(layers[:-1], found)
    with pytest.raises(ValueError, match=r"a row needs 4 coefficients with steps \(1,\), got 3"):
        LatencyModel("linear", (1,), (1,), ((0.0, 0.0, 0.0),), 0.0)
    with pytest.raises(ValueError, match="steps must be"):
        LatencyModel("linear", (1,), (1,), ((0.0,) * 4,), 0.0, ())

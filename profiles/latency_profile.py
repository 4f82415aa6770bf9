"""What each layer of one model costs on one device, with the latency model fitted to it.

Holds equations (5) and (6) of the paper (doi 10.30837/0135-1710.2026.189.034). Knows nothing of scores,
groups or how channels are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .artifact import Artifact, LayerSpec
from .device import Device
from .latency_model import KINDS, Floats, LatencyModel
from .quiet import UNKNOWN_SKEW, Skew
from .timing import Timing
from .variants import (
    LIKELY_MULTIPLE,
    Measured,
    MeasuredVariant,
    Variant,
    choose_multiple,
    further_variants,
    measure_variants,
    trial_variants,
)

FORMAT_VERSION = 6
OTHER = "other"
SIDES = ("in_channels", "out_channels")
#: Profiled inferences of a variant in each of two processes, and those before them: its layers are many.
VARIANT_REPEATS, VARIANT_WARMUP = 10, 3


@dataclass(frozen=True)
class LayerProfile:
    """One layer's shape and latency; channels, kernel, stride, groups, input_hw, output_hw as in
    `LayerSpec`.

    Attributes:
        op: "conv", "conv_transpose", "linear", or "other" for operators that are no layer (channels 0 then).
        timing: normalised: all entries of a profile together make up the model's latency.
    """

    layer: str
    op: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    input_hw: tuple[int, ...]
    timing: Timing
    output_hw: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("kernel", "stride", "input_hw", "output_hw"):
            object.__setattr__(self, key, tuple(getattr(self, key)))

    @classmethod
    def of(cls, spec: LayerSpec, timing: Timing) -> LayerProfile:
        return cls(
            layer=spec.layer,
            op=spec.op,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            kernel=spec.kernel,
            stride=spec.stride,
            groups=spec.groups,
            input_hw=spec.input_hw,
            timing=timing,
            output_hw=spec.output_hw,
        )

    def to_json(self) -> dict[str, Any]:
        plain = {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }
        return {**plain, "timing": self.timing.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerProfile:
        return cls(**{**data, "timing": Timing.from_json(data["timing"])})


@dataclass(frozen=True)
class LatencyProfile:
    """The latency profile of one model on one device.

    Attributes:
        device, fingerprint: where it was measured.
        model_key: which model (weights and architecture), as the caller names it.
        input_shape: `(1, channels, height, width)`.
        layers: convolutions and linear layers, in order of execution; every array of this class follows it.
        model_ms: latency of the whole model, measured without a profiler.
        other: latency of the operators that are no layer, by kind, in ms.
        channel_multiple: kept widths should be multiples of this on the device.
        model: predicts latency from widths.
        skew: how a disturbance moves the ratio of two versions of the model, for further comparisons.

    Raises:
        ValueError: no layers, a name twice, or a latency that is not positive.
    """

    device: Device
    fingerprint: str
    model_key: str
    input_shape: tuple[int, ...]
    layers: tuple[LayerProfile, ...]
    model_ms: float
    other: Mapping[str, float]
    channel_multiple: int
    model: LatencyModel
    skew: Skew = UNKNOWN_SKEW
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        names = [layer.layer for layer in self.layers]
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"a profile needs layers with distinct names, got {len(names)} with {len(set(names))} names"
            )
        if not self.model_ms > 0:
            raise ValueError(f"model_ms must be positive, got {self.model_ms}")
        if self.channel_multiple < 1:
            raise ValueError(f"channel_multiple must be at least 1, got {self.channel_multiple}")
        if len(self.model.coefficients) != len(names):
            raise ValueError(
                f"the latency model has {len(self.model.coefficients)} layers, the profile {len(names)}"
            )

    @property
    def other_ms(self) -> float:
        """Latency of everything that is no layer."""
        return float(sum(self.other.values()))

    @cached_property
    def delta_ms(self) -> dict[str, float]:
        """Equation (5): mean latency of a layer per output channel, t_l / N_l."""
        return {layer.layer: layer.timing.mean_ms / layer.out_channels for layer in self.layers}

    @property
    def delta_norm(self) -> dict[str, float]:
        """Equation (6): (5) over the largest of all layers; in [0, 1], 1 for the costliest channel."""
        delta = self.delta_ms
        largest = max(delta.values())
        if largest <= 0:
            raise ValueError("every layer's latency is zero; profile again with more repeats")
        return {layer: value / largest for layer, value in delta.items()}

    def widths(self, widths: Mapping[str, tuple[int, int]]) -> tuple[Floats, Floats]:
        """Arrays `(L,)` of input and output channels from a mapping; layers left out keep their own widths.

        Raises:
            KeyError: a layer that the profile does not have.
        """
        known = {layer.layer for layer in self.layers}
        unknown = [name for name in widths if name not in known]
        if unknown:
            raise KeyError(
                f"the profile of {self.model_key} has no layer {unknown[0]!r}; it has {len(known)} others"
            )
        pairs = [widths.get(layer.layer, (layer.in_channels, layer.out_channels)) for layer in self.layers]
        return np.array([pair[0] for pair in pairs], dtype=float), np.array(
            [pair[1] for pair in pairs], dtype=float
        )

    def predict_ms(self, widths: Mapping[str, tuple[int, int]], gone: Collection[str] = ()) -> float:
        """Latency of the model with other widths: layer to (input channels, output channels).

        Args:
            gone: layers that are not there any more.
        """
        ins, outs = self.widths(widths)
        model = self.model.without([layer.layer in gone for layer in self.layers]) if gone else self.model
        return float(model.predict_many(ins[None], outs[None])[0])

    def predict_many(self, in_widths: ArrayLike, out_widths: ArrayLike) -> Floats:
        """Latency of n plans: widths `(n, L)` in channels, in the order of `layers`; result `(n,)` in ms."""
        return self.model.predict_many(in_widths, out_widths)

    def gradient(self, in_widths: ArrayLike, out_widths: ArrayLike) -> tuple[Floats, Floats]:
        """What one more channel costs in ms, of inputs `(L,)` and of outputs `(L,)`, at widths `(L,)`."""
        return self.model.gradient(in_widths, out_widths)

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": self.format_version,
            "device": self.device.to_json(),
            "fingerprint": self.fingerprint,
            "model_key": self.model_key,
            "input_shape": list(self.input_shape),
            "layers": [layer.to_json() for layer in self.layers],
            "model_ms": self.model_ms,
            "other": dict(self.other),
            "channel_multiple": self.channel_multiple,
            "model": self.model.to_json(),
            "skew": asdict(self.skew),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyProfile:
        """Raises ValueError for another format version."""
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"profile format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}"
            )
        return cls(
            device=Device.from_json(data["device"]),
            fingerprint=data["fingerprint"],
            model_key=data["model_key"],
            input_shape=tuple(data["input_shape"]),
            layers=tuple(LayerProfile.from_json(layer) for layer in data["layers"]),
            model_ms=data["model_ms"],
            other=dict(data["other"]),
            channel_multiple=data["channel_multiple"],
            model=LatencyModel.from_json(data["model"]),
            skew=Skew(**data["skew"]),
        )


def build_profile(
    device: Device,
    export: Callable[[Variant], Artifact],
    model_key: str,
    *,
    kind: str = "fitted",
    repeats: int = 50,
    warmup: int = 5,
    progress: Callable[[str], None] | None = None,
) -> LatencyProfile:
    """Profile a model on a device; find the device's channel multiple and fit the latency model.

    Args:
        export: makes the artifact of a variant; its layers say the widths. Called with the unpruned model
            first.
        model_key: names the model in the profile.
        kind: of latency model. "fitted" measures a dozen pruned variants, in one to three minutes; "linear"
            and "bilinear" measure the unpruned model alone and take the usual channel multiple of 8.
        repeats, warmup: inferences of the layer profile, K and those before it in the paper.
        progress: receives a line of text per step.

    Raises: as `measure.profile_layers`.
    """
    from .measure import profile_layers

    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    say = progress or (lambda text: None)
    say(f"{device.name}: timing every layer")
    artifact = export(Variant())
    entries = profile_layers(device, artifact, repeats=repeats, warmup=warmup)
    layers = tuple(entry for entry in entries if entry.op != OTHER)
    other = {entry.layer: entry.timing.mean_ms for entry in entries if entry.op == OTHER}
    model_ms = sum(entry.timing.mean_ms for entry in entries)
    model, multiple = _unfitted("bilinear" if kind == "fitted" else kind, layers, other), LIKELY_MULTIPLE
    skew = UNKNOWN_SKEW
    if kind == "fitted":
        model, multiple, skew = _fitted(device, export, artifact, entries, model, say)
    return LatencyProfile(
        device=device,
        fingerprint=device.fingerprint,
        model_key=model_key,
        input_shape=artifact.input_shape,
        layers=layers,
        model_ms=model_ms,
        other=other,
        channel_multiple=multiple,
        model=model,
        skew=skew,
    )


def _unfitted(kind: str, layers: Sequence[LayerProfile], other: Mapping[str, float]) -> LatencyModel:
    return LatencyModel.from_layers(
        kind,
        [layer.timing.mean_ms for layer in layers],
        [layer.in_channels for layer in layers],
        [layer.out_channels for layer in layers],
        [layer.groups for layer in layers],
        sum(other.values()),
    )


def _fitted(
    device: Device,
    export: Callable[[Variant], Artifact],
    baseline: Artifact,
    entries: Sequence[LayerProfile],
    bilinear: LatencyModel,
    say: Callable[[str], None],
) -> tuple[LatencyModel, int, Skew]:
    """Latency model, channel multiple and skew, from variants measured beside the baseline."""
    from .latency_fit import fit_latency_model
    from .measure import layer_profiles

    measured = [MeasuredVariant.of(Variant(), entries)]
    model_ms = measured[0].model_ms

    def measure_all(variants: Sequence[Variant], skew: Skew) -> tuple[list[Artifact], Measured]:
        artifacts = [export(variant) for variant in variants]
        found = measure_variants(
            device, artifacts, baseline, say, repeats=VARIANT_REPEATS, warmup=VARIANT_WARMUP, skew=skew
        )
        for variant, artifact, share, processes in zip(
            variants, artifacts, found.shares, found.operators, strict=True
        ):
            layers = layer_profiles(device, artifact, processes, model_ms * float(share), VARIANT_WARMUP)
            measured.append(MeasuredVariant.of(variant, layers))
        return artifacts, found

    variants = trial_variants()
    artifacts, first = measure_all(variants, UNKNOWN_SKEW)
    ins, outs = (np.array([[getattr(spec, side) for spec in a.layers] for a in artifacts]) for side in SIDES)
    work = bilinear.predict_many(ins, outs) / model_ms
    multiple = choose_multiple(variants, first.shares, work, first.error, bilinear.out_channels)
    say(f"{device.name} works best with channels in multiples of {multiple}")
    _, further = measure_all(further_variants(multiple), first.skew)
    model = fit_latency_model([entry for entry in entries if entry.op != OTHER], measured)
    say(f"the latency model was within {model.error:.1%} on nine of ten variants it had not seen")
    return model, multiple, further.skew

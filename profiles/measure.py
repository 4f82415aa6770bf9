"""Measurements on a device: one model, two models in turns, and one model layer by layer.

Decides how often to ask and what the samples mean; the clock is read by the device's runner. Every
measurement of this machine is taken under the host's lock. Knows nothing of pruning.

How a comparison is decided: each round starts a fresh process per model and samples them in alternating
blocks (A B B A ...), so that quiet and busy moments of the machine meet both; what the rounds say together is
`quiet_ratio`'s part.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .artifact import Artifact
from .connection import Connection, DeviceError, connect
from .device import Device
from .latency_profile import OTHER, LayerProfile
from .lock import host_lock
from .quiet import MIN_ROUNDS, UNKNOWN_SKEW, Floats, Skew, quiet_ms, quiet_ratio
from .timing import Comparison, Timing

#: Receives one short line of text per step.
Progress = Callable[[str], None]

WARMUP, SHARED_WARMUP = 10, 5
ROUND_TIMEOUT_S = 300.0
#: Sampling time of a round, and of each artifact where several are measured in one round.
ROUND_S, SHARED_ROUND_S = 1.2, 0.4
#: Fresh processes that a layer profile is taken over: single operators differ between them by up to a third.
PROFILE_ROUNDS = 3
#: Turns of a round at most; fewer where several share one and the same comes round again in another pass.
TURNS, SHARED_TURNS = 10, 6


def compare(
    device: Device,
    candidate: Artifact,
    baseline: Artifact,
    *,
    target: float = 0.01,
    limit_s: float = 30.0,
    skew: Skew = UNKNOWN_SKEW,
    progress: Progress | None = None,
) -> Comparison:
    """Measure two artifacts in turns until their ratio is known.

    Args:
        target: wanted half-width of the ratio's 95% interval, as a share of the ratio.
        limit_s: no further round begins when it would end after this, once there are four.
        skew: how a neighbour moves the ratio on this device, as the model's latency profile found it.
        progress: called after each round.

    Raises:
        ValueError: an artifact is not for this device.
        DeviceLostError: the device is gone or silent.
        DeviceError: a measured process failed.
    """
    specs = [_spec(device, artifact) for artifact in (candidate, baseline)]
    rounds: list[tuple[Floats, Floats]] = []
    warmup = 0
    with measuring(device) as connection:
        for spec, artifact in zip(specs, (candidate, baseline), strict=True):
            spec["path"] = connection.send_file(artifact.path, artifact.digest)
        start = time.monotonic()
        longest_s = 0.0
        while True:
            began = time.monotonic()
            # However slow a model opens, there are rounds enough within the limit.
            share_s = limit_s / MIN_ROUNDS
            done = _round(
                connection,
                specs,
                first=len(rounds) % 2,
                round_s=min(ROUND_S, share_s),
                longest_s=share_s,
            )
            longest_s = max(longest_s, time.monotonic() - began)
            warmup = done["warmup"]
            candidate_ms, baseline_ms = _samples(done["blocks"], 2)
            rounds.append((candidate_ms, baseline_ms))
            found = quiet_ratio(rounds, skew)
            half = found.half_width
            if progress:
                width = f" ± {half:.1%}" if half < 1 else ""
                progress(f"round {len(rounds)}: ratio {math.exp(found.log):.4f}{width}")
            elapsed_s = time.monotonic() - start
            if len(rounds) >= MIN_ROUNDS and (half <= target or elapsed_s + longest_s > limit_s):
                break
    stable = half <= target
    reason = None
    if not stable:
        busy = ""
        with contextlib.suppress(DeviceError):  # only a remark: what was measured stands without it
            load = connection.ask({"do": "facts", **device.to_json()}, timeout_s=60)["state"]["load_1m"]
            busy = f", load average {load:.1f}" if load is not None else ""
        reason = (
            f"the ratio is known within ±{half:.1%} after {len(rounds)} rounds, {found.quiet_rounds} of them "
            f"undisturbed, in {elapsed_s:.0f} s (wanted ±{target:.1%}){busy}; "
            "quieten the machine or allow more time"
        )
    return Comparison(
        candidate=Timing(tuple(np.concatenate([own.ravel() for own, _ in rounds])), warmup),
        baseline=Timing(tuple(np.concatenate([own.ravel() for _, own in rounds])), warmup),
        ratio=math.exp(found.log),
        ratio_ci=(math.exp(found.log - half), math.exp(found.log + half)),
        rounds=len(rounds),
        counted=found.counted,
        is_stable=stable,
        reason=reason,
    )


@dataclass(frozen=True)
class Together:
    """Several artifacts and a baseline, measured in one round.

    Attributes:
        samples: each artifact's samples in ms, `(turns, runs)`, and, last, the baseline's; `n + 1` of them.
        operators: what the runtime's profiler said of each, for `layer_profiles`; empty if not asked.
    """

    samples: tuple[Floats, ...]
    operators: tuple[Any, ...]


def measure_together(
    device: Device,
    artifacts: Sequence[Artifact],
    baseline: Artifact,
    *,
    first: int = 0,
    profiled: int = 0,
    warmup: int = 5,
) -> Together:
    """Samples of a few artifacts and a baseline, from a single round of fresh processes.

    All take turns within seconds, so what the machine does meanwhile meets every one of them. Rounds differ
    among themselves by a percent or two: take several, or `compare`, where a single figure decides.

    Args:
        artifacts: as many as the device can hold in memory beside the baseline.
        first: which of them begins, the baseline being the last.
        profiled, warmup: inferences to profile operator by operator in the same processes, 0 for none, and
            those before them.

    Raises: as `compare`.
    """
    everyone = [*artifacts, baseline]
    specs = [{**_spec(device, artifact), "warmup": SHARED_WARMUP} for artifact in everyone]
    with measuring(device) as connection:
        for spec, artifact in zip(specs, everyone, strict=True):
            spec["path"] = connection.send_file(artifact.path, artifact.digest)
        of = list(range(len(artifacts))) if profiled else []
        done = _round(
            connection,
            specs,
            first=first % len(specs),
            round_s=SHARED_ROUND_S * len(specs),
            turns=SHARED_TURNS,
            profile={"of": of, "repeats": profiled, "warmup": warmup},
        )
    return Together(_samples(done["blocks"], len(specs)), tuple(done["nodes"]))


def measure(
    device: Device, artifact: Artifact, *, rounds: int = 3, progress: Progress | None = None
) -> Timing:
    """Latency of one artifact, over `rounds` fresh processes of about a second each.

    Raises: as `compare`.
    """
    done = _rounds_of_one(device, artifact, profiled=[0] * rounds, progress=progress)
    return Timing(_flat(done), done[-1]["warmup"])


def profile_layers(
    device: Device, artifact: Artifact, *, repeats: int = 50, warmup: int = 5
) -> tuple[LayerProfile, ...]:
    """Latency of every layer in the device's own runtime, and of everything else.

    A profiler slows what it watches, small operators most, so its times are used as shares: the mean
    latencies of all entries add up to the latency of the model measured without a profiler. Samples of one
    inference are at one place in all entries, and as far apart as inferences were.

    Args:
        repeats: profiled inferences, K in the paper, spread over a few fresh processes; at least 1.
        warmup: inferences before them, in each process.

    Returns:
        One entry per layer in the artifact's order, then one per kind of other operator, with `op` "other"
        and `layer` "other/<kind>".

    Raises:
        DeviceError: a layer does not show in the runtime's profile; else as `compare`.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    of_each = [(repeats + rest) // PROFILE_ROUNDS for rest in range(PROFILE_ROUNDS)]
    done = _rounds_of_one(device, artifact, profiled=of_each, warmup=warmup)
    processes = [nodes for each in done for nodes in each["nodes"]]
    return layer_profiles(device, artifact, processes, float(np.median(_flat(done))), warmup)


def layer_profiles(
    device: Device,
    artifact: Artifact,
    processes: Sequence[Sequence[Mapping[str, Any]]],
    model_ms: float,
    warmup: int,
) -> tuple[LayerProfile, ...]:
    """What a runtime's profiler said of single operators, as the latency of layers.

    Args:
        processes: what it said in each of one or more, per operator `name`, `op` and `samples_ms`, as the
            runner gives them.
        model_ms: latency of the model without a profiler.
        warmup: inferences before the samples, in each process.

    Returns and raises: as `profile_layers`.
    """
    found = [_by_layer(device, artifact, nodes) for nodes in processes]
    whole = np.concatenate([np.sum(list(times.values()), axis=0) for times in found])

    def timing(key: str) -> Timing:
        # A kind of operator that one process does not show took no time there.
        parts = [times.get(key, np.zeros_like(next(iter(times.values())))) for times in found]
        return Timing(tuple(np.concatenate(parts) * (model_ms / whole.mean())), warmup)

    layers = [LayerProfile.of(spec, timing(spec.layer)) for spec in artifact.layers]
    kinds = dict.fromkeys(key for times in found for key in times if key.startswith(f"{OTHER}/"))
    return (*layers, *(LayerProfile(key, OTHER, 0, 0, (), (), 1, (), timing(key)) for key in kinds))


def _by_layer(device: Device, artifact: Artifact, nodes: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    """Time of each layer and each kind of other operator in every inference that a process profiled, as a
    share of an undisturbed inference: processes may have met another machine each.
    """
    layer_of = {name: spec.layer for spec in artifact.layers for name in (spec.layer, *spec.names)}
    times: dict[str, Floats] = {}
    for node in nodes:
        key = layer_of.get(node["name"], f"{OTHER}/{node['op']}")
        times[key] = times.get(key, 0.0) + np.asarray(node["samples_ms"], dtype=float)
    lost = [spec.layer for spec in artifact.layers if spec.layer not in times]
    if lost:
        raise DeviceError(
            f"device {device.name}: {len(lost)} of {len(artifact.layers)} layers do not show in the profile "
            f"of {device.runtime}, the first is {lost[0]}; the operators seen are "
            f"{', '.join(node['name'] for node in nodes[:5])}, ..."
        )
    undisturbed_ms = quiet_ms(np.sum(list(times.values()), axis=0))
    return {key: values / undisturbed_ms for key, values in times.items()}


@contextlib.contextmanager
def measuring(device: Device) -> Iterator[Connection]:
    """A connection to the device, which nobody else of ours works on meanwhile."""
    # Importing the runtime needs no lock and would keep others waiting.
    connection = connect(device)
    with host_lock("measure") if device.is_local else connection.alone():
        yield connection


def _spec(device: Device, artifact: Artifact) -> dict[str, Any]:
    if (artifact.runtime, artifact.precision) != (device.runtime, device.precision):
        raise ValueError(
            f"device {device.name} runs {device.runtime} in {device.precision}, the artifact "
            f"{artifact.path.name} is for {artifact.runtime} in {artifact.precision}; "
            "export it for this device"
        )
    return {
        "runtime": device.runtime,
        "precision": device.precision,
        "threads": device.threads,
        "providers": list(device.providers),
        "input_shape": list(artifact.input_shape),
        "warmup": WARMUP,
    }


def _round(
    connection: Connection,
    specs: list[dict[str, Any]],
    *,
    first: int,
    round_s: float = ROUND_S,
    longest_s: float = math.inf,
    turns: int = TURNS,
    profile: dict[str, Any] | None = None,
) -> dict[str, Any]:
    request = {
        "do": "round",
        "specs": specs,
        "first": first,
        "turns": turns,
        "block_s": 0.05,
        "round_s": round_s,
        "longest_s": min(longest_s, ROUND_TIMEOUT_S),
        "profile": profile,
        "timeout_s": ROUND_TIMEOUT_S,
    }
    return connection.ask(request, timeout_s=ROUND_TIMEOUT_S * max(1, len(specs) - 1) + 60)


def _rounds_of_one(
    device: Device,
    artifact: Artifact,
    *,
    profiled: Sequence[int],
    warmup: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Rounds of one artifact, each of a fresh process.

    Args:
        profiled: per round how many inferences to profile operator by operator after its samples.
        warmup: inferences before those.
        progress: called after each round.
    """
    spec = _spec(device, artifact)
    done: list[dict[str, Any]] = []
    with measuring(device) as connection:
        spec["path"] = connection.send_file(artifact.path, artifact.digest)
        for repeats in profiled:
            profile = {"of": [0] if repeats else [], "repeats": repeats, "warmup": warmup}
            done.append(_round(connection, [spec], first=0, profile=profile))
            if progress:
                progress(f"round {len(done)} of {len(profiled)}: {float(np.median(_flat(done))):.3f} ms")
    return done


def _flat(rounds: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """All samples of rounds of one artifact in ms, in order of time."""
    return tuple(sample for done in rounds for _, samples in done["blocks"] for sample in samples)


def _samples(blocks: Sequence[tuple[int, Sequence[float]]], count: int) -> tuple[Floats, ...]:
    """Samples of each of `count` models in order of time, `(turns, runs)`."""
    return tuple(np.array([values for index, values in blocks if index == own]) for own in range(count))

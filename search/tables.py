"""JSON documents and terminal tables of profiles, scores, plans and devices: what the commands print.

The JSON keys are fixed: keys may be added, never renamed.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from profiles.device import DeviceFacts
from profiles.latency_profile import LatencyProfile

from .criteria import SOURCES
from .evidence import Evidence
from .plan import PruningPlan
from .prediction import predict_ms
from .result import TrialParams
from .scores import ChannelScores


def profile_json(profile: LatencyProfile) -> dict[str, Any]:
    """A device's entry of `paretoprune profile --json`."""
    delta, norm = profile.delta_ms, profile.delta_norm
    return {
        "fingerprint": profile.fingerprint,
        "model_ms": profile.model_ms,
        "other_ms": profile.other_ms,
        "channel_multiple": profile.channel_multiple,
        "layers": [
            {
                "layer": layer.layer,
                "latency_ms": layer.timing.mean_ms,
                "latency_p50_ms": layer.timing.p50_ms,
                "channels": layer.out_channels,
                "delta_ms": delta[layer.layer],
                "delta_norm": norm[layer.layer],
            }
            for layer in profile.layers
        ],
    }


def _add_layer_columns(table: Table, *numbers: str) -> None:
    """A layer's name in full, since names differ at their ends, and numbers that give way to it."""
    table.add_column("layer", no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")


def profile_table(name: str, profile: LatencyProfile) -> Table:
    table = Table(
        title=f"{name} ({profile.fingerprint}): {profile.model_ms:.2f} ms, "
        f"of which {profile.other_ms:.2f} ms outside the layers; "
        f"channels in multiples of {profile.channel_multiple}",
        title_justify="left",
    )
    _add_layer_columns(table, "channels", "latency ms", "share", "per channel µs", "normalised")
    for entry in profile_json(profile)["layers"]:
        table.add_row(
            entry["layer"],
            str(entry["channels"]),
            f"{entry['latency_ms']:.3f}",
            f"{entry['latency_ms'] / profile.model_ms:.1%}",
            f"{entry['delta_ms'] * 1e3:.2f}",
            f"{entry['delta_norm']:.3f}",
        )
    return table


def score_json(scores: ChannelScores) -> dict[str, Any]:
    """A criterion's entry of `paretoprune score --json`: per layer the channels' scores and their range."""
    return {
        "source": SOURCES[scores.criterion],
        "model_key": scores.model_key,
        "data_key": scores.data_key,
        "layers": [
            {
                "layer": name,
                "channels": len(v),
                "mean": float(v.mean()),
                "min": float(v.min()),
                "max": float(v.max()),
                "scores": v.tolist(),
            }
            for name, v in scores.layers.items()
        ],
    }


def score_table(scores: ChannelScores) -> Table:
    table = Table(
        title=f"{scores.criterion}, model {scores.model_key[:12]}",
        caption=SOURCES[scores.criterion],
        title_justify="left",
        caption_justify="left",
    )
    _add_layer_columns(table, "channels", "lowest", "mean", "highest")
    for entry in score_json(scores)["layers"]:
        table.add_row(
            entry["layer"], str(entry["channels"]), *(f"{entry[key]:.3g}" for key in ("min", "mean", "max"))
        )
    return table


def plan_json(plan: PruningPlan, params: TrialParams, known: Evidence) -> dict[str, Any]:
    """`paretoprune plan --json`. Channels are outputs of prunable layers, as the paper counts them."""
    prunable = {m.layer for group in known.groups.groups for m in group.weighted}
    layers = []
    for layer in known.profile.layers:
        if layer.layer not in prunable:
            continue
        cut = plan.layers.get(layer.layer)
        kept = cut.kept_out if cut else layer.out_channels
        layers.append(
            {
                "layer": layer.layer,
                "channels": layer.out_channels,
                "kept": 0 if plan.inside_blocks(layer.layer) else kept,
            }
        )
    removed = sum(
        len(plan.layers[layer].removed_out) if layer in plan.layers else 0
        for layer in prunable
        if not plan.inside_blocks(layer)
    ) + sum(known.groups.widths[layer][1] for layer in prunable if plan.inside_blocks(layer))
    return {
        "device": known.device.name,
        "fingerprint": known.profile.fingerprint,
        "beta": params.beta,
        "ratio": params.ratio,
        "round_to": params.round_to,
        "channels_total": known.groups.prunable_channels,
        "channels_removed": removed,
        "predicted_latency_ms": predict_ms(plan, known.profile),
        "baseline_latency_ms": known.profile.predict_ms({}),
        "digest": plan.digest,
        "blocks": list(plan.blocks),
        "layers": layers,
    }


def plan_title(document: dict[str, Any]) -> str:
    """A plan of `plan_json` in a line: what was asked, what goes, the predicted latency."""
    gone, total = document["channels_removed"], document["channels_total"]
    predicted, unpruned = document["predicted_latency_ms"], document["baseline_latency_ms"]
    return (
        f"{document['device']}, β {document['beta']:g}, ratio {document['ratio']:g}: "
        f"{gone} of {total} channels ({gone / total:.1%}); "
        f"predicted {predicted:.2f} ms of {unpruned:.2f} ms ({predicted / unpruned - 1:+.1%})"
    )


def plan_table(document: dict[str, Any]) -> Table:
    """The layers that lose channels, with a bar for the share."""
    blocks = document["blocks"]
    table = Table(
        title=plan_title(document),
        title_justify="left",
        caption=f"blocks that go as a whole: {', '.join(blocks)}" if blocks else None,
        caption_justify="left",
    )
    _add_layer_columns(table, "channels", "kept")
    table.add_column("removed")
    for layer in document["layers"]:
        removed = 1 - layer["kept"] / layer["channels"]
        if removed:
            bar = "█" * round(removed * 24)
            table.add_row(layer["layer"], str(layer["channels"]), str(layer["kept"]), f"{bar} {removed:.0%}")
    return table


def device_json(facts: DeviceFacts | str) -> dict[str, Any]:
    """A device's entry of `paretoprune devices --json`; a text is why it is not there."""
    if isinstance(facts, str):
        return {"available": False, "reason": facts}
    return {
        "available": True,
        "fingerprint": facts.fingerprint,
        "facts": dict(facts.stable),
        "state": dict(facts.state),
        "disturbances": list(facts.disturbances),
    }


def device_table(found: dict[str, DeviceFacts | str]) -> Table:
    table = Table(title_justify="left", show_lines=True)
    for heading in ("device", "what it is", "quiet?"):
        table.add_column(heading, overflow="fold")
    for name, facts in found.items():
        if isinstance(facts, str):
            table.add_row(name, f"[red]not there[/red]: {facts}", "")
            continue
        chip = facts.stable.get("gpu") or facts.stable.get("cpu")
        runtime = f"{facts.stable.get('runtime')} {facts.stable.get('runtime_version')}"
        noise = facts.disturbances
        table.add_row(
            name,
            f"{chip}, {facts.stable.get('cpus')} CPUs\n{runtime}, {facts.stable.get('threads')} threads, "
            f"{facts.stable.get('precision')}\n{facts.fingerprint}",
            "[green]yes[/green]" if not noise else "[yellow]no[/yellow]: " + "\n".join(noise),
        )
    return table

"""What a tracking store shows of a trial and of a front: names and values of params, metrics, tags, tables.

Works on the JSON form of the records, which is what waits in the outbox. Knows no store.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from .result import differing

METRICS = (
    "accuracy",
    "latency_ms",
    "latency_p90_ms",
    "latency_raw_ms",
    "speedup",
    "params",
    "macs",
    "predicted_latency_ms",
)
COLUMNS = (
    "trial",
    "beta",
    "ratio",
    "accuracy",
    "latency_ms",
    "latency_p90_ms",
    "speedup",
    "speedup_low",
    "speedup_high",
    "params",
    "macs",
    "run_id",
    "ratio_of",
    "criterion",
    "cost",
    "allocation",
    "round_to",
    "steps",
    "depth",
    "recovery",
)
TAG_CHARACTERS = 500


def result_digest(result: Mapping[str, Any]) -> str:
    """sha256 of a result's JSON form: equal results need no second logging."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def trial_params(result: Mapping[str, Any]) -> dict[str, str]:
    """What the trial was asked: `beta`, `ratio`, ..."""
    return {name: str(value) for name, value in result["asked"].items()}


def trial_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """What it measured, finite values only; units are in the names.

    The interval of the speedup becomes `speedup_low` and `speedup_high`, a step's time `duration_<step>_s`;
    numbers among the result's details keep their names unless one of ours is the same.
    """
    found: dict[str, Any] = {
        name: value for name, value in result["details"].items() if _is_metric_name(name)
    }
    found.update({name: result[name] for name in METRICS})
    if result["speedup_ci"]:
        found["speedup_low"], found["speedup_high"] = result["speedup_ci"]
    found.update({f"duration_{step}_s": seconds for step, seconds in result["duration_s"].items()})
    found["duration_s"] = sum(result["duration_s"].values())
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def trial_tags(result: Mapping[str, Any]) -> dict[str, str]:
    """What a reviewer filters by."""
    tags = {
        "device": result["device"],
        "fingerprint": result["fingerprint"],
        "optuna.trial_number": str(result["trial"]),
        "state": result["state"],
        "reason": (result["reason"] or "")[:TAG_CHARACTERS],
        "plan_digest": result["plan_digest"],
        "artifact_digest": result["artifact_digest"],
    }
    return {name: value for name, value in tags.items() if value}


def trial_period_ms(result: Mapping[str, Any]) -> tuple[int, int]:
    """Start and end of the trial as Unix times in ms; the end is now where there is no `finished_at`."""
    end_s = time.time()
    if result["finished_at"]:
        end_s = datetime.fromisoformat(result["finished_at"]).timestamp()
    return round((end_s - sum(result["duration_s"].values())) * 1000), round(end_s * 1000)


def front_rows(front: Mapping[str, Any], run_ids: Mapping[int, str]) -> list[dict[str, Any]]:
    """The front's points as flat records with the keys of COLUMNS, in the front's order."""
    rows = []
    for point in front["points"]:
        low, high = point.get("speedup_ci") or (None, None)
        row = {**point.get("asked", {}), **point, "speedup_low": low, "speedup_high": high}
        row["run_id"] = run_ids.get(point["trial"])
        rows.append({name: row.get(name) for name in COLUMNS})
    return rows


def front_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as CSV, which MLflow shows as a table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def front_note(device: str, front: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The front as Markdown, for the run's description, with the settings in which its points differ."""
    settings = differing(rows)
    base = front["baseline"]
    title = (
        f"**Pareto front of {device}**: {len(rows)} points, hypervolume {front['hypervolume']:.4f}. "
        f"Unpruned: accuracy {base['accuracy']:.4f} at {base['latency_ms']:.2f} ms."
    )
    lines = [
        title,
        "",
        "| trial | β | ratio | accuracy | latency, ms | p90, ms | speedup |"
        + "".join(f" {name.replace('_', ' ')} |" for name in settings),
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(settings),
    ]
    for row in rows:
        interval = (
            f" ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})" if row["speedup_low"] is not None else ""
        )
        lines.append(
            f"| {row['trial']} | {row['beta']:.3f} | {row['ratio']:.3f} | {row['accuracy']:.4f} | "
            f"{row['latency_ms']:.2f} | {row['latency_p90_ms']:.2f} | {row['speedup']:.2f}x{interval} |"
            + "".join(f" {_setting(row[name])} |" for name in settings)
        )
    for place in front.get("references", ()):
        how = "" if place["measured"] else ", as given"
        lines.append(
            f"| {place['name']}{how} | | | {place['accuracy']:.4f} | {place['latency_ms']:.2f} | | "
            f"{place['speedup']:.2f}x |" + " |" * len(settings)
        )
    return "\n".join(lines) + "\n"


def _setting(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_metric_name(name: str) -> bool:
    return bool(name) and len(name) < 200 and all(c.isalnum() or c in "_-. /" for c in name)

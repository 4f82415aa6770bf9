"""The report: one HTML file with every device's front, to open anywhere without a network.

Fills search/report.html, where the page's looks and its script are. Knows neither where the results come from
nor where the page goes.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figures import (
    beta_ratio_figure,
    front_figure,
    hypervolume_figure,
    importance_figure,
    predicted_measured_figure,
    profile_figure,
    pruned_share_figure,
)
from .front import ParetoFront
from .result import TrialResult, differing
from .widths import Widths

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = (
    ("accuracy", "accuracy", "{:.4f}"),
    ("latency, ms", "latency_ms", "{:.2f}"),
    ("speedup", "speedup", "{:.2f}"),
    ("β", "beta", "{:.3f}"),
    ("ratio", "ratio", "{:.3f}"),
    ("p90, ms", "latency_p90_ms", "{:.2f}"),
    ("parameters", "params", "{:,}"),
    ("MACs", "macs", "{:,}"),
)


def write_report(
    path: Path,
    study: str,
    fronts: Sequence[ParetoFront],
    results: Mapping[str, Sequence[TrialResult]],
    *,
    profiles: Mapping[str, Mapping[str, Any]] | None = None,
    widths: Mapping[str, Mapping[int, Widths]] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    hints: Mapping[str, str] | None = None,
    references: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    importances: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    run_ids: Mapping[str, Mapping[int, str]] | None = None,
    command: Sequence[str] = ("STUDY.yaml",),
    metric: str = "accuracy",
) -> Path:
    """Write the page; a reader of `path` sees the old page or the new one, never half of it.

    All mappings are by device.

    Args:
        fronts: one for each device that has a complete unpruned model; the page shows them in this order.
        results: every trial of a device, for what is not on the front; a device without a front is named.
        profiles: entries of `paretoprune profile --json`.
        widths: by trial number what `trial_widths` returns; a trial that is not in it is said to be unknown.
        limits: what the device's models must satisfy, as the study file spells it; those on accuracy and
            latency are drawn too.
        hints: what a reader of the device's front should know, one line each.
        references, importances: see `front_figure` and `importance_figure`.
        run_ids: MLflow's run of each trial.
        command: how the export command names the study, words after `paretoprune export`.
        metric: what the accuracy is.

    Raises:
        OSError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs

    figures: dict[str, Figure] = {}
    devices: dict[str, Any] = {}
    sections = []
    for number, front in enumerate(fronts):
        device = front.device
        trials = results.get(device, ())
        by_trial = (widths or {}).get(device, {})
        runs = (run_ids or {}).get(device, {})
        devices[device] = {
            **front.to_json({n: {"run_id": run_id} for n, run_id in runs.items()}),
            "knee": front.knee.trial,
            "trials": _trials(front, trials, by_trial, runs, command),
        }
        shown = {
            "front": front_figure(
                [front], {device: trials}, limits=limits, references=references, metric=metric
            ),
            **_more_figures(
                front, trials, by_trial, (profiles or {}).get(device), (importances or {}).get(device)
            ),
        }
        names = {title: f"device{number}-{place}" for place, title in enumerate(shown)}
        figures.update({names[title]: figure for title, figure in shown.items()})
        sections.append(
            _section(
                number,
                front,
                trials,
                names,
                references=(references or {}).get(device, ()),
                limits=(limits or {}).get(device, {}),
                hint=(hints or {}).get(device),
                metric=metric,
            )
        )
    if len(fronts) > 1:
        figures["all"] = front_figure(fronts, relative=True, metric=metric)
    fills = {
        "TITLE": html.escape(f"{study}: Pareto fronts"),
        "BODY": _body(study, fronts, results, sections),
        "DATA": _script_json({"study": study, "devices": devices}),
        "FIGURES": "{" + ",".join(f"{json.dumps(k)}:{_figure_json(f)}" for k, f in figures.items()) + "}",
        "PLOTLY": get_plotlyjs(),
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # One pass: what is filled in is never looked through for marks again.
    page = re.sub(r"@@([A-Z]+)@@", lambda mark: fills[mark[1]], template)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, path)
    return path


def write_figure(path: Path, figure: Figure) -> Path:
    """Write one figure as a page of its own that needs no network, about 5 MB.

    Raises:
        OSError: the file cannot be written.
    """
    # Plotly offers by default to send a chart to its own cloud.
    config = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "plotlyServerURL": ""}
    figure.write_html(path, include_plotlyjs=True, config=config)
    return path


def _more_figures(
    front: ParetoFront,
    trials: Sequence[TrialResult],
    widths: Mapping[int, Widths],
    profile: Mapping[str, Any] | None,
    importances: Mapping[str, Mapping[str, float]] | None,
) -> dict[str, Figure]:
    """Title to figure, for those that there is data for."""
    figures = {}
    if any(r.state == "complete" for r in trials):
        figures["Hypervolume after each trial"] = hypervolume_figure({front.device: trials})
        figures["β and ratio, by accuracy"] = beta_ratio_figure(trials, "accuracy")
        figures["β and ratio, by speedup"] = beta_ratio_figure(trials, "speedup")
    chosen = {f"trial {p.trial}": widths[p.trial] for p in front.points if widths.get(p.trial)}
    if chosen:
        figures["Share removed from each layer"] = pruned_share_figure(chosen)
    if any(r.state == "complete" and r.predicted_latency_ms is not None for r in trials):
        figures["Predicted and measured latency"] = predicted_measured_figure(trials)
    if importances:
        figures["What each parameter decides"] = importance_figure(importances)
    if profile:
        figures["Latency of each layer"] = profile_figure(profile)
    return figures


def _trials(
    front: ParetoFront,
    trials: Sequence[TrialResult],
    widths: Mapping[int, Widths],
    run_ids: Mapping[int, str],
    command: Sequence[str],
) -> dict[str, Any]:
    """What the page shows of a trial once it is chosen."""
    on_front = {p.trial for p in front.points}
    shown = {r.trial: r for r in (*trials, front.baseline, *front.points) if r.state == "complete"}
    return {
        str(number): {
            "asked": result.asked.to_json(),
            "accuracy": result.accuracy,
            "latency_ms": result.latency_ms,
            "latency_p90_ms": result.latency_p90_ms,
            "speedup": result.speedup,
            "speedup_ci": result.speedup_ci,
            "predicted_latency_ms": result.predicted_latency_ms,
            "params": result.params,
            "macs": result.macs,
            "run_id": run_ids.get(number),
            "pareto": number in on_front,
            "widths": [[layer, *width] for layer, width in widths[number].items()]
            if number in widths
            else None,
            "blocks": list(result.details.get("blocks") or ()),
            # Only a point of the front can be exported.
            "command": shlex.join(_export_command(command, front.device, number))
            if number in on_front
            else None,
            "instead": _instead(front, result),
        }
        for number, result in sorted(shown.items())
    }


def _export_command(study: Sequence[str], device: str, trial: int) -> list[str]:
    out = f"export/{device}-trial-{trial}"
    return ["paretoprune", "export", *study, "--device", device, "--trial", str(trial), "--out", out]


def _instead(front: ParetoFront, result: TrialResult) -> int | None:
    """The point to take instead of a dominated trial: the most accurate of those at most as slow."""
    if any(p.trial == result.trial for p in front.points) or result.fingerprint != front.fingerprint:
        return None
    within = [p.trial for p in front.points if (p.latency_ms or 0.0) <= (result.latency_ms or 0.0)]
    return within[-1] if within else None


def _body(
    study: str,
    fronts: Sequence[ParetoFront],
    results: Mapping[str, Sequence[TrialResult]],
    sections: Sequence[str],
) -> str:
    total = sum(len(trials) for trials in results.values())
    lines = [
        "<header>",
        f"<h1>{html.escape(study)}</h1>",
        '<p class="soft">Pruned versions worth shipping, for each device: nothing measured is both faster '
        f"and more accurate. {total} trial{'s' * (total != 1)} on {len(fronts)} "
        f"device{'s' * (len(fronts) != 1)}.</p>",
    ]
    if len(fronts) > 1:
        links = (f'<a href="#device{n}">{html.escape(f.device)}</a>' for n, f in enumerate(fronts))
        lines += ["<nav>", *links, "</nav>"]
    lines += ["</header>", "<main>"]
    if len(fronts) > 1:
        label = "Fronts of all devices"
        lines += [
            '<div class="card"><h2>All devices</h2>',
            '<p class="soft small">Latency relative to the unpruned model on the same device.</p>',
            f'<div class="figure" data-figure="all" role="img" aria-label="{label}"></div></div>',
        ]
    lines += sections
    missing = [device for device in results if device not in {front.device for front in fronts}]
    if missing:
        text = f"No front yet, the unpruned model is not measured: {html.escape(', '.join(missing))}"
        lines.append(f'<p class="card">{text}</p>')
    lines += [
        "</main>",
        '<footer class="soft small">Latency is measured on the exported model in its own runtime, in turns '
        "with the unpruned model; bars and brackets are 95% intervals. Export commands are for the folder of "
        "the study file. Written by paretoprune.</footer>",
    ]
    return "\n".join(lines)


def _section(
    number: int,
    front: ParetoFront,
    trials: Sequence[TrialResult],
    names: Mapping[str, str],
    *,
    references: Sequence[Mapping[str, Any]],
    limits: Mapping[str, float],
    hint: str | None,
    metric: str,
) -> str:
    device, base = html.escape(front.device), front.baseline
    ended = {state: sum(r.state == state for r in trials) for state in ("stopped", "failed")}
    fastest = front.points[0]
    facts = [
        (f"{base.accuracy:.4f}", f"{metric}, unpruned"),
        (f"{base.latency_ms:.2f} ms", "latency, unpruned"),
        (f"{fastest.speedup:.2f} times", "fastest point"),
        (f"{front.hypervolume:.3f}", "hypervolume"),
        (str(len(front.points)), "points on the front"),
    ]
    counts = f"{len(trials)} trials" + "".join(f", {n} {state}" for state, n in ended.items() if n)
    lines = [
        f'<section class="device" id="device{number}" data-device="{device}">',
        f"<h2>{device}</h2>",
        f'<p class="soft small">{html.escape(front.fingerprint)} · {counts}</p>',
        '<div class="facts">',
        *(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in facts),
        "</div>",
        *([f'<p class="soft small limits">Limits: {_limits(limits)}</p>'] if limits else []),
        *([f'<p class="small hint">{html.escape(hint)}</p>'] if hint else []),
        f'<div class="figure" data-figure="{names["front"]}" data-device="{device}" role="img" '
        f'aria-label="Accuracy against latency on {device}; the table below holds the same points"></div>',
        _table(front, trials, references),
        '<div class="detail" aria-live="polite"></div>',
        '<div class="figures">',
    ]
    for title, name in names.items():
        if title != "front":
            lines.append(
                f'<figure><h3>{html.escape(title)}</h3><div class="figure" data-figure="{name}" '
                f'data-device="{device}" role="img" aria-label="{html.escape(title)}"></div></figure>'
            )
    lines += ["</div>", "</section>"]
    return "\n".join(lines)


def _limits(limits: Mapping[str, float]) -> str:
    """`latency_ms at most 33, accuracy at least 0.55`, with the study file's keys."""
    words = {"accuracy": "at least"}
    return ", ".join(f"{key} {words.get(key, 'at most')} {value:,}" for key, value in limits.items())


def _table(front: ParetoFront, trials: Sequence[TrialResult], references: Sequence[Mapping[str, Any]]) -> str:
    """The front's points, to choose from, and between them what to compare with; fastest first.

    Of what a trial was asked those keys are shown in which the device's trials differ.
    """
    searched = differing(r.asked.to_json() for r in (*trials, *front.points, front.baseline))
    columns = (*_COLUMNS, *((key.replace("_", " "), key, "{}") for key in searched))
    device = html.escape(front.device)
    on_front = {p.trial for p in front.points}
    points = list(front.points) + ([] if front.baseline.trial in on_front else [front.baseline])
    rows = []
    for point in points:
        badges = [
            *(["knee"] if point.trial == front.knee.trial else []),
            *(["unpruned"] if point.trial == front.baseline.trial else []),
            *(["not on the front"] if point.trial not in on_front else []),
        ]
        asked = point.asked.to_json()
        values = {key: asked[key] if key in asked else getattr(point, key) for _, key, _ in columns}
        opening = f'<tr class="point" tabindex="0" data-device="{device}" data-trial="{point.trial}">'
        name = f"{point.trial}" + "".join(f"<span class=badge>{badge}</span>" for badge in badges)
        rows.append((point.latency_ms or 0.0, opening + _cells(columns, name, values, point.speedup_ci)))
    for place in references:
        badge = "reference" if place.get("measured") else "as given, not measured"
        name = f"{html.escape(str(place['name']))}<span class=badge>{badge}</span>"
        cells = _cells(columns, name, place, place.get("speedup_ci"))
        rows.append((place["latency_ms"], f'<tr class="reference">{cells}'))
    heads = "".join(f"<th scope='col'>{title}</th>" for title, _, _ in columns)
    return "\n".join(
        [
            '<div class="scroll"><table>',
            f"<thead><tr><th scope='col'>trial</th>{heads}</tr></thead>",
            "<tbody>",
            *(row for _, row in sorted(rows, key=lambda row: row[0])),
            "</tbody>",
            "</table></div>",
        ]
    )


def _cells(
    columns: Sequence[tuple[str, str, str]],
    name: str,
    values: Mapping[str, Any],
    interval: Sequence[float] | None,
) -> str:
    cells = [f"<td>{name}</td>"]
    for _, key, pattern in columns:
        value = values.get(key)
        if isinstance(value, float) and pattern == "{}":
            pattern = "{:.3f}"
        text = "-" if value is None else html.escape(pattern.format(value))
        if key == "speedup" and interval:
            text += f' <span class="soft small">({interval[0]:.2f} to {interval[1]:.2f})</span>'
        cells.append(f"<td>{text}</td>")
    return "".join(cells) + "</tr>"


def _script_json(value: Any) -> str:
    return _safe(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _figure_json(figure: Figure) -> str:
    return _safe(str(figure.to_json()))


def _safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")

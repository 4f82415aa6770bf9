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
    Widths,
    beta_ratio_figure,
    front_figure,
    hypervolume_figure,
    importance_figure,
    predicted_measured_figure,
    profile_figure,
    pruned_share_figure,
)
from .front import ParetoFront
from .plan import PruningPlan
from .result import TrialResult

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


def layer_widths(plan: PruningPlan, original: Mapping[str, int] | None = None) -> dict[str, tuple[int, int]]:
    """Output channels of each layer before and after a plan.

    Args:
        original: layer to its output channels in the unpruned model, in the network's order: those that keep
            everything are then listed too. Without it only narrowed layers are, sorted by name.

    Returns:
        Layer to (before, after); batch norms are left out.
    """
    narrowed = {
        name: (cut.channels_out, cut.kept_out)
        for name, cut in plan.layers.items()
        if cut.channels_in and cut.removed_out
    }
    if original is None:
        return {name: narrowed[name] for name in sorted(narrowed, key=_in_order)}
    every = {name: narrowed.get(name, (channels, channels)) for name, channels in original.items()}
    return every | {name: width for name, width in narrowed.items() if name not in every}


def write_report(
    path: Path,
    study: str,
    fronts: Sequence[ParetoFront],
    results: Mapping[str, Sequence[TrialResult]],
    *,
    profiles: Mapping[str, Mapping[str, Any]] | None = None,
    widths: Mapping[str, Mapping[int, Widths]] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    references: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    importances: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    run_ids: Mapping[str, Mapping[int, str]] | None = None,
    study_file: str = "STUDY.yaml",
) -> Path:
    """Write the page; a reader of `path` sees the old page or the new one, never half of it.

    All mappings are by device.

    Args:
        fronts: one for each device that has a complete unpruned model; the page shows them in this order.
        results: every trial of a device, for what is not on the front.
        profiles: entries of `paretoprune profile --json`.
        widths: by trial number what `layer_widths` returns.
        limits, references, importances: see `front_figure` and `importance_figure`.
        run_ids: MLflow's run of each trial.
        study_file: as the export command should name it.

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
            "trials": _trials(front, trials, by_trial, runs, study_file),
        }
        shown = {
            "front": front_figure([front], {device: trials}, limits=limits, references=references),
            **_more_figures(
                front, trials, by_trial, (profiles or {}).get(device), (importances or {}).get(device)
            ),
        }
        names = {title: f"device{number}-{place}" for place, title in enumerate(shown)}
        figures.update({names[title]: figure for title, figure in shown.items()})
        sections.append(_section(number, front, trials, names))
    if len(fronts) > 1:
        figures["all"] = front_figure(fronts, relative=True)
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
    study_file: str,
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
            "widths": [[layer, *width] for layer, width in widths.get(number, {}).items()],
            "command": shlex.join(_export_command(study_file, front.device, number)),
        }
        for number, result in sorted(shown.items())
    }


def _export_command(study_file: str, device: str, trial: int) -> list[str]:
    out = f"export/{device}-trial-{trial}"
    return ["paretoprune", "export", study_file, "--device", device, "--trial", str(trial), "--out", out]


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
        f"and more accurate. {total} trials on {len(results) or len(fronts)} devices.</p>",
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
        "with the unpruned model; bars and brackets are 95% intervals. Written by paretoprune.</footer>",
    ]
    return "\n".join(lines)


def _section(number: int, front: ParetoFront, trials: Sequence[TrialResult], names: Mapping[str, str]) -> str:
    device, base = html.escape(front.device), front.baseline
    ended = {state: sum(r.state == state for r in trials) for state in ("stopped", "failed")}
    fastest = front.points[0]
    facts = [
        (f"{base.accuracy:.4f}", "accuracy, unpruned"),
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
        f'<div class="figure" data-figure="{names["front"]}" data-device="{device}" role="img" '
        f'aria-label="Accuracy against latency on {device}; the table below holds the same points"></div>',
        _table(front),
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


def _table(front: ParetoFront) -> str:
    device = html.escape(front.device)
    on_front = {p.trial for p in front.points}
    rows = list(front.points) + ([] if front.baseline.trial in on_front else [front.baseline])
    lines = [
        '<div class="scroll"><table>',
        "<thead><tr><th scope='col'>trial</th>"
        + "".join(f"<th scope='col'>{title}</th>" for title, _, _ in _COLUMNS)
        + "</tr></thead>",
        "<tbody>",
    ]
    for row in sorted(rows, key=lambda r: (r.latency_ms or 0.0, r.trial)):
        badges = [
            *(["knee"] if row.trial == front.knee.trial else []),
            *(["unpruned"] if row.trial == front.baseline.trial else []),
            *(["not on the front"] if row.trial not in on_front else []),
        ]
        cells = [f"<td>{row.trial}{''.join(f'<span class=badge>{badge}</span>' for badge in badges)}</td>"]
        for _, key, pattern in _COLUMNS:
            value = getattr(row.asked if key in ("beta", "ratio") else row, key)
            text = "-" if value is None else pattern.format(value)
            if key == "speedup" and row.speedup_ci:
                low, high = row.speedup_ci
                text += f' <span class="soft small">({low:.2f} to {high:.2f})</span>'
            cells.append(f"<td>{text}</td>")
        lines.append(
            f'<tr class="point" tabindex="0" data-device="{device}" data-trial="{row.trial}">'
            f"{''.join(cells)}</tr>"
        )
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def _script_json(value: Any) -> str:
    return _safe(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _figure_json(figure: Figure) -> str:
    return _safe(str(figure.to_json()))


def _safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `model.10` after `model.9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

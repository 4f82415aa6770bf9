"""The study's figures, as Plotly objects: fronts, progress, the search space, profiles and predictions.

Each function takes plain records and returns a `plotly.graph_objects.Figure`. Knows no file, no store and no
page: report.py puts figures on a page, tracking.py keeps the page.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .front import ParetoFront
from .hover import describe, why_ended
from .result import TrialResult
from .widths import Widths

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# At least 3:1 on white and on the report's dark ground, and apart for the common colour-blindnesses.
COLOURS = ("#2f7fd0", "#cf6a17", "#14917b", "#a35fc4", "#d1476f", "#84800f")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "hexagon")
GREY = "#8a8f98"
SCALE = "Cividis"  # even in lightness, and made for colour-blind readers


def front_figure(
    fronts: Sequence[ParetoFront],
    results: Mapping[str, Sequence[TrialResult]] | None = None,
    *,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    references: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    relative: bool = False,
    metric: str = "accuracy",
) -> Figure:
    """Accuracy against latency: each device's front, its unpruned model as a star, dominated trials behind.

    The horizontal bars are the 95% interval of the speedup, turned into latency.

    Args:
        results: by device, for the dominated trials.
        limits: by device `latency_ms` and `accuracy`, drawn as lines.
        references: by device stock models to compare with, as in `paretoprune front --json`: each `name`,
            `accuracy`, `latency_ms`, `measured`, and `speedup` with `speedup_ci` where it was measured.
        relative: latency in percent of the device's unpruned model, to show unequal devices together.
        metric: what the accuracy is, for the axis.
    """
    figure = _figure("latency, % of the unpruned model" if relative else "latency, ms", metric)
    for number, front in enumerate(fronts):
        colour, symbol = COLOURS[number % len(COLOURS)], SYMBOLS[number % len(SYMBOLS)]
        name = html.escape(front.device)
        scale = 100.0 / _value(front.baseline.latency_ms) if relative else 1.0
        on_front = {p.trial for p in front.points} | {front.baseline.trial}
        others = [
            r
            for r in (results or {}).get(front.device, ())
            if r.state == "complete" and r.trial not in on_front and r.fingerprint == front.fingerprint
        ]
        if others:
            figure.add_scatter(
                **_points(others, scale),
                mode="markers",
                name=f"{name}: dominated" if len(fronts) > 1 else "dominated",
                marker={"color": GREY, "size": 7, "symbol": symbol, "opacity": 0.75},
                meta={"device": front.device, "role": "dominated"},
            )
        figure.add_scatter(
            **_points(front.points, scale),
            mode="lines+markers",
            name=name if len(fronts) > 1 else "front",
            # Up to the next point's latency nothing better than the last one is to be had: steps, not slopes.
            line={"color": colour, "width": 2, "shape": "hv"},
            marker={"color": colour, "size": 10, "symbol": symbol},
            error_x={**_interval_ms(front.points, scale), "color": colour, "thickness": 1, "width": 3},
            meta={"device": front.device, "role": "front"},
        )
        figure.add_scatter(
            **_points([front.baseline], scale),
            mode="markers",
            name=f"{name}: unpruned" if len(fronts) > 1 else "unpruned",
            marker={"color": colour, "size": 17, "symbol": "star", "line": {"color": "white", "width": 1}},
            meta={"device": front.device, "role": "baseline"},
        )
        for place in (references or {}).get(front.device, ()):
            label, how = html.escape(str(place["name"])), "measured" if place.get("measured") else "as given"
            latency_ms, ci = place["latency_ms"] * scale, place.get("speedup_ci")
            speedup = place.get("speedup") or 1.0
            figure.add_scatter(
                x=[latency_ms],
                y=[place["accuracy"]],
                mode="markers+text",
                text=[label],
                textposition="top center",
                name=label,
                showlegend=False,
                hovertemplate=f"<b>{label}</b>, {how}<br>accuracy %{{y:.4f}}<br>%{{x:.2f}}<extra></extra>",
                marker={"color": colour, "size": 10, "symbol": "x-thin-open", "line": {"width": 2}},
                error_x={**_bars([(latency_ms, speedup, ci)]), "color": colour, "thickness": 1, "width": 3},
                textfont={"color": colour, "size": 11},
                meta={"device": front.device, "role": "reference"},
            )
        _draw_limits(figure, (limits or {}).get(front.device, {}), colour, scale)
    return figure


def hypervolume_figure(results: Mapping[str, Sequence[TrialResult]]) -> Figure:
    """How each device's front grew: hypervolume after each complete trial; no baseline, no curve."""
    figure = _figure("complete trials", "hypervolume")
    for number, (device, trials) in enumerate(results.items()):
        complete = sorted((r for r in trials if r.state == "complete"), key=lambda r: r.trial)
        if not complete or complete[0].trial != 0:
            continue
        complete = [r for r in complete if r.fingerprint == complete[0].fingerprint]
        values = [ParetoFront.of(complete[: n + 1]).hypervolume for n in range(len(complete))]
        figure.add_scatter(
            x=list(range(1, len(values) + 1)),
            y=values,
            mode="lines+markers",
            name=html.escape(device),
            line={"color": COLOURS[number % len(COLOURS)], "shape": "hv"},
            marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 6},
            text=[f"trial {r.trial}" for r in complete],
            hovertemplate="%{text}<br>hypervolume %{y:.4f}<extra></extra>",
        )
    figure.update_layout(showlegend=len(figure.data) > 1)
    return figure


def beta_ratio_figure(results: Sequence[TrialResult], colour: str = "accuracy") -> Figure:
    """Where the search looked: β against ratio, coloured by `accuracy` or `speedup`; ended trials are hollow.

    Raises:
        ValueError: `colour` is neither of the two.
    """
    if colour not in ("accuracy", "speedup"):
        raise ValueError(f"colour must be accuracy or speedup, got {colour!r}")
    figure = _figure("β", "ratio")
    complete = [r for r in results if r.state == "complete"]
    ended = [r for r in results if r.state != "complete"]
    if ended:
        figure.add_scatter(
            x=[r.asked.beta for r in ended],
            y=[r.asked.ratio for r in ended],
            mode="markers",
            marker={"color": GREY, "symbol": "circle-open", "size": 9},
            text=[f"trial {r.trial} {r.state}: {why_ended(r)}" for r in ended],
            hovertemplate="%{text}<br>β %{x:.3f}, ratio %{y:.3f}<extra></extra>",
        )
    figure.add_scatter(
        x=[r.asked.beta for r in complete],
        y=[r.asked.ratio for r in complete],
        mode="markers",
        marker={
            "color": [getattr(r, colour) for r in complete],
            "colorscale": SCALE,
            "showscale": True,
            "colorbar": {"title": {"text": colour}, "thickness": 12, "outlinewidth": 0},
            "size": 12,
            "line": {"color": GREY, "width": 1},
        },
        customdata=[[r.trial] for r in complete],
        text=[describe(r) for r in complete],
        hovertemplate="%{text}<extra></extra>",
    )
    figure.update_layout(showlegend=False)
    return figure


def profile_figure(profile: Mapping[str, Any]) -> Figure:
    """Latency of each layer and, below, its latency per channel by equation (6): the paper's figure 2.

    Args:
        profile: a device's entry of `paretoprune profile --json`: `layers`, each `layer`, `latency_ms`,
            `channels`, `delta_norm`.
    """
    from plotly.subplots import make_subplots

    layers = profile["layers"]
    figure = _figure("", "", make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08))
    names = [html.escape(entry["layer"]) for entry in layers]
    for row, (key, colour) in enumerate((("latency_ms", COLOURS[0]), ("delta_norm", COLOURS[1])), start=1):
        figure.add_bar(
            x=list(range(len(layers))),
            y=[entry[key] for entry in layers],
            marker={"color": colour, "line": {"width": 0}},
            text=[f"{name}, {entry['channels']} channels" for name, entry in zip(names, layers, strict=True)],
            textposition="none",
            hovertemplate="%{text}<br>%{y:.4g}<extra></extra>",
            row=row,
            col=1,
        )
    figure.update_yaxes(title_text="ms", row=1, col=1)
    figure.update_yaxes(title_text="δ̃, per channel", row=2, col=1)
    figure.update_xaxes(title_text="layer", row=2, col=1)
    figure.update_layout(showlegend=False)
    return figure


def fit_figure(checks: Sequence[Sequence[float]]) -> Figure:
    """How well a latency model predicts: pruned versions that it was not fitted to, against the clock.

    Args:
        checks: of each version the predicted and the measured latency in ms, see `LatencyModel.checks`.
    """
    figure = _figure("predicted latency, ms", "measured latency, ms")
    if checks:
        ends = [min(min(pair) for pair in checks), max(max(pair) for pair in checks)]
        for share, dash in ((1.0, "solid"), (0.95, "dot"), (1.05, "dot")):
            line = {"color": GREY, "dash": dash, "width": 1}
            measured = [share * end for end in ends]
            figure.add_scatter(x=ends, y=measured, mode="lines", line=line, hoverinfo="skip")
    figure.add_scatter(
        x=[predicted for predicted, _ in checks],
        y=[measured for _, measured in checks],
        mode="markers",
        marker={"color": COLOURS[2], "size": 9},
        customdata=[predicted / measured - 1 for predicted, measured in checks],
        hovertemplate="predicted %{x:.3f} ms<br>measured %{y:.3f} ms<br>%{customdata:+.1%}<extra></extra>",
    )
    figure.update_layout(showlegend=False)
    return figure


def pruned_share_figure(widths: Mapping[str, Widths]) -> Figure:
    """Share of each layer's channels removed, the paper's figure 3b: bars for one model, a map for more.

    Args:
        widths: label of a model (`trial 7`) to its layers' channels before and after. A layer that one of
            them lacks kept everything there.
    """
    layers = list(dict.fromkeys(layer for model in widths.values() for layer in model))
    shares = [[_removed_percent(model, layer) for layer in layers] for model in widths.values()]
    names = [html.escape(layer) for layer in layers]
    figure = _figure("layer", "")
    if len(shares) == 1:
        figure.add_bar(
            x=list(range(len(layers))),
            y=shares[0],
            marker={"color": COLOURS[0], "line": {"width": 0}},
            text=names,
            textposition="none",
            hovertemplate="%{text}<br>%{y:.1f}% removed<extra></extra>",
        )
        figure.update_yaxes(title_text="removed, %", range=[0, 100])
    else:
        figure.add_heatmap(
            z=shares,
            y=[html.escape(label) for label in widths],
            text=[names for _ in shares],
            hovertemplate="%{y}<br>%{text}<br>%{z:.1f}% removed<extra></extra>",
            colorscale=SCALE,
            zmin=0,
            zmax=100,
            colorbar={"title": {"text": "removed, %"}, "thickness": 12, "outlinewidth": 0},
        )
        figure.update_yaxes(type="category", autorange="reversed")  # the first model on top
    return figure


def plan_figure(title: str, widths: Widths) -> Figure:
    """`pruned_share_figure` of one plan as a picture by itself, a page wide: with a title and all names."""
    figure = pruned_share_figure({"": widths})
    figure.update_layout(title={"text": html.escape(title), "font": {"size": 15}}, margin_t=56)
    # The names say what the axis is; its title would lie across the longest of them.
    figure.update_xaxes(
        title_text="",
        tickvals=list(range(len(widths))),
        ticktext=[html.escape(layer) for layer in widths],
        tickangle=-90,
        tickfont_size=10,
    )
    return figure


def predicted_measured_figure(results: Sequence[TrialResult]) -> Figure:
    """Latency as the device's model predicted it against what was measured; on the line they agree."""
    both = [r for r in results if r.state == "complete" and r.predicted_latency_ms is not None]
    figure = _figure("predicted latency, ms", "measured latency, ms")
    predicted = [_value(r.predicted_latency_ms) for r in both]
    measured = [_value(r.latency_ms) for r in both]
    if both:
        ends = [min(predicted + measured), max(predicted + measured)]
        line = {"color": GREY, "dash": "dot", "width": 1}
        figure.add_scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip")
    interval = _interval_ms(both, 1.0)
    figure.add_scatter(
        x=predicted,
        y=measured,
        mode="markers",
        marker={"color": COLOURS[0], "size": 9},
        error_y={**interval, "color": COLOURS[0], "thickness": 1, "width": 3},
        customdata=[[r.trial] for r in both],
        text=[describe(r) for r in both],
        hovertemplate="%{text}<br>predicted %{x:.2f} ms<extra></extra>",
    )
    figure.update_layout(showlegend=False)
    return figure


def importance_figure(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """How much each parameter decides.

    Args:
        importances: objective (`accuracy`) to parameter to importance, which sum to 1 for each objective.
    """
    figure = _figure("importance", "")
    for number, (objective, values) in enumerate(importances.items()):
        ordered = sorted(values.items(), key=lambda item: item[1])
        figure.add_bar(
            y=[html.escape(name) for name, _ in ordered],
            x=[value for _, value in ordered],
            orientation="h",
            name=html.escape(objective),
            marker={"color": COLOURS[number % len(COLOURS)], "line": {"width": 0}},
            hovertemplate="%{y} %{x:.3f}<extra>" + html.escape(objective) + "</extra>",
        )
    figure.update_yaxes(type="category")
    return figure


def _figure(x: str, y: str, figure: Any = None) -> Figure:
    """An empty figure in the project's style; clear grounds, so that a page can be light or dark."""
    import plotly.graph_objects as go

    figure = go.Figure() if figure is None else figure
    axis = {"gridcolor": "rgba(138,143,152,0.25)", "zeroline": False, "linecolor": GREY, "automargin": True}
    figure.update_layout(
        template="none",
        font={
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "size": 13,
            "color": "#30343b",
        },
        margin={"l": 56, "r": 16, "t": 16, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        hoverlabel={"align": "left"},
        barmode="group",
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure


def _draw_limits(figure: Figure, asked: Mapping[str, float], colour: str, scale: float) -> None:
    """Lines at the limits; one far from every point is named at the edge, where it does not squeeze them."""
    for key, axis, add, factor in (
        ("latency_ms", "x", figure.add_vline, scale),
        ("accuracy", "y", figure.add_hline, 1.0),
    ):
        if key not in asked:
            continue
        place, values = asked[key] * factor, [v for trace in figure.data for v in trace[axis]]
        low, high = min(values), max(values)
        if low - 0.5 * (high - low) - 0.1 * high <= place <= high + 0.5 * (high - low) + 0.1 * high:
            line = {"color": colour, "dash": "dash", "width": 1}
            add(place, line=line, annotation_text="limit", annotation_font_color=colour)
            continue
        beyond = place > high
        x, y = (float(beyond), 0.0) if axis == "x" else (0.0, float(beyond))
        text = f"limit {place:g} " + {"x": "←→", "y": "↓↑"}[axis][beyond]
        anchors = {"xanchor": "right" if x else "left", "yanchor": "top" if y else "bottom"}
        figure.add_annotation(
            x=x, y=y, xref="paper", yref="paper", text=text, showarrow=False, font_color=colour, **anchors
        )  # fmt: skip


def _points(results: Sequence[TrialResult], scale: float) -> dict[str, Any]:
    return {
        "x": [_value(r.latency_ms) * scale for r in results],
        "y": [_value(r.accuracy) for r in results],
        "customdata": [[r.trial] for r in results],
        "text": [describe(r) for r in results],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _interval_ms(results: Sequence[TrialResult], scale: float) -> dict[str, Any]:
    return _bars([(_value(r.latency_ms) * scale, r.speedup or 1.0, r.speedup_ci) for r in results])


def _bars(values: Sequence[tuple[float, float, Sequence[float] | None]]) -> dict[str, Any]:
    """Error bars of (latency, speedup, its interval): a lower speedup is a higher latency."""
    plus, minus = [], []
    for latency, speedup, interval in values:
        low, high = interval or (None, None)
        plus.append(max(0.0, latency * (speedup / low - 1)) if low else 0.0)
        minus.append(max(0.0, latency * (1 - speedup / high)) if high else 0.0)
    return {"type": "data", "symmetric": False, "array": plus, "arrayminus": minus}


def _removed_percent(model: Widths, layer: str) -> float:
    before, after = model.get(layer, (1, 1))
    return 100.0 * (1 - after / before)


def _value(number: float | None) -> float:
    assert number is not None
    return number

"""What a figure says of a trial under the pointer, as the HTML that Plotly takes. Knows no figure."""

from __future__ import annotations

import html

from .result import TrialResult
from .uri import publishable


def why_ended(r: TrialResult) -> str:
    """Why a trial ended; a figure leaves this machine, so its paths stay here."""
    return html.escape(str(publishable(r.reason or ""))[:90])


def describe(r: TrialResult) -> str:
    """A complete trial: what it was asked, as far as trials commonly differ in it, and what it measured."""
    asked = r.asked
    depth = f", depth {asked.depth:.3f}" if asked.depth else ""
    steps = f", {asked.steps} steps" if asked.steps > 1 else ""
    recovery = f", {html.escape(asked.recovery)}" if asked.recovery != "finetune" else ""
    return (
        f"<b>trial {r.trial}</b>{' (unpruned)' if r.trial == 0 else ''}<br>"
        f"β {asked.beta:.3f}, ratio {asked.ratio:.3f} of {html.escape(asked.ratio_of)}{depth}<br>"
        f"{html.escape(asked.criterion)}, {html.escape(asked.allocation)}, cost {html.escape(asked.cost)}, "
        f"multiples of {asked.round_to}{steps}{recovery}<br>"
        f"accuracy {_value(r.accuracy):.4f}<br>"
        f"{_value(r.latency_ms):.2f} ms, p90 {_value(r.latency_p90_ms):.2f} ms, {_value(r.speedup):.2f} times"
    )


def _value(number: float | None) -> float:
    assert number is not None
    return number

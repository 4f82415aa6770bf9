"""The page of `paretoprune profile --html`: what a layer costs on each device, and how well it is known.

Knows profiles and figures; measures nothing and reads no store.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from profiles.latency_profile import LatencyProfile

from .figures import fit_figure, profile_figure
from .tables import profile_json

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1d2430;"
    "background:#fff}h1{font-size:1.4rem}h2{font-size:1.15rem;margin:2rem 0 0}"
    "h3{font-size:1rem;margin:1rem 0 0}p{margin:.2rem 0;color:#505a68}"
)


def write_profile_page(path: Path, profiles: Mapping[str, LatencyProfile]) -> Path:
    """Write one self-contained page for all devices.

    Raises:
        OSError: the file cannot be written.
    """
    config = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "plotlyServerURL": ""}
    parts = []
    for name, profile in profiles.items():
        parts.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(_summary(profile))}</p>")
        figures = {"Layers": profile_figure(profile_json(profile))}
        if profile.model.checks:
            figures["Latency model: pruned versions it was not fitted to; dotted lines at 5%"] = fit_figure(
                profile.model.checks
            )
        for title, figure in figures.items():
            first = not any("<script" in part for part in parts)
            body = figure.to_html(full_html=False, include_plotlyjs=first, config=config)
            parts.append(f"<h3>{html.escape(title)}</h3>{body}")
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Latency profiles</title><style>{_STYLE}</style></head>"
        f"<body><h1>Latency profiles</h1>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    return path


def _summary(profile: LatencyProfile) -> str:
    error = profile.model.error
    known = "" if error is None else f"; nine of ten unseen versions predicted within {error:.1%}"
    # Only variants show the multiple, and only a fitted model has any.
    found = "works best with channels" if profile.model.kind == "fitted" else "channels, by default,"
    return (
        f"{profile.fingerprint}: {profile.model_ms:.2f} ms, of which {profile.other_ms:.2f} ms outside the "
        f"layers; {found} in multiples of {profile.channel_multiple}; "
        f"latency model: {profile.model.kind}{known}"
    )

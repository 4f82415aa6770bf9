"""The page of profiles: everything measured is on it, and nothing is fetched."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from search.figures import fit_figure
from search.profile_page import write_profile_page
from search.tables import profile_json

from .test_budget import Net, make_profile


def test_every_device_layer_and_check_is_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = Net().eval()
    profile = make_profile(model, {"a": 2.0, "b": 0.5})
    fitted = replace(profile, model=replace(profile.model, error=0.04, checks=((4.0, 4.1), (6.5, 6.0))))
    page = write_profile_page(tmp_path / "profile.html", {"near <1>": fitted, "far": profile}).read_text()
    assert "near &lt;1&gt;" in page
    assert "within 4.0%" in page
    assert "; channels, by default, in multiples of " in page  # none of the two was fitted to variants
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    drawn_data = re.findall(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*\{', page)
    charts = [json.loads(found) for found in drawn_data]
    assert len(charts) == 3  # two profiles, and one fit that was checked
    drawn = {text.split(",")[0] for trace in charts[0] for text in trace["text"]}
    assert drawn == {layer["layer"] for layer in profile_json(profile)["layers"]}


def test_points_stand_at_predicted_and_measured() -> None:
    figure = fit_figure([(4.0, 4.1), (6.5, 6.0)])
    points = figure.data[-1]
    np.testing.assert_allclose(points.x, [4.0, 6.5])
    np.testing.assert_allclose(points.y, [4.1, 6.0])
    for line, share in zip(figure.data[:3], (1.0, 0.95, 1.05), strict=True):
        np.testing.assert_allclose(np.array(line.y) / np.array(line.x), share)

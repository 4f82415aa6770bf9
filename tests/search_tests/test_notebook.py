"""A study in a notebook: what is set and asked for there is what a launch gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import search.notebook
from search.notebook import Study

STUDY = """
name: s
model: model.pt
data: data.yaml
devices: [{name: laptop, runtime: torch}]
storage: postgresql://host/optuna
limits: {accuracy: 0.5}
trials: 7
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for name in ("model.pt", "data.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"storage": None}, "storage", None),
        ({"limits.accuracy": None}, "limits.accuracy", None),
        ({"search.beta": 0.5}, "search.beta", 0.5),
        ({"stopping.enabled": False}, "stopping.enabled", False),
        ({"search.round_to": {"choices": [4, 8]}}, "search.round_to.choices", (4, 8)),
        ({"search.ratio": "{low: 0.1, high: 0.5}"}, "search.ratio.high", 0.5),
        ({"search.criterion": "l1"}, "search.criterion", "l1"),
    ],
)
def test_settings_are_taken_as_what_they_are(
    path: Path, settings: dict[str, Any], key: str, value: Any
) -> None:
    found: Any = Study(path, settings).file
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("asked", "wanted"), [(None, 7), (0, 0), (3, 3)])
def test_a_number_of_trials_is_the_files_only_where_none_is_given(
    path: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None, wanted: int
) -> None:
    heard: list[int] = []

    def launch(study: Any, devices: Any, *, trials: int, **_: Any) -> dict[str, Any]:
        heard.append(trials)
        return {}

    monkeypatch.setattr(search.notebook, "launch", launch)
    monkeypatch.setattr(Study, "front", lambda self, devices: None)
    Study(path).run(trials=asked)
    assert heard == [wanted]

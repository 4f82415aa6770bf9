"""A study in a notebook: what is set and asked for there is what a launch gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import search.notebook
import search.preview
from search.notebook import Study
from search.studyfile import StudyFileError

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


def test_a_plan_is_asked_for_with_the_studys_settings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: dict[str, Any] = {}

    def evidence(study: Any, device: Any, workspace: Any, **_: Any) -> Any:
        heard.update(
            beta=study.search.beta, ratio=study.search.ratio, cost=study.search.cost, device=device.name
        )
        heard["folder"] = workspace.folder
        raise LookupError

    monkeypatch.setattr(search.preview, "recall_evidence", evidence)
    with pytest.raises(LookupError):
        Study(path, {"search.cost": "macs"}, path.parent / "out").plan("laptop", beta=0.25, ratio=0.5)
    wanted = {"beta": 0.25, "ratio": 0.5, "cost": "macs", "device": "laptop", "folder": path.parent / "out"}
    assert heard == wanted
    with pytest.raises(StudyFileError, match="2 faults"):
        Study(path).plan("laptop", beta=2, ratio=1)

"""The README's first command, made small: fewer images, one epoch, shorter measurements, nothing else."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import search.quickstart
from search.exported import read_metrics
from search.found import fronts_of
from search.quickstart import run_quickstart
from search.studyfile import load_study_file

pytestmark = pytest.mark.usefixtures("one_thread", "no_pngs")


def test_quickstart_does_the_whole_job_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from profiles.connection import close_connections

    for name, value in {"_IMAGES_TRAIN": 16, "_IMAGES_VAL": 8, "_EPOCHS": 1}.items():
        monkeypatch.setattr(search.quickstart, name, value)
    text = search.quickstart._STUDY
    small = text.replace("limit_s: 5", "limit_s: 0.5, target: 0.9").replace(
        "bilinear", "bilinear, repeats: 5"
    )
    assert small != text
    monkeypatch.setattr(search.quickstart, "_STUDY", small)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    try:
        run_quickstart(tmp_path / "quick", trials=1, console=Console(file=said, width=200))
        study = load_study_file(tmp_path / "quick" / "study.yaml")
        names = [device.name for device in study.devices]
        found = fronts_of(study, names)
        assert sorted(found) == ["cpu-ort", "cpu-torch"]
        for name, f in found.items():
            assert f.results[0].state == "complete"
            # A proposal that was stopped for its plan alone is no trial.
            assert sum(r.trial > 0 and not r.was_only_planned for r in f.results) == 1
            folder = study.folder / "exports" / name
            assert read_metrics(folder)["trial"] in {p.trial for p in f.front.points}
            assert (folder / "MODEL_CARD.md").is_file()
        assert "<html" in (study.folder / "front.html").read_text()[:200]
        assert "paretoprune ui quick/study.yaml" in said.getvalue()

        weights = (tmp_path / "quick" / "shapes.pt").stat().st_mtime_ns
        run_quickstart(tmp_path / "quick", trials=1, console=Console(file=said, width=200))
        assert (tmp_path / "quick" / "shapes.pt").stat().st_mtime_ns == weights
        assert [r.to_json() for f in fronts_of(study, names).values() for r in f.results] == [
            r.to_json() for f in found.values() for r in f.results
        ]
    finally:
        close_connections()

"""What is kept of an opened task: good for as long as nothing that it was read from changes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

import search.groups
from objectives.digest import loaded_code
from search.depth import Block
from search.groups import ChannelGroup, ChannelGroups, Member
from search.recall import Recalled, recall, remember
from search.studyfile import StudyFile, load_study_file
from search.workspace import Workspace

FOUND = Recalled(
    "model",
    "data",
    (1, 3, 8, 8),
    ChannelGroups(
        (
            ChannelGroup("a", 2, (Member("a", "out", np.array([[0], [1]]), True),)),
            ChannelGroup("b", 2, (Member("b", "in", np.array([[0, 1], [2, 3]]), False),)),
        ),
        (("a", "b"),),
        {"a": (3, 2)},
        {"bn": 2},
    ),
    (Block("block", ("a", "b")),),
)


@pytest.fixture
def study(tmp_path: Path) -> StudyFile:
    for name in ("model.pt", "data.yaml"):
        (tmp_path / name).write_text(name)
    for split in ("train", "val"):
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "labels" / split / "1.txt").write_text("0 0.5 0.5 0.1 0.1")
    devices = [{"name": "desk", "runtime": "onnxruntime"}]
    described = {"name": "study", "model": "model.pt", "data": "data.yaml", "devices": devices}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(described))
    return load_study_file(tmp_path / "study.yaml")


@pytest.fixture
def keep(study: StudyFile) -> Callable[..., None]:
    folder = study.source.parent
    sources = [
        folder / "model.pt",
        folder / "data.yaml",
        folder / "labels" / "train",
        folder / "labels" / "val",
    ]

    def now(since: float | None = None) -> None:
        moment = time.time() + 1 if since is None else since
        remember(study, Workspace(study.folder), FOUND, sources, moment)

    return now


def found(study: StudyFile) -> Recalled | None:
    return recall(study, Workspace(study.folder))


def test_what_was_kept_comes_back_whole(study: StudyFile, keep: Callable[..., None]) -> None:
    assert found(study) is None
    keep()
    kept = found(study)
    assert kept is not None
    assert kept.to_json() == FOUND.to_json()
    for ours, theirs in zip(kept.groups.groups, FOUND.groups.groups, strict=True):
        for a, b in zip(ours.members, theirs.members, strict=True):
            assert np.array_equal(a.index, b.index)
            assert (a.layer, a.side, a.weighted, a.index.dtype) == (
                b.layer,
                b.side,
                b.weighted,
                b.index.dtype,
            )
    assert kept.groups.tied == FOUND.groups.tied
    assert kept.groups.widths == FOUND.groups.widths
    assert kept.groups.norms == FOUND.groups.norms
    assert kept.blocks == FOUND.blocks


@pytest.mark.parametrize("change", ["model", "label", "new label", "lost label", "lost folder"])
def test_a_changed_source_has_the_task_opened_again(
    study: StudyFile, keep: Callable[..., None], change: str
) -> None:
    keep()
    folder = study.source.parent
    label = folder / "labels" / "train" / "1.txt"
    match change:
        case "model":  # of the same size, and a moment later
            (folder / "model.pt").write_text("model.PT")
            os.utime(folder / "model.pt", ns=(1, (folder / "data.yaml").stat().st_mtime_ns + 1))
        case "label":
            label.write_text("0 0.5 0.5 0.1 0.15")
        case "new label":
            (label.parent / "2.txt").write_text("")
        case "lost label":
            label.unlink()
        case _:
            label.unlink()
            label.parent.rmdir()
    assert found(study) is None
    keep()
    assert found(study) is not None


def test_what_others_put_beside_the_sources_changes_nothing(
    study: StudyFile, keep: Callable[..., None]
) -> None:
    keep()
    (study.source.parent / "labels" / "train.cache").write_text("")
    assert found(study) is not None


@pytest.mark.parametrize(
    "setting", ["imgsz=64", "search.include=[a*]", "search.exclude=[a*]", "search.depth=0.5"]
)
def test_other_settings_are_another_task(study: StudyFile, keep: Callable[..., None], setting: str) -> None:
    keep()
    assert found(load_study_file(study.source, [setting])) is None
    assert found(load_study_file(study.source, ["trials=3", "search.beta=0.5"])) is not None


def test_what_changed_while_it_was_read_is_not_kept(study: StudyFile, keep: Callable[..., None]) -> None:
    keep(since=(study.source.parent / "model.pt").stat().st_mtime - 1)
    assert found(study) is None


def test_code_that_was_loaded_counts_as_a_source(
    study: StudyFile, keep: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = tmp_path / "builder.py"
    builder.write_text("WIDTH = 8\n")
    module = ModuleType("builder")
    module.__file__ = str(builder)
    monkeypatch.setitem(sys.modules, "builder", module)
    keep()
    assert found(study) is not None
    builder.write_text("WIDTH = 16\n")
    assert found(study) is None


def test_installed_packages_are_no_code_that_changes() -> None:
    files = {str(path) for path in loaded_code()}
    assert __file__ in files
    assert np.__file__ not in files
    assert os.__file__ not in files


def test_what_was_kept_in_another_format_is_no_use(
    study: StudyFile, keep: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep()
    monkeypatch.setattr(search.groups, "FORMAT_VERSION", 99)
    assert found(study) is None

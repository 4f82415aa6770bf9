"""An exported folder: read back as written, and replaced only where nothing else would be lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from search.exported import check_target, read_metrics, replace_folder, sha256
from search.studyfile import StudyFileError


def write_export(folder: Path, content: str = "a model") -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_text(content)
    metrics = {"format_version": 1, "files": {"model.onnx": sha256(folder / "model.onnx")}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "MODEL_CARD.md").write_text("# A model")
    return folder


def training_run(folder: Path) -> str:
    """What any training script may leave."""
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"loss": [3.0, 2.0]}))
    (folder / "weights.pt").write_text("a week of training")
    return "metrics.json, weights.pt"


def anothers_metrics(folder: Path) -> str:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"format_version": 3, "files": 12}))
    return "metrics.json"


def broken_metrics(folder: Path) -> str:
    (write_export(folder) / "metrics.json").write_text("{")
    return "MODEL_CARD.md, metrics.json, model.onnx"


def a_note_beside_it(folder: Path) -> str:
    (write_export(folder) / "NOTES.md").write_text("what the customer said")
    return "NOTES.md"


def a_folder_in_it(folder: Path) -> str:
    (write_export(folder) / "pictures").mkdir()
    return "pictures"


def a_folder_named_like_a_file(folder: Path) -> str:
    (write_export(folder) / "model.onnx").unlink()
    (folder / "model.onnx").mkdir()
    (folder / "model.onnx" / "kept").write_text("")
    return "model.onnx"


FOREIGN = (
    training_run, anothers_metrics, broken_metrics, a_note_beside_it, a_folder_in_it,
    a_folder_named_like_a_file,
)  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("make", FOREIGN)
def test_what_no_export_wrote_is_never_replaced(make: Callable[[Path], str], tmp_path: Path) -> None:
    target = tmp_path / "target"
    foreign = make(target)
    before = files(target)
    with pytest.raises(StudyFileError, match=f"target, which holds {foreign}; name another folder"):
        check_target(target)
    # Nor where it came there while the export was being made.
    with pytest.raises(StudyFileError):
        replace_folder(write_export(tmp_path / "new"), target)
    assert files(target) == before


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path: Path) -> None:
    check_target(tmp_path / "nowhere")
    (tmp_path / "target").mkdir()
    check_target(tmp_path / "target")
    replace_folder(write_export(tmp_path / "first", "another model"), tmp_path / "target")
    # One that lost a file is an export still.
    (tmp_path / "target" / "MODEL_CARD.md").unlink()
    new = write_export(tmp_path / "new")
    expected = files(new)
    replace_folder(new, tmp_path / "target")
    assert files(tmp_path / "target") == expected
    assert list(read_metrics(tmp_path / "target")["files"]) == ["model.onnx"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("text")
    with pytest.raises(StudyFileError, match="which is no folder"):
        check_target(tmp_path / "target")

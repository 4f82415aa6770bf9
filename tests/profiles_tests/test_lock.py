"""The host's lock between real processes, in a folder of the test's own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from profiles.lock import host_lock

HOLD = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from pathlib import Path
from profiles.lock import host_lock
with host_lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
    (Path(sys.argv[1]) / f"released-{sys.argv[2]}").touch()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def start(folder: Path, purpose: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", HOLD, str(folder), purpose]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def held(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert process.stdout.readline() == "held\n"


def test_work_is_shared_and_a_measurement_waits_for_it(folder: Path) -> None:
    with start(folder, "train") as other:
        held(other)
        with host_lock("evaluate"):
            assert not (folder / "released-train").exists()
        assert other.stdin
        other.stdin.write("\n")
        other.stdin.flush()
        with host_lock("measure"):
            assert (folder / "released-train").exists()


def test_work_waits_for_a_measurement_elsewhere(folder: Path) -> None:
    with start(folder, "measure") as other:
        held(other)
        assert other.stdin
        other.stdin.write("\n")
        other.stdin.flush()
        with host_lock("train"):
            assert (folder / "released-measure").exists()


def test_a_killed_holder_gives_the_lock_up(folder: Path) -> None:
    with start(folder, "measure") as other:
        held(other)
        other.kill()
        other.wait()
        with host_lock("measure"):
            pass


def test_reentrant_but_no_measurement_inside_work(folder: Path) -> None:
    with host_lock("measure"), host_lock("measure"), host_lock("train"):
        pass
    with (
        host_lock("train"),
        pytest.raises(RuntimeError, match=r"cannot measure while .* 'train'"),
        host_lock("measure"),
    ):
        pass
    with host_lock("measure"):
        pass

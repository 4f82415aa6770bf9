"""Every benchmark starts as its docstring says: from the root, as a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_starts_and_says_what_it_measures(script: str) -> None:
    # The folder holds a `search.py`, and Python puts a script's own folder before every package.
    command = [sys.executable, f"benchmarks/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert "--json" in done.stdout
    assert "--check" in done.stdout

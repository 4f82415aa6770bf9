"""The rules of the layout, read from the sources: who imports whom, who knows which library."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Each may import itself and what stands before it.
PACKAGES = ("profiles", "objectives", "search")
#: The only modules that may import a library; everything else goes through them.
KNOWN_TO = {
    "optuna": {f"search/{n}.py" for n in ("space", "sampler", "shared_candidates", "storage", "study")},
    "mlflow": {p.relative_to(ROOT).as_posix() for p in (ROOT / "search/tracking").glob("*.py")},
    "torch_pruning": {"search/groups.py", "search/prune.py"},
    "ultralytics": {p.relative_to(ROOT).as_posix() for p in (ROOT / "objectives/detection").glob("*.py")},
}
#: Read files that may come from anybody: only `torch.load(weights_only=True)` and safetensors are safe there.
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources() -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level package and line of every import in a file, wherever it stands; relative ones resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield (package[: len(package) - node.level + 1] or ("outside",))[0], node.lineno
            else:
                yield (node.module or "").partition(".")[0], node.lineno
        elif isinstance(node, ast.Call) and _is_import_call(node.func):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value.partition(".")[0], node.lineno


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def test_there_is_something_to_check() -> None:
    assert {p.relative_to(ROOT).parts[0] for p in sources()} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    backward = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name, line in imports(path)
        if name in later or name in ("outside", "tests", "benchmarks", "examples")
    ]
    assert not backward, f"allowed is {' -> '.join(reversed(PACKAGES))}: {backward}"


@pytest.mark.parametrize("library", KNOWN_TO)
def test_only_its_own_modules_know_a_library(library: str) -> None:
    strangers = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        for name, line in imports(path)
        if name == library and path.relative_to(ROOT).as_posix() not in KNOWN_TO[library]
    ]
    assert not strangers, f"only {', '.join(sorted(KNOWN_TO[library]))} may import {library}: {strangers}"


def test_nothing_is_pickled() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources()
        for name, line in imports(path)
        if name in PICKLES
    ]
    assert not found, f"artifacts of ours are JSON, weights safetensors or state dicts: {found}"


def test_relative_imports_stay_inside_a_package_and_absolute_ones_go_between() -> None:
    absolute = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and not node.level
        and (node.module or "").partition(".")[0] == path.relative_to(ROOT).parts[0]
    ]
    assert not absolute, f"inside a package imports are relative: {absolute}"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_typed_and_says_what_each_module_is_for(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    silent = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / package).rglob("*.py"))
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) and path.name != "__init__.py"
    ]
    assert not silent, f"these modules have no docstring: {silent}"


def test_the_mlflow_folder_does_not_shadow_the_library() -> None:
    assert not list((ROOT / "mlflow").rglob("*.py"))
    # From the repository's root, where the folder of that name is first on the path.
    program = "import importlib.util as u; print(u.find_spec('mlflow').origin)"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    origin = Path(answer.stdout.strip()).resolve()
    installed = Path(str(importlib.metadata.distribution("mlflow").locate_file(""))).resolve()
    assert origin.is_relative_to(installed)
    assert not origin.is_relative_to(ROOT / "mlflow")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def f():\n    import optuna.samplers", "optuna"),
        ("from mlflow.tracking import MlflowClient", "mlflow"),
        ("if TYPE_CHECKING:\n    from torch_pruning import x", "torch_pruning"),
        ("import importlib\nimportlib.import_module('ultralytics.nn')", "ultralytics"),
        ("from .task import Task", "objectives"),
        ("from ..search import study", "outside"),
    ],
)
def test_the_reader_sees_every_form_of_import(
    source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that reads sources is only as good as its reader."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "objectives" / "example.py"
    path.parent.mkdir()
    path.write_text(source)
    assert name in [found for found, _ in imports(path)]


def test_the_runner_is_python_3_9() -> None:
    """A board's system Python runs it; nothing here does, so what newer versions brought is looked for."""
    files = sorted((ROOT / "profiles" / "runner").glob("*.py"))
    assert len(files) > 5
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Match), f"{path.name}:{node.lineno} has a match statement"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
                assert not node.keywords, f"{path.name}:{node.lineno} gives zip a keyword"

"""The pages of the documentation: commands run, study files load, code does what the pages say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import search.cli
from search.result import accuracy_of
from search.studyfile import load_study_file

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md", "mlflow/README.md", "objectives/builder.md", "profiles/runtime.md", "search/exporting.md",
    "search/launching.md", "search/reviewing.md",
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread", "no_pngs")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def commands(page: str) -> list[str]:
    lines = [
        line.partition("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()
    ]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(autouse=True)
def _no_connections() -> Iterator[None]:
    from profiles.connection import close_connections

    yield
    close_connections()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a `paretoprune` line of a page, in this process; its output, redirected where the line says so."""

    def call(line: str, *further: str) -> str:
        line, _, target = line.partition(" > ")
        monkeypatch.setattr(sys, "argv", [*shlex.split(line), *further])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            search.cli.main()
        out, err = capfd.readouterr()
        # On a busy machine a second measurement may disagree with the first, and says so.
        allowed = (None, 0, 1) if "--measure" in line else (None, 0)
        assert stop.value.code in allowed, f"{line}: {err}"
        if target:
            Path(target).write_text(out)
        return str(out)

    return call


# -- every page


def test_every_page_is_listed_in_the_readme_and_links_lead_somewhere() -> None:
    found = {p.relative_to(ROOT).as_posix() for folder in ("search", "profiles", "objectives", "mlflow")
             for p in (ROOT / folder).glob("*.md")}  # fmt: skip
    assert found | {"README.md"} == set(PAGES)
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert found <= linked
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_the_study_files_shown_are_valid(
    page: str, searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "secret")
    base = yaml.safe_load(searched.study.read_text())
    base.pop("references")
    for text in blocks(page, "yaml"):
        document = yaml.safe_load(text)
        devices = document.get("devices") or base["devices"]
        named = [
            {"name": r["device"], "runtime": "ncnn"} for r in document.get("references", ()) if "device" in r
        ]
        (tmp_path / "study.yaml").write_text(
            yaml.safe_dump({**base, **document, "devices": [*devices, *named]})
        )
        load_study_file(tmp_path / "study.yaml", needs_files=False)


def test_the_commands_shown_exist() -> None:
    import typer

    known = typer.main.get_command(search.cli.app)
    seen = 0
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line.partition(" > ")[0])
            if "paretoprune" not in words:
                continue
            name, *rest = words[words.index("paretoprune") + 1 :]
            assert name in known.commands, f"{page}: {line}"  # type: ignore[attr-defined]
            options = {o for p in known.commands[name].params for o in p.opts}  # type: ignore[attr-defined]
            assert {w for w in rest if w.startswith("--")} <= options, f"{page}: {line}"
            seen += 1
    assert seen > 20


# -- the pages one by one


def test_launching(run: Any, searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(searched.study.parent)
    outputs = [run(line) for line in commands("search/launching.md")]
    assert "desk-torch" in outputs[0]
    assert "desk" in outputs[-1]


def test_launching_with_the_remote_device_of_the_page(
    run: Any, shapes: Any, ssh_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_server.use(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shown = yaml.safe_load(blocks("search/launching.md", "yaml")[0])
    (far,) = [device for device in shown["devices"] if "host" in device]
    far["host"] = ssh_server.host
    study = {
        "name": "far",
        "model": str(shapes.weights),
        "data": str(shapes.data),
        "imgsz": shapes.imgsz,
        "devices": [{**device, "threads": 1} for device in shown["devices"]],
        "search": {"ratio": {"low": 0.2, "high": 0.5}, "min_channels": 4},
        "calibration": {"images": 6, "batch": 4},
        "profile": {"model": "bilinear", "repeats": 5},
        "finetune": {"epochs": 0, "batch": 4, "device": "cpu", "reestimate_images": 12},
        "measure": {"limit_s": 0.5, "target": 0.9},
        "trials": 2,
    }
    Path("study.yaml").write_text(yaml.safe_dump(study))
    outputs = [run(line) for line in commands("search/launching.md")]
    assert all(device["name"] in outputs[0] for device in shown["devices"])
    assert far["name"] in outputs[1]
    fronts = json.loads(run("paretoprune front study.yaml --json --device " + far["name"]))["devices"]
    (found,) = fronts.values()
    assert found["baseline"]["latency_ms"] > 0


def test_reviewing(run: Any, searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(searched.study.parent)
    for line in commands("search/reviewing.md"):
        run(line)
    assert Path("report.html").stat().st_size > 1_000_000
    assert '"references"' in Path("front.json").read_text()


def test_exporting(
    run: Any, searched: Any, shapes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from search.found import fronts_of

    monkeypatch.chdir(searched.study.parent)
    # Which trials are on the front is for the measurement to say; a second version is of another one.
    front = fronts_of(load_study_file(searched.study), ["desk"])["desk"].front
    other = next(point for point in front.points if point.trial != front.knee.trial)
    accuracy = f"--min-accuracy {accuracy_of(other) - 1e-6}"
    for line in commands("search/exporting.md"):
        run(line.replace("--trial 1", f"--trial {other.trial}").replace("--min-accuracy 0.2", accuracy))
    shipped, earlier = Path("shipped"), Path("earlier")
    assert (shipped / "metrics.json").read_bytes() != (earlier / "metrics.json").read_bytes()
    from PIL import Image

    source = sorted((shapes.data.parent / "images" / "val").iterdir())[0]
    Image.open(source).save("image.jpg")
    predict, download = blocks("search/exporting.md", "python")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": searched.tracking_uri, "YOLO_OFFLINE": "1"}
    code = f"{predict}\nassert len(results) == 1\n{download}\nprint(folder)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = Path(done.stdout.splitlines()[-1])
    assert (got / "metrics.json").read_bytes() == (shipped / "metrics.json").read_bytes()


def test_the_server_page(run: Any, searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(searched.study.parent)
    for line in commands("mlflow/README.md"):
        if line.startswith("paretoprune"):
            run(line)
    (code,) = blocks("mlflow/README.md", "python")
    check = "\nprint([p['trial'] for p in front['points']])"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": searched.tracking_uri}
    done = subprocess.run(
        [sys.executable, "-c", code + check], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    from search.found import fronts_of

    front = fronts_of(load_study_file(searched.study), ["desk"])["desk"].front
    assert done.stdout.splitlines()[-1] == str([p.trial for p in front.points])


def test_the_servers_files_are_ones_that_docker_takes(tmp_path: Path) -> None:
    """As far as it goes without pulling images: the page's first steps, then Compose's own check."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("needs docker with its compose plugin")
    shutil.copytree(ROOT / "mlflow", tmp_path / "mlflow")
    first = blocks("mlflow/README.md", "bash")[0].partition("docker compose")[0]
    subprocess.run(["sh", "-ec", first + f"{docker} compose config --quiet"], cwd=tmp_path, check=True)


def test_the_notebook_page(searched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from plotly.graph_objects import Figure
    from ultralytics import YOLO

    from search.found import fronts_of

    monkeypatch.chdir(searched.study.parent)
    (code,) = [b for b in blocks("README.md", "python") if "search.notebook" in b]
    names: dict[str, Any] = {}
    exec(code, names)
    study, front = names["study"], names["front"]
    found = fronts_of(study.file, study.devices)
    expected = [(name, p.trial, p.latency_ms) for name, f in found.items() for p in f.front.points]
    assert list(front[["device", "trial", "latency_ms"]].itertuples(index=False, name=None)) == expected
    assert list(names["everything"]["trial"]) == [0, 1, 2]
    assert set(names["everything"].columns) >= {"beta", "ratio", "accuracy", "state", "pareto"}
    assert isinstance(names["figure"], Figure)
    assert list(study.references()["name"]) == ["at 32 px", "a vendor's"]
    assert isinstance(names["model"], YOLO)
    chosen = found["desk"].front.choose(max_latency_ms=1000)
    assert sum(p.numel() for p in names["model"].model.parameters()) == chosen.params
    assert (names["folder"] / "MODEL_CARD.md").is_file()


def test_a_builder_of_ones_own(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from objectives.builder import load_pruned
    from search.notebook import Study

    monkeypatch.chdir(tmp_path)
    page = "objectives/builder.md"
    (study,) = blocks(page, "yaml")
    network, *scripts = blocks(page, "python")
    Path("mine.yaml").write_text(study)
    Path("networks.py").write_text(network)
    for script in scripts:
        subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": "."})
    quick = {"measure.limit_s": 0.5, "measure.target": 0.9, "profile.model": "bilinear", "profile.repeats": 5}
    settings = [word for key, value in quick.items() for word in ("--set", f"{key}={value}")]
    for line in commands(page):
        run(line, *settings)
    opened = Study("mine.yaml", quick)
    trial = int(opened.trials("desk")["trial"].max())
    front = opened.front()
    assert trial == 1
    model = opened.best("desk", trial=int(front["trial"].iloc[0]))
    assert isinstance(model, torch.nn.Module)

    def build(classes: int) -> torch.nn.Module:
        names: dict[str, Any] = {}
        exec(network, names)
        return names["small"](classes)  # type: ignore[no-any-return]

    shipped = opened.export("desk", "again", trial=int(front["trial"].iloc[0]))
    twin = load_pruned(build(3), shipped / "model.pt").eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(twin(images), model(images), atol=1e-5)
    import onnxruntime

    session = onnxruntime.InferenceSession(shipped / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images[:1].numpy()})
    assert np.abs(got - twin(images[:1]).detach().numpy()).max() < 1e-4
    # What the card shows for ONNX Runtime needs none of our code either.
    from PIL import Image

    Image.fromarray(np.full((20, 24, 3), 90, np.uint8)).save(shipped / "image.jpg")
    card = (shipped / "MODEL_CARD.md").read_text()
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", card, re.S) if "onnxruntime" in b]
    done = subprocess.run([sys.executable, "-c", code], cwd=shipped, capture_output=True, text=True)
    assert done.stdout.strip() in {"0", "1", "2"}, done.stderr


def test_adding_a_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import profiles.device
    from profiles.device import PRECISIONS, RUNTIMES
    from profiles.export import EXPORTERS, trace_layers
    from profiles.runner.sessions import HINTS, import_runtime

    page = (ROOT / "profiles/runtime.md").read_text()
    for place in re.findall(r"`((?:profiles|tests)/[\w/]+\.py)`", page):
        assert place.endswith("session_NAME.py") or (ROOT / place).is_file(), place
    assert set(RUNTIMES) == set(PRECISIONS) == set(EXPORTERS) == set(HINTS)
    assert import_runtime("onnxruntime")
    assert profiles.device.RUNTIMES is RUNTIMES
    (code,) = blocks("profiles/runtime.md", "python")
    names: dict[str, Any] = {}
    try:
        exec(code, names)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
        layers = trace_layers(net, (1, 3, 8, 8))
        path, found = EXPORTERS["mine"](net, tmp_path, (1, 3, 8, 8), layers, {})
    finally:
        EXPORTERS.pop("mine", None)
    assert path.is_file()
    assert list(found) == ["0"]
    (line,) = commands("profiles/runtime.md")
    arguments = shlex.split(line)[shlex.split(line).index("pytest") + 1 :]
    command = [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "onnxruntime" in done.stdout

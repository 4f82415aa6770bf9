"""What leaves the tool works without it, is what was recorded, and holds nothing of this machine."""

from __future__ import annotations

import io
import itertools
import json
import pickletools
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import search.cli
import search.export
import search.remeasure
from objectives.detection import DetectionTask
from profiles.artifact import Artifact
from profiles.lock import host_lock
from profiles.structure import structure_digest
from search.champion import fetch_export, register_export
from search.export import export_best, latency_interval_ms
from search.exported import read_metrics, sha256
from search.found import fronts_of
from search.notebook import Study
from search.plan import PruningPlan
from search.recorder import open_tracker
from search.remeasure import Remeasured, remeasure
from search.result import TrialParams, TrialResult
from search.review import write_study_report
from search.storage import SearchError
from search.studyfile import StudyFile, load_study_file
from search.tracking import TrackingError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def study(searched: Any) -> StudyFile:
    return load_study_file(searched.study)


@pytest.fixture(scope="module")
def exported(study: StudyFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The most pruned point, in every runtime's format."""
    out = tmp_path_factory.mktemp("shipped") / "best"
    found = fronts_of(study, ["desk"])["desk"]
    also = ("torch", "openvino", "ncnn")
    return export_best(
        study, "desk", trial=found.front.points[0].trial, out=out, also=also, notice=lambda _: None
    )


#: Put before code that must run without this project: its packages are out of reach, and that is checked.
ALONE = f"""
import sys, importlib.util
root = {str(ROOT)!r}
sys.path[:] = [p for p in sys.path if p and not p.startswith(root) or "site-packages" in p]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
assert not [n for n in ("search", "objectives", "profiles") if importlib.util.find_spec(n)]
"""


def run_alone(code: str, folder: Path, **environment: str) -> str:
    """Run code in a process of its own in `folder`; what it printed."""
    import os

    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MLFLOW", "OPTUNA"))}
    quiet = {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE + code],
        cwd=folder,
        env={**keep, **quiet, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def picture(shapes: Any, folder: Path) -> None:
    """One of the images that the detector was trained on, where it sees something."""
    source = sorted((shapes.data.parent / "images" / "train").iterdir())[0]
    Image.open(source).save(folder / "image.jpg")


# -- alone


def inside(box: Sequence[float], side: int) -> Any:
    """A box `(x, y, width, height)` around its centre, cut off at the image's edge as Ultralytics does it."""
    x, y, width, height = box
    left, right = np.clip([x - width / 2, x + width / 2], 0, side)
    top, bottom = np.clip([y - height / 2, y + height / 2], 0, side)
    return np.array([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])


def test_the_cards_code_predicts_on_an_image_without_this_project(
    exported: Path, shapes: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(exported, folder)
    picture(shapes, folder)
    blocks = code_blocks((folder / "MODEL_CARD.md").read_text())
    kinds = ("ultralytics", "onnxruntime", "torch", "openvino")
    assert [next(k for k in kinds if f"import {k}" in b or f"from {k}" in b) for b in blocks] == list(kinds)
    report = """
import json
print(json.dumps([[int(b.cls), float(b.conf), *map(float, b.xywh[0])] for b in results[0].boxes]))
"""
    # A detector this small is never sure: look at its fainter boxes too.
    yolo = blocks[0].replace("imgsz=64", "imgsz=64, conf=0.05")
    boxes = json.loads(run_alone(yolo + report, folder).splitlines()[-1])
    lines = run_alone(blocks[1].replace("0.25", "0.04"), folder).splitlines()
    assert boxes, "the model sees nothing on an image it was trained on"
    for label, score, *place in boxes:
        # Plain ONNX Runtime prints the same box among those it does not thin out.
        near = [line for line in lines if line.startswith(f"{label} ")]
        assert any(
            abs(float(line.split()[1]) - score) < 0.02
            and np.abs(inside(json.loads(line.split(" ", 2)[2]), shapes.imgsz) - place).max() < 2
            for line in near
        ), (label, score, place, lines)
    shapes_of = "print(outputs[0].shape if hasattr(outputs[0], 'shape') else outputs.shape)"
    assert run_alone(blocks[2] + "\n" + shapes_of, folder)
    assert run_alone(blocks[3] + "\n" + shapes_of, folder)


def test_ultralytics_opens_the_onnx_file_too(exported: Path, shapes: Any, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(exported, folder)
    picture(shapes, folder)
    code = (
        "from ultralytics import YOLO\n"
        "found = YOLO('{}', task='detect').predict('image.jpg', imgsz=64)\n"
        "print(len(found[0].boxes))"
    )
    seen = [run_alone(code.format(name), folder).splitlines()[-1] for name in ("model.pt", "model.onnx")]
    assert seen[0] == seen[1]


def test_the_card_and_the_metrics_say_what_was_measured(exported: Path, study: StudyFile) -> None:
    metrics = read_metrics(exported)
    front = fronts_of(study, ["desk"])["desk"].front
    point = front.points[0]
    assert metrics["trial"] == point.trial
    assert metrics["plan_digest"] == point.plan_digest == PruningPlan.load(exported / "plan.json").digest
    assert metrics["fingerprint"] == front.fingerprint
    assert metrics["latency_ci_ms"][0] <= metrics["latency_ms"] <= metrics["latency_ci_ms"][1]
    assert set(metrics["artifacts"]) == {"model.onnx", "model.pt2", "model.xml", "model.ncnn.param"}
    assert all(abs(a["accuracy"] - metrics["accuracy"]) <= 0.005 for a in metrics["artifacts"].values())
    assert {"python", "torch", "onnxruntime", "ultralytics"} <= set(metrics["versions"])
    card = (exported / "MODEL_CARD.md").read_text()
    for text in (
        f"{point.accuracy:.4f}",
        f"{point.latency_ms:.2f} ms",
        front.fingerprint,
        metrics["data_key"],
    ):
        assert text in card
    narrowed = [line for line in card.splitlines() if re.match(r"\| model\.\S+ \| \d+ \| \d+ \|", line)]
    plan = PruningPlan.load(exported / "plan.json")
    assert len(narrowed) == sum(bool(c.removed_out and c.channels_in) for c in plan.layers.values())


def test_an_edited_file_is_noticed(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "edited")
    (tmp_path / "edited" / "model.onnx").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"model\.onnx must be the file that metrics\.json records"):
        read_metrics(tmp_path / "edited")


def test_a_folder_with_other_files_is_not_replaced(study: StudyFile, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        export_best(study, "desk", out=tmp_path, notice=lambda _: None)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_trial_of_another_machine_is_fetched_from_mlflow(study: StudyFile, tmp_path: Path) -> None:
    front = fronts_of(study, ["desk"])["desk"].front
    trial = front.points[0].trial
    folder = study.folder / "devices" / "desk" / f"trial-{trial:04d}"
    folder.rename(tmp_path / "away")
    try:
        said: list[str] = []
        out = export_best(study, "desk", trial=trial, out=tmp_path / "out", notice=said.append)
        assert any("fetched from MLflow" in text for text in said)
        assert read_metrics(out)["trial"] == trial
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (tmp_path / "away").rename(folder)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("devices.desk.threads=2", "device was .*'threads': 1.*, is .*'threads': 2"),
        ("imgsz=96", r"input_shape was \[1, 3, 64, 64\], is \[1, 3, 96, 96\]"),
    ],
)
def test_another_study_file_than_the_searchs_is_refused(
    searched: Any, setting: str, says: str, tmp_path: Path
) -> None:
    changed = load_study_file(searched.study, [setting])
    with pytest.raises(SearchError, match=says):
        export_best(changed, "desk", out=tmp_path / "out", notice=lambda _: None)
    key, _, value = setting.partition("=")
    with pytest.raises(SearchError, match=says):
        Study(searched.study, {key: value}).best("desk")
    assert not (tmp_path / "out").exists()


def test_the_card_tells_the_searchs_training_and_how_it_was_exported(
    searched: Any, study: StudyFile, secret: str, tmp_path: Path
) -> None:
    overrides = ["finetune.epochs=9", "references=[]", f"tracking_uri={searched.tracking_uri}"]
    trial = fronts_of(study, ["desk"])["desk"].front.points[0].trial
    out = export_best(
        load_study_file(searched.study, overrides), "desk", trial=trial, out=tmp_path, notice=lambda _: None
    )
    metrics, card = read_metrics(out), (out / "MODEL_CARD.md").read_text()
    assert metrics["finetune"]["epochs"] == metrics["epochs_trained"] == 1
    assert "trained for 1 epoch." in card
    assert "9 epoch" not in card
    words = shlex.split(metrics["command"])
    assert words[:3] == ["paretoprune", "export", "study.yaml"]
    assert words[-4:] == ["--device", "desk", "--trial", str(trial)]
    assert [w for before, w in itertools.pairwise(words) if before == "--set"][:2] == overrides[:2]
    assert secret not in (out / "metrics.json").read_text() + card


def test_nothing_is_measured_meanwhile(
    study: StudyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watch(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            # A process that may be busy is told so where it would measure itself.
            with pytest.raises(RuntimeError, match="cannot measure while"), host_lock("measure"):
                pass
            seen.append(name)
            return plain(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in (
        (search.export, "export_model"),
        (search.export, "export_artifact"),
        (search.export, "check_parity"),
        (DetectionTask, "evaluate"),
    ):
        watch(owner, name)
    export_best(study, "desk", out=tmp_path / "out", also=["torch"], notice=lambda _: None)
    assert set(seen) == {"export_model", "export_artifact", "check_parity", "evaluate"}


def test_what_ships_has_the_structure_of_what_was_measured(
    study: StudyFile, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = fronts_of(study, ["desk"])["desk"].front.points[0]
    file = Artifact(exported / "model.onnx", "onnxruntime", "fp32", (1, 3, 64, 64), "", ())
    assert chosen.details["structure"] == structure_digest(file)
    monkeypatch.setattr(search.export, "structure_digest", lambda artifact: "another")
    with pytest.raises(SearchError, match=r"model\.onnx must have the structure of the file that trial"):
        export_best(study, "desk", trial=chosen.trial, out=tmp_path / "out", notice=lambda _: None)
    assert not (tmp_path / "out").exists()
    # A trial of an earlier version says nothing of it.
    unknown = TrialResult.failed(1, "desk", "", TrialParams(), "made up")
    search.export.check_structure(file, unknown)


def test_an_exported_file_is_measured_again(study: StudyFile, exported: Path, tmp_path: Path) -> None:
    from profiles.connection import close_connections

    again = remeasure(study, "desk", exported, notice=lambda _: None)
    close_connections()
    metrics = read_metrics(exported)
    assert again.recorded_ms == metrics["latency_ms"]
    assert again.ci_ms[0] <= again.latency_ms <= again.ci_ms[1]
    apart = Remeasured(1.0, (0.9, 1.1), 2.0, (1.8, 2.2))
    assert not apart.agrees
    assert not apart.inside
    near = Remeasured(1.9, (1.7, 2.1), 2.0, (1.8, 2.2))
    assert near.agrees
    assert near.inside
    beside = Remeasured(1.7, (1.5, 1.9), 2.0, (1.8, 2.2))
    assert beside.agrees
    assert not beside.inside
    with pytest.raises(SearchError, match="numbers of different devices do not compare"):
        remeasure(study, "desk-torch", exported, notice=lambda _: None)
    close_connections()


def test_an_export_of_another_model_is_not_measured_beside_this_one(
    study: StudyFile, exported: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(exported, foreign)
    key = read_metrics(exported)["model_key"]
    text = (foreign / "metrics.json").read_text()
    (foreign / "metrics.json").write_text(text.replace(key, "f" * len(key)))
    with pytest.raises(SearchError, match=r"foreign was pruned from another model .* key is ffffffffffff"):
        remeasure(study, "desk", foreign, notice=lambda _: None)


def test_the_measured_file_is_the_one_that_the_metrics_name(
    study: StudyFile, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a runtime calls its files."""
    from profiles.connection import close_connections

    class AskedError(Exception):
        pass

    def compare(device: Any, candidate: Artifact, baseline: Artifact, **_: Any) -> Any:
        raise AskedError(candidate.path.name)

    folder = tmp_path / "renamed"
    shutil.copytree(exported, folder)
    (folder / "model.onnx").rename(folder / "model.mine")
    text = (folder / "metrics.json").read_text().replace('"model.onnx"', '"model.mine"')
    (folder / "metrics.json").write_text(text)
    monkeypatch.setattr(search.remeasure, "compare", compare)
    with pytest.raises(AskedError, match=r"model\.mine"):
        remeasure(study, "desk", folder, notice=lambda _: None)
    close_connections()


def test_the_unpruned_models_interval_is_that_of_two_copies() -> None:
    numbers: dict[str, Any] = {
        "accuracy": 0.5, "latency_ms": 10.0, "latency_p90_ms": 11.0, "speedup": 1.0, "speedup_ci": (1.0, 1.0),
    }  # fmt: skip
    result = TrialResult(0, "desk", "print", TrialParams(), "complete", **numbers)
    assert latency_interval_ms(result) == [10.0, 10.0]  # of an earlier version
    for ratio, interval in (((0.99, 1.02), [9.9, 10.2]), ((1.01, 1.03), [10.0, 10.3])):
        copies = {"copies_ratio_ci": list(ratio)}
        measured = TrialResult(0, "desk", "print", TrialParams(), "complete", **numbers, details=copies)
        assert latency_interval_ms(measured) == pytest.approx(interval)


# -- the registry


def test_champion_and_previous(
    study: StudyFile, exported: Path, shapes: Any, tmp_path: Path, searched: Any
) -> None:
    name = "tiny.desk"
    first = register_export(study, "desk", exported)
    knee = export_best(study, "desk", out=tmp_path / "knee", notice=lambda _: None)
    second = register_export(study, "desk", knee)
    assert re.fullmatch(rf"registered {name} version \d+ as champion(, version \d+ is previous)?", first)
    assert re.fullmatch(rf"registered {name} version \d+ as champion, version \d+ is previous", second)
    # The same model exported again, on another day.
    twin = tmp_path / "twin"
    shutil.copytree(knee, twin)
    (twin / "model.pt").write_bytes((twin / "model.pt").read_bytes() + b"a later date")
    metrics = json.loads((twin / "metrics.json").read_text())
    metrics["files"]["model.pt"] = sha256(twin / "model.pt")
    (twin / "metrics.json").write_text(json.dumps(metrics))
    assert "stays champion" in register_export(study, "desk", twin)
    client = open_tracker(study).client()
    version = client.get_model_version_by_alias(name, "champion")
    assert version.tags["trial"] == str(read_metrics(knee)["trial"])
    assert f"# {study.name} for desk" in version.description

    # Another machine: the study file and the server's address, nothing else.
    away = tmp_path / "another machine"
    away.mkdir()
    text = yaml.safe_load(searched.study.read_text()) | {"model": "gone/model.pt", "data": "gone/data.yaml"}
    text["references"] = []
    (away / "study.yaml").write_text(yaml.safe_dump(text))
    elsewhere = load_study_file(away / "study.yaml", needs_files=False)
    for alias, origin in (("champion", knee), ("previous", exported)):
        fetched = fetch_export(elsewhere, "desk", alias=alias, out=away / alias, notice=lambda _: None)
        assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {
            p.name: p.read_bytes() for p in origin.iterdir()
        }
    with pytest.raises(TrackingError, match=r"must hold tiny\.desk-torch with the alias champion"):
        fetch_export(elsewhere, "desk-torch", out=away / "none", notice=lambda _: None)

    # From the registry alone: MLflow's client, Ultralytics and ONNX Runtime, none of our code.
    picture(shapes, away)
    code = f"""
import json, mlflow, numpy as np, onnxruntime
from ultralytics import YOLO
folder = mlflow.artifacts.download_artifacts("models:/{name}@champion")
assert len(YOLO(folder + "/model.pt").predict("image.jpg", imgsz=64)) == 1
pixels = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
(plain,) = session.run(None, {{session.get_inputs()[0].name: pixels}})
(served,) = mlflow.pyfunc.load_model("models:/{name}@champion").predict({{"images": pixels}}).values()
assert np.allclose(plain, served, atol=1e-4)
np.save("outputs.npy", plain)
"""
    run_alone(code, away, MLFLOW_TRACKING_URI=searched.tracking_uri)
    import onnxruntime

    session = onnxruntime.InferenceSession(knee / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    assert np.allclose(
        session.run(None, {session.get_inputs()[0].name: pixels})[0], np.load(away / "outputs.npy")
    )


def test_a_registered_model_is_fetched_by_alias_and_measured(
    study: StudyFile,
    exported: Path,
    searched: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from profiles.connection import close_connections

    register_export(study, "desk", exported)
    words = ["export", str(searched.study), "--device", "desk", "--from-registry", "--alias", "champion"]
    words += ["--measure", "--json", "--out", str(tmp_path / "fetched")]
    monkeypatch.setattr(sys, "argv", ["paretoprune", *words])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        search.cli.main()
    close_connections()
    document = json.loads(capfd.readouterr().out)
    again = document["remeasured"]
    assert document["trial"] == read_metrics(exported)["trial"]
    assert again["recorded_ms"] == document["latency_ms"]
    assert again["recorded_ci_ms"] == document["latency_ci_ms"]
    (low, high), (now_low, now_high) = again["recorded_ci_ms"], again["latency_ci_ms"]
    assert now_low <= again["latency_ms"] <= now_high
    assert again["inside"] == (low <= again["latency_ms"] <= high)
    assert again["agrees"] == (now_low <= high and low <= now_high)
    assert (stop.value.code or 0) == (0 if again["agrees"] else 1)


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "metrics.json", "model.onnx"])
def test_what_is_not_as_registered_is_not_fetched(
    study: StudyFile, exported: Path, name: str, tmp_path: Path
) -> None:
    register_export(study, "desk", exported)
    client = open_tracker(study).client()
    source = client.get_model_version_by_alias("tiny.desk", "champion").source
    run_id, _, place = source.removeprefix("runs:/").partition("/")
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / name).write_bytes((exported / name).read_bytes() + b"\n")
    client.log_artifacts(run_id, str(edited), place)
    try:
        with pytest.raises(SearchError, match=f"is damaged: .*{re.escape(name)}"):
            fetch_export(study, "desk", out=tmp_path / "out", notice=lambda _: None)
        assert not (tmp_path / "out").exists()
    finally:
        client.log_artifacts(run_id, str(exported), place)
    assert fetch_export(study, "desk", out=tmp_path / "out", notice=lambda _: None).is_dir()


def test_a_registry_that_does_not_answer_is_not_taken_for_an_empty_one(
    study: StudyFile, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    register_export(study, "desk", exported)
    client = open_tracker(study).client()
    before = client.get_model_version_by_alias("tiny.desk", "champion").version
    versions = len(client.search_model_versions("name='tiny.desk'"))

    def away(self: Any, name: str, alias: str) -> Any:
        raise MlflowException("the database is locked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "get_model_version_by_alias", away)
        with pytest.raises(TrackingError, match=r"cannot be registered: .*the database is locked"):
            register_export(study, "desk", exported)
        with pytest.raises(TrackingError, match=r"cannot be asked .*the database is locked"):
            fetch_export(study, "desk", out=tmp_path / "out", notice=lambda _: None)
    assert client.get_model_version_by_alias("tiny.desk", "champion").version == before
    assert len(client.search_model_versions("name='tiny.desk'")) == versions
    with pytest.raises(TrackingError, match=r"must hold tiny\.desk with the alias nobody"):
        fetch_export(study, "desk", alias="nobody", out=tmp_path / "out", notice=lambda _: None)


# -- what leaves


def texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file's content, and that of everything packed in it."""
    data = path.read_bytes()
    yield path.name, data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield f"{path.name}/{name}", archive.read(name)


def pickled_modules(data: bytes) -> set[str]:
    """Top-level packages of the classes and functions that unpickling would import."""
    found, words = set(), []
    for op, argument, _ in pickletools.genops(data):
        if isinstance(argument, str):
            words.append(argument)
        if op.name == "GLOBAL":
            found.add(str(argument).partition(" ")[0].partition(".")[0])
        elif op.name == "STACK_GLOBAL":
            found.add(words[-2].partition(".")[0])
    return found


def test_no_pickle_of_ours_no_path_and_no_secret_leaves(
    study: StudyFile, exported: Path, secret: str, tmp_path: Path
) -> None:
    found = fronts_of(study, ["desk", "desk-torch"])
    write_study_report(study, found, tmp_path / "report.html")
    (tmp_path / "front.json").write_text(json.dumps({n: f.document for n, f in found.items()}))
    client = open_tracker(study).client()
    experiment = client.get_experiment_by_name(study.name)
    for number, run in enumerate(client.search_runs([experiment.experiment_id])):
        (tmp_path / f"run-{number}").mkdir()
        (tmp_path / f"run-{number}" / "run.json").write_text(json.dumps(run.data.to_dictionary()))
        for entry in client.list_artifacts(run.info.run_id):
            client.download_artifacts(run.info.run_id, entry.path, str(tmp_path / f"run-{number}"))
    files = [p for folder in (tmp_path, exported) for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 40
    home = str(Path.home()).encode()
    # The suite's folders stand for the user's: all of them lie below one temporary folder.
    places = [str(study.source.parent.parent).encode(), str(ROOT).encode(), sys.prefix.encode()]
    places += [home] if len(home) > 6 else []
    pickles = 0
    for path in files:
        for name, data in texts(path):
            assert secret.encode() not in data, name
            for place in places:
                at = data.find(place)
                assert at < 0, (name, data[max(0, at - 80) : at + 120])
            if name.endswith(".pkl"):
                pickles += 1
                assert not pickled_modules(data) & {"search", "objectives", "profiles", "tests"}, name
    assert pickles > 0

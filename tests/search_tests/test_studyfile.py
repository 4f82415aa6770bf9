"""The study file: what is right is read, and what is wrong is said, all of it, in words that help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from search.sections import Choices, Range
from search.studyfile import StudyFile, StudyFileError, load_study_file

ROOT = Path(__file__).resolve().parents[2]


def document(**changes: Any) -> dict[str, Any]:
    return {
        "name": "study",
        "model": "model.pt",
        "data": "data.yaml",
        "imgsz": 64,
        "devices": [
            {"name": "first", "runtime": "onnxruntime", "threads": 2},
            {"name": "second", "runtime": "torch", "limits": {"latency_ms": 5}},
        ],
        **changes,
    }


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Write a document beside an (empty) model and data file and read it."""
    for name in ("model.pt", "data.yaml"):
        (tmp_path / name).touch()

    def read(content: Any = None, *overrides: str, **changes: Any) -> StudyFile:
        path = tmp_path / "study.yaml"
        text = content if isinstance(content, str) else yaml.safe_dump(content or document(**changes))
        path.write_text(text)
        return load_study_file(path, overrides)

    return read


def faults(load: Any, *args: Any, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(StudyFileError) as caught:
        load(*args, **changes)
    assert str(caught.value).startswith("study.yaml: ")
    return caught.value.faults


def test_steps_depth_and_recovery_are_fixed_or_searched(load: Any) -> None:
    search = load(search={"steps": 3, "depth": 0.25, "recovery": "scratch"}).search
    assert (search.steps, search.depth, search.recovery) == (3, 0.25, "scratch")
    search = load(
        search={
            "steps": {"choices": [1, 4]},
            "depth": {"low": 0, "high": 0.5},
            "recovery": {"choices": ["finetune", "scratch"]},
        }
    ).search
    assert search.steps == Choices(choices=(1, 4))
    assert search.depth == Range(low=0.0, high=0.5)
    for key, value, words in (
        ("steps", 0, "search.steps"),
        ("steps", {"choices": [0, 2]}, "must be at least 1, got 0"),
        ("depth", 1.0, "must lie in [0, 1), got 1"),
        ("recovery", "none", "must be one of finetune, scratch, got 'none'"),
    ):
        assert any(words in fault for fault in faults(load, search={key: value})), (key, value)


# ---- what is right -------------------------------------------------------------------------------


def test_references_are_measured_or_given(load: Any, tmp_path: Path) -> None:
    (tmp_path / "small.pt").touch()
    smaller, other, given = load(
        references=[
            {"name": "smaller", "imgsz": 32},
            {"name": "another", "model": "small.pt", "device": "first"},
            {"name": "theirs", "device": "second", "accuracy": 0.5, "latency_ms": 3},
        ]
    ).references
    assert (smaller.is_given, other.is_given, given.is_given) == (False, False, True)
    assert other.model == str(tmp_path / "small.pt")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ({"name": "x"}, "references[0]: needs a model or imgsz to measure"),
        ({"name": "x", "latency_ms": 3}, "references[0]: given numbers must be accuracy, latency_ms and"),
        (
            {"name": "x", "latency_ms": 3, "accuracy": 0.5, "device": "first", "imgsz": 32},
            "references[0]: given numbers must be accuracy, latency_ms and their device, without model",
        ),
        (
            {"name": "x", "imgsz": 32, "device": "nowhere"},
            "references: the device of x must be one of first, second, got 'nowhere'",
        ),
        ({"name": "x", "model": "gone/w.pt"}, "references[0].model: must be an existing file"),
        ({"name": "x", "imgsz": 32, "size": 1}, "references[0].size: unknown key"),
    ],
)
def test_a_wrong_reference(load: Any, reference: dict[str, Any], says: str) -> None:
    assert any(fault.startswith(says) for fault in faults(load, references=[reference]))


def test_files_may_be_missing_where_nothing_is_opened(load: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.yaml").write_text(
        yaml.safe_dump(document(model="gone/model.pt", data="gone/data.yaml"))
    )
    with pytest.raises(StudyFileError):
        load_study_file(tmp_path / "elsewhere.yaml")
    assert load_study_file(tmp_path / "elsewhere.yaml", needs_files=False).name == "study"


def test_the_smallest_file(load: Any, tmp_path: Path) -> None:
    study = load(
        {
            "name": "s",
            "model": "model.pt",
            "data": "data.yaml",
            "devices": [{"name": "d", "runtime": "torch"}],
        }
    )
    assert study.search.beta == Range(low=0.0, high=1.0)
    assert study.search.allocation == "rank"
    assert study.device("d").device().threads == 1
    assert (study.model, study.data) == (str(tmp_path / "model.pt"), str(tmp_path / "data.yaml"))
    assert study.folder == tmp_path / "runs" / "s"
    assert study.storage is None
    assert study.tracking_uri is None


def test_a_full_file(load: Any) -> None:
    study = load(
        search={
            "beta": 0.5,
            "ratio": {"choices": [0.2, 0.4]},
            "ratio_of": "latency",
            "round_to": {"choices": [1, 8]},
            "sampler": "tpe",
        },
        finetune={"epochs": 1, "options": {"mosaic": 0.0}},
        limits={"latency_ms": 33, "accuracy": 0.55},
        trials=7,
        storage="postgresql://u:p@host/db",
    )
    assert study.search.beta == 0.5
    assert study.search.ratio == Choices[float](choices=(0.2, 0.4))
    assert study.search.round_to.choices == (1, 8)
    assert study.limits_of("first").latency_ms == 33
    assert (study.limits_of("second").latency_ms, study.limits_of("second").accuracy) == (5, 0.55)


def test_shipped_examples_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("yolov8n-bccd.pt", "bccd/data.yaml", "cifar10-10k.npz", "resnet56-cifar10.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("PARETOPRUNE_DATA", str(tmp_path))
    examples = sorted((ROOT / "examples").glob("*.yaml"))
    assert examples
    for path in examples:
        assert load_study_file(path).devices


def test_variables_are_expanded_everywhere(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WHERE", str(tmp_path))
    monkeypatch.setenv("HOST", "pi5.local")
    study = load(
        model="${WHERE}/model.pt",
        devices=[{"name": "pi", "runtime": "torch", "host": "ssh://pi@${HOST}"}],
    )
    assert study.model == str(tmp_path / "model.pt")
    assert study.devices[0].host == "ssh://pi@pi5.local"


def test_stores_come_from_the_file_first_and_the_environment_next(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///env.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert (load().storage, load().tracking_uri) == ("sqlite:///env.db", "http://env")
    study = load(storage="sqlite:///file.db", tracking_uri="http://file")
    assert (study.storage, study.tracking_uri) == ("sqlite:///file.db", "http://file")


def test_a_name_that_ultralytics_knows_needs_no_file(load: Any) -> None:
    study = load(model="yolov8n.pt", data="coco128.yaml")
    assert (study.model, study.data) == ("yolov8n.pt", "coco128.yaml")


# ---- --set ---------------------------------------------------------------------------------------


def test_overrides(load: Any) -> None:
    study = load(
        None,
        "search.beta=0.5",
        "search.ratio={low: 0.2, high: 0.3}",
        "devices.second.threads=4",
        "devices.0.runtime=torch",
        "finetune.epochs=0",
        "name=other",
    )
    assert study.search.beta == 0.5
    assert study.search.ratio == Range(low=0.2, high=0.3)
    assert [d.threads for d in study.devices] == [2, 4]
    assert study.devices[0].runtime == "torch"
    assert study.finetune.epochs == 0
    assert study.folder.name == "other"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("search.beta", "--set must be key=value, got 'search.beta'"),
        ("=1", "--set must be key=value, got '=1'"),
        ("devices.third.threads=1", "'third' must be a position or a name in a list of 2"),
        ("devices.7.threads=1", "'7' must be a position or a name in a list of 2"),
        ("imgsz.width=1", "imgsz holds a plain value, so it has no key 'width'"),
        ("search.beta=[", "the value must be valid YAML, got '['"),
        ("search.beat=0.5", "search.beat: unknown key"),
        ("search.beta=2", "search.beta: must lie in [0, 1], got 2"),
    ],
)
def test_wrong_overrides(load: Any, override: str, text: str) -> None:
    (fault,) = faults(load, None, override)
    assert text in fault


def test_an_override_of_an_empty_section(load: Any) -> None:
    """`search:` with nothing under it is how a commented-out section reads."""
    assert load({**document(), "search": None, "finetune": None}, "search.beta=0.5").search.beta == 0.5


# ---- what is wrong -------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        StudyFileError, match=r"absent.yaml: 1 fault\n.*does not exist; give the path of a study file"
    ):
        load_study_file(tmp_path / "absent.yaml")
    with pytest.raises(StudyFileError, match="cannot be read"):
        load_study_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "the file is not valid YAML"),
        ("- a", "must hold keys and values, got list"),
        ("", "must hold keys and values, got NoneType"),
    ],
)
def test_files_that_hold_no_study(load: Any, text: str, says: str) -> None:
    if text:
        (fault,) = faults(load, text)
    else:
        with pytest.raises(StudyFileError) as caught:
            load("\n")
        (fault,) = caught.value.faults
    assert says in fault


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"colour": "red"}, "colour", "unknown key"),
        ({"stopping": {"halvin": 2}}, "stopping.halvin", "unknown key"),
        ({"stopping": {"halving": 0}}, "stopping.halving", "greater than or equal to 1, got 0"),
        ({"stopping": {"margin": 1.0}}, "stopping.margin", "less than 1, got 1.0"),
        ({"screening": {"candidates": -1}}, "screening.candidates", "greater than or equal to 0, got -1"),
        ({"limits": {"size_mb": 0}}, "limits.size_mb", "greater than 0, got 0"),
        (
            {"finetune": {"device": "gpu"}},
            "finetune.device",
            "one of auto, cpu, cuda, cuda:N, mps, got 'gpu'",
        ),
        ({"calibration": {"device": "cuda:"}}, "calibration.device", "one of auto, cpu, cuda, cuda:N, mps"),
        ({"calibration": {"device": "mps"}}, "calibration.device", "(mps has no float64), got 'mps'"),
        ({"search": {"betta": 0.5}}, "search.betta", "unknown key"),
        ({"search": {"beta": {"low": 0, "high": 1, "step": 0.1}}}, "search.beta.step", "unknown key"),
        ({"devices": []}, "devices", "needs at least one entry, got none"),
        ({"search": {"beta": 1.5}}, "search.beta", "must lie in [0, 1], got 1.5"),
        ({"search": {"beta": -0.1}}, "search.beta", "must lie in [0, 1], got -0.1"),
        ({"search": {"beta": {"low": 0, "high": 1.5}}}, "search.beta", "must lie in [0, 1], got 1.5"),
        ({"search": {"beta": {"choices": [0.5, 7]}}}, "search.beta", "must lie in [0, 1], got 7"),
        (
            {"search": {"beta": {"choices": [0.5, 0.5]}}},
            "search.beta.choices",
            "choices must differ, got [0.5, 0.5]",
        ),
        ({"search": {"ratio": 1.0}}, "search.ratio", "must lie in [0, 1), got 1"),
        ({"search": {"ratio": {"low": 0.1, "high": 1.0}}}, "search.ratio", "must lie in [0, 1), got 1"),
        (
            {"search": {"ratio": {"low": 0.5, "high": 0.1}}},
            "search.ratio",
            "low must be below high, got low 0.5 and high 0.1",
        ),
        ({"search": {"ratio": "much"}}, "search.ratio", "got 'much'"),
        ({"search": {"beta": {"low": 0.1}}}, "search.beta.high", "is required and missing"),
        ({"search": {"round_to": 0}}, "search.round_to", "got 0"),
        ({"search": {"criterion": "magic"}}, "search.criterion", "must be one of taylor"),
        ({"search": {"allocation": "magic"}}, "search.allocation", "must be one of rank"),
        (
            {"search": {"sampler": "magic"}},
            "search.sampler",
            "'gp', 'tpe', 'nsga2', 'random' or 'grid', got 'magic'",
        ),
        (
            {"search": {"ratio_of": "watts"}},
            "search.ratio_of",
            "'channels', 'latency', 'macs', 'params' or 'memory', got 'watts'",
        ),
        ({"trials": 0}, "trials", "got 0"),
        ({"name": "a/b"}, "name", "must be letters, digits, '.', '_' and '-' (it names a folder), got 'a/b'"),
        ({"finetune": {"epochs": -1}}, "finetune.epochs", "got -1"),
        ({"limits": {"accuracy": 55}}, "limits.accuracy", "got 55"),
        ({"devices": [{"name": "d"}]}, "devices[0].runtime", "is required and missing"),
        ({"devices": [{"name": "d", "runtime": "abacus"}]}, "devices[0]", "runtime must be one of torch"),
        ({"devices": [{"name": "d", "runtime": "torch", "threads": 0}]}, "devices[0].threads", "got 0"),
        (
            {"devices": [{"name": "d", "runtime": "torch", "host": "pi5"}]},
            "devices[0]",
            "host must look like ssh://user@host",
        ),
        (
            {"devices": [{"name": "d", "runtime": "torch"}] * 2},
            "devices",
            "names must be unique, got d more than once",
        ),
        ({"model": "absent/model.pt"}, "model", "must be an existing file"),
        ({"data": "absent/data.yaml"}, "data", "got 'absent/data.yaml'"),
        ({"model": {"builder": "no_colon"}}, "model.builder", "got 'no_colon'"),
        (
            {"model": {"builder": "a:b", "weights": "absent/w.pt"}},
            "model.weights",
            "must be an existing file",
        ),
        ({"model": 7}, "model", "got 7"),
        ({"model": "${NOWHERE_AT_ALL}/m.pt"}, "model", "environment variable NOWHERE_AT_ALL must be set"),
    ],
)
def test_one_fault_gives_one_line_with_key_rule_and_value(
    load: Any, change: dict[str, Any], key: str, says: str
) -> None:
    found = faults(load, **change)
    assert len(found) == 1, found
    assert found[0].startswith(f"{key}: "), found[0]
    assert says in found[0]


@pytest.mark.parametrize("key", ["name", "model", "data", "devices"])
def test_a_missing_key(load: Any, key: str) -> None:
    content = document()
    del content[key]
    assert faults(load, content) == (f"{key}: is required and missing",)


def test_several_faults_are_reported_together(load: Any) -> None:
    found = faults(
        load,
        document(
            colour="red",
            model="${NOWHERE_AT_ALL}/m.pt",
            data="absent/data.yaml",
            search={"beta": 2, "ratio": 1.0},
            devices=[{"name": "d", "runtime": "torch", "threads": 0}],
        ),
        "imgsz",
    )
    keys = sorted(fault.split(":")[0] for fault in found)
    assert keys == ["--set must be key=value, got 'imgsz'", "colour", "data", "devices[0].threads", "model", "search.beta", "search.ratio"]  # fmt: skip  # noqa: E501


def test_the_message_counts_and_lists(load: Any) -> None:
    with pytest.raises(
        StudyFileError, match=r"^study.yaml: 2 faults\n  search.beta: .*\n  search.ratio: .*$"
    ):
        load(search={"beta": 2, "ratio": 1.0})


def test_an_unknown_device_is_named_with_those_there_are(load: Any) -> None:
    with pytest.raises(StudyFileError, match="--device must be one of first, second, got 'third'"):
        load().device("third")


def test_overrides_are_kept_as_words_without_secrets_and_paths(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    (tmp_path / "data.yaml").touch()
    path = tmp_path / "study.yaml"
    path.write_text("{name: kept, model: model.pt, data: data.yaml, devices: [{name: d, runtime: torch}]}")
    overrides = ["search.beta=0.5", "storage=postgresql://me:hunter2@db/x", f"data={tmp_path / 'data.yaml'}"]
    study = load_study_file(path, overrides)
    shown = ["search.beta=0.5", "storage=postgresql://***@db/x", "data=data.yaml"]
    assert study.set_words == [word for text in shown for word in ("--set", text)]
    assert "overrides" not in study.model_dump()
    assert load_study_file(path).set_words == []

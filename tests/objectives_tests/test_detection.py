"""The detection task on a tiny YOLO: what a trial relies on, and what a user may get wrong."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from objectives.detection import DetectionTask, PrunedTrainer
from objectives.detection.training import orthogonalised
from objectives.digest import stamp
from objectives.synthetic import make_detection_set
from objectives.task import Recovery
from search.groups import find_groups
from search.plan import PruningPlan
from search.prune import check_widths, prune

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(shapes: Any) -> DetectionTask:
    return DetectionTask(str(shapes.weights), str(shapes.data), shapes.imgsz)


@pytest.fixture(scope="module")
def plan(task: DetectionTask) -> PruningPlan:
    model = task.load_model()
    groups = find_groups(task.traceable(model), model)
    removed = {}
    for unit in groups.units:
        count = groups.groups[unit[0]].channels // 3
        removed |= {groups.groups[i].name: np.arange(count) for i in unit}
    return PruningPlan.of(task.model_key, groups, removed)


@pytest.fixture
def pruned(task: DetectionTask, plan: PruningPlan) -> nn.Module:
    return prune(task.load_model(), plan, task.settle)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics leaves folders where it runs."""
    monkeypatch.chdir(tmp_path)


# ---- model ---------------------------------------------------------------------------------------


def test_a_loaded_model_is_fresh_trainable_and_float32(task: DetectionTask) -> None:
    first, second = task.load_model(), task.load_model()
    assert not first.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in first.parameters())
    with torch.no_grad():
        next(first.parameters()).add_(1)
    assert not torch.equal(next(first.parameters()), next(second.parameters()))
    assert task.input_shape == (1, 3, 64, 64)


def test_keys_follow_weights_and_data(task: DetectionTask, shapes: Any, tmp_path: Path) -> None:
    again = DetectionTask(str(shapes.weights), str(shapes.data), 64)
    assert (again.model_key, again.data_key) == (task.model_key, task.data_key)
    other = DetectionTask(str(shapes.model), str(shapes.data), 64)
    assert other.model_key != task.model_key
    assert other.data_key == task.data_key


def test_a_change_of_any_source_shows(shapes: Any, tmp_path: Path) -> None:
    data = make_detection_set(tmp_path / "set", images_train=2, images_val=2, imgsz=64, seed=0)
    weights = shutil.copy(shapes.weights, tmp_path / "model.pt")
    sources = DetectionTask(str(weights), str(data), 64).sources
    labels = sorted((tmp_path / "set").rglob("labels/*/*.txt"))
    images = sorted((tmp_path / "set").rglob("images/*/*"))
    assert len(labels) == len(images) == 4
    for path in [Path(weights), Path(data), *labels, *images]:
        before = stamp(sources).digest
        assert stamp(sources).digest == before
        with path.open("ab") as file:
            file.write(b"\n")
        assert stamp(sources).digest != before, path


def test_the_traced_copy_computes_the_same_head_inputs(task: DetectionTask) -> None:
    """Splitting cv1 into halves must not change anything, or the groups would be another network's."""
    model = task.load_model()
    twin = task.traceable(model).model
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        head = model.model[-1]  # type: ignore[index]  # a Sequential
        features = model(image)[1]["feats"]
        want = [branch[i](features[i]) for branch in (head.cv2, head.cv3) for i in range(head.nl)]
        for a, b in zip(want, twin(image), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


# ---- loss ----------------------------------------------------------------------------------------


def test_the_loss_is_summed_over_images_and_reaches_every_layer(task: DetectionTask) -> None:
    model = task.load_model()
    (both,) = list(task.calibration(2, 2))
    singles = list(task.calibration(2, 1))
    whole = task.loss(model, both)
    assert whole.ndim == 0
    # Each batch is normalised by its own targets, so this is near the sum of single images' losses only.
    parts = sum(task.loss(model, batch).item() for batch in singles)
    assert 0.5 < whole.item() / parts < 1.5
    whole.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert [n for n in silent if "dfl" not in n] == []
    assert not model.training
    task.outputs(model, both).backward()


def test_calibration_is_the_same_every_time_and_spread_out(task: DetectionTask) -> None:
    first, second = (list(task.calibration(5, 2)) for _ in range(2))
    assert [len(b["img"]) for b in first] == [2, 2, 1]
    assert all(torch.equal(a["img"], b["img"]) for a, b in zip(first, second, strict=True))
    names = [Path(f).stem for b in first for f in b["im_file"]]
    assert names == ["00000", "00003", "00006", "00008", "00011"]
    assert sum(len(b["img"]) for b in task.calibration(100, 8)) == 12
    assert float(first[0]["img"].max()) <= 1.0


# ---- recovery ------------------------------------------------------------------------------------


def test_a_recovery_keeps_the_widths_and_returns_the_best_weights(
    task: DetectionTask,
    plan: PruningPlan,
    pruned: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, int, float]] = []
    before = copy.deepcopy(pruned.state_dict())
    untouched = task.evaluate(task.predictor(pruned))

    def on_epoch(done: int, epochs: int, accuracy: float) -> bool:
        told.append((done, epochs, accuracy))
        return True

    recovery = Recovery(epochs=2, lr=1e-3, batch=4, device="cpu", reestimate_images=12)
    with monkeypatch.context() as patch:
        judged: list[float] = []
        evaluate = task.evaluate
        patch.setattr(
            DetectionTask, "evaluate", lambda self, predict: judged.append(evaluate(predict)) or judged[-1]
        )
        model = task.recover(pruned, recovery, tmp_path, on_epoch)
    # Once before training: what the unpruned network's statistics would give is not asked.
    assert judged == [accuracy for _, _, accuracy in told]
    check_widths(model, plan)
    assert [(done, epochs) for done, epochs, _ in told] == [(0, 2), (1, 2), (2, 2)]
    assert told[0][2] >= untouched
    best = max(accuracy for _, _, accuracy in told)
    assert task.evaluate(task.predictor(model)) == pytest.approx(best, abs=1e-6)
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("epochs", "options", "scale", "translate"),
    [(10, {}, 0.2, 0.05), (10, {"scale": 0.4}, 0.4, 0.05), (11, {}, 0.5, 0.1)],
)
def test_a_short_recovery_changes_its_images_little(
    task: DetectionTask,
    pruned: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epochs: int,
    options: dict[str, float],
    scale: float,
    translate: float,
) -> None:
    seen: list[Any] = []

    def train(trainer: Any) -> None:
        seen.append(trainer.args)
        trainer.ema = SimpleNamespace(ema=trainer.model)

    monkeypatch.setattr("objectives.detection.task.RecoveryTrainer.train", train)
    recovery = Recovery(epochs=epochs, device="cpu", reestimate_images=0, options=options)
    task.recover(pruned, recovery, tmp_path, lambda *_: True)
    (args,) = seen
    assert (args.scale, args.translate) == (scale, translate)
    assert args.batch == args.nbs == 2  # as small as may be, for as many steps as so few images give


def test_training_that_makes_it_worse_is_undone(task: DetectionTask, tmp_path: Path) -> None:
    model = task.load_model()
    before = copy.deepcopy(model.state_dict())
    accuracy = task.evaluate(task.predictor(model))
    assert accuracy > 0.05
    recovery = Recovery(epochs=1, lr=1.0, batch=4, device="cpu", reestimate_images=0)
    model = task.recover(model, recovery, tmp_path, lambda *_: True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert task.evaluate(task.predictor(model)) == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize(("asked", "used"), [(None, 2), (3, 3)])
def test_a_recovery_uses_the_threads_asked_for_or_leaves_them(
    task: DetectionTask, pruned: nn.Module, tmp_path: Path, asked: int | None, used: int
) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # Ultralytics by itself would leave all but one core
    try:
        recovery = Recovery(epochs=1, batch=4, device="cpu", reestimate_images=0, threads=asked)
        task.recover(pruned, recovery, tmp_path, lambda *_: seen.append(torch.get_num_threads()) is None)
        assert seen == [used, used]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_importing_leaves_torch_its_threads() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    shown = "torch.get_num_threads(), os.environ.get('OMP_NUM_THREADS')"

    def seen(before: str = "") -> str:
        command = [sys.executable, "-c", f"{before}import os, torch; print({shown})"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    assert seen("import objectives.detection; ") == seen()


def test_a_caller_may_end_a_recovery(task: DetectionTask, pruned: nn.Module, tmp_path: Path) -> None:
    for stop_at in (0, 1):
        told: list[int] = []

        def on_epoch(done: int, epochs: int, accuracy: float, stop: int = stop_at) -> bool:
            told.append(done)  # noqa: B023  # called before the loop goes on
            return done < stop

        recovery = Recovery(epochs=5, batch=4, device="cpu", reestimate_images=0)
        task.recover(copy.deepcopy(pruned), recovery, tmp_path, on_epoch)
        assert told == list(range(stop_at + 1))


def test_an_accuracy_that_is_known_is_not_judged_again(
    task: DetectionTask, pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[float] = []

    def judge(self: DetectionTask, predict: Any) -> float:
        judged.append(0.1)
        return judged[-1]

    monkeypatch.setattr(DetectionTask, "evaluate", judge)
    told: list[tuple[int, float]] = []
    recovery = Recovery(epochs=1, batch=4, device="cpu", reestimate_images=0, accuracy=0.7)

    def on_epoch(done: int, epochs: int, accuracy: float) -> bool:
        told.append((done, accuracy))
        return True

    before = copy.deepcopy(pruned.state_dict())
    after = task.recover(pruned, recovery, tmp_path, on_epoch).state_dict()
    assert told == [(0, 0.7), (1, 0.1)]
    assert judged == [0.1]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # still the best state


def test_a_loss_that_is_no_number_is_said(task: DetectionTask, pruned: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        next(pruned.parameters()).fill_(float("nan"))
    recovery = Recovery(epochs=1, batch=4, device="cpu", reestimate_images=0)
    with pytest.raises(FloatingPointError, match="training loss became nan in epoch 1"):
        task.recover(pruned, recovery, tmp_path, lambda *_: True)


@pytest.mark.parametrize("shape", [(3, 8, 40), (40, 8), (16, 16)])
def test_updates_are_orthogonalised_about_as_ultralytics_does(shape: tuple[int, ...]) -> None:
    from ultralytics.optim.muon import zeropower_via_newtonschulz5

    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrices)
    torch.testing.assert_close(found, zeropower_via_newtonschulz5(matrices).float(), rtol=0.0, atol=0.03)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.25
    assert values.median() > 0.6


@pytest.mark.parametrize(("optimizer", "is_used"), [("MuSGD", True), ("SGD", False)])
def test_musgd_needs_no_bfloat16_on_a_cpu(
    task: DetectionTask,
    pruned: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    is_used: bool,
) -> None:
    from ultralytics.optim import muon

    def in_bfloat16(matrices: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked for bfloat16")

    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz5", in_bfloat16)
    monkeypatch.setattr(
        "objectives.detection.training.orthogonalised",
        lambda matrices: seen.append(matrices.shape) or orthogonalised(matrices),
    )
    options = {"optimizer": optimizer, "momentum": 0.9}
    recovery = Recovery(epochs=1, batch=4, lr=0.01, device="cpu", reestimate_images=0, options=options)
    task.recover(pruned, recovery, tmp_path, lambda *_: True)
    assert bool(seen) == is_used
    assert muon.zeropower_via_newtonschulz5 is in_bfloat16


# ---- accuracy ------------------------------------------------------------------------------------


def test_accuracy_is_ultralytics_own(task: DetectionTask, shapes: Any) -> None:
    from ultralytics import YOLO

    options = {"imgsz": 64, "rect": False, "batch": 4, "workers": 0, "plots": False, "device": "cpu"}
    found = YOLO(str(shapes.weights)).val(data=str(shapes.data), **options)
    ours = task.evaluate(task.predictor(task.load_model()))
    assert ours > 0.05
    assert ours == pytest.approx(float(found.box.map), abs=2e-3)


def test_a_predictor_that_sees_nothing_scores_zero(task: DetectionTask) -> None:
    def blind(images: np.ndarray) -> list[np.ndarray]:
        return [np.zeros((len(images), 9, 80), dtype=np.float32)]

    assert task.evaluate(blind) == 0.0


def test_evaluation_leaves_the_model_alone(task: DetectionTask, pruned: nn.Module) -> None:
    before = copy.deepcopy(pruned.state_dict())
    task.evaluate(task.predictor(pruned))
    assert all(torch.equal(v, before[k]) for k, v in pruned.state_dict().items())
    assert any(isinstance(m, nn.BatchNorm2d) for m in pruned.modules())  # the fused one is a copy


# ---- the checkpoint ------------------------------------------------------------------------------


def test_a_pruned_checkpoint_opens_predicts_and_refuses_to_be_unpruned(
    task: DetectionTask, plan: PruningPlan, pruned: nn.Module, shapes: Any, tmp_path: Path
) -> None:
    from ultralytics import YOLO

    path = task.save(pruned, tmp_path / "model.pt")
    yolo = YOLO(str(path))
    check_widths(yolo.model, plan)
    image = torch.from_numpy(task.sample_images(1))
    with torch.no_grad():
        torch.testing.assert_close(
            yolo.model.float().eval()(image)[0], pruned(image)[0], rtol=1e-4, atol=1e-4
        )
    assert yolo.names == dict(pruned.names)  # type: ignore[arg-type]
    yolo.predict(np.zeros((64, 64, 3), dtype=np.uint8), imgsz=64, device="cpu", verbose=False)
    options = {
        "data": str(shapes.data), "imgsz": 64, "epochs": 1, "batch": 4, "device": "cpu", "workers": 0,
        "plots": False, "val": False, "amp": False, "project": str(tmp_path), "verbose": False,
    }  # fmt: skip
    with pytest.raises(Exception, match="this model was pruned and cannot be rebuilt from its yaml"):
        YOLO(str(path)).train(**options)
    trained = YOLO(str(path))
    trained.train(trainer=PrunedTrainer, **options)
    check_widths(trained.model, plan)


def test_an_unpruned_checkpoint_names_no_folder_of_this_machine(task: DetectionTask, tmp_path: Path) -> None:
    path = task.save(task.load_model(), tmp_path / "model.pt")
    saved = torch.load(path, weights_only=False)
    assert saved["model"].yaml["yaml_file"] == "tiny.yaml"
    assert str(tmp_path) not in str(saved["model"].yaml) + str(saved["train_args"])
    assert DetectionTask(str(path), task.data, 64).model_key == task.model_key


def test_a_checkpoint_holds_stock_classes_only(
    task: DetectionTask, pruned: nn.Module, tmp_path: Path
) -> None:
    saved = torch.load(task.save(pruned, tmp_path / "model.pt"), weights_only=False)["model"]
    strangers = {type(m).__module__.partition(".")[0] for m in saved.modules()} - {"ultralytics", "torch"}
    assert strangers == set()


def test_ultralytics_is_kept_quiet(task: DetectionTask) -> None:
    from ultralytics.utils import SETTINGS, USER_CONFIG_DIR

    assert str(USER_CONFIG_DIR).startswith(os.environ["YOLO_CONFIG_DIR"])
    assert os.environ["YOLO_AUTOINSTALL"] == "0"
    assert SETTINGS is not None


# ---- wrong input ---------------------------------------------------------------------------------


def test_a_model_that_is_none(shapes: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("no model")
    with pytest.raises(ValueError, match=r"model must be an Ultralytics detection checkpoint, got .*text.pt"):
        DetectionTask(str(text), str(shapes.data), 64)
    weights = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, weights)
    with pytest.raises(
        ValueError, match=r"model must be an Ultralytics detection checkpoint, got .*weights.pt"
    ):
        DetectionTask(str(weights), str(shapes.data), 64)
    with pytest.raises(
        ValueError, match=r"must be an existing Ultralytics .pt or .yaml file, got .*absent.pt"
    ):
        DetectionTask(str(tmp_path / "absent.pt"), str(shapes.data), 64)


def test_data_that_is_of_no_use(shapes: Any, tmp_path: Path) -> None:
    def data(**changes: Any) -> str:
        content = yaml.safe_load(shapes.data.read_text())
        content = {k: str(shapes.data.parent / v) if k in ("train", "val") else v for k, v in content.items()}
        path = tmp_path / "data.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return str(path)

    model = str(shapes.weights)
    assert DetectionTask(model, data(), 64).metric == "mAP50-95"
    with pytest.raises(ValueError, match="data must be an Ultralytics data file whose images exist"):
        DetectionTask(model, data(val=str(tmp_path / "absent")), 64)
    with pytest.raises(ValueError, match=r"tiny.pt detects 5 classes, data data.yaml has 2"):
        DetectionTask(model, data(names={0: "a", 1: "b"}), 64)
    images = tmp_path / "images" / "bare"
    images.mkdir(parents=True)
    for image in sorted((shapes.data.parent / "images" / "train").iterdir())[:2]:
        (images / image.name).write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match=r"data must have labels, got .* with none in its val split"):
        DetectionTask(model, data(val=str(images)), 64)


@pytest.mark.parametrize("imgsz", [0, 31, 65, -32])
def test_an_image_size_yolo_cannot_take(shapes: Any, imgsz: int) -> None:
    with pytest.raises(ValueError, match=f"imgsz must be a positive multiple of 32, got {imgsz}"):
        DetectionTask(str(shapes.weights), str(shapes.data), imgsz)

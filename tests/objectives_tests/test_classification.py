from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from objectives.builder import load_pruned
from objectives.classification import ClassificationTask
from objectives.digest import stamp
from objectives.task import Recovery, Task
from objectives.wiring import fuse_batchnorm, wiring

MODULE = """
from torch import nn

def cnn(width=8, classes=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
    )

def no_module():
    return 3

def crashes():
    raise RuntimeError("out of ideas")

def feature_maps():
    return nn.Conv2d(3, 4, 1)

not_a_function = 3
"""
QUICK = Recovery(epochs=3, lr=0.05, batch=32, device="cpu", threads=1, reestimate_images=0)


def stripes(count: int, seed: int) -> tuple[Any, Any]:
    """`(count, 16, 16, 3)` uint8: dark stripes in one of four directions, of any colour and phase, and their
    direction.

    Directions 1 and 3 are mirror images of each other, so the tests train without mirroring.
    """
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, count)
    rows, columns = np.mgrid[0:16, 0:16]
    angle = (y * np.pi / 4)[:, None, None]
    wave = np.cos(
        (columns * np.cos(angle) + rows * np.sin(angle)) * 1.4 + random.uniform(0, 6.3, (count, 1, 1))
    )
    colour = random.uniform(60, 250, (count, 1, 1, 3))
    x = colour * (0.6 + 0.4 * wave[..., None]) + random.normal(0, 12, (count, 16, 16, 3))
    return np.clip(x, 0, 255).astype(np.uint8), y


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny_models.py").write_text(MODULE)
    (x_train, y_train), (x_test, y_test) = stripes(640, 0), stripes(200, 1)
    np.savez(folder / "stripes.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return folder


def make(folder: Path, **settings: Any) -> ClassificationTask:
    return ClassificationTask(
        **{"builder": "tiny_models:cnn", "data": "stripes.npz", "folder": folder} | settings
    )


@pytest.fixture(scope="module")
def task(folder: Path) -> ClassificationTask:
    return make(folder)


@pytest.fixture(scope="module")
def trained(task: ClassificationTask, folder: Path) -> nn.Module:
    return task.recover(task.load_model(), options(QUICK, flip=False), folder, lambda *_: True)


def options(recovery: Recovery, **values: Any) -> Recovery:
    return Recovery(**vars(recovery) | {"options": values})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_it_is_a_task(task: ClassificationTask) -> None:
    checked: Task = task
    assert checked.metric == "top-1"
    assert checked.input_shape == (1, 3, 16, 16)
    assert checked.settle(checked.load_model()) is None


# ---- training and judging ----------------------------------------------------------------------------------


def test_it_learns(task: ClassificationTask, trained: nn.Module) -> None:
    before = task.evaluate(task.predictor(task.load_model()))
    after = task.evaluate(task.predictor(trained))
    assert before < 0.5
    assert after > 0.9
    assert not trained.training


def test_recovery_improves_a_damaged_model(
    task: ClassificationTask, trained: nn.Module, folder: Path
) -> None:
    damaged = make(folder).load_model()
    damaged.load_state_dict(trained.state_dict())
    with torch.no_grad():
        damaged[4].weight[3:] = 0
        damaged[9].weight[:, :3] *= -1
    before = task.evaluate(task.predictor(damaged))
    seen: list[tuple[int, int, float]] = []

    def on_epoch(epoch: int, epochs: int, accuracy: float) -> bool:
        seen.append((epoch, epochs, accuracy))
        return True

    recovered = task.recover(damaged, options(QUICK, flip=False), folder, on_epoch)
    after = task.evaluate(task.predictor(recovered))
    assert after > before + 0.1
    assert [(epoch, epochs) for epoch, epochs, _ in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert max(accuracy for *_, accuracy in seen) == after


def test_reestimation_alone_mends_the_statistics_and_moves_no_weight(
    task: ClassificationTask, trained: nn.Module, folder: Path
) -> None:
    damaged = task.load_model()
    damaged.load_state_dict(trained.state_dict())
    damaged[1].running_mean.fill_(3)
    before = task.evaluate(task.predictor(damaged))
    mended = task.recover(damaged, Recovery(epochs=0, device="cpu", threads=1), folder, lambda *_: True)
    assert task.evaluate(task.predictor(mended)) > max(before, 0.85)
    assert torch.equal(mended[0].weight, trained[0].weight)


def test_the_callback_ends_the_recovery(task: ClassificationTask, folder: Path) -> None:
    epochs: list[int] = []

    def until_the_first(epoch: int, *_: object) -> bool:
        epochs.append(epoch)
        return epoch < 1

    task.recover(task.load_model(), QUICK, folder, until_the_first)
    assert epochs == [0, 1]


def test_an_accuracy_that_is_known_is_not_judged_again(
    task: ClassificationTask, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassificationTask, "_accuracy", lambda self, model: 0.1)
    told: list[tuple[int, float]] = []
    before = task.load_model().state_dict()
    after = task.recover(
        task.load_model(),
        replace(QUICK, epochs=1, accuracy=0.7),
        folder,
        lambda done, _, accuracy: told.append((done, accuracy)) or True,
    ).state_dict()
    assert told == [(0, 0.7), (1, 0.1)]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())  # still the best state


def test_the_seed_decides_the_recovery_and_nothing_else_does(task: ClassificationTask, folder: Path) -> None:
    def weights(seed: int) -> nn.Module:
        torch.manual_seed(torch.seed())
        recovery = Recovery(epochs=1, batch=64, device="cpu", threads=1, seed=seed)
        return task.recover(task.load_model(), recovery, folder, lambda *_: True)

    first, again, other = weights(0), weights(0), weights(1)
    assert same(first, again)
    assert not same(first, other)


def test_recovery_leaves_the_global_random_state_and_threads(task: ClassificationTask, folder: Path) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    task.recover(task.load_model(), Recovery(epochs=1, device="cpu", threads=1), folder, lambda *_: True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_diverging_recovery_is_an_error(task: ClassificationTask, folder: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"became (nan|inf) in epoch .*finetune\.lr"):
        task.recover(
            task.load_model(),
            Recovery(epochs=1, lr=1e12, batch=64, device="cpu", threads=1),
            folder,
            lambda *_: True,
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mosaic": 1.0}, "'mosaic' is unknown for classification; known are momentum"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"shift": -1}, "shift must be at least 0 pixels, got -1"),
    ],
)
def test_bad_options_are_named(
    task: ClassificationTask, folder: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        task.recover(task.load_model(), options(QUICK, **values), folder, lambda *_: True)


def test_evaluation_through_a_callable_equals_the_module(
    task: ClassificationTask, trained: nn.Module
) -> None:
    with np.load(task.folder / task.data) as data:
        x, y = data["x_test"], data["y_test"]
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (task.mean, task.std))
    with torch.no_grad():
        guesses = trained((pixels - mean) / std).argmax(1).numpy()

    assert task.evaluate(task.predictor(trained)) == (guesses == y).mean()
    assert task.evaluate(lambda images: [np.full((len(images), 4), np.nan, np.float32)]) == 0


# ---- loss and calibration ----------------------------------------------------------------------------------


def test_the_loss_is_a_sum_over_images(task: ClassificationTask) -> None:
    model = task.load_model()
    (batch,) = task.calibration(6, 6)
    halves = list(task.calibration(6, 3))
    total = task.loss(model, batch)
    assert total.requires_grad
    assert total.item() == pytest.approx(sum(task.loss(model, half).item() for half in halves), rel=1e-5)
    assert task.outputs(model, batch).item() == pytest.approx(model(batch.images).sum().item(), rel=1e-5)


def test_calibration_gives_the_same_images_each_time(task: ClassificationTask) -> None:
    first, again = list(task.calibration(20, 8)), list(task.calibration(20, 8))
    assert [len(b.images) for b in first] == [8, 8, 4]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))


def test_calibration_is_spread_over_the_training_split(tmp_path: Path, folder: Path) -> None:
    x, y = stripes(400, 0)
    order = np.argsort(y)
    np.savez(tmp_path / "sorted.npz", x_train=x[order], y_train=y[order], x_test=x, y_test=y)
    batches = make(folder, data=str(tmp_path / "sorted.npz")).calibration(16, 8)
    assert set(torch.cat([b.labels for b in batches]).tolist()) == {0, 1, 2, 3}


# ---- shipping ----------------------------------------------------------------------------------------------


def test_the_deployable_copy_is_fused_and_equal(task: ClassificationTask, trained: nn.Module) -> None:
    ready = task.deployable(trained)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ready.modules())
    assert [n for n, m in ready.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))] == ["0", "4", "9"]
    x = torch.from_numpy(task.sample_images(8))
    assert x.shape == (8, 3, 16, 16)
    torch.testing.assert_close(ready(x), trained(x), rtol=1e-4, atol=1e-5)
    assert isinstance(trained[1], nn.BatchNorm2d), "the model itself keeps its batch norm"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_pruned_model_is_saved_and_opened_again(
    task: ClassificationTask, tmp_path: Path, suffix: str
) -> None:
    pruned = nn.Sequential(*make(task.folder, arguments={"width": 5}).load_model())
    path = task.save(pruned, tmp_path / f"model{suffix}")

    opened = load_pruned(task.load_model(), path).eval()
    assert opened[0].out_channels == opened[4].in_channels == opened[1].num_features == 5
    x = torch.from_numpy(task.sample_images(4))
    assert torch.equal(opened(x), pruned.eval()(x))


def test_a_pruned_depthwise_model_is_opened_again(tmp_path: Path) -> None:
    def depthwise(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 3, groups=width), nn.Conv2d(width, 2, 1)
        )

    pruned = depthwise(5)
    torch.save(pruned.state_dict(), tmp_path / "model.pt")
    x = torch.rand(2, 3, 6, 6)
    assert torch.equal(load_pruned(depthwise(8), tmp_path / "model.pt")(x), pruned(x))


def test_metadata_names_what_the_file_needs_outside(task: ClassificationTask) -> None:
    texts = task.metadata(task.load_model())
    assert all(isinstance(v, str) for v in texts.values())
    assert texts["imgsz"] == "[16, 16]"
    assert texts["names"] == "{0: '0', 1: '1', 2: '2', 3: '3'}"


def test_keys_follow_weights_data_and_normalisation(task: ClassificationTask, folder: Path) -> None:
    assert make(folder).model_key == task.model_key
    assert make(folder).data_key == task.data_key
    assert make(folder, arguments={"width": 6}).model_key != task.model_key
    assert make(folder, mean=(0.5, 0.5, 0.5)).data_key != task.data_key
    assert make(folder, imgsz=24).data_key != task.data_key


def test_a_change_of_any_source_shows(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b", "b/deeper"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / split / name / "1.png")
    weights = tmp_path / "weights.pt"
    torch.save(make(folder).load_model().state_dict(), weights)
    sources = make(folder, data=str(tmp_path), weights=str(weights), imgsz=16).sources
    images = sorted(tmp_path.rglob("*.png"))
    assert len(images) == 6
    for path in [weights, *images]:
        before = stamp(sources).digest
        with path.open("ab") as file:
            file.write(b" ")
        assert stamp(sources).digest != before, path
    before = stamp(sources).digest
    (tmp_path / "val" / "c").mkdir()
    assert stamp(sources).digest != before
    npz = folder / "stripes.npz"
    assert make(folder).sources == [npz]


def test_each_loaded_model_is_a_fresh_trainable_copy(task: ClassificationTask) -> None:
    first, second = task.load_model(), task.load_model()
    with torch.no_grad():
        first[0].weight.zero_()
    assert second[0].weight.abs().sum() > 0
    assert not second.training
    assert all(p.requires_grad for p in second.parameters())


# ---- wiring ------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """`a` is read by its batch norm and a sum, `b` by its own alone; `left` and `right` make the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.first_bn = nn.BatchNorm2d(3)
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(self.first_bn(x))
        y = a + self.bn_a(a)
        y = torch.relu_(self.bn_b(self.b(y)))
        return (self.left(y) + self.right(y)).mean((2, 3))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_wiring_finds_the_output_layers_and_the_safe_batch_norms(mode: Any) -> None:
    model = Branching()
    with mode():
        found = wiring(model, torch.rand(1, 3, 5, 5))
    assert found.outputs == {"left", "right"}
    assert found.batchnorms == {"b": "bn_b"}


def test_only_safe_batch_norms_are_fused() -> None:
    torch.manual_seed(0)
    model = Branching()
    for norm in (model.bn_a, model.bn_b, model.first_bn):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -1, 1)
    model.eval()
    x = torch.rand(2, 3, 5, 5)
    fused = fuse_batchnorm(model, x[:1])
    assert [n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["bn_a", "first_bn"]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_output_layer_and_the_models_own_list_are_fixed(task: ClassificationTask) -> None:
    model = task.load_model()
    assert task.traceable(model).fixed == {"9"}
    model.fixed_layers = ["4"]  # type: ignore[assignment]
    assert task.traceable(model).fixed == {"4", "9"}
    model.fixed_layers = ["nowhere"]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="names no layer of the model: nowhere"):
        task.traceable(model)


# ---- data --------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class folders of pictures of several shapes; `val` lacks the first class."""
    random = np.random.default_rng(0)
    for split, classes in (("train", ("ants", "bees", "cats", "dogs")), ("val", ("bees", "cats", "dogs"))):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for index, size in enumerate(((20, 30), (40, 24), (16, 16))):
                pixels = random.integers(0, 255, (*size, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def test_a_folder_of_class_folders_is_read(pictures: Path, folder: Path) -> None:
    task = make(folder, data=str(pictures), imgsz=16)
    assert task.input_shape == (1, 3, 16, 16)
    labels = torch.cat([b.labels for b in task.calibration(12, 5)])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    # val has no ants, and yet its bees are class 1 as in train.
    perfect = iter([1, 1, 1, 2, 2, 2, 3, 3, 3])
    assert task.evaluate(lambda images: [np.eye(4, dtype=np.float32)[[next(perfect) for _ in images]]]) == 1
    assert "1: 'bees'" in task.metadata(task.load_model())["names"]

    with Image.open(pictures / "val/bees/2.png") as picture:
        exact = np.asarray(picture).transpose(2, 0, 1) / 255
    shown = task.sample_images(9)[2] * np.array(task.std)[:, None, None] + np.array(task.mean)[:, None, None]
    np.testing.assert_allclose(shown, exact, atol=1e-6)


def test_array_images_are_scaled_to_imgsz(folder: Path) -> None:
    task = make(folder, imgsz=24)
    assert task.input_shape == (1, 3, 24, 24)
    assert task.sample_images(3).shape == (3, 3, 24, 24)


def arrays(**change: Any) -> dict[str, Any]:
    x, y = stripes(12, 0)
    return {"x_train": x, "y_train": y, "x_test": x, "y_test": y} | change


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x_train": stripes(3, 0)[0]}, "lacks y_train, x_test, y_test"),
        (
            arrays(x_train=np.zeros((12, 16, 16, 3))),
            r"x_train must be .* uint8, not empty, got \(12, 16, 16, 3\) float64",
        ),
        (arrays(x_test=np.zeros((12, 16, 16), np.uint8)), r"x_test must be .* got \(12, 16, 16\)"),
        (arrays(y_train=np.zeros(3, int)), r"y_train must be \(12,\) integers"),
        (arrays(y_test=np.full(12, -1)), "y_test must be .* smallest -1"),
        (arrays(y_train=np.full(12, 9)), "has 4 outputs, data .* 10 classes"),
        (arrays(x_train=np.zeros((12, 8, 8, 3), np.uint8)), "must be one size"),
    ],
)
def test_unusable_arrays_are_named(
    tmp_path: Path, folder: Path, content: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(ValueError, match=message):
        make(folder, data=str(tmp_path / "bad.npz"))


def test_unusable_data_is_named(tmp_path: Path, folder: Path, pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"data must be an \.npz file or a folder .* which does not exist"):
        make(folder, data="nowhere")
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"data .*broken\.npz must be an \.npz"):
        make(folder, data=str(tmp_path / "broken.npz"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="train/ must hold one folder of images per class"):
        make(folder, data=str(tmp_path / "empty"))
    (pictures / "val" / "eels").mkdir()
    with pytest.raises(ValueError, match="val/ has classes that train/ lacks: eels"):
        make(folder, data=str(pictures), imgsz=16)


def test_an_unreadable_image_is_named(pictures: Path, folder: Path) -> None:
    (pictures / "val/bees/1.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"image .*bees/1\.png cannot be read"):
        make(folder, data=str(pictures), imgsz=16).sample_images(9)


# ---- model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ("tiny_models.cnn", "must be \"pkg.module:function\", got 'tiny_models.cnn'"),
        ("no_such_module:cnn", "cannot be imported .* No module named 'no_such_module'"),
        ("tiny_models:nothing", "has no attribute 'nothing'"),
        ("tiny_models:not_a_function", "must name a function, got a int"),
        ("tiny_models:no_module", r"must return a torch\.nn\.Module, got a int"),
        ("tiny_models:crashes", r"crashes\(\) fails: RuntimeError: out of ideas"),
        ("tiny_models:feature_maps", r"must return logits \(images, classes\), got \(1, 4, 16, 16\)"),
    ],
)
def test_unusable_builders_are_named(folder: Path, builder: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder, builder=builder)


def test_wrong_arguments_and_normalisation_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cnn\(depth=3\) fails: TypeError"):
        make(folder, arguments={"depth": 3})
    with pytest.raises(ValueError, match=r"std must be three finite numbers above 0.*got \(1, 0, 1\)"):
        make(folder, std=(1, 0, 1))


def test_two_studies_may_name_their_module_alike(folder: Path, tmp_path: Path) -> None:
    first = make(folder)
    (tmp_path / "tiny_models.py").write_text(MODULE.replace("width=8", "width=4"))
    data = str(folder / "stripes.npz")
    other = make(tmp_path, data=data)
    again = make(folder)
    assert [t.load_model()[0].out_channels for t in (first, other, again)] == [8, 4, 8]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_weights_are_loaded(folder: Path, tmp_path: Path, trained: nn.Module, suffix: str) -> None:
    path = make(folder).save(trained, tmp_path / f"weights{suffix}")
    assert same(make(folder, weights=str(path)).load_model(), trained)


def test_wrapped_state_dicts_are_unwrapped(folder: Path, tmp_path: Path, trained: nn.Module) -> None:
    state = {f"module.{name}": tensor for name, tensor in trained.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pt")
    assert same(make(folder, weights=str(tmp_path / "wrapped.pt")).load_model(), trained)


def test_unusable_weights_are_named(folder: Path, tmp_path: Path, trained: nn.Module) -> None:
    def fault(name: str) -> str:
        with pytest.raises(ValueError, match=r"model\.weights") as caught:
            make(folder, weights=str(tmp_path / name))
        return str(caught.value)

    assert "does not exist" in fault("nowhere.pt")
    (tmp_path / "text.pt").write_text("no weights")
    assert "cannot be read" in fault("text.pt") or "more than tensors" in fault("text.pt")
    (tmp_path / "text.safetensors").write_text("no weights")
    assert "cannot be read" in fault("text.safetensors")
    torch.save(trained, tmp_path / "whole.pt")
    assert "save model.state_dict() instead of the model" in fault("whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in fault("list.pt")
    state = trained.state_dict()
    state["extra"] = state.pop("0.weight")
    state["9.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "other.pt")
    message = fault("other.pt")
    assert "1 names are missing (0.weight)" in message
    assert "1 names are unknown to the model (extra)" in message
    assert "9.bias is (7,) instead of (4,)" in message


def test_a_pickle_that_would_run_code_runs_none(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"weight": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        make(folder, weights=str(tmp_path / "trap.pt"))
    assert not (tmp_path / "sprung").exists()


# ---- real weights ------------------------------------------------------------------------------------------


def test_resnet56_loads_the_published_weights() -> None:
    root = Path(__file__).resolve().parents[2]
    shared = Path(os.environ.get("PARETOPRUNE_DATA", root.parent / "shared" / "data"))
    if not (shared / "resnet56-cifar10.pt").is_file():
        pytest.skip(f"no resnet56-cifar10.pt in {shared}; set PARETOPRUNE_DATA to its folder")
    task = ClassificationTask(
        builder="resnet_cifar:resnet56",
        data=str(shared / "cifar10-10k.npz"),
        weights=str(shared / "resnet56-cifar10.pt"),
        folder=root / "examples",
    )
    model = task.load_model()
    assert sum(p.numel() for p in model.parameters()) == 853_018
    assert task.traceable(model).fixed == {"linear"}

    # 128 of the 4000 test images: enough to tell the published 0.885 from a wrong normalisation or shortcut.
    images, labels = task._images.val.read(np.arange(128)), task._images.val.labels[:128]
    with torch.inference_mode():
        guesses = task.deployable(model)(task._normalise(images)).argmax(1).numpy()
    assert (guesses == labels).mean() > 0.8

"""Quickstart: the whole main job on a small detection set that it makes itself. No network, no data, nothing
to configure.

Makes images of shapes, trains a small YOLO on them, searches on two runtimes of this machine, exports the
best model of each. Every part is kept in one folder and found there again, so an interrupted quickstart goes
on. The study it leaves is an ordinary one.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from objectives.detection import DetectionTask
from objectives.synthetic import CLASSES, make_detection_set
from objectives.task import Recovery

from .export import export_best
from .found import fronts_of
from .launch import launch
from .progress import ConsoleProgress, front_table
from .review import write_study_report
from .studyfile import load_study_file

IMGSZ = 128
_IMAGES_TRAIN, _IMAGES_VAL = 400, 120
_EPOCHS = 10
#: From nothing, after eight epochs on these images: MuSGD .08 mAP, SGD .02, AdamW below .01.
_OPTIMIZER = {"optimizer": "MuSGD", "momentum": 0.9, "warmup_epochs": 0.5}

#: A YOLOv8 of about a million parameters; (from, repeats, block, arguments) as Ultralytics writes them.
_ARCHITECTURE = {
    "nc": len(CLASSES),
    "scales": {"n": [0.33, 0.25, 512]},
    "backbone": [
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "C2f", [128, True]],
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 3, "C2f", [256, True]],
        [-1, 1, "Conv", [512, 3, 2]],
        [-1, 3, "C2f", [512, True]],
        [-1, 1, "SPPF", [512, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 3, "C2f", [256]],
        [-1, 1, "Conv", [256, 3, 2]],
        [[-1, 7], 1, "Concat", [1]],
        [-1, 3, "C2f", [512]],
        [[10, 13], 1, "Detect", ["nc"]],
    ],
}

_STUDY = """\
# A study as quickstart made it; change what you like and run it again.
name: quickstart
model: shapes.pt
data: shapes/data.yaml
imgsz: {imgsz}
devices:
  - {{name: cpu-torch, runtime: torch, threads: {threads}}}
  - {{name: cpu-ort, runtime: onnxruntime, threads: {threads}}}
search:
  beta: {{low: 0.0, high: 1.0}}
  ratio: {{low: 0.1, high: 0.7}}
  round_to: {{choices: [4, 8]}}
  min_channels: 4
finetune: {{epochs: 1, batch: 8}}
profile: {{model: bilinear}}    # quick; fitted measures pruned variants of the model too
measure: {{limit_s: 5}}
trials: {trials}
"""


def run_quickstart(folder: Path, *, trials: int, console: Console) -> None:
    """Run it; see the module's text.

    Args:
        folder: where everything goes; what an earlier run left there is used.
        trials: pruned trials per device.
        console: for progress (standard error).
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "shapes" / "data.yaml"
    if not data.exists():
        console.print(f"making {_IMAGES_TRAIN + _IMAGES_VAL} images of shapes in {data.parent}")
        make_detection_set(
            data.parent, images_train=_IMAGES_TRAIN, images_val=_IMAGES_VAL, imgsz=IMGSZ, seed=0
        )
    weights = folder / "shapes.pt"
    if not weights.exists():
        _train(folder, data, weights, console)
    path = folder / "study.yaml"
    if not path.exists():
        path.write_text(_STUDY.format(imgsz=IMGSZ, threads=2, trials=trials), encoding="utf-8")
    study = load_study_file(path, [f"trials={trials}"])
    names = [d.name for d in study.devices]
    with ConsoleProgress(console, metric="mAP50-95", devices=names) as progress:
        fronts = launch(study, names, trials=trials, timeout_s=None, progress=progress)
    for name, front in fronts.items():
        console.print(front_table(name, front, "mAP50-95"))
    exported = [export_best(study, name, notice=console.print) for name in names]
    report = write_study_report(study, fronts_of(study, names), study.folder / "front.html")
    console.rule("done")
    for target in exported:
        console.print(f"exported {_short(target)}", highlight=False)
    shown = _short(path)
    console.print(
        f"report   {_short(report)}\n\nlook further:\n"
        f"  paretoprune front {shown}\n"
        f"  paretoprune ui {shown}\n"
        f"  paretoprune plan {shown} --device {names[1]} --beta 0.3 --ratio 0.4\n"
        f"  paretoprune search {shown} --trials {trials * 3}\n"
        f"  paretoprune export {shown} --device {names[1]} --min-accuracy 0.3",
        highlight=False,
        soft_wrap=True,
    )


def _train(folder: Path, data: Path, weights: Path, console: Console) -> None:
    """Train the small detector from scratch."""
    architecture = folder / "shapes-yolo.yaml"
    architecture.write_text(
        yaml.safe_dump({**_ARCHITECTURE, "scale": "n"}, sort_keys=False), encoding="utf-8"
    )
    task = DetectionTask(model=str(architecture), data=str(data), imgsz=IMGSZ)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training a small YOLO on them", total=_EPOCHS, note="")

        def on_epoch(done: int, epochs: int, accuracy: float) -> bool:
            progress.update(
                bar, completed=done, note=f"epoch {done} of {epochs}, {task.metric} {accuracy:.3f}"
            )
            if not console.is_terminal:
                console.print(f"epoch {done} of {epochs}: {task.metric} {accuracy:.3f}")
            return True

        recovery = Recovery(epochs=_EPOCHS, lr=0.02, batch=8, reestimate_images=0, options=_OPTIMIZER)
        model = task.recover(task.load_model(), recovery, folder / "training", on_epoch)
    partial = weights.with_suffix(".partial.pt")
    task.save(model, partial)
    partial.replace(weights)


def _short(path: Path) -> str:
    """A path as the user would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)

"""The model card: what an exported model is, was measured at and needs, in Markdown beside its files.

Written from metrics.json's content, so that the card and the numbers cannot differ. The code in it uses the
runtimes alone and is meant to be copied.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from .plan import PruningPlan
from .widths import layer_widths


def model_card(metrics: Mapping[str, Any], metadata: Mapping[str, str], plan: PruningPlan) -> str:
    """The card of an exported model.

    Args:
        metrics: the content of metrics.json.
        metadata: what the exported file carries: `task`, `names`, for a classifier `mean`, `std` and
            `resize`.
    """
    parts = [
        f"# {metrics['study']} for {metrics['device']}",
        _summary(metrics, metadata, plan),
        _numbers(metrics),
        "## Use it",
        *_snippets(metrics, metadata),
        _classes(metadata),
        _conditions(metrics),
        _widths(plan),
        _provenance(metrics),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(metrics: Mapping[str, Any], metadata: Mapping[str, str], plan: PruningPlan) -> str:
    side = " by ".join(str(n) for n in metrics["input_shape"][2:])
    kind = {"detect": "detector", "classify": "classifier"}.get(metadata.get("task", ""), "network")
    if plan.is_empty:
        return f"The unpruned {kind}, {side} pixels, as trial {metrics['trial']} of the study measured it."
    return (
        f"A {kind} for {side} pixels, made smaller for this device: {_what_went(metrics['asked'], plan)}. "
        f"{_training(metrics)}"
    )


def _what_went(asked: Mapping[str, Any], plan: PruningPlan) -> str:
    parts, beta = [], f"β {asked['beta']:.3f}"
    if plan.removed:
        steps = f" in {asked['steps']} steps" if asked["steps"] > 1 else ""
        parts.append(
            f"channels were pruned{steps} (asked was a share of {asked['ratio']:.3f} of {asked['ratio_of']}, "
            f"criterion {asked['criterion']}, {beta}, cost {asked['cost']}, allocation "
            f"{asked['allocation']}, kept widths in multiples of {asked['round_to']})"
        )
    if plan.blocks:
        parts.append(
            f"{_many(len(plan.blocks), 'block')} went as a whole (asked was a share of {asked['depth']:.3f} "
            f"of those that can, {beta})"
        )
    return " and ".join(parts)


def _training(metrics: Mapping[str, Any]) -> str:
    epochs = metrics["epochs_trained"]
    trained = f"trained for {_many(epochs, 'epoch')}" if epochs else "not trained"
    if metrics["asked"]["recovery"] == "scratch":
        return f"All weights were then drawn at random and {trained}: nothing of the original's is left."
    return f"What was left was then {trained}."


def _numbers(metrics: Mapping[str, Any]) -> str:
    base = metrics["baseline"]
    latency, speedup = f"{metrics['latency_ms']:.2f} ms", f"{metrics['speedup']:.2f} times"
    if metrics["latency_ci_ms"]:
        low, high = metrics["latency_ci_ms"]
        latency += f" ({low:.2f} to {high:.2f})"
        low, high = metrics["speedup_ci"]
        speedup += f" ({low:.2f} to {high:.2f})"
    rows = [
        ("", "this model", "unpruned"),
        ("---", "---:", "---:"),
        (metrics["metric"], f"{metrics['accuracy']:.4f}", f"{base['accuracy']:.4f}"),
        ("latency, median", latency, f"{base['latency_ms']:.2f} ms"),
        (
            "latency, 90th percentile",
            f"{metrics['latency_p90_ms']:.2f} ms",
            f"{base['latency_p90_ms']:.2f} ms",
        ),
        ("speedup", speedup, "1"),
        ("parameters", _count(metrics["params"]), _count(base["params"])),
        ("multiply-accumulates", _count(metrics["macs"]), _count(base["macs"])),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    settings = metrics["device_settings"]
    return (
        f"{table}\n\nLatency is that of the exported file in {settings['runtime']}, "
        f"{_many(settings['threads'], 'thread')}, {settings['precision']}, measured in turns "
        f"with the unpruned model on `{metrics['fingerprint']}`; in brackets 95% intervals. It holds for "
        "that machine only."
    )


def _snippets(metrics: Mapping[str, Any], metadata: Mapping[str, str]) -> list[str]:
    files, detects = metrics["files"], metadata.get("task") == "detect"
    side = metrics["input_shape"][-1]
    found = []
    if "model.pt" in files and detects:
        found.append(
            "With Ultralytics:\n\n```python\nfrom ultralytics import YOLO\n\n"
            f'model = YOLO("model.pt")\nresults = model.predict("image.jpg", imgsz={side})\n```'
        )
    if "model.onnx" in files:
        found.append(f"With ONNX Runtime:\n\n```python\n{_onnx(metrics, metadata, detects)}```")
    if "model.pt2" in files:
        shape = tuple(metrics["input_shape"])
        found.append(
            "With PyTorch, without the network's own code:\n\n```python\nimport torch\n\n"
            'model = torch.export.load("model.pt2").module()\n'
            f"outputs = model(torch.zeros{shape})  # {_pixels(metadata)}\n```"
        )
    if "model.xml" in files:
        found.append(
            "With OpenVINO:\n\n```python\nimport numpy as np\nimport openvino\n\n"
            'model = openvino.Core().compile_model("model.xml", "CPU")\n'
            f"outputs = model([np.zeros({tuple(metrics['input_shape'])}, np.float32)])"
            f"  # {_pixels(metadata)}\n```"
        )
    if "model.ncnn.param" in files:
        found.append(
            "With ncnn: `model.ncnn.param` and `model.ncnn.bin`, input blob `in0`, output blob `out0`."
        )
    if "model.pt" in files and not detects:
        found.append(
            "`model.pt` is a state dict with the narrowed layers' shapes; "
            f'`load_pruned(network, Path("model.pt"){_blocks(metrics)})` of paretoprune\'s '
            "`objectives.builder` loads it into the unpruned network."
        )
    return found


def _blocks(metrics: Mapping[str, Any]) -> str:
    """The argument without which a state dict with blocks missing does not fit."""
    return f", blocks={json.dumps(metrics['blocks'])}" if metrics["blocks"] else ""


def _onnx(metrics: Mapping[str, Any], metadata: Mapping[str, str], detects: bool) -> str:
    """Code that predicts on one image with NumPy, Pillow and ONNX Runtime alone."""
    height, side = metrics["input_shape"][2:]
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image",
        "",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        'image = Image.open("image.jpg").convert("RGB")',
    ]
    if detects:
        lines += [
            f"scale = {side} / max(image.size)",
            f'square = Image.new("RGB", ({side}, {side}), (114, 114, 114))',
            "square.paste(image.resize([max(1, round(n * scale)) for n in image.size]))",
            "pixels = np.asarray(square, np.float32).transpose(2, 0, 1)[None] / 255",
            "output = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]",
        ]
        if metadata.get("end2end") == "True":
            lines += [
                "for x1, y1, x2, y2, score, label in output[output[:, 4] > 0.25]:",
                "    print(int(label), round(float(score), 3), [round(float(v / scale), 1) "
                "for v in (x1, y1, x2, y2)])",
            ]
        else:
            lines += [
                "boxes, scores = output[:4].T, output[4:].T  # centre x, y, width, height; scores by class",
                "for box, score in zip(boxes, scores):  # overlaps are not removed",
                "    if score.max() > 0.25:",
                "        found = [round(float(v), 1) for v in box / scale]",
                "        print(int(score.argmax()), round(float(score.max()), 3), found)",
            ]
    else:
        if metadata.get("resize") == "crop":
            lines += [
                f"scale = {side} / min(image.size)  # the shorter side fits, what the longer has more is cut",
                f"size = [max({side}, round(n * scale)) for n in image.size]",
                f"left, top = [(n - {side}) // 2 for n in size]",
                "image = image.resize(size, Image.Resampling.BILINEAR)",
                f"image = image.crop((left, top, left + {side}, top + {side}))",
            ]
        else:
            lines.append(f"image = image.resize(({side}, {height}), Image.Resampling.BILINEAR)")
        lines += [
            "pixels = np.asarray(image, np.float32) / 255",
            f"pixels = (pixels - np.float32({metadata.get('mean')})) / np.float32({metadata.get('std')})",
            "pixels = pixels.transpose(2, 0, 1)[None]",
            "logits = session.run(None, {session.get_inputs()[0].name: pixels})[0][0]",
            "print(int(logits.argmax()))",
        ]
    return "\n".join(lines) + "\n"


def _pixels(metadata: Mapping[str, str]) -> str:
    if metadata.get("task") == "detect":
        return "RGB, 0 to 1"
    return f"RGB, 0 to 1, then minus {metadata.get('mean')} over {metadata.get('std')}"


def _classes(metadata: Mapping[str, str]) -> str:
    names: dict[int, str] = ast.literal_eval(metadata.get("names", "{}"))
    if not names:
        return ""
    shown = ", ".join(f"{number} {name}" for number, name in list(names.items())[:100])
    return f"Classes: {shown}{', ...' if len(names) > 100 else ''}."


def _conditions(metrics: Mapping[str, Any]) -> str:
    licence = (
        "\n- Made with Ultralytics, whose code and weights are under AGPL-3.0 or their own licence."
        if any(name == "ultralytics" for name in metrics["versions"]) and metrics["metric"] == "mAP50-95"
        else ""
    )
    return (
        "## Limits\n\n"
        f"- Accuracy is {metrics['metric']} on the study's validation images, by which the training's best "
        "state was also chosen; expect a little less on images it has never seen.\n"
        "- The input's size is fixed, its batch is one.\n"
        f"- A latency on other hardware, another version of {metrics['device_settings']['runtime']} or other "
        f"threads has to be measured there.{licence}"
    )


def _widths(plan: PruningPlan) -> str:
    widths = layer_widths(plan)
    gone = ""
    if plan.blocks:
        gone = f"## Blocks that are gone\n\nEach is an identity now: {', '.join(plan.blocks)}."
    if not widths:
        return gone
    rows = "\n".join(f"| {name} | {before} | {after} |" for name, (before, after) in widths.items())
    table = f"## Layers that were narrowed\n\n| layer | before | after |\n| --- | ---: | ---: |\n{rows}"
    return f"{gone}\n\n{table}" if gone else table


def _provenance(metrics: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    files = "\n".join(f"| {name} | `{digest}` |" for name, digest in metrics["files"].items())
    rows = {
        "study": metrics["study"],
        "trial": metrics["trial"],
        "MLflow run": metrics["run_id"] or "none",
        "unpruned model": metrics["model_key"],
        "data": metrics["data_key"],
        "plan": metrics["plan_digest"],
        "measured": metrics["finished_at"] or "unknown",
        "versions": versions,
        "made by": f"`{metrics['command']}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"## Where it comes from\n\n| | |\n| --- | --- |\n{table}\n\n"
        f"| file | sha256 |\n| --- | --- |\n{files}\n\n"
        "`plan.json` says which channels and blocks went, `metrics.json` holds every number of this page."
    )


def _many(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"

"""Whether two model files compute the same, their weights apart.

Latency depends on a file's operators, shapes and types, not on its weights, so a file that was measured
before a training stands for the one after it where both have one structure. Reads files; runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .artifact import Artifact


def structure_digest(artifact: Artifact) -> str | None:
    """sha256 of an artifact's operators, their settings, shapes and types; None where it cannot be told.

    Equal digests mean the same computation on other weights. Different ones need not mean anything: a
    converter may write one computation in two ways.
    """
    reader = _READERS.get(artifact.runtime)
    text = reader(artifact.path) if reader else None
    return None if text is None else hashlib.sha256(text).hexdigest()


def _onnx(path: Path) -> bytes:
    import onnx

    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    numbers = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16,
               onnx.TensorProto.DOUBLE, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)  # fmt: skip
    for tensor in model.graph.initializer:
        if tensor.data_type in numbers:  # whole numbers are shapes and indices, which decide what is run
            for field in ("raw_data", "float_data", "int32_data", "double_data"):
                tensor.ClearField(field)
    return bytes(model.SerializeToString(deterministic=True))


def _openvino(path: Path) -> bytes:
    """Every result as a hash of what leads to it: names and order differ from one conversion to the next."""
    net = ElementTree.parse(path).getroot()
    inputs: dict[str, list[tuple[int, str, str]]] = {}
    for edge in net.iterfind("edges/edge"):
        at = edge.attrib
        inputs.setdefault(at["to-layer"], []).append((int(at["to-port"]), at["from-layer"], at["from-port"]))
    layers = {layer.attrib["id"]: layer for layer in net.iterfind("layers/layer")}
    hashes: dict[str, str] = {}
    while left := [name for name in layers if name not in hashes]:
        ready = [name for name in left if all(source in hashes for _, source, _ in inputs.get(name, ()))]
        if not ready:
            raise ValueError(f"{path} is no OpenVINO model: {len(left)} of its operators wait for each other")
        for name in ready:
            layer = layers[name]
            data = {k: v for e in layer.iterfind("data") for k, v in e.attrib.items() if k != "offset"}
            ports = [
                (p.attrib.get("precision"), [d.text for d in p.iterfind("dim")]) for p in layer.iter("port")
            ]
            sources = [(port, hashes[source], out) for port, source, out in sorted(inputs.get(name, ()))]
            text = repr((layer.attrib["type"], sorted(data.items()), ports, sources))
            hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    results = [hashes[name] for name, layer in layers.items() if layer.attrib["type"] == "Result"]
    return "\n".join(sorted(results)).encode()


def _ncnn(path: Path) -> bytes:
    return path.read_bytes()


def _torch(path: Path) -> bytes | None:
    with zipfile.ZipFile(path) as archive:
        programs = [name for name in archive.namelist() if name.endswith("models/model.json")]
        if len(programs) != 1:
            return None
        program = json.loads(archive.read(programs[0]))
    return json.dumps(_without_remarks(program), sort_keys=True).encode()


def _without_remarks(value: Any) -> Any:
    """A program without its nodes' metadata: where in which source file an operator came from."""
    if isinstance(value, dict):
        return {key: _without_remarks(item) for key, item in value.items() if key != "metadata"}
    if isinstance(value, list):
        return [_without_remarks(item) for item in value]
    return value


_READERS = {"onnxruntime": _onnx, "openvino": _openvino, "ncnn": _ncnn, "torch": _torch}

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
    """Every output as a hash of what leads to it: names, order and recorded shapes do not matter."""
    import onnx

    graph = (model := onnx.load(path, load_external_data=False)).graph
    hashes = {"": ""}  # an input that is left out
    for value in graph.input:
        hashes[value.name] = _hash("input", _serialised(value.type))
    for tensor in graph.initializer:
        hashes[tensor.name] = _hash("tensor", _without_numbers(tensor))
    for node in graph.node:
        settings = []
        for attribute in sorted(node.attribute, key=lambda a: str(a.name)):
            own = _without_numbers(attribute.t) if attribute.HasField("t") else _serialised(attribute)
            settings.append((attribute.name, own))
        text = (node.domain, node.op_type, settings, [hashes[name] for name in node.input])
        for place, name in enumerate(node.output):
            hashes[name] = _hash(*text, place)
    outputs = [hashes[value.name] for value in graph.output]
    return repr((sorted((o.domain, o.version) for o in model.opset_import), outputs)).encode()


def _without_numbers(tensor: Any) -> bytes:
    """A tensor's type and shape, and what is in it where it holds whole numbers: shapes and indices, which
    decide what is run.
    """
    import onnx

    small = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims)
    kind = onnx.TensorProto
    if tensor.data_type not in (kind.FLOAT, kind.FLOAT16, kind.BFLOAT16, kind.DOUBLE, kind.INT8, kind.UINT8):
        small.raw_data = onnx.numpy_helper.to_array(tensor).tobytes()
    return _serialised(small)


def _serialised(message: Any) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


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
            hashes[name] = _hash(layer.attrib["type"], sorted(data.items()), ports, sources)
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

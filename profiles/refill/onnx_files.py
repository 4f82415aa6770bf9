"""ONNX files given other weights, see `refill`: initializers are exchanged and shapes inferred anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import LayerSpec
from .parts import AXIS, Bounds, scaled_slice, scaled_split
from .weights import Exchange

#: Bytes of the largest tensor whose content may decide a shape; weights are left out of inferring them.
_SMALL = 1024


def refill_onnx(
    source: Path,
    target: Path,
    layers: tuple[LayerSpec, ...],
    exchange: Exchange,
    metadata: Mapping[str, str],
) -> bool:
    """Whether it could, see `Refiller`."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    parts = _parts(model, _shapes(model)) if exchange.resizes else []
    for tensor in model.graph.initializer:
        now = exchange.now(numpy_helper.to_array(tensor))
        if now is not None:
            tensor.CopyFrom(numpy_helper.from_array(now, tensor.name))
    if not exchange.is_complete or (exchange.resizes and not _settle(model, layers, parts)):
        return False
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, target)
    return True


@dataclass(frozen=True)
class _Part:
    """A node that takes even parts of a tensor's channels: a slice of one of them or a split into all.

    Attributes:
        bounds: of a slice where it begins and ends, of a split the sizes; input of the node to value.
        names: input of the node to the constant that holds it.
        width: channels of the tensor that they are of.
    """

    node: Any
    bounds: Mapping[int, Bounds]
    names: Mapping[int, str]
    width: int

    def scaled(self, width: int) -> dict[int, Bounds] | None:
        """The bounds of the same parts of another width; None where there are none."""
        if self.node.op_type == "Split":
            sizes = scaled_split(self.bounds[1], width)
            return None if sizes is None else {1: sizes}
        found = scaled_slice(self.bounds[1][0], self.bounds[2][0], self.width, width)
        return None if found is None else {1: found[:1], 2: found[1:]}


def _parts(model: Any, shapes: Mapping[str, Any]) -> list[_Part]:
    """The nodes that take parts of channels, before anything has changed."""
    from onnx import numpy_helper

    whole = {
        t.name: tuple(numpy_helper.to_array(t).ravel().tolist())
        for t in model.graph.initializer
        if t.data_type == t.INT64
    }
    found = []
    for node in model.graph.node:
        constants = {place: whole[name] for place, name in enumerate(node.input) if name in whole}
        if node.op_type == "Slice" and constants.get(3) == (AXIS,) and constants.get(4, (1,)) == (1,):
            bounds = {place: constants[place] for place in range(1, 3) if place in constants}
            if len(bounds) < 2:
                continue  # computed, so they follow by themselves or not at all
        elif node.op_type == "Split" and any(a.name == "axis" and a.i == AXIS for a in node.attribute):
            bounds = {1: constants[1]} if 1 in constants else {}  # left out, they are even
        else:
            continue
        if bounds and node.input[0] in shapes:
            names = {place: node.input[place] for place in bounds}
            found.append(_Part(node, bounds, names, _channels(shapes[node.input[0]])))
    return found


def _settle(model: Any, layers: tuple[LayerSpec, ...], parts: list[_Part]) -> bool:
    """Bring what depends on widths in line with them, in place: the groups of depthwise layers, where halves
    of a layer's channels begin and end, recorded shapes. False where something depends in another way.
    """
    from onnx import numpy_helper

    graph = model.graph
    groups = {spec.layer: spec.groups for spec in layers}
    for node in graph.node:
        layer = node.name.partition("/")[0]  # a layer that is called again has a number behind its name
        for attribute in node.attribute:
            if node.op_type == "Conv" and attribute.name == "group" and layer in groups:
                attribute.i = groups[layer]
    # What follows a part has a wrong width until the part is set, so the last of them may need many looks.
    for _ in range(len(parts) + 1):
        shapes = _shapes(model)
        known = {tensor.name for tensor in graph.initializer}
        moved = False
        for part in parts:
            width = _channels(shapes.get(part.node.input[0]))
            wanted = part.scaled(width) if width else {}  # not known before the parts before it are set
            if wanted is None:
                return False
            for place, bounds in wanted.items():
                same = bounds == part.bounds[place]
                name = part.names[place] if same else "channels/" + "-".join(map(str, bounds))
                moved = moved or part.node.input[place] != name
                part.node.input[place] = name
                if name not in known:
                    known.add(name)
                    graph.initializer.append(numpy_helper.from_array(np.array(bounds, np.int64), name))
        if not moved:
            break
    shapes = _shapes(model, strict=True)
    if not shapes:
        return False
    for value in graph.value_info:
        if value.name in shapes:
            value.CopyFrom(shapes[value.name])
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return True


def _shapes(model: Any, *, strict: bool = False) -> dict[str, Any]:
    """Name to type and shape of what nodes give; nothing where strictness finds that they do not fit."""
    import onnx

    graph = model.graph
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = graph.name
    for field in ("node", "input", "output"):
        getattr(light.graph, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        if len(tensor.raw_data) <= _SMALL:  # sizes, scales and bounds decide shapes by what they hold
            light.graph.initializer.append(tensor)
        else:
            light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    try:
        shaped = onnx.shape_inference.infer_shapes(
            light, check_type=strict, strict_mode=strict, data_prop=True
        )
    except onnx.shape_inference.InferenceError:
        return {}
    return {value.name: value for value in shaped.graph.value_info}


def _channels(value: Any) -> int:
    """Size along the axis of channels, 0 where it has none or none is known."""
    dims = value.type.tensor_type.shape.dim if value is not None else ()
    return int(dims[AXIS].dim_value) if len(dims) > AXIS else 0

"""A model file given other weights: an export without an exporter.

Exporting takes seconds, while what it writes depends on a network's weights and widths in simple ways. So the
file of the unpruned model is kept and given the weights of pruned ones, and a file that was measured before a
training is given those after it. Knows the file formats; knows nothing of training or of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .artifact import Artifact, LayerSpec
from .export import content_digest, trace_layers
from .refill_ncnn import refill_ncnn
from .runner.files import model_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

Weights = Mapping[str, "Tensor"]
_AXIS = 1  # of channels
#: Bytes of the largest tensor whose content may decide a shape; weights are left out of inferring them.
_SMALL = 1024


def refill(
    artifact: Artifact, old: Weights, module: nn.Module, folder: Path, metadata: Mapping[str, str]
) -> Artifact | None:
    """Write a copy of an artifact with other weights into `folder`.

    Args:
        old: the state dict of the module that the artifact was exported from.
        module: with the same layers and the new weights, of any widths; in eval mode on the CPU.
        metadata: texts that the file carries.

    Returns:
        None where it must be exported anew: for runtimes whose files this cannot change, and where a weight
        that changed cannot be told from another one, or was made part of something else by the exporter.
        Something else in the file may depend on a weight or a width and go unnoticed: hold what comes back
        against the module.
    """
    refiller = _REFILLERS.get(artifact.runtime)
    new = module.state_dict()
    if refiller is None or old.keys() != new.keys():
        return None
    traced = {spec.layer: spec for spec in trace_layers(module, artifact.input_shape)}
    if traced.keys() != {spec.layer for spec in artifact.layers}:
        return None
    layers = tuple(replace(traced[spec.layer], names=spec.names) for spec in artifact.layers)
    # Batch norm also counts its batches, which no inference reads.
    changed = {k: t for k, t in new.items() if t.is_floating_point() and not t.equal(old[k])}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / artifact.path.name
    if not refiller(artifact.path, path, layers, old, changed, metadata):
        return None
    return replace(artifact, path=path, digest=model_digest(path), layers=layers)


def _onnx(
    source: Path,
    target: Path,
    layers: tuple[LayerSpec, ...],
    old: Weights,
    changed: Weights,
    metadata: Mapping[str, str],
) -> bool:
    """Exchange the initializers that hold what changed, found by their values: exporters rename weights."""
    import onnx
    from onnx import numpy_helper

    names: dict[str, list[str]] = {}
    for name, tensor in old.items():
        names.setdefault(_values_digest(tensor.detach().cpu().numpy()), []).append(name)
    model = onnx.load(source)
    narrower = any(tensor.shape != old[name].shape for name, tensor in changed.items())
    parts = _parts(model, _shapes(model)) if narrower else []
    filled = set()
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        # Exporters may transpose a linear layer's weight, and give a slope per channel further dimensions.
        for turned in (False, True) if values.ndim == 2 else (False,):
            found = names.get(_values_digest(values.T if turned else values), [])
            if not any(name in changed for name in found):
                continue
            if len(found) > 1 or _is_constant(values):
                return False
            now = changed[found[0]].detach().cpu().numpy()
            if not turned and values.shape != tuple(old[found[0]].shape):
                if now.size != values.size:
                    return False
                now = now.reshape(values.shape)
            now = np.ascontiguousarray(now.T if turned else now)
            tensor.CopyFrom(numpy_helper.from_array(now, tensor.name))
            filled.add(found[0])
            break
    if filled != changed.keys():
        return False
    if narrower and not _settle(model, layers, parts):
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
    bounds: Mapping[int, tuple[int, ...]]
    names: Mapping[int, str]
    width: int

    def scaled(self, width: int) -> dict[int, tuple[int, ...]] | None:
        """The bounds of the same parts of another width; None where parts were not even, or cannot be."""
        if width == self.width:
            return dict(self.bounds)
        values = [value for bounds in self.bounds.values() for value in bounds]
        if self.node.op_type == "Slice":
            start, end = values[0], min(values[1], self.width)
            even = 0 <= start < end and start % (end - start) == 0 and self.width % (end - start) == 0
        else:
            even = len(set(values)) == 1
        if not even or any(value * width % self.width for value in values if value <= self.width):
            return None
        return {  # a very large number means "to the end" of any width
            place: tuple(v if v > self.width else v * width // self.width for v in bounds)
            for place, bounds in self.bounds.items()
        }


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
        if node.op_type == "Slice" and constants.get(3) == (_AXIS,) and constants.get(4, (1,)) == (1,):
            bounds = {place: constants[place] for place in range(1, 3) if place in constants}
        elif node.op_type == "Split" and any(a.name == "axis" and a.i == _AXIS for a in node.attribute):
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
    return int(dims[_AXIS].dim_value) if len(dims) > _AXIS else 0


def _values_digest(values: np.ndarray) -> str:
    return content_digest(values.ravel())


def _is_constant(values: np.ndarray) -> bool:
    """One number all over, as the start of a scale or a bias: any constant of the file may look like it."""
    return values.size == 0 or bool((values == values.flat[0]).all())


_Refiller = Callable[[Path, Path, tuple[LayerSpec, ...], Weights, Weights, Mapping[str, str]], bool]
_REFILLERS: dict[str, _Refiller] = {"onnxruntime": _onnx, "ncnn": refill_ncnn}

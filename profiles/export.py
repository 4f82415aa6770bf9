"""The exporters: one function per runtime that writes a module's file and says where each layer went.

Layers are found again through their weights: every exporter keeps a weight's name or at least its values,
while operator names are rewritten at will. Knows PyTorch and the file formats; knows nothing of devices or
timing.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .artifact import LayerSpec
from .export_ncnn import export_ncnn
from .runner.sessions import import_runtime

if TYPE_CHECKING:
    from torch import nn

#: Writes the file; returns its path and, by layer, the names under which the runtime may show it.
Exporter = Callable[
    ["nn.Module", Path, tuple[int, ...], tuple[LayerSpec, ...], Mapping[str, str]],
    tuple[Path, dict[str, tuple[str, ...]]],
]
ONNX_OPSET = 17
#: Activations that ONNX Runtime folds into the convolution before them.
_FOLDED = {"Relu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "HardSigmoid"}
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def trace_layers(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[LayerSpec, ...]:
    """Convolutions and linear layers that one inference calls, in order of first call."""
    import torch
    from torch import nn

    found: dict[str, LayerSpec] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if name in found:
            return
        if isinstance(layer, nn.Linear):
            found[name] = LayerSpec(name, "linear", layer.in_features, layer.out_features, (), (), 1, (), ())
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            found[name] = LayerSpec(
                layer=name,
                op="conv_transpose" if isinstance(layer, nn.ConvTranspose2d) else "conv",
                in_channels=layer.in_channels,
                out_channels=layer.out_channels,
                kernel=tuple(layer.kernel_size),
                stride=tuple(layer.stride),
                groups=layer.groups,
                input_hw=tuple(inputs[0].shape[2:]),
                output_hw=tuple(output.shape[2:]),
            )

    hooks = [
        layer.register_forward_hook(lambda m, i, o, name=name: note(name, m, i, o))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    try:
        with torch.inference_mode():
            module(torch.zeros(input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found.values())


def export_torch(
    module: nn.Module,
    folder: Path,
    input_shape: tuple[int, ...],
    layers: tuple[LayerSpec, ...],
    metadata: Mapping[str, str],
) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """`model.pt2` by `torch.export`; metadata as extra file `metadata.json`. Weights keep their names."""
    import torch
    import torch.export
    import torch.fx

    path = folder / "model.pt2"
    with torch.no_grad():
        program = torch.export.export(module, (torch.zeros(input_shape),), strict=False)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # places of source files on this machine, which a file keeps
    with warnings.catch_warnings():
        # Said of any program without the collective tensors it looks for; the file is complete.
        warnings.filterwarnings(
            "ignore", message="No complete tensor found in the group", category=UserWarning
        )
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return path, {}


def export_onnx(
    module: nn.Module,
    folder: Path,
    input_shape: tuple[int, ...],
    layers: tuple[LayerSpec, ...],
    metadata: Mapping[str, str],
) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """`model.onnx`, opset 17, simplified; metadata as `metadata_props`. A layer's node gets its name.

    Raises:
        ValueError: a layer's weight is not in the file, as happens when batch norm was not fused.
    """
    import onnx
    import onnxslim
    import torch
    from torch.jit._trace import TracerWarning

    path = folder / "model.onnx"
    with warnings.catch_warnings():
        # The exporter that keeps weight names and needs no further package says that it is the old one.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)  # Shapes are fixed on purpose.
        torch.onnx.export(
            module,
            (torch.zeros(input_shape),),
            str(path),
            dynamo=False,
            opset_version=ONNX_OPSET,
            input_names=["images"],
            output_names=["output0"],
        )
    model = onnxslim.slim(onnx.load(path))
    names = _name_onnx_layers(model, module, layers)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)
    return path, names


def _name_onnx_layers(
    model: Any, module: nn.Module, layers: tuple[LayerSpec, ...]
) -> dict[str, tuple[str, ...]]:
    """Rename each layer's node to the layer, in place; returns the other names a runtime may use for it."""
    from onnx import numpy_helper

    # Exporters merge weights of equal values and may transpose a linear layer's: match by name, then by
    # values, in order of execution.
    waiting: dict[str, list[str]] = {}
    for layer in layers:
        weight = module.get_parameter(f"{layer.layer}.weight").detach().numpy()
        waiting.setdefault(content_digest(weight), []).append(layer.layer)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    consumers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for tensor in node.input:
            consumers.setdefault(tensor, []).append(node)
    names: dict[str, tuple[str, ...]] = {}
    made_by: dict[str, str] = {}  # the weight in the file to its layer, for layers that are called again
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED:
            continue
        for tensor in (t for t in node.input[:2] if t in initializers):
            values = numpy_helper.to_array(initializers[tensor])
            keys = [content_digest(values)] + ([content_digest(values.T)] if values.ndim == 2 else [])
            key = next((k for k in keys if waiting.get(k)), None)
            if key is None and tensor not in made_by:
                continue
            follow = [c.output[0] for c in consumers.get(node.output[0], []) if c.op_type in _FOLDED]
            if key is None:
                found = made_by[tensor]
                node.name = f"{found}/{len(names[found])}"
                names[found] = (*names[found], node.name, node.output[0], *follow)
                break
            named = tensor.removesuffix(".weight")
            found = named if named in waiting[key] else waiting[key][0]
            waiting[key].remove(found)
            made_by[tensor] = found
            names[found] = (node.output[0], *follow)
            node.name = found
            break
    lost = [layer.layer for layer in layers if layer.layer not in names]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(layers)} layers have no weight of theirs in the ONNX file, "
            f"the first is {lost[0]}; fuse batch norm into the convolutions before exporting"
        )
    return names


def content_digest(values: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes()).hexdigest()


def export_openvino(
    module: nn.Module,
    folder: Path,
    input_shape: tuple[int, ...],
    layers: tuple[LayerSpec, ...],
    metadata: Mapping[str, str],
) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """`model.xml` and `model.bin`, read from our ONNX file; metadata in the section `paretoprune` of rt_info.

    Raises: as `export_onnx`; MissingRuntimeError without OpenVINO.
    """
    import_runtime("openvino")
    import openvino

    path = folder / "model.xml"
    with tempfile.TemporaryDirectory() as between:
        source, names = export_onnx(module, Path(between), input_shape, layers, {})
        # Not `openvino.convert_model`, which reports its use over the network.
        model = openvino.Core().read_model(str(source))
        for op in model.get_ops():
            # An operator with a bias is taken apart on reading and its name goes to the addition; OpenVINO
            # calls the other half of a convolution after it, as done here for the others.
            if op.get_friendly_name() in names and op.get_type_name() == "Add":
                half = op.input_value(0).get_node()
                half.set_friendly_name(f"{op.get_friendly_name()}/WithoutBiases")
        for key, value in metadata.items():
            model.set_rt_info(value, ["paretoprune", key])
        openvino.save_model(model, str(path), compress_to_fp16=False)
    return path, names


EXPORTERS: dict[str, Exporter] = {
    "torch": export_torch,
    "onnxruntime": export_onnx,
    "openvino": export_openvino,
    "ncnn": export_ncnn,
}

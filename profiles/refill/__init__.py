"""A model file given other weights: an export without an exporter.

Exporting takes seconds, while what it writes depends on a network's weights and widths in simple ways. So the
file of the unpruned model is kept and given the weights of pruned ones, and a file that was measured before a
training is given those after it. Knows the file formats; knows nothing of training or of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact import Artifact, LayerSpec
from ..export import trace_layers
from ..runner.files import model_digest
from .ncnn_files import refill_ncnn
from .onnx_files import refill_onnx
from .openvino_files import refill_openvino
from .weights import Exchange, NotToldApartError, Weights

if TYPE_CHECKING:
    from torch import nn

#: Writes a file like another one with other weights; says whether it could. Takes the file there is, the file
#: to write, the layers as they are now, the weights and the texts that the file carries.
Refiller = Callable[[Path, Path, tuple[LayerSpec, ...], Exchange, Mapping[str, str]], bool]
_REFILLERS: dict[str, Refiller] = {
    "onnxruntime": refill_onnx,
    "openvino": refill_openvino,
    "ncnn": refill_ncnn,
}


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
    try:
        if not refiller(artifact.path, path, layers, Exchange(old, changed), metadata):
            return None
    except NotToldApartError:
        return None
    return replace(artifact, path=path, digest=model_digest(path), layers=layers)

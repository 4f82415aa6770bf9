"""A model file given other weights: what was exported before a training becomes what ships after it.

Exporting takes seconds and what it writes does not depend on the weights, so a file that was measured can be
kept and its weights exchanged. Knows the file formats; knows nothing of training or of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .artifact import Artifact
from .export import content_digest
from .runner.files import model_digest

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]


def refill(artifact: Artifact, old: Weights, new: Weights, folder: Path) -> Artifact | None:
    """Write a copy of an artifact with other weights into `folder`; its metadata stay.

    Args:
        old: the state dict of the module that the artifact was exported from.
        new: the state dict of the same module after a training.

    Returns:
        None where it must be exported anew: for runtimes whose files this cannot change, and where a weight
        that changed cannot be told from another one, or was made part of something else by the exporter. A
        weight that is in the file both as it is and as part of something else goes unnoticed: hold what
        comes back against the module.
    """
    refiller = _REFILLERS.get(artifact.runtime)
    if refiller is None or {k: t.shape for k, t in old.items()} != {k: t.shape for k, t in new.items()}:
        return None
    # Batch norm also counts its batches, which no inference reads.
    changed = {k: t for k, t in new.items() if t.is_floating_point() and not t.equal(old[k])}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / artifact.path.name
    if not refiller(artifact.path, path, old, changed):
        return None
    return replace(artifact, path=path, digest=model_digest(path))


def _onnx(source: Path, target: Path, old: Weights, changed: Weights) -> bool:
    """Exchange the initializers that hold what changed, found by their values: exporters rename weights."""
    import onnx
    from onnx import numpy_helper

    names: dict[str, list[str]] = {}
    for name, tensor in old.items():
        names.setdefault(_values_digest(tensor.detach().cpu().numpy()), []).append(name)
    model = onnx.load(source)
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
            now = np.ascontiguousarray(now.T if turned else now.reshape(values.shape))
            tensor.CopyFrom(numpy_helper.from_array(now, tensor.name))
            filled.add(found[0])
            break
    if filled != changed.keys():
        return False
    onnx.save(model, target)
    return True


def _values_digest(values: np.ndarray) -> str:
    return content_digest(values.ravel())


def _is_constant(values: np.ndarray) -> bool:
    """One number all over, as the start of a scale or a bias: any constant of the file may look like it."""
    return values.size == 0 or bool((values == values.flat[0]).all())


_REFILLERS: dict[str, Callable[[Path, Path, Weights, Weights], bool]] = {"onnxruntime": _onnx}

"""The exporter for ncnn, which goes through pnnx and finds the layers again in the file of weights.

Knows PyTorch, pnnx and ncnn's file format; knows nothing of devices or timing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .artifact import LayerSpec
from .runner.sessions import MissingRuntimeError

if TYPE_CHECKING:
    from torch import nn

#: Layers that carry a weight of ours in ncnn's file.
_WEIGHTED = (
    "Convolution",
    "ConvolutionDepthWise",
    "Convolution1D",
    "ConvolutionDepthWise1D",
    "Deconvolution",
    "DeconvolutionDepthWise",
    "InnerProduct",
    "Gemm",
)
_TIMEOUT_S = 300


def export_ncnn(
    module: nn.Module,
    folder: Path,
    input_shape: tuple[int, ...],
    layers: tuple[LayerSpec, ...],
    metadata: Mapping[str, str],
) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """`model.ncnn.param` and `model.ncnn.bin` by pnnx, weights in fp32; metadata in `model.ncnn.json`.

    Raises:
        MissingRuntimeError: pnnx is not installed.
        ValueError: the batch is not 1, pnnx or ncnn lack an operator, or a layer's weight is not in the file.
    """
    if input_shape[0] != 1:
        raise ValueError(f"ncnn takes one image at a time; input_shape must begin with 1, got {input_shape}")
    program = _pnnx()
    path = folder / "model.ncnn.param"
    with tempfile.TemporaryDirectory() as between:
        _trace(module, input_shape, Path(between) / "model.pt")
        # pnnx writes half a dozen files beside its input, and halves weights unless told not to.
        shape = "[" + ",".join(map(str, input_shape)) + "]"
        done = subprocess.run(
            [program, "model.pt", f"inputshape={shape}", "fp16=0"],
            cwd=between,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        said = (done.stdout + done.stderr).strip().splitlines()
        if done.returncode or not (Path(between) / path.name).is_file():
            raise ValueError(f"pnnx failed (status {done.returncode}): {' | '.join(said[-3:])}")
        for name in (path.name, path.with_suffix(".bin").name):
            shutil.move(Path(between) / name, folder / name)
    path.with_suffix(".json").write_text(json.dumps(dict(metadata)))
    return path, _find_layers(path, module, layers)


def _pnnx() -> str:
    try:
        import pnnx
    except ImportError as error:
        raise MissingRuntimeError(
            f"exporting for ncnn needs pnnx ({error}); install it: pip install pnnx, or the extra 'ncnn'"
        ) from error
    return str(pnnx.EXEC_PATH)


def _trace(module: nn.Module, input_shape: tuple[int, ...], path: Path) -> None:
    import torch
    from torch.jit._trace import TracerWarning

    with warnings.catch_warnings(), torch.no_grad():
        # What pnnx reads best is what PyTorch calls deprecated.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)  # Shapes are fixed on purpose.
        trace: Any = torch.jit.trace  # PyTorch gives it no types.
        program = trace(module, torch.zeros(input_shape), check_trace=False)
        program.save(str(path))


def _find_layers(path: Path, module: nn.Module, layers: tuple[LayerSpec, ...]) -> dict[str, tuple[str, ...]]:
    """Names of each layer in ncnn, which numbers its layers anew.

    Both of ncnn's files follow one order, so the n-th weight of ours in the file of weights belongs to the
    n-th layer with weights in the file of structure.
    """
    lines = [line.split() for line in path.read_text().splitlines()[2:]]
    unknown = sorted({line[0] for line in lines if "." in line[0]})
    if unknown:
        raise ValueError(f"ncnn has no operator for {', '.join(unknown)}")
    content = path.with_suffix(".bin").read_bytes()
    places: dict[int, str] = {}
    for layer in layers:
        place = find_weight(
            content, module.get_parameter(f"{layer.layer}.weight").detach().numpy(), layer, places
        )
        if place is None:
            raise ValueError(
                f"the weight of layer {layer.layer} is not in ncnn's file; "
                "fuse batch norm into the convolutions before exporting"
            )
        places[place] = layer.layer
    # A Gemm may also multiply two computed matrices; 4 and 5 say which of them are stored.
    weighted = [
        line[1]
        for line in lines
        if line[0] in _WEIGHTED and (line[0] != "Gemm" or {"4=1", "5=1"} & set(line))
    ]
    if len(weighted) != len(places):
        raise ValueError(f"ncnn's file has {len(weighted)} layers with weights, the model {len(places)}")
    return {places[place]: (name,) for place, name in zip(sorted(places), weighted, strict=True)}


def find_weight(
    content: bytes, weight: np.ndarray[Any, Any], layer: LayerSpec, taken: Mapping[int, str]
) -> int | None:
    """Where a weight begins in ncnn's file of weights; equal weights are told apart by `taken`."""
    forms = [weight]
    if layer.op == "conv_transpose":  # (in, out / groups, ...) here, (groups, out, in) there.
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        forms.insert(0, grouped.swapaxes(1, 2))
    elif layer.op == "linear":
        forms.append(weight.T)
    for form in forms:
        wanted = np.ascontiguousarray(form, dtype=np.float32).tobytes()
        place = content.find(wanted)
        while place in taken:
            place = content.find(wanted, place + len(wanted))
        if place >= 0:
            return place
    return None

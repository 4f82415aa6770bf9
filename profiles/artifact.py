"""An exported model file with its layers: what a device runs, and what gets shipped.

Exports a fused PyTorch module for a device's runtime and opens the file again. Knows PyTorch and the
exporters; knows neither pruning nor where the module comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .device import Device
from .runner.files import model_digest, model_files
from .runner.sessions import open_session

if TYPE_CHECKING:
    from torch import nn

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerSpec:
    """One convolution or linear layer of an exported model.

    Attributes:
        layer: module path in the fused model, `model.2.cv1.conv`.
        op: "conv", "conv_transpose" or "linear".
        in_channels, out_channels, groups: as in PyTorch (features for a linear layer, with groups 1).
        kernel, stride: one number per spatial dimension; () for a linear layer.
        input_hw, output_hw: spatial sizes; () for a linear layer.
        names: under what names the runtime may show this layer's operator, besides its own.
    """

    layer: str
    op: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    input_hw: tuple[int, ...]
    output_hw: tuple[int, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("kernel", "stride", "input_hw", "output_hw", "names"):
            object.__setattr__(self, key, tuple(getattr(self, key)))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        pixels = math.prod(self.output_hw) * math.prod(self.kernel)
        return pixels * self.in_channels * self.out_channels // self.groups

    def to_json(self) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerSpec:
        return cls(**data)


@dataclass(frozen=True)
class Artifact:
    """An exported model.

    Attributes:
        path: the model file; where a runtime needs two, the one that says the structure.
        runtime, precision: what it was exported for.
        input_shape: `(1, channels, height, width)`.
        digest: sha256 over all its files.
        layers: convolutions and linear layers in order of execution.
    """

    path: Path
    runtime: str
    precision: str
    input_shape: tuple[int, ...]
    digest: str
    layers: tuple[LayerSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """`path` becomes the file's name alone: the record lies beside the file."""
        return {
            "format_version": FORMAT_VERSION,
            "path": self.path.name,
            "runtime": self.runtime,
            "precision": self.precision,
            "input_shape": list(self.input_shape),
            "digest": self.digest,
            "layers": [layer.to_json() for layer in self.layers],
        }

    @property
    def files(self) -> tuple[Path, ...]:
        """All its files, `path` first."""
        return model_files(self.path)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], folder: Path) -> Artifact:
        """Read the record of a file in `folder`.

        Raises:
            ValueError: another format version, or the file is not the one recorded.
            FileNotFoundError: the file is gone.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"artifact format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}"
            )
        path = folder / data["path"]
        digest = model_digest(path)
        if digest != data["digest"]:
            raise ValueError(f"{path} has sha256 {digest}, its record says {data['digest']}; export it again")
        layers = tuple(LayerSpec.from_json(layer) for layer in data["layers"])
        return cls(path, data["runtime"], data["precision"], tuple(data["input_shape"]), digest, layers)


def export_artifact(
    module: nn.Module,
    device: Device,
    folder: Path,
    input_shape: tuple[int, ...],
    metadata: Mapping[str, str] | None = None,
) -> Artifact:
    """Write a module for a device's runtime into `folder`, which is made where missing.

    `model.pt2` for torch, `model.onnx` for onnxruntime, `model.xml` and `.bin` for openvino,
    `model.ncnn.param` and `.bin` for ncnn (metadata beside it in `model.ncnn.json`). Weights stay fp32 in
    the file; the runtime computes in the device's precision.

    Args:
        module: in eval mode on the CPU, batch norm fused, one input tensor, tensor outputs. It is not
            changed.
        input_shape: `(1, channels, height, width)`.
        metadata: texts that the file carries.

    Raises:
        ValueError: a layer is lost on the way.
        MissingRuntimeError: what converts to the runtime's format is not installed.
    """
    from .export import EXPORTERS, trace_layers

    if module.training:
        raise ValueError("the module to export must be in eval mode; call .eval() and fuse batch norm first")
    folder.mkdir(parents=True, exist_ok=True)
    layers = trace_layers(module, input_shape)
    path, names = EXPORTERS[device.runtime](module, folder, input_shape, layers, dict(metadata or {}))
    layers = tuple(replace(layer, names=names.get(layer.layer, ())) for layer in layers)
    return Artifact(path, device.runtime, device.precision, tuple(input_shape), model_digest(path), layers)


def open_artifact(
    artifact: Artifact, threads: int
) -> Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """The artifact as a function of images, on the CPU in this process: for accuracy, not for timing.

    Takes `(batch, channels, height, width)` float32 in any batch size: an artifact of batch 1 is run image
    by image and its outputs are stacked along the first axis.

    Raises:
        MissingRuntimeError: the runtime is not installed.
        RuntimeError: it would not compute in the artifact's precision here.
    """
    spec = {
        "path": str(artifact.path),
        "runtime": artifact.runtime,
        "precision": artifact.precision,
        "input_shape": list(artifact.input_shape),
        "threads": threads,
        "providers": [],
    }
    session = open_session(spec, spin=False)
    step = artifact.input_shape[0]

    def predict(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        images = np.ascontiguousarray(images, dtype=np.float32)
        if images.shape[1:] != tuple(artifact.input_shape[1:]) or len(images) == 0 or len(images) % step:
            raise ValueError(
                f"images must be (n x {step}, {artifact.input_shape[1:]}), got shape {images.shape}"
            )
        parts = [session.run(images[i : i + step]) for i in range(0, len(images), step)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    return predict

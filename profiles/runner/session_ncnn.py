"""One open model in ncnn, on the CPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .example import example_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Kinds of layer whose arithmetic is the model's precision.
_WEIGHTED = {"Convolution", "ConvolutionDepthWise", "Deconvolution", "DeconvolutionDepthWise", "InnerProduct"}


class NcnnSession:
    """ncnn: the precision stated and looked up again; images one by one, since ncnn knows no batch.

    The layer profile asks one extractor for every blob in order of execution, so that each request runs one
    layer: the wheel is built without ncnn's own layer timer. A second request for the same blob runs nothing;
    its time is what asking costs, and is taken off.
    """

    def __init__(self, spec: dict[str, Any], *, spin: bool = True) -> None:
        import ncnn

        self._ncnn, precision = ncnn, spec["precision"]
        self._net = ncnn.Net()
        options = self._net.opt
        options.num_threads = spec["threads"]
        options.use_vulkan_compute = False
        # fp16 and bf16 are on by default wherever the CPU has them.
        for key in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
            setattr(options, key, precision == "fp16")
        for key in ("use_bf16_packed", "use_bf16_storage"):
            setattr(options, key, precision == "bf16")
        if not spin:
            options.openmp_blocktime = 0
        path = Path(spec["path"])
        for load, file in ((self._net.load_param, path), (self._net.load_model, path.with_suffix(".bin"))):
            if not file.is_file() or load(str(file)):
                raise RuntimeError(f"ncnn cannot load {file}")
        names = [list(self._net.input_names()), list(self._net.output_names())]
        if len(names[0]) != 1 or not names[1]:
            raise RuntimeError(f"a model needs one input and some output, {path.name} has {names}")
        self._input, self._outputs = names[0][0], names[1]
        self._layers = [layer for layer in self._net.layers() if layer.type != "Input"]
        self._images = self._mat(example_images(spec["input_shape"])[0])
        self._check_precision(precision)

    def _mat(self, image: NDArray[np.float32]) -> Any:
        # A copy of its own: ncnn's rows of channels are aligned, numpy's are not.
        return self._ncnn.Mat(image).clone()

    def _extractor(self, image: Any) -> Any:
        extractor = self._net.create_extractor()
        if extractor.input(self._input, image):
            raise RuntimeError(f"ncnn does not take the input {self._input}")
        return extractor

    def prepare(self) -> None:
        """Nothing: threads belong to the net."""

    def run(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        import numpy as np

        results = []
        for image in images:
            extractor = self._extractor(self._mat(image))
            results.append([np.array(_blob(extractor, name)) for name in self._outputs])
        return [np.stack(outputs) for outputs in zip(*results)]

    def once(self) -> None:
        extractor = self._extractor(self._images)
        for name in self._outputs:
            _blob(extractor, name)

    def profile(self, repeats: int, warmup: int) -> list[dict[str, Any]]:
        samples: list[list[float]] = [[] for _ in self._layers]
        for run in range(-warmup, repeats):
            extractor = self._extractor(self._images)
            for index, layer in enumerate(self._layers):
                spent_s = 0.0
                for blob in layer.tops:
                    start = time.perf_counter()
                    _blob(extractor, blob, raw=True)
                    middle = time.perf_counter()
                    _blob(extractor, blob, raw=True)
                    spent_s += max(0.0, 2 * middle - start - time.perf_counter())
                if run >= 0:
                    samples[index].append(spent_s * 1e3)
        return [
            {"name": layer.name, "op": layer.type, "samples_ms": times}
            for layer, times in zip(self._layers, samples)
        ]

    def _check_precision(self, precision: str) -> None:
        """Run once and look at the width of what the layers put out.

        Raises:
            RuntimeError: it is not that of the precision asked for.
        """
        bits = []
        extractor = self._extractor(self._images)
        for layer in self._layers:
            for blob in layer.tops:
                width = _blob(extractor, blob, raw=True).elembits()
                if layer.type in _WEIGHTED:
                    bits.append(width)
        wanted = 32 if precision == "fp32" else 16
        right = bits.count(wanted)
        # In fp32 nothing may be narrower; else single layers may lack a narrow kernel.
        if right < len(bits) * (1 if precision == "fp32" else 0.5):
            raise RuntimeError(
                f"precision {precision} was asked for, but ncnn computes {len(bits) - right} of {len(bits)} "
                f"layers in {'16' if wanted == 32 else '32'} bits on this CPU; state another precision"
            )


def _blob(extractor: Any, name: str | int, *, raw: bool = False) -> Any:
    """A blob, computed when it is not yet; `raw` leaves it in the layout and precision of the layer."""
    status, blob = extractor.extract(name, int(raw))
    if status:
        raise RuntimeError(f"ncnn cannot compute {name!r} (status {status})")
    return blob

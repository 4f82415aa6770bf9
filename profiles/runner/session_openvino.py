"""One open model in OpenVINO, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .example import example_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: OpenVINO's names of the precisions.
_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
#: Kinds of operator, as the compiled model names them, whose arithmetic is the model's precision.
_WEIGHTED = {"Convolution", "Deconvolution", "FullyConnected"}


class OpenvinoSession:
    """OpenVINO's CPU plugin: one stream, the precision stated and looked up again, no pinning of its own."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._compiled = self._compile(count=False)
        self._request = self._prepared(self._compiled)

    def _compile(self, *, count: bool) -> Any:
        import openvino

        precision = self._spec["precision"]
        config = {
            # Left alone, OpenVINO computes in bf16 on every CPU that has it.
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": self._spec["threads"],
            "NUM_STREAMS": 1,
            # The process is pinned already; without the second, threads on one core would be left unused.
            "ENABLE_CPU_PINNING": False,
            "ENABLE_HYPER_THREADING": True,
            "PERF_COUNT": count,
        }
        compiled = openvino.Core().compile_model(str(Path(self._spec["path"])), "CPU", config)
        _check_precision(compiled, precision)
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        if threads != self._spec["threads"]:
            raise RuntimeError(
                f"{self._spec['threads']} threads were asked for, but OpenVINO uses {threads} here; "
                f"set threads to {threads}"
            )
        return compiled

    def _prepared(self, compiled: Any) -> Any:
        import openvino

        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(example_images(self._spec["input_shape"])))
        return request

    def prepare(self) -> None:
        """Nothing: threads belong to the session."""

    def run(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        import openvino

        request = self._compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(images))
        request.start_async()
        request.wait()
        return [request.get_output_tensor(i).data.copy() for i in range(len(self._compiled.outputs))]

    def once(self) -> None:
        # Not `infer`, which copies the outputs into arrays.
        self._request.start_async()
        self._request.wait()

    def profile(self, repeats: int, warmup: int) -> list[dict[str, Any]]:
        request = self._prepared(self._compile(count=True))
        nodes: dict[str, dict[str, Any]] = {}
        for run in range(-warmup, repeats):
            request.start_async()
            request.wait()
            if run < 0:
                continue
            for entry in request.profiling_info:
                # A convolution with a bias is taken apart on reading and put together again under this name.
                name = entry.node_name.removesuffix("/WithoutBiases")
                if entry.status.name == "EXECUTED":
                    node = nodes.setdefault(
                        name, {"name": name, "op": entry.node_type, "samples_ms": [0.0] * repeats}
                    )
                    node["samples_ms"][run] += entry.real_time.total_seconds() * 1e3
        return list(nodes.values())


def _check_precision(compiled: Any, precision: str) -> None:
    """Compare with the compiled model's own report.

    Raises:
        RuntimeError: it would compute in another precision than was asked for.
    """
    wanted = _HINTS[precision]
    executed = [
        info["runtimePrecision"].astype(str)
        for info in (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
        if info["layerType"].astype(str) in _WEIGHTED
    ]
    # In fp32 nothing may be narrower; else single layers may lack a narrow kernel.
    right = executed.count(wanted)
    if right < len(executed) * (1 if precision == "fp32" else 0.5):
        raise RuntimeError(
            f"precision {precision} was asked for, but OpenVINO computes {len(executed) - right} of "
            f"{len(executed)} layers in {', '.join(sorted(set(executed) - {wanted}))} on this CPU; "
            "state that precision, or use another device"
        )

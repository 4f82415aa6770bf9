"""One open model in ONNX Runtime."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .example import example_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


_CUDA = "CUDAExecutionProvider"
#: Providers whose operators are queued: the profiler's events end before the work does.
_QUEUED = (_CUDA, "TensorrtExecutionProvider", "ROCMExecutionProvider", "MIGraphXExecutionProvider")


class OnnxRuntimeSession:
    """ONNX Runtime. `spin` False keeps its thread pool from spinning between runs, beside other work."""

    def __init__(self, spec: dict[str, Any], *, spin: bool = True) -> None:
        self._spec, self._spin = spec, spin
        self._session = self._open(None)
        self._input = self._session.get_inputs()[0].name
        self._images = example_images(spec["input_shape"])

    def _open(self, profile_prefix: str | None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._spec["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if not self._spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile_prefix:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        providers = list(self._spec.get("providers") or ["CPUExecutionProvider"])
        # fp32 means fp32: TF32 would be another precision under the same name.
        settings = [(name, {"use_tf32": "0"}) if name == _CUDA else name for name in providers]
        session = onnxruntime.InferenceSession(self._spec["path"], options, providers=settings)
        # ONNX Runtime leaves out in silence what cannot start, and falls back to the CPU.
        lost = [name for name in providers if name not in session.get_providers()]
        if lost or session.get_providers()[0] != providers[0]:
            raise RuntimeError(
                f"execution provider {(lost or providers)[0]} was asked for but ONNX Runtime uses "
                f"{session.get_providers()[0]}; this build offers {onnxruntime.get_available_providers()}"
            )
        return session

    def prepare(self) -> None:
        """Nothing: threads belong to the session."""

    def run(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(self._session.run(None, {self._input: images}))

    def once(self) -> None:
        self._session.run(None, {self._input: self._images})

    def profile(self, repeats: int, warmup: int) -> list[dict[str, Any]]:
        first = self._session.get_providers()[0]
        if first in _QUEUED:
            raise RuntimeError(
                f"ONNX Runtime's profiler times how long {first} takes to queue an operator, not to compute "
                "it; profile this device with runtime torch and providers [cuda]"
            )
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(str(Path(folder) / "profile"))
            for _ in range(warmup + repeats):
                session.run(None, {self._input: self._images})
            events = json.loads(Path(session.end_profiling()).read_text())
        nodes: dict[str, dict[str, Any]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = _plain_name(event["name"])
                node = nodes.setdefault(
                    name, {"name": name, "op": event["args"].get("op_name", "?"), "samples_ms": []}
                )
                node["samples_ms"].append(event["dur"] / 1e3)
        for node in nodes.values():
            # Two nodes may share a name; their times of one run belong together.
            runs, times = warmup + repeats, node["samples_ms"]
            if len(times) % runs:
                raise RuntimeError(f"operator {node['name']} ran {len(times)} times in {runs} inferences")
            each = len(times) // runs
            node["samples_ms"] = [sum(times[i * each : (i + 1) * each]) for i in range(warmup, runs)]
        return list(nodes.values())


def _plain_name(event: str) -> str:
    # ONNX Runtime renames what it rewrites: fused operators get a prefix, blocked ones the name of their
    # output and a suffix, and a number where a name was taken.
    name = event.removesuffix("_kernel_time").removeprefix("fused ")
    name = re.sub(r"_token_\d+$", "", name)
    return name.removesuffix("_nchwc").removesuffix("/MatMulAddFusion")

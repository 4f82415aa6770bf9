"""One open model in one runtime: inference, and the runtime's own times per operator.

The only file that knows the runtimes' interfaces.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HINTS = {"torch": "pip install torch", "onnxruntime": "pip install onnxruntime"}


class MissingRuntimeError(RuntimeError):
    """The runtime is not installed here."""


class Session(Protocol):
    """One open model."""

    def run(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Outputs for `images` of the model's input shape."""
        ...

    def once(self) -> None:
        """One inference on a prepared input, finished when it returns: what gets timed."""
        ...

    def profile(self, repeats: int, warmup: int) -> list[dict[str, Any]]:
        """Operators as the runtime sees them, in execution order: `{"name", "op", "samples_ms"}`."""
        ...


def _images(shape: list[int]) -> NDArray[np.float32]:
    import numpy as np

    return np.random.default_rng(0).random(shape, dtype=np.float32)


class OnnxRuntimeSession:
    """ONNX Runtime. `spin` False keeps its thread pool from spinning between runs, beside other work."""

    def __init__(self, spec: dict[str, Any], *, spin: bool = True) -> None:
        self._spec, self._spin = spec, spin
        self._session = self._open(None)
        self._input = self._session.get_inputs()[0].name
        self._images = _images(spec["input_shape"])

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
        session = onnxruntime.InferenceSession(self._spec["path"], options, providers=providers)
        # ONNX Runtime falls back to the CPU in silence when a provider cannot start.
        if session.get_providers()[0] != providers[0]:
            raise RuntimeError(
                f"execution provider {providers[0]} was asked for but ONNX Runtime uses "
                f"{session.get_providers()[0]}; this build offers {onnxruntime.get_available_providers()}"
            )
        return session

    def run(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(self._session.run(None, {self._input: images}))

    def once(self) -> None:
        self._session.run(None, {self._input: self._images})

    def profile(self, repeats: int, warmup: int) -> list[dict[str, Any]]:
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


class TorchSession:
    """An exported PyTorch program (`torch.export`), run eagerly. One provider: `cpu`, `cuda` or `cuda:1`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        import torch.export

        self._torch = torch
        self._threads = spec["threads"]
        self._device = torch.device((spec.get("providers") or ["cpu"])[0])
        if self._device.type == "cuda":
            # fp32 means fp32: TF32 would be another precision under the same name.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        program = torch.export.load(spec["path"])
        if self._device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, self._device)
        try:
            # Guards check the input's shape on every call, which a shipped model does not need.
            self._module = program.module(check_guards=False)
        except TypeError:
            self._module = program.module()
        self._example = torch.from_numpy(_images(spec["input_shape"])).to(self._device)

    @contextlib.contextmanager
    def _own_threads(self) -> Iterator[None]:
        before = self._torch.get_num_threads()
        if before != self._threads:
            self._torch.set_num_threads(self._threads)
        try:
            with self._torch.inference_mode():
                yield
        finally:
            if before != self._threads:
                self._torch.set_num_threads(before)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)

    def run(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        with self._own_threads():
            outputs = self._module(self._torch.from_numpy(images).to(self._device))
        outputs = [outputs] if isinstance(outputs, self._torch.Tensor) else outputs
        return [output.cpu().numpy() for output in outputs]

    def once(self) -> None:
        with self._torch.inference_mode():
            self._module(self._example)
            self._wait()

    def prepare(self) -> None:
        """Take over the process's thread count; only in a process of its own."""
        self._torch.set_num_threads(self._threads)

    def profile(self, repeats: int, warmup: int) -> list[dict[str, Any]]:
        from torch import fx

        session = self
        times: dict[str, list[float]] = {}

        class Timed(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n.op != "call_function":
                    return super().run_node(n)
                session._wait()
                start = time.perf_counter()
                value = super().run_node(n)
                session._wait()
                times.setdefault(n.name, []).append((time.perf_counter() - start) * 1e3)
                return value

        interpreter = Timed(self._module)
        with self._torch.inference_mode():
            for _ in range(warmup + repeats):
                interpreter.run(self._example)
        nodes = []
        for node in self._module.graph.nodes:
            if node.name in times:
                weights = [
                    str(arg.target)
                    for arg in node.args
                    if isinstance(arg, fx.Node)
                    and arg.op == "get_attr"
                    and str(arg.target).endswith(".weight")
                ]
                name = weights[0].removesuffix(".weight") if weights else node.name
                op = getattr(node.target, "__name__", str(node.target)).split(".")[0]
                nodes.append({"name": name, "op": op, "samples_ms": times[node.name][warmup:]})
        return nodes


def open_session(spec: dict[str, Any], *, spin: bool = True) -> Session:
    """Open a model: spec has `path, runtime, input_shape, threads, providers`.

    Raises:
        MissingRuntimeError: the runtime is not installed.
        ValueError: an unknown runtime.
    """
    import_runtime(spec["runtime"])
    if spec["runtime"] == "onnxruntime":
        return OnnxRuntimeSession(spec, spin=spin)
    return TorchSession(spec)


def import_runtime(runtime: str) -> str:
    """Import the runtime with all it will need, and return its version."""
    if runtime not in HINTS:
        raise ValueError(f"runtime must be one of {', '.join(HINTS)}, got {runtime!r}")
    try:
        if runtime == "onnxruntime":
            import onnxruntime

            return str(onnxruntime.__version__)
        import torch
        import torch.export.pt2_archive  # Else `torch.export.load` imports it in every measured process.

        return str(torch.__version__)
    except ImportError as error:
        raise MissingRuntimeError(
            f"runtime {runtime} cannot be imported by {sys.executable} ({error}); "
            f"install it there: {HINTS[runtime]}"
        ) from error

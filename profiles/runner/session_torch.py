"""One open model in PyTorch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .example import example_images

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.fx import GraphModule


#: glibc's numbers for M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX, and more than any model takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ENOUGH = -1, -3, -4, 2**31 - 1
_keeps = ""


def keep_memory() -> str:
    """Have the C library keep what is freed, where it is glibc; says what was reached, for the record.

    PyTorch asks for the memory of every map anew. By default glibc returns it to the system in between, and
    an inference pays for fresh pages each time: a few percent more, and what they are worth differs from
    process to process (YOLOv8n at 320 px, one thread: 32.6 against 30.3 ms, and a standard deviation between
    processes of 2.7% against 0.5%). Long-running services keep memory too, by this setting or by another
    allocator; the other runtimes have their own.
    """
    global _keeps
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Older versions know an upper limit for the threshold, and no map at all is the same to us.
        kept = libc.mallopt(_MMAP_THRESHOLD, _ENOUGH) or libc.mallopt(_MMAP_MAX, 0)
        if kept and libc.mallopt(_TRIM_THRESHOLD, _ENOUGH):
            _keeps = "glibc, keeps freed memory"
    return _keeps


def kept_memory() -> str:
    """What `keep_memory` reached in this process; empty where it was not called or could not."""
    return _keeps


#: Models read for the processes to be forked, oldest first; kept up to so many bytes of model files.
_read_before: dict[tuple[str, str, int, int], GraphModule] = {}
_KEPT_BYTES = 512 * 2**20


def read_ahead(spec: dict[str, Any]) -> None:
    """Read a model for the CPU before the processes that measure it are forked: PyTorch takes a second or two
    to rebuild its graph, longer than a round measures.

    Each process gives the weights memory of its own, so that processes stay as different from each other as
    if each had read the file. What runs on a GPU is read by each: CUDA must not be touched before a fork.
    """
    import torch

    key = _identity(spec)
    if key in _read_before or _device_name(spec) != "cpu":
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    try:
        _read_before[key] = _read(spec)
    finally:
        torch.set_num_threads(before)
    while len(_read_before) > 1 and sum(size for *_, size in _read_before) > _KEPT_BYTES:
        del _read_before[next(iter(_read_before))]


def _identity(spec: dict[str, Any]) -> tuple[str, str, int, int]:
    file = os.stat(spec["path"])
    return _device_name(spec), spec["path"], file.st_mtime_ns, file.st_size


def _device_name(spec: dict[str, Any]) -> str:
    return str((spec.get("providers") or ["cpu"])[0])


def _read(spec: dict[str, Any]) -> GraphModule:
    import torch.export

    program = torch.export.load(spec["path"])
    device = torch.device(_device_name(spec))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    try:
        # Guards check the input's shape on every call, which a shipped model does not need.
        return program.module(check_guards=False)
    except TypeError:
        return program.module()


class TorchSession:
    """An exported PyTorch program (`torch.export`), run eagerly. One provider: `cpu`, `cuda` or `cuda:1`.

    In bf16 and fp16 weights and activations are of that type; images go in and outputs come out in fp32, and
    an inference includes both conversions.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch

        self._torch = torch
        self._threads = spec["threads"]
        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self._dtype = names[spec["precision"]]
        self._device = torch.device(_device_name(spec))
        if self._device.type == "cuda":
            # fp32 means fp32: TF32 would be another precision under the same name.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        ahead = _read_before.get(_identity(spec))
        self._module = _read(spec) if ahead is None else ahead
        if ahead is not None:
            for tensor in (*self._module.parameters(), *self._module.buffers()):
                tensor.data = tensor.data.clone()
        self._module = self._module.to(self._dtype)
        self._example = torch.from_numpy(example_images(spec["input_shape"])).to(self._device)

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
            outputs = self._infer(self._torch.from_numpy(images).to(self._device))
        return [output.cpu().numpy() for output in outputs]

    def _infer(self, images: Tensor) -> list[Tensor]:
        if self._dtype == self._torch.float32:
            outputs = self._module(images)
            return [outputs] if isinstance(outputs, self._torch.Tensor) else list(outputs)
        outputs = self._module(images.to(self._dtype))
        outputs = [outputs] if isinstance(outputs, self._torch.Tensor) else outputs
        return [output.float() for output in outputs]

    def once(self) -> None:
        with self._torch.inference_mode():
            self._infer(self._example)
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
                interpreter.run(self._example.to(self._dtype))
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

"""What every runtime's session offers, and which runtimes there are.

Each runtime's interface is known to one file beside this one; nothing else in the runner knows any.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HINTS = {
    "torch": "pip install torch",
    "onnxruntime": "pip install onnxruntime",
    "openvino": "pip install openvino (where paretoprune itself is installed: its extra 'openvino')",
    "ncnn": "pip install ncnn (where paretoprune itself is installed: its extra 'ncnn')",
}


class MissingRuntimeError(RuntimeError):
    """The runtime is not installed here."""


class Session(Protocol):
    """One open model."""

    def prepare(self) -> None:
        """Take over the process's thread count and the like; only in a process of its own."""
        ...

    def run(self, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Outputs for `images` of the model's input shape."""
        ...

    def once(self) -> None:
        """One inference on a prepared input, finished when it returns: what gets timed."""
        ...

    def profile(self, repeats: int, warmup: int) -> list[dict[str, Any]]:
        """Operators as the runtime sees them, in execution order: `{"name", "op", "samples_ms"}`."""
        ...


def open_session(spec: dict[str, Any], *, spin: bool = True) -> Session:
    """Open a model: spec has `path, runtime, precision, input_shape, threads, providers`.

    Args:
        spin: False keeps the thread pool of ONNX Runtime and ncnn from spinning between runs, for use beside
            other work; the others have none that spins.

    Raises:
        MissingRuntimeError: the runtime is not installed.
        ValueError: an unknown runtime.
        RuntimeError: the runtime would not compute in the precision asked for.
    """
    import_runtime(spec["runtime"])
    if spec["runtime"] == "onnxruntime":
        from .session_onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(spec, spin=spin)
    if spec["runtime"] == "openvino":
        from .session_openvino import OpenvinoSession

        return OpenvinoSession(spec)
    if spec["runtime"] == "ncnn":
        from .session_ncnn import NcnnSession

        return NcnnSession(spec, spin=spin)
    from .session_torch import TorchSession

    return TorchSession(spec)


def read_ahead(spec: dict[str, Any]) -> None:
    """Do what the processes to be forked for this model can share, where the runtime has such a thing."""
    if spec["runtime"] == "torch":
        from .session_torch import read_ahead as read_program

        read_program(spec)


def import_runtime(runtime: str) -> str:
    """Import the runtime with all it will need, and return its version."""
    if runtime not in HINTS:
        raise ValueError(f"runtime must be one of {', '.join(HINTS)}, got {runtime!r}")
    try:
        if runtime == "onnxruntime":
            import onnxruntime

            return str(onnxruntime.__version__)
        if runtime == "openvino":
            import openvino

            return str(openvino.__version__).split("-")[0]
        if runtime == "ncnn":
            import ncnn
            import numpy  # noqa: F401  ncnn's own package does not ask for it.

            return str(ncnn.__version__)
        import torch

        with contextlib.suppress(ImportError):  # older versions keep it elsewhere
            # Else `torch.export.load` imports it in every measured process.
            import torch.export.pt2_archive

        return str(torch.__version__)
    except ImportError as error:
        raise MissingRuntimeError(
            f"runtime {runtime} cannot be imported by {sys.executable} ({error}); "
            f"install it there: {HINTS[runtime]}"
        ) from error

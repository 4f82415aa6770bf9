"""Models that a user's own function builds, and the weight files that go with them.

Knows Python modules and state dicts; nothing of data or training.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def build_model(builder: str, folder: Path, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the function that `builder` names.

    Args:
        builder: "pkg.module:function".
        folder: where modules are looked for first, the study file's own.
        arguments: passed to the function by name.

    Raises:
        ValueError: the text has another form, there is no such function, or it fails or returns no module.
    """
    module_name, colon, function_name = builder.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise ValueError(f'model.builder must be "pkg.module:function", got {builder!r}')
    with _first_on_path(folder, module_name.partition(".")[0]):
        try:
            function = getattr(importlib.import_module(module_name), function_name)
        except ImportError as error:
            raise ValueError(
                f"model.builder {builder!r} cannot be imported from {folder} or installed packages: {error}"
            ) from error
        except AttributeError as error:
            raise ValueError(f"model.builder {builder!r}: {error}") from error
        except Exception as error:  # whatever the user's module does at import
            raise ValueError(
                f"model.builder {builder!r} fails at import: {type(error).__name__}: {error}"
            ) from error
        if not callable(function):
            raise ValueError(
                f"model.builder {builder!r} must name a function, got a {type(function).__name__}"
            )
        try:
            # Architectures without a weights file start from random ones, the same in every process.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = function(**arguments)
        except Exception as error:
            given = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
            raise ValueError(
                f"model.builder {builder}({given}) fails: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model.builder {builder!r} must return a torch.nn.Module, got a {type(model).__name__}"
        )
    return model


@contextlib.contextmanager
def _first_on_path(folder: Path, package: str) -> Iterator[None]:
    """Import `package` from `folder` where it is there, whatever other module of that name is loaded."""
    place = str(folder.resolve())
    own = [p for p in (folder / f"{package}.py", folder / package / "__init__.py") if p.is_file()]
    loaded = getattr(sys.modules.get(package), "__file__", None)
    if own and loaded is not None and Path(loaded).resolve() not in [p.resolve() for p in own]:
        for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
            del sys.modules[name]
    importlib.invalidate_caches()
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from `.pt`, `.pth` or `.safetensors`, on the CPU. Nothing in the file is executed.

    A dict that holds the state dict under `state_dict` or `model` is unwrapped, and `module.` prefixes of
    parallel training go.

    Raises:
        ValueError: no such file, or no state dict in it.
    """
    rule = "model.weights must be a state dict (names to tensors) in a .pt, .pth or .safetensors file"
    if not path.is_file():
        raise ValueError(f"{rule}, got {path}, which does not exist")
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(f"{rule}, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and safetensors each raise their own
        if type(error).__name__ == "UnpicklingError":
            raise ValueError(
                f"{rule}, got {path}, which holds more than tensors; "
                "save model.state_dict() instead of the model"
            ) from error
        raise ValueError(f"{rule}, got {path}, which cannot be read: {_first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{rule}, got {path}, which holds a {type(state).__name__} of something else")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Load a state dict that fits the model exactly, in place.

    Raises:
        ValueError: names or shapes differ; the message shows the first of each kind.
    """
    state, own = read_state(path), model.state_dict()
    faults = []
    missing, unknown = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing:
        faults.append(f"{len(missing)} names are missing ({', '.join(missing[:3])})")
    if unknown:
        faults.append(f"{len(unknown)} names are unknown to the model ({', '.join(unknown[:3])})")
    for name in own:
        if name in state and state[name].shape != own[name].shape:
            faults.append(f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}")
    if faults:
        raise ValueError(f"model.weights {path} do not fit the model: {'; '.join(faults[:5])}")
    model.load_state_dict(state)
    return model


def load_pruned(model: nn.Module, path: Path, blocks: Iterable[str] = ()) -> nn.Module:
    """Load a pruned model's state dict into the unpruned architecture, narrowing its layers to the file's
    shapes, in place.

    This is how an exported classifier is opened again: `load_pruned(resnet56(), Path("model.pt"))`.

    Args:
        blocks: module paths of blocks that were removed as a whole; each becomes an identity.

    Raises:
        ValueError: names differ, or a shape that differs belongs to no convolution, linear layer or batch
        norm.
    """
    state = read_state(path)
    for name in blocks:
        model.set_submodule(name, nn.Identity())
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        weight = state.get(f"{prefix}weight")
        if weight is None or not isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)):
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.Conv2d):
            if (
                module.groups == module.in_channels > 1
            ):  # depthwise: as many groups as channels, however many are left
                module.groups = weight.shape[0] * module.groups // module.out_channels
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        else:
            module.num_features = weight.shape[0]
        for part, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            there = state.get(prefix + part)
            if there is not None and there.shape != tensor.shape:
                fresh = torch.empty_like(there)
                if isinstance(tensor, nn.Parameter):
                    setattr(module, part, nn.Parameter(fresh))
                else:
                    setattr(module, part, fresh)
    return load_weights(model, path)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

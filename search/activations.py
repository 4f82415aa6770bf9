"""The map of every channel, caught during one forward pass. Knows no loss and no score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class ActivationMaps:
    """Follows each layer's output through batch norm and activation modules during one forward pass.

    Works on tensor identity rather than on module structure, so it needs no knowledge of a framework's
    blocks. Identities are safe because every followed tensor is kept alive here. A tensor that was written to
    in between (`out += shortcut`) is no longer the layer's own map, and is not followed further.
    """

    def __init__(self, model: nn.Module, names: Mapping[nn.Module, str]):
        self._model = model
        self._names = names

    def __enter__(self) -> dict[str, Tensor]:
        import torch
        from torch import nn
        from torch.nn.modules.batchnorm import _BatchNorm

        maps: dict[str, Tensor] = {}
        owner: dict[int, tuple[str, int]] = {}  # tensor to its layer and its version
        entering: dict[nn.Module, str | None] = {}
        keep: list[Tensor] = []

        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            # Before the module runs: one that works in place changes its input's version itself.
            name, version = owner.get(id(inputs[0]), (None, -1)) if len(inputs) == 1 else (None, -1)
            entering[module] = name if name is not None and inputs[0]._version == version else None

        def follow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
            name = self._names[module] if module in self._names else entering.get(module)
            if name is None or not isinstance(output, torch.Tensor):
                return None
            maps[name] = output
            # The network goes on with a copy: `out += shortcut` would otherwise change the recorded map in
            # place.
            onward = output.clone()
            owner[id(onward)] = (name, onward._version)
            keep.append(onward)
            return onward

        elementwise = (
            _BatchNorm,
            nn.ReLU,
            nn.ReLU6,
            nn.SiLU,
            nn.GELU,
            nn.Hardswish,
            nn.LeakyReLU,
            nn.Sigmoid,
            nn.ELU,
        )
        followers = [m for m in self._model.modules() if isinstance(m, elementwise)]
        self._handles = [m.register_forward_pre_hook(look) for m in followers]
        self._handles += [m.register_forward_hook(follow) for m in (*self._names, *followers)]
        self._keep = keep
        return maps

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._keep.clear()

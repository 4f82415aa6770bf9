"""Which of a file's tensors hold weights that changed, and what they hold now.

Exporters rename weights, turn them and merge equal ones, so a weight is found by its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..export import content_digest

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]


class NotToldApartError(Exception):
    """A tensor of the file may be more than one weight, or holds one in a form that is not known."""


class Exchange:
    """The weights of one module in the place of another's.

    Args:
        old: the state dict that is in the file.
        changed: the part of the new one that differs from it, in values or in widths.
    """

    def __init__(self, old: Weights, changed: Weights):
        self._old = old
        self._changed = changed
        self._found: set[str] = set()
        self._names: dict[str, list[str]] = {}
        for name, tensor in old.items():
            self._names.setdefault(_digest(tensor.detach().cpu().numpy()), []).append(name)

    @property
    def resizes(self) -> bool:
        """Whether any width is another."""
        return any(tensor.shape != self._old[name].shape for name, tensor in self._changed.items())

    @property
    def is_complete(self) -> bool:
        """Whether everything that changed has been found."""
        return self._changed.keys() <= self._found

    def of(self, name: str) -> tuple[NDArray[np.generic], NDArray[np.generic]] | None:
        """A parameter as it was and as it is, where the file has it as it is; None where there is none."""
        if name not in self._old:
            return None
        self._found.add(name)
        new = self._changed.get(name, self._old[name])
        return self._old[name].detach().cpu().numpy(), new.detach().cpu().numpy()

    def now(self, values: NDArray[np.generic]) -> NDArray[np.generic] | None:
        """What a tensor of the file has to hold; None where that did not change.

        Raises:
            NotToldApartError: see there.
        """
        # Exporters may transpose a linear layer's weight.
        for turned in (False, True) if values.ndim == 2 else (False,):
            names = self._names.get(_digest(values.T if turned else values), [])
            if not any(name in self._changed for name in names):
                continue
            if len(names) > 1 or _is_constant(values):
                raise NotToldApartError(f"{names} have equal values")
            (name,) = names
            self._found.add(name)
            new = self._changed[name].detach().cpu().numpy()
            shape = tuple(self._old[name].shape)
            return np.ascontiguousarray(new.T if turned else _as_stored(new, shape, values.shape))
        return None


def _as_stored(
    new: NDArray[np.generic], shape: tuple[int, ...], stored: tuple[int, ...]
) -> NDArray[np.generic]:
    """A weight in the form that a file has one of `shape` in."""
    if stored == shape:
        return new
    if new.shape == shape:
        return new.reshape(stored)
    if len(shape) == 1 and sorted(stored) == sorted((*shape, *(1,) * (len(stored) - 1))):
        return new.reshape([-1 if size == shape[0] else 1 for size in stored])
    if stored == (shape[0], 1, *shape[1:]):  # a depthwise layer, one group after the other
        return new[:, None]
    raise NotToldApartError(f"a weight of shape {shape} is stored as {stored}")


def _digest(values: NDArray[np.generic]) -> str:
    return content_digest(values.ravel())


def _is_constant(values: NDArray[np.generic]) -> bool:
    """One number all over, as the start of a scale or a bias: any constant of the file may look like it."""
    return values.size == 0 or bool((values == values.flat[0]).all())

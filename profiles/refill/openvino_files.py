"""OpenVINO's files given other weights, see `refill`: constants are exchanged and shapes inferred anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import LayerSpec
from .parts import AXIS, Bounds, scaled_slice, scaled_split
from .weights import Exchange


def refill_openvino(
    source: Path,
    target: Path,
    layers: tuple[LayerSpec, ...],
    exchange: Exchange,
    metadata: Mapping[str, str],
) -> bool:
    """Whether it could, see `Refiller`."""
    import openvino

    model = openvino.Core().read_model(str(source))
    operators = model.get_ordered_ops()
    parts = [_Part.of(op) for op in operators if op.get_type_name() in _PARTS and _channels(op)]
    for op in operators:
        if op.get_type_name() == "Constant" and op.get_element_type().is_real():
            now = exchange.now(op.data)
            if now is not None:
                _replace(op, now)
    if not exchange.is_complete or not _settle(model, parts):
        return False
    for key, value in metadata.items():
        model.set_rt_info(value, ["paretoprune", key])
    openvino.save_model(model, str(target), compress_to_fp16=False)
    return True


#: Operators that take parts of a tensor: the input that says along which axis, and those that say which.
_PARTS = {"Slice": (4, (1, 2, 3)), "VariadicSplit": (1, (2,))}


@dataclass(frozen=True)
class _Part:
    """An operator that takes parts of a tensor's channels.

    Attributes:
        bounds: what its inputs held: of a slice where it begins, ends and steps, of a split the sizes.
        width: channels of the tensor that they were of.
    """

    op: Any
    bounds: tuple[Bounds | None, ...]
    width: int

    @classmethod
    def of(cls, op: Any) -> _Part:
        _, places = _PARTS[op.get_type_name()]
        return cls(op, tuple(_constant(op, place) for place in places), _channels(op))

    def wanted(self) -> dict[int, Bounds | None]:
        """What its inputs should hold for the channels that there are now; None where there is no saying."""
        now = _channels(self.op)
        if len(self.bounds) == 1:
            (sizes,) = self.bounds
            return {2: None if sizes is None else scaled_split(sizes, now)}
        start, end, step = self.bounds
        found = scaled_slice(start[0], end[0], self.width, now) if start and end and step == (1,) else None
        return {1: None if found is None else found[:1], 2: None if found is None else found[1:]}


def _settle(model: Any, parts: Sequence[_Part]) -> bool:
    """Infer shapes and set what operators take of so many channels; False where widths do not fit."""
    # What follows a part has a wrong width until the part is set, so the last of them may need many looks.
    for _ in range(len(parts) + 1):
        try:
            model.validate_nodes_and_infer_types()
            fits = True
        except RuntimeError:
            fits = False  # up to there shapes are the new ones
        wanted = [(part.op, *entry) for part in parts for entry in part.wanted().items()]
        moved = [entry for entry in wanted if entry[2] not in (None, _constant(*entry[:2]))]
        for op, place, values in moved:
            _set_input(op, place, np.array(values, np.int64))
        if not moved:
            return fits and all(values is not None for _, _, values in wanted)
    return False


def _channels(op: Any) -> int:
    """Channels of what an operator reads; 0 where it takes no parts of them."""
    axis = _constant(op, _PARTS[op.get_type_name()][0])
    shape = op.input_value(0).get_partial_shape()
    return int(shape[AXIS].get_length()) if axis == (AXIS,) and len(shape) > AXIS else 0


def _constant(op: Any, place: int) -> Bounds | None:
    """Whole numbers that an operator reads from a constant; None where they are computed."""
    node = op.input_value(place).get_node()
    if node.get_type_name() == "Broadcast":  # a step that was left out, one for each axis
        return _constant(node, 0)
    return tuple(node.data.ravel().tolist()) if node.get_type_name() == "Constant" else None


def _set_input(op: Any, place: int, values: np.ndarray) -> None:
    from openvino import opset13

    op.input(place).replace_source_output(opset13.constant(values).output(0))


def _replace(op: Any, values: np.ndarray) -> None:
    from openvino import opset13

    constant = opset13.constant(np.ascontiguousarray(values))
    constant.set_friendly_name(op.get_friendly_name())
    op.output(0).replace(constant.output(0))

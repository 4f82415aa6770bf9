"""ncnn's files given other weights, see `refill`: both are rewritten in place, pnnx is not asked.

ncnn records no shapes but the widths of layers that have weights; what lies between them takes whatever
comes. Knows ncnn's file format alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..artifact import LayerSpec
from ..export_ncnn import find_weight
from .weights import Exchange

#: Kind of layer to the keys of its output channels, of how many numbers its weight has, and of its groups.
_KEYS: Mapping[str, tuple[int, int, int | None]] = {
    "Convolution": (0, 6, None),
    "ConvolutionDepthWise": (0, 6, 7),
    "InnerProduct": (0, 2, None),
}
#: Kinds without weights that take any channels. ncnn trusts its files, and another kind with the old number
#: of channels may read what is not there, so kinds not known are left to an export.
_INDIFFERENT = frozenset(
    [
        "BinaryOp",
        "Clip",
        "Concat",
        "Dropout",
        "ELU",
        "Flatten",
        "GELU",
        "HardSigmoid",
        "HardSwish",
        "Input",
        "Interp",
        "MemoryData",
        "Mish",
        "Noop",
        "Permute",
        "Pooling",
        "ReLU",
        "Reduction",
        "Reshape",
        "SELU",
        "Sigmoid",
        "Softmax",
        "Split",
        "Swish",
        "TanH",
        "UnaryOp",
    ]
)
_EVEN = "-233"  # a size of ncnn's slices: an equal share of what is left


def refill_ncnn(
    source: Path,
    target: Path,
    layers: tuple[LayerSpec, ...],
    exchange: Exchange,
    metadata: Mapping[str, str],
) -> bool:
    """Whether it could, see `Refiller`: not where another parameter changed than a layer's weight or bias,
    where these are not in the file as they are, or something else may depend on how many channels there are.
    """
    lines = source.read_text().splitlines()
    rows = {line.split()[1]: number for number, line in enumerate(lines) if len(line.split()) > 2}
    if exchange.resizes and not all(_takes_any_channels(line.split()) for line in lines[2:]):
        return False
    content = source.with_suffix(".bin").read_bytes()
    taken: dict[int, str] = {}
    pieces: list[tuple[int, int, bytes]] = []
    for spec in layers:
        row = rows[spec.names[0]]
        kind = lines[row].split()[0]
        found = [exchange.of(f"{spec.layer}.{name}") for name in ("weight", "bias")]
        own = [pair for pair in found if pair is not None]
        if found[0] is None:  # computed from other parameters
            return False
        place = find_weight(content, own[0][0], spec, taken)
        if place is None or kind not in _KEYS:
            return False
        taken[place] = spec.layer
        before = b"".join(_bytes(was) for was, _ in own)  # the bias follows its weight
        if content[place : place + len(before)] != before:
            return False
        pieces.append((place, place + len(before), b"".join(_bytes(now) for _, now in own)))
        for key, value in zip(_KEYS[kind], (spec.out_channels, own[0][1].size, spec.groups), strict=True):
            if key is not None:
                lines[row] = re.sub(rf"(?<= ){key}=\S+", f"{key}={value}", lines[row])
    if not exchange.is_complete:
        return False
    ends = [0, *(end for _, end, _ in sorted(pieces))]
    parts = [content[at:start] + new for at, (start, _, new) in zip(ends, sorted(pieces), strict=False)]
    target.write_text("\n".join(lines) + "\n")
    target.with_suffix(".bin").write_bytes(b"".join([*parts, content[ends[-1] :]]))
    target.with_suffix(".json").write_text(json.dumps(dict(metadata)))
    return True


def _takes_any_channels(words: list[str]) -> bool:
    """Whether a line's layer goes on with other channels than those it was written for."""
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    if words[0] == "Slice":  # -23300 says how many sizes there are, then each
        along_others = settings.get("1", "0") != "0"
        return along_others or set(settings.get("-23300", "").split(",")[1:]) == {_EVEN}
    if words[0] == "Padding":  # in front of the channels and behind them
        return settings.get("7", "0") == settings.get("8", "0") == "0"
    return words[0] in _INDIFFERENT or words[0] in _KEYS


def _bytes(values: NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(values, dtype=np.float32).tobytes()

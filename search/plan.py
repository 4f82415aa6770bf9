"""Pruning plans: which channels and which blocks go, replayable from the original weights alone.

A plan names indices of the ORIGINAL model and the layers they narrow, so a replay needs neither a dependency
graph nor the order in which the channels were chosen. Knows nothing of why these were chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .groups import ChannelGroups

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerCut:
    """What one layer loses.

    Attributes:
        channels_in, channels_out: original widths (a batch norm has none in).
        removed_in, removed_out: sorted indices into the original.
    """

    channels_in: int
    channels_out: int
    removed_in: tuple[int, ...] = ()
    removed_out: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for side, channels, removed in (
            ("in", self.channels_in, self.removed_in),
            ("out", self.channels_out, self.removed_out),
        ):
            if list(removed) != sorted(set(removed)):
                raise ValueError(
                    f"removed_{side} must be sorted without repetition, got {list(removed)[:8]}..."
                )
            if removed and not 0 <= removed[0] <= removed[-1] < channels:
                raise ValueError(
                    f"removed_{side} must lie in [0, {channels}), got {removed[0]}..{removed[-1]}"
                )
            if removed and len(removed) == channels:
                raise ValueError(
                    f"a layer never loses all its channels, got all {channels} of its {side} side"
                )

    @property
    def kept_in(self) -> int:
        return self.channels_in - len(self.removed_in)

    @property
    def kept_out(self) -> int:
        return self.channels_out - len(self.removed_out)


@dataclass(frozen=True)
class PruningPlan:
    """Which channels of a model go, and which blocks.

    Attributes:
        model_key: digest of the model the indices belong to.
        removed: group name to sorted channel indices of that group; groups that keep everything are absent.
        layers: layer name to what it loses; layers that keep everything are absent, and those inside a block
            that goes.
        blocks: module paths that are replaced by the identity, sorted; none lies inside another.

    Raises:
        ValueError: a block is there twice or lies inside another, or a layer of a block is narrowed too.
    """

    model_key: str
    removed: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, LayerCut] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks must be sorted without repetition, got {list(self.blocks)[:8]}")
        for name in (*self.blocks, *self.layers):
            if outer := next((b for b in self.blocks if name.startswith(f"{b}.")), None):
                raise ValueError(
                    f"nothing inside a block that goes has a cut of its own, got {name} in {outer}"
                )

    @classmethod
    def of(
        cls, model_key: str, groups: ChannelGroups, removed: Mapping[str, NDArray[np.int64]]
    ) -> PruningPlan:
        """The plan that removes these channels of these groups.

        Args:
            removed: group name to channel indices of that group, in any order.

        Raises:
            ValueError: an unknown group, an index out of range, a group or layer left empty, or tied groups
                that lose different numbers of channels.
        """
        out: dict[str, list[NDArray[np.int64]]] = {}
        into: dict[str, list[NDArray[np.int64]]] = {}
        chosen: dict[str, tuple[int, ...]] = {}
        norms: dict[str, int] = {}  # of groups made by hand, which do not say
        for name, indices in removed.items():
            group = groups.by_name.get(name)
            if group is None:
                raise ValueError(
                    f"group must be one of the model's {len(groups.groups)} groups, got {name!r}"
                )
            indices = np.unique(np.asarray(indices, dtype=np.int64))
            if len(indices) == 0:
                continue
            if indices[0] < 0 or indices[-1] >= group.channels:
                raise ValueError(
                    f"channels of {name} must lie in [0, {group.channels}), got {indices[0]}..{indices[-1]}"
                )
            if len(indices) == group.channels:
                raise ValueError(f"a group never loses all its channels, got all {group.channels} of {name}")
            chosen[name] = tuple(indices.tolist())
            for member in group.members:
                (out if member.side == "out" else into).setdefault(member.layer, []).append(
                    member.index[indices].ravel()
                )
        for names in groups.tied:
            counts = {name: len(chosen.get(name, ())) for name in names}
            if len(set(counts.values())) > 1:
                raise ValueError(f"tied groups must lose equal numbers of channels, got {counts}")
        for group in groups.groups:
            for member in group.members:
                if member.side == "out" and member.layer not in groups.widths:
                    norms[member.layer] = norms.get(member.layer, 0) + member.index.size
        layers = {}
        for layer in sorted({*out, *into}):
            width_in, width_out = groups.widths.get(layer, (0, groups.norms.get(layer, norms.get(layer, 0))))
            layers[layer] = LayerCut(width_in, width_out, _merge(into.get(layer)), _merge(out.get(layer)))
        return cls(model_key, chosen, layers)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Convolution or linear layer to kept `(in, out)` channels, for those that lose any."""
        return {name: (cut.kept_in, cut.kept_out) for name, cut in self.layers.items() if cut.channels_in}

    @property
    def is_empty(self) -> bool:
        return not self.removed and not self.blocks

    def inside_blocks(self, layer: str) -> bool:
        """Whether a layer goes with a block."""
        return layer.startswith(tuple(f"{name}." for name in self.blocks)) if self.blocks else False

    @property
    def digest(self) -> str:
        """sha256 of the plan's content; equal plans have equal digests."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        # Only where there are any: a plan of channels alone keeps the digest it always had.
        blocks = {"blocks": list(self.blocks)} if self.blocks else {}
        return {
            **blocks,
            "format_version": FORMAT_VERSION,
            "model_key": self.model_key,
            "removed": {name: list(indices) for name, indices in self.removed.items()},
            "layers": {
                name: {
                    "in": cut.channels_in,
                    "out": cut.channels_out,
                    "removed_in": list(cut.removed_in),
                    "removed_out": list(cut.removed_out),
                }
                for name, cut in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Read what `to_json` wrote.

        Raises:
            ValueError: another format version, or indices that break a rule.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"a plan's format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}"
            )
        return cls(
            data["model_key"],
            {name: tuple(indices) for name, indices in data["removed"].items()},
            {
                name: LayerCut(cut["in"], cut["out"], tuple(cut["removed_in"]), tuple(cut["removed_out"]))
                for name, cut in data["layers"].items()
            },
            tuple(data.get("blocks", ())),
        )

    def save(self, path: Path) -> Path:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))


def _merge(parts: list[NDArray[np.int64]] | None) -> tuple[int, ...]:
    if not parts:
        return ()
    return tuple(np.unique(parts[0] if len(parts) == 1 else np.concatenate(parts)).tolist())

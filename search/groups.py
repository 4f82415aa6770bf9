"""Channel groups: the channels of a network that can only be removed together.

Torch-Pruning's dependency graph finds which layers are coupled; what comes out is plain records in the names
of the original model, so that nothing later needs a graph. Knows no scores and no devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

    from objectives.task import Traceable

Side = Literal["out", "in"]
IntArray = NDArray[np.int64]
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Member:
    """One layer's part in a group.

    Attributes:
        layer: module path in the original model; convolutions, linear layers and batch norms.
        side: `out`, the layer's own channels, or `in`, what it reads.
        index: `(channels, width)`; row j holds the layer's indices that go when the group's channel j goes.
            `width` is 1 except behind a flatten, where one channel becomes several inputs.
        weighted: a convolution or linear layer on its `out` side, the ones that carry scores.
    """

    layer: str
    side: Side
    index: IntArray
    weighted: bool


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that can only be removed together.

    A residual stream is the typical case: channel j of every layer that adds into it, the batch norms behind
    them and input j of every layer that reads it. Removing the group's channel j removes all of these; the
    rest of the network is then exactly what it was with that channel silenced.
    """

    name: str
    channels: int
    members: tuple[Member, ...]

    @cached_property
    def weighted(self) -> tuple[Member, ...]:
        """The members that own the channels: convolutions and linear layers, `out` side."""
        return tuple(m for m in self.members if m.weighted)


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """All groups of one model.

    Attributes:
        groups: in order of the network.
        tied: sets of groups that must lose equal numbers of channels, because the model splits one layer's
            output evenly. Which channels go is free in each.
        widths: original `(in, out)` channels of every convolution and linear layer, prunable or not.
        norms: original channels of every batch norm; its members need not be all of them, where several
            groups share it and not all were selected.
    """

    groups: tuple[ChannelGroup, ...]
    tied: tuple[tuple[str, ...], ...]
    widths: Mapping[str, tuple[int, int]]
    norms: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> Mapping[str, ChannelGroup]:
        return {g.name: g for g in self.groups}

    @cached_property
    def channels(self) -> IntArray:
        """`(groups,)` channels of each group."""
        return np.array([g.channels for g in self.groups], dtype=np.int64)

    @cached_property
    def weights(self) -> IntArray:
        """`(groups,)` layer channels that go with one channel of the group: how the paper counts channels."""
        return np.array([sum(m.index.shape[1] for m in g.weighted) for g in self.groups], dtype=np.int64)

    @property
    def prunable_channels(self) -> int:
        """Layer channels (convolution and linear outputs) that belong to any group."""
        return int(self.channels @ self.weights)

    @cached_property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """Groups that are decided together, as positions: each tied set, and every other group on its own."""
        position = {g.name: i for i, g in enumerate(self.groups)}
        tied = [tuple(position[name] for name in names) for names in self.tied]
        taken = {i for unit in tied for i in unit}
        return tuple(sorted([*tied, *((i,) for i in range(len(self.groups)) if i not in taken)]))

    @cached_property
    def unit_channels(self) -> IntArray:
        """`(units,)` channels of each unit's groups."""
        return np.array([self.groups[unit[0]].channels for unit in self.units], dtype=np.int64)

    @cached_property
    def _unit_of(self) -> IntArray:
        """`(groups,)` the unit that each group belongs to."""
        result = np.zeros(len(self.groups), dtype=np.int64)
        for u, unit in enumerate(self.units):
            result[list(unit)] = u
        return result

    def spread(self, counts: IntArray) -> IntArray:
        """Counts per unit, `(..., units)`, as counts per group, `(..., groups)`."""
        result: IntArray = counts[..., self._unit_of]
        return result

    def gather(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values per group, `(groups,)`, added up per unit, `(units,)`."""
        result: NDArray[np.float64] = np.bincount(
            self._unit_of, weights=values, minlength=len(self.units)
        ).astype(np.float64)
        return result

    @cached_property
    def owners(self) -> frozenset[str]:
        """The layers that own the groups' channels."""
        return frozenset(m.layer for group in self.groups for m in group.weighted)

    @cached_property
    def _collected(self) -> tuple[Mapping[str, int], IntArray, IntArray, tuple[slice, ...]]:
        """Layers that own channels, each with how many it has at least; and, all of these layers' channels
        being one row, the places `(n,)` to add up and the channel `(n,)` that each belongs to, the groups'
        channels being one row too; and the part of each group in that.
        """
        members = [m for group in self.groups for m in group.weighted]
        sizes: dict[str, int] = {}
        for member in members:
            sizes[member.layer] = max(sizes.get(member.layer, 0), int(member.index.max()) + 1)
        start = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        ends = np.cumsum(self.channels)
        parts = tuple(slice(int(end - c), int(end)) for end, c in zip(ends, self.channels, strict=True))
        places = [start[m.layer] + m.index.ravel() for m in members]
        owners = [
            np.repeat(np.arange(part.start, part.stop), m.index.shape[1])
            for part, group in zip(parts, self.groups, strict=True)
            for m in group.weighted
        ]
        return sizes, np.concatenate(places), np.concatenate(owners), parts

    def collect(self, values: Mapping[str, NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        """Values per layer's output channel, added up per channel of each group, one `(channels,)` each.

        Args:
            values: layer to `(output channels,)`; layers left out add nothing.

        Raises:
            ValueError: a layer with fewer values than channels.
        """
        sizes, places, owners, parts = self._collected
        rows: list[NDArray[np.float64]] = []
        for name, size in sizes.items():
            row = values[name] if name in values else np.zeros(size)
            if len(row) < size:
                raise ValueError(f"layer {name} needs {size} values at least, got {len(row)}")
            rows.append(row[:size])
        taken = np.concatenate(rows)[places]
        sums = np.bincount(owners, weights=taken, minlength=parts[-1].stop).astype(np.float64)
        return [sums[part] for part in parts]

    def incidence(self, layers: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How widths depend on groups: `(in, out)`, each `(layers, groups)`.

        `widths = original - incidence @ removed`, with `removed` the `(groups,)` counts.
        """
        row = {layer: i for i, layer in enumerate(layers)}
        into = np.zeros((len(layers), len(self.groups)))
        out = np.zeros_like(into)
        for column, group in enumerate(self.groups):
            for member in group.members:
                if member.layer in row:
                    target = out if member.side == "out" else into
                    target[row[member.layer], column] += member.index.shape[1]
        return into, out

    def select(self, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> ChannelGroups:
        """The groups whose weighted layers all match `include` and none matches `exclude` (shell globs on
        layer names).

        A tied set stays whole or goes whole.

        Raises:
            ValueError: no group is left.
        """
        kept = {
            g.name for g in self.groups if all(is_selected(m.layer, include, exclude) for m in g.weighted)
        }
        for names in self.tied:
            if not kept.issuperset(names):
                kept -= set(names)
        if not kept:
            raise ValueError(
                f"no channel group is left with include {list(include)} and exclude {list(exclude)}; layers "
                "are named "
                f"like {self.groups[0].weighted[0].layer!r}"
            )
        return ChannelGroups(
            groups=tuple(g for g in self.groups if g.name in kept),
            tied=tuple(names for names in self.tied if kept.issuperset(names)),
            widths=self.widths,
            norms=self.norms,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "groups": [
                {
                    "name": group.name,
                    "channels": group.channels,
                    "members": [
                        [m.layer, m.side, m.weighted, m.index.shape[1], m.index.ravel().tolist()]
                        for m in group.members
                    ],
                }
                for group in self.groups
            ],
            "tied": [list(names) for names in self.tied],
            "widths": {layer: list(pair) for layer, pair in self.widths.items()},
            "norms": dict(self.norms),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChannelGroups:
        """Raises ValueError for another format version."""
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"groups' format_version must be {FORMAT_VERSION}, got {data.get('format_version')!r}"
            )
        return cls(
            groups=tuple(
                ChannelGroup(
                    group["name"],
                    group["channels"],
                    tuple(
                        Member(layer, side, np.array(index, dtype=np.int64).reshape(-1, width), weighted)
                        for layer, side, weighted, width, index in group["members"]
                    ),
                )
                for group in data["groups"]
            ),
            tied=tuple(tuple(names) for names in data["tied"]),
            widths={layer: (pair[0], pair[1]) for layer, pair in data["widths"].items()},
            norms=dict(data["norms"]),
        )


def is_selected(layer: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a layer matches one of `include` and none of `exclude`, shell globs on layer names."""
    inside = any(fnmatchcase(layer, glob) for glob in include)
    return inside and not any(fnmatchcase(layer, glob) for glob in exclude)


def find_groups(traceable: Traceable, original: nn.Module) -> ChannelGroups:
    """Trace a model and translate its coupled channels into the original's layer names.

    Args:
        traceable: the form to trace, with the names that differ from the original.
        original: the model that is going to be pruned.

    Raises:
        ValueError: nothing in the model can be pruned.
    """
    import torch_pruning as tp
    from torch import nn

    model = traceable.model
    # requires_grad: without a gradient function the graph has no edges and every layer would look
    # independent.
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=traceable.example, verbose=False)
    names = {module: name for name, module in model.named_modules()}
    fixed = set(traceable.fixed) | {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and 1 < m.groups < m.out_channels
    }

    groups: list[ChannelGroup] = []
    group_of: dict[str, str] = {}
    seen: set[str] = set()
    for root in [
        m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m in graph.module2node
    ]:
        if names[root] in seen:
            continue
        pruner = graph.get_pruner_of_module(root)
        channels = int(pruner.get_out_channels(root))
        found = graph.get_pruning_group(root, pruner.prune_out_channels, idxs=list(range(channels)))
        parts: list[tuple[str, Side, dict[int, list[int]], nn.Module]] = []
        prunable = True
        for item in found.items:
            dep, module = item.dep, item.dep.target.module
            side: Side = "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"
            if isinstance(module, nn.Parameter):
                prunable = False  # a bare parameter has no layer to record the cut under
                continue
            if module not in names or not isinstance(
                module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d)
            ):
                if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
                    prunable = False  # a layer with weights that we do not know how to narrow
                continue
            name = names[module]
            if side == "out" and isinstance(module, (nn.Conv2d, nn.Linear)):
                seen.add(name)
                prunable = prunable and name not in fixed
            rows: dict[int, list[int]] = {}
            for root_index, index in zip(item.root_idxs, item.idxs, strict=True):
                rows.setdefault(int(root_index), []).append(int(index))
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                # Depthwise: input j and output j are one channel, whichever side the graph names.
                parts += [(name, "out", rows, module), (name, "in", rows, module)]
                seen.add(name)
                prunable = prunable and name not in fixed
            else:
                parts.append((name, side, rows, module))
        if not prunable or not parts:
            continue
        members = _members(parts, channels, traceable.aliases)
        if members is None:
            continue
        name = _group_name(names[root], channels, traceable.aliases, original)
        groups.append(ChannelGroup(name, channels, members))
        for part_name, side, _, module in parts:
            if side == "out" and isinstance(module, (nn.Conv2d, nn.Linear)):
                group_of[part_name] = name

    groups, tied = _tie(groups, traceable.tied, group_of)
    if not groups:
        raise ValueError(
            "no layer of this model can be pruned: every channel reaches an output or a fixed layer"
        )
    widths = {
        name: (m.in_channels, m.out_channels) if isinstance(m, nn.Conv2d) else (m.in_features, m.out_features)
        for name, m in original.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    norms = {
        name: m.num_features
        for name, m in original.named_modules()
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))
    }
    return ChannelGroups(tuple(groups), tied, widths, norms)


def _members(
    parts: Iterable[tuple[str, Side, dict[int, list[int]], nn.Module]],
    channels: int,
    aliases: Mapping[str, tuple[str, int]],
) -> tuple[Member, ...] | None:
    """Members in original names; None where a layer has unequal counterparts to the group's channels."""
    from torch import nn

    members: dict[tuple[str, Side, bytes], Member] = {}
    for name, side, rows, module in parts:
        lengths = {len(row) for row in rows.values()}
        if len(rows) != channels or len(lengths) != 1:
            return None
        index = np.array([rows[j] for j in range(channels)], dtype=np.int64)
        layer, offset = aliases.get(name, (name, 0))
        if side == "out":
            index = index + offset
        weighted = side == "out" and isinstance(module, (nn.Conv2d, nn.Linear))
        # Both halves of a split layer read the same input; in the original that is one layer, hence one
        # member.
        members[layer, side, index.tobytes()] = Member(layer, side, index, weighted)
    return tuple(members.values())


def _group_name(root: str, channels: int, aliases: Mapping[str, tuple[str, int]], original: nn.Module) -> str:
    layer, offset = aliases.get(root, (root, 0))
    return f"{layer}[{offset}:{offset + channels}]" if root in aliases else layer


def _tie(
    groups: list[ChannelGroup], tied: Sequence[tuple[str, ...]], group_of: Mapping[str, str]
) -> tuple[list[ChannelGroup], tuple[tuple[str, ...], ...]]:
    """Translate tied layers to tied groups, and drop groups whose partner cannot be pruned."""
    sets: list[set[str]] = []
    dropped: set[str] = set()
    for layers in tied:
        names = {group_of[layer] for layer in layers if layer in group_of}
        if any(layer not in group_of for layer in layers):
            dropped |= names
            continue
        if len(names) > 1:
            merged = names.union(*[s for s in sets if s & names])
            sets = [s for s in sets if not s & names] + [merged]
    # A dropped partner drags the sets it is in along, whichever order they came in.
    while doomed := [s for s in sets if s & dropped and not s <= dropped]:
        for s in doomed:
            dropped |= s
    order = {g.name: i for i, g in enumerate(groups)}
    kept = [g for g in groups if g.name not in dropped]
    ties = tuple(tuple(sorted(s, key=order.__getitem__)) for s in sets if not s & dropped)
    return kept, ties

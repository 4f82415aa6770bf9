"""Plans: what a choice of channels means for each layer, and the rules a plan cannot break."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from search.groups import ChannelGroup, ChannelGroups, Member
from search.plan import LayerCut, PruningPlan


def column(*indices: int) -> np.ndarray:
    return np.array(indices, dtype=np.int64).reshape(-1, 1)


@pytest.fixture
def groups() -> ChannelGroups:
    """A split layer (two tied halves, the second one a residual stream) and a layer before a flatten."""
    first = ChannelGroup(
        "split[0:4]",
        4,
        (
            Member("split", "out", column(0, 1, 2, 3), True),
            Member("split_bn", "out", column(0, 1, 2, 3), False),
            Member("join", "in", column(0, 1, 2, 3), False),
        ),
    )
    second = ChannelGroup(
        "split[4:8]",
        4,
        (
            Member("split", "out", column(4, 5, 6, 7), True),
            Member("split_bn", "out", column(4, 5, 6, 7), False),
            Member("stream", "out", column(0, 1, 2, 3), True),
            Member("join", "in", column(4, 5, 6, 7), False),
        ),
    )
    last = ChannelGroup(
        "join",
        3,
        (
            Member("join", "out", column(0, 1, 2), True),
            Member("fc", "in", np.arange(12, dtype=np.int64).reshape(3, 4), False),
        ),
    )
    widths = {"split": (3, 8), "stream": (4, 4), "join": (8, 3), "fc": (12, 2)}
    return ChannelGroups((first, second, last), (("split[0:4]", "split[4:8]"),), widths)


def test_a_plan_names_what_every_layer_loses(groups: ChannelGroups) -> None:
    removed = {"split[0:4]": np.array([3, 0]), "split[4:8]": np.array([1, 2]), "join": np.array([1])}
    plan = PruningPlan.of("key", groups, removed)
    assert plan.removed == {"split[0:4]": (0, 3), "split[4:8]": (1, 2), "join": (1,)}
    assert plan.layers == {
        "split": LayerCut(3, 8, (), (0, 3, 5, 6)),
        "split_bn": LayerCut(0, 8, (), (0, 3, 5, 6)),
        "stream": LayerCut(4, 4, (), (1, 2)),
        "join": LayerCut(8, 3, (0, 3, 5, 6), (1,)),
        "fc": LayerCut(12, 2, (4, 5, 6, 7), ()),
    }
    assert plan.widths == {"split": (3, 4), "stream": (4, 2), "join": (4, 2), "fc": (8, 2)}
    assert not plan.is_empty


def test_an_empty_plan(groups: ChannelGroups) -> None:
    for removed in ({}, {"join": np.array([], dtype=np.int64)}):
        plan = PruningPlan.of("key", groups, removed)
        assert plan.is_empty
        assert plan.layers == {}
        assert plan.widths == {}


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"nowhere": [0]}, "one of the model's 3 groups, got 'nowhere'"),
        ({"join": [3]}, r"join must lie in \[0, 3\), got 3..3"),
        ({"join": [-1, 1]}, r"join must lie in \[0, 3\), got -1..1"),
        ({"join": [0, 1, 2]}, "never loses all its channels, got all 3 of join"),
        ({"split[0:4]": [0]}, r"tied groups must lose equal numbers.*'split\[0:4\]': 1, 'split\[4:8\]': 0"),
        ({"split[0:4]": [0], "split[4:8]": [0, 1]}, "tied groups must lose equal numbers"),
    ],
)
def test_rules_of_a_plan(groups: ChannelGroups, removed: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningPlan.of("key", groups, {name: np.array(indices) for name, indices in removed.items()})


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ((4, 4, (), (2, 1)), "removed_out must be sorted without repetition"),
        ((4, 4, (1, 1), ()), "removed_in must be sorted without repetition"),
        ((4, 4, (), (4,)), r"removed_out must lie in \[0, 4\), got 4..4"),
        ((4, 4, (-1,), ()), r"removed_in must lie in \[0, 4\), got -1..-1"),
        ((4, 2, (), (0, 1)), "never loses all its channels, got all 2 of its out side"),
        ((2, 4, (0, 1), ()), "never loses all its channels, got all 2 of its in side"),
    ],
)
def test_rules_of_a_layer_cut(cut: tuple[int, int, tuple[int, ...], tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerCut(*cut)


def test_json_both_ways(groups: ChannelGroups, tmp_path: Path) -> None:
    plan = PruningPlan.of("key", groups, {"join": np.array([0, 2])})
    back = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert back.digest == plan.digest
    assert PruningPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.to_json()["format_version"] == 1


def test_the_digest_is_the_contents(groups: ChannelGroups) -> None:
    plan = PruningPlan.of("key", groups, {"join": np.array([0, 2])})
    assert PruningPlan.of("key", groups, {"join": np.array([2, 0, 0])}).digest == plan.digest
    assert PruningPlan.of("key", groups, {"join": np.array([0, 1])}).digest != plan.digest
    assert PruningPlan.of("other", groups, {"join": np.array([0, 2])}).digest != plan.digest
    split = {"split[0:4]": np.array([0]), "split[4:8]": np.array([1])}
    one = PruningPlan.of("key", groups, split)
    assert PruningPlan.of("key", groups, dict(reversed(split.items()))).digest == one.digest


def test_an_edited_file_is_refused(groups: ChannelGroups) -> None:
    data = PruningPlan.of("key", groups, {"join": np.array([0])}).to_json()
    with pytest.raises(ValueError, match="format_version must be 1, got 2"):
        PruningPlan.from_json({**data, "format_version": 2})
    layers = {**data["layers"], "join": {**data["layers"]["join"], "removed_out": [7]}}
    with pytest.raises(ValueError, match=r"removed_out must lie in \[0, 3\), got 7..7"):
        PruningPlan.from_json({**data, "layers": layers})

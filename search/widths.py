"""Layer widths: each layer's output channels before and after a plan, for people to look at.

Knows plans and where trials leave them; nothing of figures or pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .plan import PruningPlan
from .studyfile import StudyFile
from .workspace import Workspace

Widths = Mapping[str, tuple[int, int]]
"""Layer to its output channels before and after pruning, in the network's order."""


def layer_widths(plan: PruningPlan, original: Mapping[str, int] | None = None) -> dict[str, tuple[int, int]]:
    """Output channels of each layer before and after a plan; after it 0 for a layer that went with a block.

    Args:
        original: layer to its output channels in the unpruned model, in the network's order: those that keep
            everything are then listed too. Without it only narrowed layers are, sorted by name.

    Returns:
        Layer to (before, after); batch norms are left out.
    """
    narrowed = {
        name: (cut.channels_out, cut.kept_out)
        for name, cut in plan.layers.items()
        if cut.channels_in and cut.removed_out
    }
    if original is None:
        return {name: narrowed[name] for name in sorted(narrowed, key=_in_order)}
    every = {
        name: (channels, 0) if plan.inside_blocks(name) else narrowed.get(name, (channels, channels))
        for name, channels in original.items()
    }
    return every | {name: width for name, width in narrowed.items() if name not in every}


def trial_widths(
    study: StudyFile, device: str, trials: Sequence[int], original: Mapping[str, int] | None = None
) -> dict[int, dict[str, tuple[int, int]]]:
    """Trial number to its layers' widths, for the trials whose plan is on this machine.

    Args:
        original: as for `layer_widths`.
    """
    workspace = Workspace(study.folder)
    paths = {number: workspace.trial(device, number) / "plan.json" for number in trials}
    return {n: layer_widths(PruningPlan.load(p), original) for n, p in paths.items() if p.exists()}


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `model.10` after `model.9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

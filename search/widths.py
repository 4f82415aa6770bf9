"""Layer widths: each layer's output channels before and after a plan, for people to look at.

Knows plans, results and where trials leave them; nothing of figures or pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .plan import PruningPlan
from .result import TrialResult
from .studyfile import StudyFile
from .workspace import Workspace

Widths = Mapping[str, tuple[int, int]]
"""Layer to its output channels before and after pruning, in the network's order."""


def layer_widths(plan: PruningPlan, original: Mapping[str, int] | None = None) -> dict[str, tuple[int, int]]:
    """Output channels of each layer before and after a plan; after it 0 for a layer that went with a block.

    Args:
        original: layer to its output channels in the unpruned model, in the network's order: those that keep
            everything are then listed too. Without it only narrowed layers are, sorted by name, and none
            that went with a block (see `plan.blocks`), whose width before a plan does not tell.

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
    study: StudyFile,
    device: str,
    results: Sequence[TrialResult],
    original: Mapping[str, int] | None = None,
) -> dict[int, dict[str, tuple[int, int]]]:
    """Trial number to its layers' widths: by the plan where it is on this machine, else as far as the result
    tells.

    Args:
        results: the trials, of any machine.
        original: as for `layer_widths`; without it the widths of a trial whose plan is elsewhere, or that
            lost whole blocks, are not known and the trial is left out.
    """
    workspace = Workspace(study.folder)
    found = {}
    for result in results:
        plan = _plan(workspace.trial(device, result.trial) / "plan.json", result)
        shares = result.details.get("removed_share")
        if plan is not None and (original is not None or not plan.blocks):
            found[result.trial] = layer_widths(plan, original)
        elif original is not None and shares is not None:
            found[result.trial] = {
                layer: (channels, round(channels * (1.0 - shares.get(layer, 0.0))))
                for layer, channels in original.items()
            }
    return found


def _plan(path: Path, result: TrialResult) -> PruningPlan | None:
    """The plan in a file, None where there is none of this very trial: it may have been redone elsewhere."""
    try:
        plan = PruningPlan.load(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return plan if result.plan_digest in (None, plan.digest) else None


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `model.10` after `model.9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

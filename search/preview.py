"""What a plan would do on a device, before anything is pruned: from warm caches in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .params import fixed_params
from .planning import make_plan, rerank
from .recall import recall_evidence
from .shelf import Notice
from .studyfile import StudyFile, StudyFileError, load_study_file
from .tables import plan_json
from .workspace import Workspace


def preview(study: StudyFile, device: str, *, beta: float, ratio: float, notice: Notice) -> dict[str, Any]:
    """The plan that a beta and a ratio come to, see `tables.plan_json`; what else is searched is as
    `params.fixed_params` has it. What no cache holds is computed first.

    Raises:
        StudyFileError: beta or ratio is out of range, or the study file is not usable.
    """
    faults = [
        f"{key} must lie in {rule}, got {value:g}"
        for key, value, rule, good in (
            ("beta", beta, "[0, 1]", 0 <= beta <= 1),
            ("ratio", ratio, "[0, 1)", 0 <= ratio < 1),
        )
        if not good
    ]
    if faults:
        raise StudyFileError(study.source.name, faults)
    asked = [*study.overrides, f"search.beta={beta}", f"search.ratio={ratio}"]
    file = load_study_file(study.source, asked, study.folder)
    on, workspace = file.device(device).device(), Workspace(file.folder)

    def shop() -> Any:
        from .bench import Shop  # loads PyTorch, which takes longer than all else here

        return Shop(file, workspace, notice)

    known = recall_evidence(
        file, on, workspace, rescore=lambda criterion, gone: shop().rescore(criterion, gone), notice=notice
    ) or shop().bench(on)
    params = fixed_params(file.search, known.profile.channel_multiple)
    return plan_json(make_plan(params, rerank(params, known), known), params, known)


def write_plan_page(path: Path, document: dict[str, Any]) -> Path:
    """The share that every layer loses as a picture, on a page that needs nothing else."""
    from .figures import plan_figure
    from .report import write_figure
    from .tables import plan_title

    widths = {layer["layer"]: (layer["channels"], layer["kept"]) for layer in document["layers"]}
    write_figure(path, plan_figure(plan_title(document), widths))
    return path

"""Reviewing: a study's figures, its report page, and both on the device's run in MLflow.

Gathers what the figures need from the caches and the output folder. Knows neither how a figure is drawn nor
where MLflow puts it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import figures as draw
from .bench import Shop
from .found import Found
from .front import ParetoFront
from .range_end import range_end
from .report import write_report
from .studyfile import StudyFile
from .tables import profile_json
from .tracking import Tracker
from .widths import trial_widths
from .workspace import Workspace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from profiles.latency_profile import LatencyProfile

_PNG = {"width": 960, "height": 540, "scale": 1.5}


def figures(study: StudyFile, shop: Shop, found: Found) -> dict[str, Figure]:
    """Every figure of one device for which there is data, by name."""
    device, trials = found.front.device, found.results
    profile = _profile(study, shop, found)
    result = {
        "front": draw.front_figure(
            [found.front],
            {device: trials},
            limits=_limits(study, device),
            references=_references(found),
            metric=shop.task.metric,
        ),
        "hypervolume": draw.hypervolume_figure({device: trials}),
        "beta_ratio_accuracy": draw.beta_ratio_figure(trials, "accuracy"),
        "beta_ratio_speedup": draw.beta_ratio_figure(trials, "speedup"),
        "predicted_measured": draw.predicted_measured_figure(trials),
    }
    points = [p for p in found.front.points if p.trial > 0]
    widths = trial_widths(study, device, points, _channels(profile))
    shares = {f"trial {number}": layers for number, layers in widths.items() if layers}
    if shares:
        result["pruned_share"] = draw.pruned_share_figure(shares)
    if profile is not None:
        result["profile"] = draw.profile_figure(profile_json(profile))
    if found.importances:
        result["importance"] = draw.importance_figure(found.importances)
    return result


def write_study_report(
    study: StudyFile,
    found: Mapping[str, Found],
    path: Path,
    *,
    shop: Shop | None = None,
    devices: Sequence[str] = (),
) -> Path:
    """Write the self-contained page of all devices in `found`.

    Args:
        devices: those that were asked for; the page names those of them that have no front yet.

    Raises:
        OSError: the file cannot be written.
    """
    shop = shop or Shop(study, Workspace(study.folder))
    profiles, widths = {}, {}
    for name, f in found.items():
        cached = _profile(study, shop, f)
        if cached is not None:
            profiles[name] = profile_json(cached)
        complete = [r for r in f.results if r.state == "complete"]
        widths[name] = trial_widths(study, name, complete, _channels(cached))
    return write_report(
        path,
        study.name,
        [f.front for f in found.values()],
        {name: found[name].results if name in found else () for name in dict.fromkeys([*found, *devices])},
        profiles=profiles,
        widths=widths,
        limits={device: limits for name in found for device, limits in _limits(study, name).items()},
        hints={name: hint for name, f in found.items() if (hint := range_end(f.front, study.search))},
        references={device: shown for f in found.values() for device, shown in _references(f).items()},
        importances={name: f.importances for name, f in found.items()},
        run_ids={name: f.run_ids for name, f in found.items()},
        command=study_arguments(study),
        metric=shop.task.metric,
    )


def record_front(study: StudyFile, shop: Shop, tracker: Tracker, found: Found) -> None:
    """Put a device's front on its run in MLflow: the page with everything, and each figure alone.

    A figure alone is Plotly's JSON, a few KB, since each page carries Plotly's 5 MB; and a PNG where a
    browser is there to draw it.
    """
    with tempfile.TemporaryDirectory(dir=study.folder) as scratch:
        folder = Path(scratch)
        drawn = figures(study, shop, found)
        files = {"report.html": write_study_report(
            study, {found.front.device: found}, folder / "report.html", shop=shop
        )}  # fmt: skip
        for name, figure in drawn.items():
            path = folder / f"{name}.json"
            path.write_text(str(figure.to_json()), encoding="utf-8")
            files[f"figures/{name}.json"] = path
        files |= {f"figures/{name}.png": path for name, path in write_pngs(drawn, folder).items()}
        shown = [r.to_json(found.front.baseline) for r in found.references]
        tracker.log_front(
            found.front,
            files,
            references=shown,
            step=len(found.results),
            hypervolumes=hypervolumes(found),
        )


def hypervolumes(found: Found) -> dict[int, float]:
    """Number of trials to the hypervolume after so many, in the order in which they ended."""
    ended = sorted(found.results, key=lambda r: (r.trial > 0, r.finished_at or "", r.trial))
    return {n: ParetoFront.of(ended[:n]).hypervolume for n in range(1, len(ended) + 1)}


def write_pngs(drawn: Mapping[str, Figure], folder: Path) -> dict[str, Path]:
    """Each figure as NAME.png in `folder`, on white; nothing where kaleido or its browser is missing.

    One browser draws all of them, in a second or two.
    """
    try:
        import kaleido  # noqa: F401
        from plotly.io import write_images
    except ImportError:
        return {}
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))):
        return {}
    paths = {name: folder / f"{name}.png" for name in drawn}
    copies = []
    for figure in drawn.values():
        copy = type(figure)(figure)
        copy.update_layout(paper_bgcolor="white", plot_bgcolor="white")
        copies.append(copy)
    try:
        write_images(fig=copies, file=list(paths.values()), **_PNG)
    except Exception:  # a browser that does not start costs the pictures, not the record
        return {name: path for name, path in paths.items() if path.is_file()}
    return paths


def study_arguments(study: StudyFile) -> list[str]:
    """How a command run in the study file's folder names this study, without a path of this machine: an
    output folder outside that one is `DIR`, for the reader to fill in. Settings given with `--set` follow.
    """
    home = study.source.parent
    if study.folder == (home / "runs" / study.name).resolve():
        return [study.source.name, *study.set_words]
    inside = study.folder.is_relative_to(home)
    place = study.folder.relative_to(home).as_posix() if inside else "DIR"
    return [study.source.name, "--dir", place, *study.set_words]


def _profile(study: StudyFile, shop: Shop, found: Found) -> LatencyProfile | None:
    return shop.shelf.profile(study.device(found.front.device).device(), found.front.fingerprint)


def _channels(profile: LatencyProfile | None) -> dict[str, int] | None:
    return None if profile is None else {layer.layer: layer.out_channels for layer in profile.layers}


def _limits(study: StudyFile, device: str) -> dict[str, dict[str, float]]:
    return {device: study.limits_of(device).model_dump(exclude_none=True)}


def _references(found: Found) -> dict[str, list[dict[str, Any]]]:
    return {found.front.device: [r.to_json(found.front.baseline) for r in found.references]}

"""The command line. Parses, calls, prints; decides nothing.

stdout carries what was asked for, stderr progress and logs.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from .ending import guarded, say

if TYPE_CHECKING:
    from .bench import Shop
    from .front import ParetoFront
    from .studyfile import StudyFile

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Per device, the pruned versions of a CNN that are worth shipping.",
)
out = Console()
err = Console(stderr=True)

StudyPath = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the study file, e.g. search.beta=0.5. May be repeated.",
    ),
]
Dir = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="Output folder. Default: runs/<name> beside the study file."),
]
DeviceNames = Annotated[
    list[str] | None,
    typer.Option("--device", metavar="D", help="Only this device. May be repeated. Default: all."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else there.")
]
Refresh = Annotated[bool, typer.Option("--refresh", help="Compute again even if the cache has it.")]


class _Settings:
    debug = False


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
) -> None:
    _Settings.debug = debug
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=err, show_path=False, show_time=False)],
    )
    logging.getLogger("paretoprune").setLevel(logging.DEBUG if debug else logging.INFO)


@app.command()
def quickstart(
    dir: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where everything goes.")] = Path(
        "paretoprune-quickstart"
    ),
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials per device.")] = 3,
) -> None:
    """The whole main job on data it makes itself: no network, no data, 5 to 15 minutes."""
    from .quickstart import run_quickstart

    run_quickstart(dir, trials=trials, console=err)


@app.command()
def search(
    study: StudyPath,
    device: DeviceNames = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Trials per device, earlier ones counted in.")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="2h", help="Begin no trial after this: 90s, 30m, 2h.")
    ] = None,
    set_: Set = None,
    dir: Dir = None,
) -> None:
    """Launch a study. The same command resumes it, and joins it from another machine."""
    from .launch import launch
    from .progress import ConsoleProgress, front_table

    file = _load(study, set_, dir)
    names = _devices(file, device)
    limit_s = None if timeout is None else _seconds(timeout)
    with ConsoleProgress(err, devices=names) as progress:
        fronts = launch(file, names, trials=trials or file.trials, timeout_s=limit_s, progress=progress)
    for name, front in fronts.items():
        out.print(front_table(name, front, "accuracy"))
        _tell_range_end(file, front)
    err.print(
        f"[dim]next: paretoprune front {study} --html front.html   paretoprune ui {study}   "
        f"paretoprune export {study} --device {names[0]}[/dim]"
    )


@app.command()
def profile(
    study: StudyPath,
    device: DeviceNames = None,
    refresh: Refresh = False,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Draw the profiles on one page.")] = None,
    set_: Set = None,
    dir: Dir = None,
) -> None:
    """Measure every layer of the unpruned model on each device, or show the cached profile."""
    from .profile_page import write_profile_page
    from .tables import profile_json, profile_table

    file = _load(study, set_, dir)
    shop = _shop(file)
    profiles = {
        name: shop.profile(file.device(name).device(), refresh=refresh) for name in _devices(file, device)
    }
    if html is not None:
        err.print(f"profiles written to {write_profile_page(html, profiles)}", soft_wrap=True)
    if as_json:
        _print_json({name: profile_json(p) for name, p in profiles.items()})
        return
    for name, p in profiles.items():
        out.print(profile_table(name, p))


@app.command()
def score(
    study: StudyPath, refresh: Refresh = False, as_json: AsJson = False, set_: Set = None, dir: Dir = None
) -> None:
    """Compute the channel scores, or show that they are cached."""
    from .tables import score_json, score_table

    shop = _shop(_load(study, set_, dir))
    scores = [shop.scores(criterion, refresh=refresh) for criterion in shop.criteria]
    if as_json:
        _print_json({s.criterion: score_json(s) for s in scores})
        return
    for s in scores:
        out.print(score_table(s))


@app.command()
def plan(
    study: StudyPath,
    device: Annotated[str, typer.Option("--device", metavar="D", help="The device.")],
    beta: Annotated[float, typer.Option("--beta", metavar="B", help="Exponent of the latency, in [0, 1].")],
    ratio: Annotated[float, typer.Option("--ratio", metavar="R", help="Share to remove, in [0, 1).")],
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the share removed per layer as a picture."),
    ] = None,
    as_json: AsJson = False,
    set_: Set = None,
    dir: Dir = None,
) -> None:
    """What would be removed, and the predicted latency. Trains nothing."""
    from .preview import preview, write_plan_page
    from .tables import plan_table

    document = preview(_load(study, set_, dir), device, beta=beta, ratio=ratio, notice=_dim)
    if html:
        err.print(f"wrote {write_plan_page(html, document)}")
    if as_json:
        _print_json(document)
    else:
        out.print(plan_table(document))


@app.command()
def front(
    study: StudyPath,
    device: DeviceNames = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report, one self-contained page.")
    ] = None,
    as_json: AsJson = False,
    set_: Set = None,
    dir: Dir = None,
) -> None:
    """Show the Pareto front of each device, and write the report."""
    from .found import fronts_of
    from .progress import front_table
    from .review import write_study_report

    file = _load(study, set_, dir)
    names = _devices(file, device)
    found = fronts_of(file, names)
    err.print(f"wrote {write_study_report(file, found, html or file.folder / 'front.html', devices=names)}")
    if missing := ", ".join(name for name in names if name not in found):
        _tell(f"no front yet, the unpruned model is not measured: {missing}")
    if as_json:
        _print_json({"study": file.name, "devices": {name: f.document for name, f in found.items()}})
        return
    for name, f in found.items():
        out.print(front_table(name, f.front, "accuracy"))
        _tell_range_end(file, f.front)


@app.command()
def export(
    study: StudyPath,
    device: Annotated[str, typer.Option("--device", metavar="D", help="The device to export for.")],
    max_latency: Annotated[
        float | None, typer.Option("--max-latency", metavar="MS", help="The most accurate model within this.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option("--min-accuracy", metavar="A", help="The fastest model that reaches this.")
    ] = None,
    trial: Annotated[
        int | None, typer.Option("--trial", metavar="N", help="This trial of the front.")
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Default: exports/<device> in the output folder."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="RUNTIME", help="Write it for this runtime too. May be repeated."),
    ] = None,
    register: Annotated[
        bool, typer.Option("--register", help="Put it into MLflow's model registry as <study>.<device>.")
    ] = False,
    from_registry: Annotated[
        bool,
        typer.Option("--from-registry", help="Fetch the registered model instead: needs no trials here."),
    ] = False,
    alias: Annotated[str | None, typer.Option(help="With --from-registry; default: champion.")] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure the file again; exit 1 where it is not as fast as recorded."),
    ] = False,
    as_json: AsJson = False,
    set_: Set = None,
    dir: Dir = None,
) -> None:
    """Export the best model of a device: the knee of its front, or the one that fits the limits."""
    from .champion import fetch_export, register_export
    from .export import check_choice, export_best
    from .exported import read_metrics
    from .remeasure import remeasure

    chosen = {"--trial": trial, "--max-latency": max_latency, "--min-accuracy": min_accuracy}
    further = {"--also": also, "--register": register}
    check_choice(chosen, further, from_registry=from_registry, alias=alias)
    file = _load(study, set_, dir, needs_files=measure or not from_registry)
    name = file.device(device).name
    if from_registry:
        done = fetch_export(file, name, alias=alias or "champion", out=out_dir, notice=_tell)
    else:
        limits = {"max_latency_ms": max_latency, "min_accuracy": min_accuracy}
        done = export_best(file, name, **limits, trial=trial, out=out_dir, also=also or (), notice=_tell)
        if register:
            _tell(register_export(file, name, done))
    again = remeasure(file, name, done, notice=_tell) if measure else None
    if as_json:
        _print_json({"folder": str(done), **read_metrics(done), "remeasured": again and again.to_json()})
    else:
        out.print(str(done), highlight=False, soft_wrap=True)
    if again is not None and not again.agrees:
        say(err, "its latency and the recorded one do not agree; see paretoprune devices for what disturbs")
        raise typer.Exit(1)


@app.command()
def devices(study: StudyPath, as_json: AsJson = False, set_: Set = None, dir: Dir = None) -> None:
    """Is each device there, what is it, and is it quiet enough to measure on?"""
    from profiles.device import DeviceFacts, describe

    from .tables import device_json, device_table

    file = _load(study, set_, dir)
    found: dict[str, DeviceFacts | str] = {}
    for section in file.devices:
        try:
            found[section.name] = describe(section.device())
        except Exception as error:  # one device that is away must not hide the others
            found[section.name] = f"{type(error).__name__}: {error}"
    if as_json:
        _print_json({name: device_json(facts) for name, facts in found.items()})
    else:
        out.print(device_table(found))
    if any(isinstance(facts, str) for facts in found.values()):
        raise typer.Exit(1)


@app.command()
def ui(
    study: StudyPath,
    port: Annotated[int, typer.Option("--port", help="Port on this machine.")] = 5000,
    set_: Set = None,
    dir: Dir = None,
) -> None:
    """Open MLflow's UI on this study's store."""
    import os
    import subprocess

    from .recorder import tracking_place
    from .ui import ui_command, ui_environment

    file = _load(study, set_, dir)
    uri, artifacts = tracking_place(file)
    command = ui_command(uri, artifacts, port=port)
    if not command:
        from .uri import redact

        out.print(f"this study's tracking server is its own UI: {redact(uri)}")
        return
    err.print(f"MLflow at http://127.0.0.1:{port}  (Ctrl-C ends it)")
    raise typer.Exit(
        subprocess.run(command, env={**os.environ, **ui_environment(uri)}, check=False).returncode
    )


# -- helpers


def _load(
    path: Path, overrides: list[str] | None, folder: Path | None, *, needs_files: bool = True
) -> StudyFile:
    from .studyfile import load_study_file

    return load_study_file(path, overrides or (), folder, needs_files=needs_files)


def _tell(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell_range_end(file: StudyFile, front: ParetoFront) -> None:
    from .range_end import range_end

    if hint := range_end(front, file.search):
        _tell(hint)


def _shop(file: StudyFile) -> Shop:
    from .bench import Shop
    from .workspace import Workspace

    return Shop(file, Workspace(file.folder), notice=_dim)


def _dim(text: str) -> None:
    err.print(text, style="dim", highlight=False)


def _devices(file: StudyFile, names: list[str] | None) -> list[str]:
    return [file.device(name).name for name in names] if names else [d.name for d in file.devices]


def _seconds(text: str) -> float:
    from .studyfile import StudyFileError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not match:
        raise StudyFileError(
            "--timeout", [f"must be a number with s, m or h, like 90s, 30m or 2h, got {text!r}"]
        )
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def main() -> None:
    """Entry point: turns what can go wrong into an exit code and a few lines."""
    sys.exit(guarded(lambda: app(standalone_mode=False), err, is_debugging=lambda: _Settings.debug))


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=1) + "\n")

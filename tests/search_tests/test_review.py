"""What a reviewer finds after a search: the report and MLflow's run page in a browser, figures, tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from search.found import Found, fronts_of
from search.recorder import open_tracker
from search.review import figures, write_pngs, write_study_report
from search.studyfile import StudyFile, load_study_file

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of a drawn figure the points of one trace, as the screen has them.
DRAWN = """(role) => {
  const node = document.querySelector('section[data-device="%s"] .figure');
  const place = node && node.calcdata ? node.data.findIndex((t) => t.meta.role === role) : -1;
  return place < 0 ? null : node.calcdata[place].map((p) => [p.x, p.y]);
}"""


@pytest.fixture(scope="module")
def study(searched: Any) -> StudyFile:
    return load_study_file(searched.study)


@pytest.fixture(scope="module")
def found(study: StudyFile) -> dict[str, Found]:
    return fronts_of(study, ["desk", "desk-torch"])


def drawn(page: Any, device: str, role: str, context: Any = None) -> Any:
    return page.evaluate(f"({DRAWN % device})({json.dumps(role)})", context)


def points(found: Found) -> list[list[float]]:
    return [[p.latency_ms, p.accuracy] for p in found.front.points]  # type: ignore[list-item]


@pytest.fixture(scope="module")
def report(study: StudyFile, found: dict[str, Found], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study_report(study, found, tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize(("width", "is_phone"), [(1280, False), (390, True)])
def test_the_report_in_a_browser(
    browser: Any, report: Path, found: dict[str, Found], width: int, is_phone: bool
) -> None:
    page = browser.open(report.as_uri(), width, is_phone=is_phone)
    page.wait_for("document.readyState === 'complete' && document.querySelector('.figure') !== null")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")  # draws what is still far below
    everything = "[...document.querySelectorAll('.figure')].every((n) => n.dataset.drawn === 'true')"
    page.wait_for(f"document.querySelectorAll('.figure').length > 10 && {everything}")
    for device, f in found.items():
        assert drawn(page, device, "front") == points(f)
        base = f.front.baseline
        assert drawn(page, device, "baseline") == [[base.latency_ms, base.accuracy]]
    shown = [r.to_json(found["desk"].front.baseline) for r in found["desk"].references]
    assert drawn(page, "desk", "reference") == [[shown[0]["latency_ms"], shown[0]["accuracy"]]]
    assert page.said == []
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1] <= width

    # A row and a point each show their trial: configuration, widths, command.
    trial = max(p.trial for p in found["desk"].front.points)
    row = f"""document.querySelector('tr.point[data-device="desk"][data-trial="{trial}"]')"""
    detail = """document.querySelector('section[data-device="desk"] .detail')"""
    page.evaluate(f"{row}.click()")
    assert page.evaluate(f"{detail}.dataset.trial") == str(trial)
    text = page.evaluate(f"{detail}.innerText")
    assert f"paretoprune export study.yaml --device desk --trial {trial}" in text
    assert found["desk"].run_ids[trial] in text
    widths = page.evaluate(
        f"[...{detail}.querySelectorAll('tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert widths
    assert any(int(before) > int(after) > 0 for _, before, after, *_ in widths)
    front = """document.querySelector('section[data-device="desk"] .figure')"""
    place = f"{front}.data.findIndex((t) => t.meta.role === 'baseline')"
    page.evaluate(
        f"{front}.emit('plotly_click', {{points: [{{data: {front}.data[{place}], customdata: [0]}}]}})"
    )
    assert page.evaluate(f"{detail}.dataset.trial") == "0"


def test_mlflows_run_page_shows_the_front(
    browser: Any, searched: Any, study: StudyFile, found: dict[str, Found]
) -> None:
    run, port = device_run(study, "desk"), urlsplit(searched.tracking_uri).port
    place = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    page = browser.open(f"http://127.0.0.1:{port}/#/{place}/artifacts/report.html", 1400, 1000)
    page.wait_for("document.querySelector('iframe') !== null")
    # Figures are drawn when they come into view, or when the page is to be printed.
    print_first = "window.dispatchEvent(new Event('beforeprint'))"
    assert seen_in_a_frame(page, f"{print_first} && ({DRAWN % 'desk'})('front')") == points(found["desk"])

    page = browser.open(f"http://127.0.0.1:{port}/#/{place}", 1400, 1000)
    page.wait_for("document.body?.innerText?.includes('Pareto front of desk')")
    cells = page.evaluate(
        "[...document.querySelectorAll('table')].flatMap((t) => [...t.rows].map((r) => r.innerText))"
    )
    for point in found["desk"].front.points:
        assert any(f"{point.accuracy:.4f}" in c and f"{point.latency_ms:.2f}" in c for c in cells), cells


def seen_in_a_frame(page: Any, expression: str) -> Any:
    """The expression's value in the frame of a page in which it is the first to come true."""
    for _ in range(300):
        for context in page.frames():
            try:
                if value := page.evaluate(expression, context):
                    return value
            except AssertionError:
                continue  # the frame went away in between: the page around it was drawn anew
        page.browser.listen(0.2)
    raise AssertionError(f"in no frame: {expression}; the console: {page.said}")


def device_run(study: StudyFile, device: str) -> Any:
    client = open_tracker(study).client()
    experiment = client.get_experiment_by_name(study.name)
    assert experiment is not None
    (run,) = client.search_runs(
        [experiment.experiment_id], f"tags.role = 'device' and tags.device = '{device}'"
    )
    return run


def test_the_devices_run_holds_what_a_reviewer_needs(study: StudyFile, found: dict[str, Found]) -> None:
    client, run = open_tracker(study).client(), device_run(study, "desk")
    names = {f.path.rpartition("/")[2] for f in client.list_artifacts(run.info.run_id, "figures")}
    drawn_figures = {
        "front", "hypervolume", "beta_ratio_accuracy", "beta_ratio_speedup", "predicted_measured",
        "pruned_share", "profile",
    }  # fmt: skip
    assert {n.removesuffix(".json") for n in names if n.endswith(".json")} == drawn_figures
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {
        "report.html",
        "front.json",
        "front.csv",
    }
    tags, params = run.data.tags, run.data.params
    assert tags["fingerprint"] == found["desk"].front.fingerprint
    assert {"digest.model", "digest.data", "version.torch", "version.onnxruntime", "version.python"} <= set(
        tags
    )
    assert params["metric"] == "mAP50-95"
    assert "at 32 px" in tags["mlflow.note.content"]
    # The hypervolume grows trial by trial, while the search runs.
    history = client.get_metric_history(run.info.run_id, "hypervolume")
    assert {m.step for m in history} == {1, 2, 3}
    values = [m.value for m in sorted(history, key=lambda m: m.step)]
    assert values == sorted(values)
    children = client.search_runs([run.info.experiment_id], "tags.device = 'desk' and tags.pareto = 'true'")
    assert {int(r.data.tags["optuna.trial_number"]) for r in children} == {
        p.trial for p in found["desk"].front.points
    }
    assert all(r.data.tags["digest.data"] == tags["digest.data"] for r in children)


def test_a_measured_reference_is_measured_once_and_no_point(
    study: StudyFile, found: dict[str, Found], searched: Any
) -> None:
    smaller, given = found["desk"].references
    assert smaller.is_measured
    assert smaller.imgsz == 32
    assert not given.is_measured
    assert found["desk-torch"].references == ()
    document = found["desk"].document
    assert [r["name"] for r in document["references"]] == ["at 32 px", "a vendor's"]
    # What is given would dominate everything, and is on no front for all that.
    assert all(p["latency_ms"] != 0.5 for p in document["points"])
    from profiles.connection import close_connections
    from search.bench import Shop
    from search.reference import measure_references, open_references
    from search.workspace import Workspace

    said: list[str] = []
    shop = Shop(study, Workspace(study.folder), notice=said.append)
    try:
        measure_references(study, shop, open_references(study), ["desk", "desk-torch"])
    finally:
        close_connections()
    assert said == []


def test_pngs_are_drawn_where_a_browser_is(
    browser: Any, study: StudyFile, found: dict[str, Found], tmp_path: Path
) -> None:
    from search.bench import Shop
    from search.workspace import Workspace

    everything = figures(study, Shop(study, Workspace(study.folder)), found["desk"])
    two = {name: everything[name] for name in ("front", "profile")}
    paths = write_pngs(two, tmp_path)
    assert sorted(paths) == ["front", "profile"]
    for path in paths.values():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000


def test_importances_name_what_decides() -> None:
    import optuna
    from optuna.distributions import FloatDistribution

    from search.space import IMPORTANCE_TRIALS, parameter_importances

    study = optuna.create_study(directions=["maximize", "minimize"])
    space = {"beta": FloatDistribution(0, 1), "ratio": FloatDistribution(0, 1)}

    def add(beta: float, ratio: float) -> None:
        values = [1 - ratio**2, 10 - 9 * ratio]
        study.add_trial(
            optuna.trial.create_trial(
                params={"beta": beta, "ratio": ratio}, distributions=space, values=values
            )
        )

    rng = np.random.default_rng(0)
    for _ in range(IMPORTANCE_TRIALS):
        add(*rng.random(2))
    assert parameter_importances(study) == {}  # one too few, for trial 0 is no choice of the search
    for _ in range(40):
        add(*rng.random(2))
    found = parameter_importances(study)
    assert set(found) == {"front", "accuracy", "latency"}
    for objective in ("accuracy", "latency"):
        assert sum(found[objective].values()) == pytest.approx(1)
        assert found[objective]["ratio"] > 0.5

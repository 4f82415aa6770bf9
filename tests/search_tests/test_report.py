"""Figures and the report: what is drawn is what was measured, and the page stands on its own."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.figures import (
    beta_ratio_figure,
    front_figure,
    hypervolume_figure,
    importance_figure,
    plan_figure,
    predicted_measured_figure,
    profile_figure,
    pruned_share_figure,
)
from search.front import ParetoFront
from search.plan import LayerCut, PruningPlan
from search.report import write_figure, write_report
from search.result import TrialParams, TrialResult
from search.review import study_arguments
from search.run_record import front_csv, front_note, front_rows
from search.studyfile import StudyFile, load_study_file
from search.widths import layer_widths, trial_widths
from search.workspace import Workspace

HOSTILE = "</script><script>alert(1)</script>"
REFERENCE = {
    "name": "yolov8n at 256 px",
    "measured": True,
    "accuracy": 0.52,
    "latency_ms": 7.5,
    "speedup": 10 / 7.5,
    "speedup_ci": [1.25, 1.42],
}


def make_results(device: str, base_ms: float) -> list[TrialResult]:
    def result(trial: int, accuracy: float, share: float) -> TrialResult:
        speedup = 1 / share
        return TrialResult(
            trial,
            device,
            f"cpu of {device}",
            TrialParams(beta=min(1.0, 0.1 * trial), ratio=0.1 * trial),
            "complete",
            accuracy=accuracy,
            latency_ms=base_ms * share,
            latency_p90_ms=base_ms * share * 1.1,
            speedup=speedup,
            speedup_ci=(speedup * 0.9, speedup * 1.25),
            predicted_latency_ms=base_ms * share * 0.9,
            params=1000 - trial,
            macs=2000,
            epochs=(0.1, accuracy),
        )

    asked = TrialParams(beta=0.7, ratio=0.5)
    return [
        result(0, 0.60, 1.0),
        result(1, 0.58, 0.8),
        result(2, 0.50, 0.9),
        result(3, 0.55, 0.6),
        TrialResult(4, device, f"cpu of {device}", asked, "stopped", f"too slow {HOSTILE}"),
        result(5, 0.40, 0.5),
    ]


@pytest.fixture
def results() -> dict[str, list[TrialResult]]:
    return {"laptop": make_results("laptop", 10.0), "pi <5>": make_results("pi <5>", 80.0)}


@pytest.fixture
def fronts(results: Mapping[str, list[TrialResult]]) -> list[ParetoFront]:
    return [ParetoFront.of(trials) for trials in results.values()]


@pytest.fixture
def page(tmp_path: Path, results: dict[str, list[TrialResult]], fronts: list[ParetoFront]) -> Path:
    widths = {
        "laptop": {3: {"model.0.conv": (16, 8), "model.1.conv": (32, 32)}, 1: {"model.0.conv": (16, 12)}}
    }
    layers = [
        {
            "layer": f"model.{n}.conv",
            "latency_ms": 0.1 * n,
            "channels": 16,
            "delta_ms": 0.01,
            "delta_norm": 0.5,
        }
        for n in range(1, 5)
    ]
    return write_report(
        tmp_path / "out" / "report.html",
        f"bccd {HOSTILE}",
        fronts,
        {**results, "not measured yet": []},
        profiles={"laptop": {"fingerprint": "x", "model_ms": 10.0, "layers": layers}},
        widths=widths,
        limits={"laptop": {"latency_ms": 7.0, "accuracy": 0.5}},
        references={"laptop": [REFERENCE]},
        importances={"laptop": {"accuracy": {"beta": 0.3, "ratio": 0.7}}},
        run_ids={"laptop": {3: "run-of-three"}},
        command=["my study.yaml", "--dir", "out"],
    )


def embedded(page: Path, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    return json.loads(found[1])


def traces(figure: Any, role: str) -> list[Any]:
    return [trace for trace in figure.data if trace.meta and trace.meta["role"] == role]


def test_the_points_drawn_are_the_fronts(
    results: dict[str, list[TrialResult]], fronts: list[ParetoFront]
) -> None:
    figure = front_figure(fronts, results)
    for front, trace in zip(fronts, traces(figure, "front"), strict=True):
        assert trace.meta["device"] == front.device
        assert list(trace.x) == [p.latency_ms for p in front.points]
        assert list(trace.y) == [p.accuracy for p in front.points]
        assert [c[0] for c in trace.customdata] == [p.trial for p in front.points] == [5, 3, 1, 0]
    assert [[c[0] for c in t.customdata] for t in traces(figure, "dominated")] == [[2], [2]]
    assert [(t.x[0], t.y[0], t.marker.symbol) for t in traces(figure, "baseline")] == [
        (10.0, 0.60, "star"),
        (80.0, 0.60, "star"),
    ]


def test_error_bars_are_the_speedups_interval(fronts: list[ParetoFront]) -> None:
    trace = traces(front_figure(fronts[:1]), "front")[0]
    for n, point in enumerate(fronts[0].points):
        assert point.speedup_ci is not None
        low, high = point.speedup_ci
        assert trace.x[n] + trace.error_x.array[n] == pytest.approx(10.0 / low)
        assert trace.x[n] - trace.error_x.arrayminus[n] == pytest.approx(10.0 / high)


def test_a_limit_far_away_does_not_squeeze_the_points(fronts: list[ParetoFront]) -> None:
    near, far = (
        front_figure(fronts[:1], limits={"laptop": {"latency_ms": ms, "accuracy": accuracy}}).layout
        for ms, accuracy in ((7.0, 0.5), (900.0, 0.01))
    )
    assert [(s.x0, s.x1) if s.yref.endswith("domain") else (s.y0, s.y1) for s in near.shapes] == [
        (7.0, 7.0),
        (0.5, 0.5),
    ]
    assert not far.shapes
    assert [a.text for a in far.annotations] == ["limit 900 →", "limit 0.01 ↓"]


def test_references_are_drawn_with_their_bars(fronts: list[ParetoFront]) -> None:
    given = {"name": "theirs", "measured": False, "accuracy": 0.6, "latency_ms": 1.0, "speedup": 10.0}
    figure = front_figure(fronts[:1], references={"laptop": [REFERENCE, given]})
    measured, told = traces(figure, "reference")
    assert measured.x[0] + measured.error_x.array[0] == pytest.approx(10.0 / 1.25)
    assert "measured" in measured.hovertemplate
    assert "as given" in told.hovertemplate
    # The better one is no part of the front for all that.
    assert list(traces(figure, "front")[0].x) == [p.latency_ms for p in fronts[0].points]


def test_relative_fronts_share_the_unpruned_model_at_100(fronts: list[ParetoFront]) -> None:
    figure = front_figure(fronts, relative=True)
    assert [t.x[0] for t in traces(figure, "baseline")] == [100.0, 100.0]
    first, second = traces(figure, "front")
    assert list(first.x) == pytest.approx(list(second.x))


def test_the_hypervolume_grows_to_the_fronts(
    results: dict[str, list[TrialResult]], fronts: list[ParetoFront]
) -> None:
    figure = hypervolume_figure({**results, "empty": []})
    assert len(figure.data) == 2
    values = list(figure.data[0].y)
    assert values == sorted(values)
    assert values[-1] == fronts[0].hypervolume
    assert len(values) == 5


def test_the_map_colours_complete_trials_and_keeps_the_others(results: dict[str, list[TrialResult]]) -> None:
    hollow, full = beta_ratio_figure(results["laptop"], "speedup").data
    assert list(full.marker.color) == [r.speedup for r in results["laptop"] if r.state == "complete"]
    assert list(hollow.x) == [0.7]
    assert "<script>" not in hollow.text[0]
    with pytest.raises(ValueError, match="colour must be accuracy or speedup, got 'macs'"):
        beta_ratio_figure([], "macs")


def test_the_other_figures_show_their_records(results: dict[str, list[TrialResult]]) -> None:
    one = pruned_share_figure({"trial 3": {"a": (16, 8), "b": (32, 32)}})
    assert list(one.data[0].y) == [50.0, 0.0]
    alone = plan_figure("laptop, β 0.5", {"a": (16, 8), "b": (32, 32)})
    assert (alone.layout.title.text, list(alone.layout.xaxis.ticktext)) == ("laptop, β 0.5", ["a", "b"])
    assert list(alone.data[0].y) == [50.0, 0.0]
    two = pruned_share_figure({"trial 3": {"a": (16, 8), "b": (32, 32)}, "trial 1": {"a": (16, 12)}})
    assert [list(row) for row in two.data[0].z] == [[50.0, 0.0], [25.0, 0.0]]
    measured = predicted_measured_figure(results["laptop"]).data[-1]
    assert measured.x[1] == pytest.approx(7.2)
    assert measured.y[1] == 8.0
    layers = [{"layer": "a", "latency_ms": 2.0, "channels": 4, "delta_ms": 0.5, "delta_norm": 1.0}]
    assert [list(t.y) for t in profile_figure({"layers": layers}).data] == [[2.0], [1.0]]
    bars = importance_figure({"accuracy": {"beta": 0.7, "ratio": 0.3}}).data[0]
    assert list(bars.y) == ["ratio", "beta"]


def test_widths_of_a_plan() -> None:
    plan = PruningPlan(
        "key",
        {"g": (0, 1)},
        {
            "model.10.conv": LayerCut(8, 16, (), (0, 1)),
            "model.9.conv": LayerCut(8, 16, (), (0, 1, 2)),
            "model.9.bn": LayerCut(0, 16, (), (0, 1, 2)),
            "model.11.conv": LayerCut(16, 4, (0, 1), ()),
        },
    )
    assert list(layer_widths(plan).items()) == [("model.9.conv", (16, 13)), ("model.10.conv", (16, 14))]
    every = layer_widths(plan, {"model.9.conv": 16, "model.10.conv": 16, "model.11.conv": 4})
    assert every["model.11.conv"] == (4, 4)
    assert next(iter(every)) == "model.9.conv"


def study_in(home: Path, folder: Path) -> StudyFile:
    for name in ("model.pt", "data.yaml"):
        (home / name).touch()
    (home / "study.yaml").write_text(
        "name: s\nmodel: model.pt\ndata: data.yaml\ndevices: [{name: laptop, runtime: torch}]\n"
    )
    return load_study_file(home / "study.yaml", folder=folder)


def test_widths_of_a_trial_come_from_its_plan_or_from_what_its_result_tells(
    tmp_path: Path, results: dict[str, list[TrialResult]]
) -> None:
    study = study_in(tmp_path, tmp_path / "out")
    original = {"a": 16, "b.0.conv": 8, "c": 32}
    plan = PruningPlan("key", {}, {"a": LayerCut(8, 16, (), (0, 1))}, ("b.0",))
    here = Workspace(study.folder).trial("laptop", 1)
    here.mkdir(parents=True)
    plan.save(here / "plan.json")
    shares = {"removed_share": {"a": 0.25, "a.bn": 0.25, "b.0.conv": 1.0}}
    local = replace(results["laptop"][1], plan_digest=plan.digest)
    elsewhere = replace(results["laptop"][2], details=shares, plan_digest="of another machine")
    # Redone by another machine: the plan that lies here is no longer this trial's.
    redone = replace(local, plan_digest="of another machine", details=shares)
    old = results["laptop"][3]
    found = trial_widths(study, "laptop", [local, elsewhere, old], original)
    assert found == {
        1: {"a": (16, 14), "b.0.conv": (8, 0), "c": (32, 32)},
        2: {"a": (16, 12), "b.0.conv": (8, 0), "c": (32, 32)},
    }
    assert trial_widths(study, "laptop", [redone], original)[1]["a"] == (16, 12)
    # Without the original's widths a block that is gone cannot be told from one that was kept.
    assert trial_widths(study, "laptop", [local, elsewhere], None) == {}


def test_commands_name_no_folder_outside_the_study_files(tmp_path: Path) -> None:
    home = tmp_path / "somebody" / "project"
    home.mkdir(parents=True)
    for folder, words in (
        (home / "runs" / "s", []),
        (home / "out" / "first", ["--dir", "out/first"]),
        (tmp_path / "somebody" / "elsewhere", ["--dir", "DIR"]),
    ):
        assert study_arguments(study_in(home, folder)) == ["study.yaml", *words]


def test_no_path_of_this_machine_is_in_a_figure_or_a_page(
    tmp_path: Path, results: dict[str, list[TrialResult]]
) -> None:
    reason = "RuntimeError: cannot read '/home/bob/secret project/x.pt' from http://bob:hunter2@host/"
    trials = [replace(r, reason=reason) if r.reason else r for r in results["laptop"]]
    figure = beta_ratio_figure(trials)
    assert "RuntimeError: cannot read" in figure.data[0].text[0]
    page = write_report(tmp_path / "r.html", "s", [ParetoFront.of(trials)], {"laptop": trials}).read_text()
    for text in (str(figure.to_json()), page.split("plotly.js v")[0]):
        assert "/home" not in text
        assert "bob" not in text
        assert "hunter2" not in text


SETTINGS = {"criterion": "l1", "steps": 3, "depth": 0.25, "recovery": "scratch"}


def test_trials_that_differ_in_any_setting_can_be_told_apart(
    tmp_path: Path, results: dict[str, list[TrialResult]]
) -> None:
    first, second = results["laptop"][0], results["laptop"][3]
    for key, value in SETTINGS.items():
        twin = replace(second, asked=replace(second.asked, **{key: value}), trial=7, latency_ms=5.9)
        front = ParetoFront.of([first, second, replace(twin, accuracy=0.54)])
        texts = [text.split("<br>")[1:3] for text in traces(front_figure([front]), "front")[0].text]
        assert texts[0] != texts[1]
        points = {p["trial"]: p for p in front.to_json()["points"]}
        assert points[7]["asked"] == {**points[3]["asked"], key: value}

        rows = front_rows(front.to_json(), {})
        table = list(csv.DictReader(io.StringIO(front_csv(rows))))
        assert [row[key] for row in table][:2] == [str(value), str(getattr(second.asked, key))]
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        note = front_note("laptop", {**front.to_json(), "references": [REFERENCE]}, rows).splitlines()
        assert [key in line for line in note[2:3]] == [True]
        assert f" {shown} |" in note[4]
        assert len({line.count("|") for line in note[2:]}) == 1

        page = write_report(tmp_path / "r.html", "s", [front], {"laptop": list(front.points)}).read_text()
        table_of_page = page[page.index("<thead>") : page.index("</table>")]
        assert f"<th scope='col'>{key}</th>" in table_of_page
        assert f"<td>{shown}</td>" in table_of_page
        others = set(SETTINGS) - {key}
        assert not [name for name in others if f"<th scope='col'>{name}</th>" in table_of_page]


def test_a_hint_stands_on_its_devices_part(
    tmp_path: Path, results: dict[str, list[TrialResult]], fronts: list[ParetoFront]
) -> None:
    hints = {"laptop": "trial 3 has <98%> & more"}
    page = write_report(tmp_path / "r.html", "s", fronts, results, hints=hints).read_text()
    (hint,) = re.findall(r'<p class="[^"]*hint">.*?</p>', page)
    assert hint.endswith(">trial 3 has &lt;98%&gt; &amp; more</p>")
    of_laptop, of_pi = (page.index(f'<section class="device" id="device{n}"') for n in range(2))
    assert of_laptop < page.index(hint) < of_pi


def test_all_limits_of_a_device_are_listed(tmp_path: Path, results: dict[str, list[TrialResult]]) -> None:
    limits = {"latency_ms": 33.0, "accuracy": 0.55, "params": 1_000_000, "size_mb": 5.5}
    fronts = [ParetoFront.of(trials) for trials in results.values()]
    page = write_report(tmp_path / "r.html", "s", fronts, results, limits={"laptop": limits}).read_text()
    (line,) = re.findall(r'<p class="[^"]*limits">(.*?)</p>', page)
    assert line.removeprefix("Limits: ").split(", ") == [
        "latency_ms at most 33.0",
        "accuracy at least 0.55",
        "params at most 1,000,000",
        "size_mb at most 5.5",
    ]


def test_the_page_says_what_is_gone_and_what_is_not_known(
    browser: Any, tmp_path: Path, results: dict[str, list[TrialResult]]
) -> None:
    blocks = {"blocks": ["layer1.0"]}
    trials = [replace(r, details=blocks) if r.trial == 3 else r for r in results["laptop"]]
    gone = {"stem": (16, 8), "layer1.0.conv": (8, 0), "layer2.0.conv": (8, 8)}
    page = write_report(
        tmp_path / "r.html", "s", [ParetoFront.of(trials)], {"laptop": trials},
        widths={"laptop": {3: gone, 1: gone, 2: {}}},
    )  # fmt: skip
    tab = browser.open(page.as_uri(), 1280)
    tab.wait_for("document.readyState === 'complete' && document.querySelector('tr.point') !== null")
    detail = "document.querySelector('section[data-device=laptop] .detail')"

    def shown(trial: int) -> str:
        tab.evaluate(f"""document.querySelector('tr.point[data-trial="{trial}"]').click()""")
        return str(tab.evaluate(f"{detail}.textContent"))

    three = shown(3)
    assert "Blocks that are gone, each an identity now: layer1.0." in three
    assert "1 of 3 layers narrowed, 1 gone with their blocks" in three
    assert "Layers that went with whole blocks: layer1.0.conv." in shown(1)
    assert "not known" in shown(5)
    assert tab.said == []


def test_the_pages_points_are_the_fronts(page: Path, fronts: list[ParetoFront]) -> None:
    data = embedded(page, "data")
    for front in fronts:
        shown = data["devices"][front.device]
        expected = front.to_json()
        assert [(p["trial"], p["latency_ms"], p["accuracy"]) for p in shown["points"]] == [
            (p["trial"], p["latency_ms"], p["accuracy"]) for p in expected["points"]
        ]
        assert shown["baseline"] == expected["baseline"]
        assert shown["knee"] == front.knee.trial
        assert set(shown["trials"]) == {"0", "1", "2", "3", "5"}
        assert shown["trials"]["2"]["pareto"] is False
    three = data["devices"]["laptop"]["trials"]["3"]
    assert three["widths"] == [["model.0.conv", 16, 8], ["model.1.conv", 32, 32]]
    assert three["run_id"] == "run-of-three"
    assert three["command"] == (
        "paretoprune export 'my study.yaml' --dir out --device laptop --trial 3 --out export/laptop-trial-3"
    )
    drawn = embedded(page, "figures")["device0-0"]["data"]
    line = next(trace for trace in drawn if trace["meta"]["role"] == "front")
    assert line["x"] == [p.latency_ms for p in fronts[0].points]
    assert line["y"] == [p.accuracy for p in fronts[0].points]


def test_a_figures_page_needs_no_network_and_offers_no_cloud(
    tmp_path: Path, fronts: list[ParetoFront]
) -> None:
    outline = Outline()
    text = write_figure(tmp_path / "front.html", front_figure(fronts)).read_text()
    outline.feed(text)
    assert outline.loads == []
    assert '"showSendToCloud": false' in text


class Outline(html.parser.HTMLParser):
    """Collects what the page would load, its table rows and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.rows: list[tuple[str, int]] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.scripts += tag == "script"
        for name in ("src", "href"):
            address = found.get(name) or ""
            if address and not address.startswith(("#", "data:")):
                self.loads.append(address)
        if tag == "tr" and found.get("class") == "point":
            self.rows.append((str(found["data-device"]), int(str(found["data-trial"]))))


def test_the_page_stands_alone_and_takes_hostile_names(page: Path, fronts: list[ParetoFront]) -> None:
    outline = Outline()
    outline.feed(page.read_text())
    assert outline.loads == []
    assert outline.scripts == 4
    assert outline.rows == [(f.device, p.trial) for f in fronts for p in f.points]
    assert not re.search("@@[A-Z]+@@", page.read_text().split("plotly.js v")[0])
    assert "not measured yet" in page.read_text()
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(("width", "is_phone"), [(1280, False), (390, True)])
def test_the_page_in_a_browser(
    browser: Any, page: Path, fronts: list[ParetoFront], width: int, is_phone: bool
) -> None:
    tab = browser.open(page.as_uri(), width, is_phone=is_phone)
    tab.wait_for("document.readyState === 'complete' && document.querySelector('.figure') !== null")
    tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")  # draws what is still far below
    tab.wait_for("[...document.querySelectorAll('.figure')].every((n) => n.dataset.drawn === 'true')")
    first = "document.querySelector('.figure[data-figure=device0-0]')"
    place = f"{first}.data.findIndex((t) => t.meta.role === 'front')"
    assert tab.evaluate(f"{first}.calcdata[{place}].map((p) => [p.x, p.y])") == [
        [p.latency_ms, p.accuracy] for p in fronts[0].points
    ]
    scroll, client = tab.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert scroll <= client
    detail = "document.querySelector('section[data-device=laptop] .detail')"
    tab.evaluate("""document.querySelector('tr.point[data-device="laptop"][data-trial="3"]').click()""")
    row = tab.evaluate(f"{detail}.textContent")
    assert "--device laptop --trial 3" in row
    assert "run-of-three" in row
    rows = f"[...{detail}.querySelectorAll('tbody tr')]"
    assert tab.evaluate(f"{rows}.map((r) => [...r.cells].slice(0, 3).map((c) => c.textContent))") == [
        ["model.0.conv", "16", "8"],
        ["model.1.conv", "32", "32"],
    ]
    tab.evaluate(
        f"{first}.emit('plotly_click', {{points: [{{data: {first}.data[{place}], customdata: [1]}}]}})"
    )
    assert tab.evaluate(f"{detail}.dataset.trial") == "1"
    # A dominated trial has no command, which would be refused, but says what to take instead.
    dominated = f"{first}.data.findIndex((t) => t.meta.role === 'dominated')"
    tab.evaluate(
        f"{first}.emit('plotly_click', {{points: [{{data: {first}.data[{dominated}], customdata: [2]}}]}})"
    )
    assert tab.evaluate(f"{detail}.querySelector('.command')") is None
    assert "trial 1 is at most as slow" in tab.evaluate(f"{detail}.innerText")
    assert tab.said == []

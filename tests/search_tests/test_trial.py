"""A trial and its bench on a tiny detector: all of it real but the clock."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

import search.bench
import search.judge
import search.model_files
from objectives.detection import DetectionTask
from objectives.task import Recovery
from profiles.artifact import Artifact, LayerSpec, export_artifact, open_artifact
from profiles.device import Device
from profiles.latency_model import LatencyModel
from profiles.latency_profile import LatencyProfile, LayerProfile
from profiles.quiet import Skew
from profiles.refill import refill
from profiles.timing import Comparison, Timing
from search.bench import Shop
from search.model_files import check_parity
from search.plan import PruningPlan
from search.planning import make_plan, rerank
from search.prediction import predict_ms
from search.proxy import Proxy
from search.prune import WidthError, check_widths
from search.result import TrialParams, TrialResult
from search.sensitivity import DEPTHS, LossCurves, Stage
from search.stopping import OpenGate
from search.studyfile import StudyFile, StudyFileError, load_study_file
from search.tables import plan_json, plan_table, profile_json, profile_table, score_json, score_table
from search.trial import Bench, run_trial
from search.workspace import Workspace, read_result

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = ["rerank", "plan", "prune", "export", "measure", "recover"]


class Listener:
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.epochs: list[tuple[int, int]] = []

    def step(self, name: str) -> None:
        self.steps.append(name)

    def epoch(self, done: int, epochs: int, accuracy: float) -> None:
        self.epochs.append((done, epochs))


def work(layer: LayerSpec) -> float:
    """A layer's cost in ms, as multiply-accumulates would have it."""
    size = np.prod(layer.kernel) * np.prod(layer.output_hw) * layer.in_channels * layer.out_channels
    return float(size) / layer.groups / 1e6


def counted_profile(
    device: Device, export: Callable[[Any], Artifact], model_key: str, **_: Any
) -> LatencyProfile:
    artifact = export(search.bench.Variant())
    layers = tuple(LayerProfile.of(spec, Timing((work(spec),), 0)) for spec in artifact.layers)
    shapes = [
        [getattr(spec, key) for spec in artifact.layers] for key in ("in_channels", "out_channels", "groups")
    ]
    model = LatencyModel.from_layers("bilinear", [work(spec) for spec in artifact.layers], *shapes, 0.1)
    total = sum(map(work, artifact.layers)) + 0.1
    return LatencyProfile(
        device, "print", model_key, artifact.input_shape, layers, total, {"x": 0.1}, 4, model
    )


def counted_comparison(device: Device, candidate: Artifact, baseline: Artifact, **_: Any) -> Comparison:
    """The ratio of the artifacts' counted work; the clock of the moment runs twice too slow."""
    times = [sum(map(work, a.layers)) for a in (candidate, baseline)]
    ratio = times[0] / times[1]
    timings = [Timing((2 * t, 2 * t, 2.2 * t), 0) for t in times]
    return Comparison(*timings, ratio, (ratio * 0.98, ratio * 1.02), 4, 4, True)


@pytest.fixture(scope="module")
def study(shapes: Any, tmp_path_factory: pytest.TempPathFactory) -> StudyFile:
    folder = tmp_path_factory.mktemp("trial")
    path = folder / "study.yaml"
    document = {
        "name": "tiny",
        "model": str(shapes.weights),
        "data": str(shapes.data),
        "imgsz": shapes.imgsz,
        "devices": [{"name": "ort", "runtime": "onnxruntime"}, {"name": "torch", "runtime": "torch"}],
        "search": {"min_channels": 4},
        "calibration": {"images": 6, "batch": 4},
        "finetune": {"epochs": 1, "batch": 4, "device": "cpu", "reestimate_images": 12},
    }
    path.write_text(yaml.safe_dump(document))
    return load_study_file(path)


@pytest.fixture(scope="module")
def shop(study: StudyFile) -> Shop:
    return Shop(study, Workspace(study.folder), notice=lambda text: None)


@pytest.fixture(scope="module")
def bench(shop: Shop) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.bench, "build_profile", counted_profile)
        patch.setattr(Device, "fingerprint", "print")
        return shop.bench(shop.study.device("ort").device())


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(search.judge, "compare", counted_comparison)
    monkeypatch.chdir(tmp_path)


PARAMS = TrialParams(beta=0.2, ratio=0.4, round_to=4)


@pytest.fixture(scope="module")
def done(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialResult, Path, Listener]:
    folder, listener = tmp_path_factory.mktemp("run") / "trial-0001", Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.judge, "compare", counted_comparison)
        result = run_trial(
            1, PARAMS, replace(bench, baseline_ms=10.0, baseline_p90_ms=12.0), folder, listener
        )
    return result, folder, listener


# ---- the trial -----------------------------------------------------------------------------------


def test_a_trial_is_its_steps_each_with_its_time(done: tuple[TrialResult, Path, Listener]) -> None:
    result, _, listener = done
    assert listener.steps == [*STEPS, "export"]  # what was measured before training ships after it
    assert list(result.duration_s) == STEPS
    assert listener.epochs == [(0, 1), (1, 1)]
    assert len(result.epochs) == 2
    assert result.accuracy == max(result.epochs)
    assert result.state == "complete"


def test_a_trials_files_tell_all_of_it(done: tuple[TrialResult, Path, Listener], bench: Bench) -> None:
    from safetensors.torch import load_file

    result, folder, _ = done
    assert read_result(folder / "result.json") == result
    plan = PruningPlan.load(folder / "plan.json")
    assert plan.digest == result.plan_digest
    state = load_file(folder / "model.safetensors")
    for name, cut in plan.layers.items():
        assert state[f"{name}.weight"].shape[0] == cut.kept_out
    assert result.params == sum(
        v.numel() for k, v in state.items() if "running" not in k and "num_b" not in k
    )
    artifact = next(folder.glob("*.onnx"))
    assert result.artifact_digest == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert (folder / "model.pt").exists()
    share = sum(len(v) for v in plan.removed.values()) / bench.groups.channels.sum()
    assert 0.2 < share < 0.6


def test_latency_is_the_measured_ratio_times_trial_0s(done: tuple[TrialResult, Path, Listener]) -> None:
    """A clock that runs at half speed today moves no point."""
    result, _, _ = done
    assert result.speedup is not None and result.latency_ms is not None  # noqa: PT018
    assert result.speedup > 1.2
    assert result.latency_ms == pytest.approx(10.0 / result.speedup)
    assert result.latency_p90_ms == pytest.approx(
        result.latency_ms * 2.16 / 2
    )  # 90th percentile of 2, 2, 2.2
    assert result.speedup_ci == pytest.approx((result.speedup / 1.02, result.speedup / 0.98))
    assert result.details["verdict"] == "faster"


def test_the_unpruned_model_sets_the_scale(bench: Bench, tmp_path: Path) -> None:
    listener = Listener()
    result = run_trial(0, TrialParams(), bench, tmp_path / "trial-0000", listener)
    assert result.speedup == 1.0
    assert result.latency_ms == pytest.approx(2 * sum(map(work, bench.baseline.layers)))
    assert listener.epochs == [(0, 0)]  # evaluated, not trained
    assert PruningPlan.load(tmp_path / "trial-0000" / "plan.json").is_empty
    assert result.predicted_latency_ms == pytest.approx(bench.profile.predict_ms({}))


def test_a_trial_computes_no_scores_and_profiles_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        pytest.fail("a trial repeated what is cached")

    monkeypatch.setattr("search.scores.taylor", forbidden)
    monkeypatch.setattr("search.criteria.taylor", forbidden)
    monkeypatch.setattr("profiles.measure.profile_layers", forbidden)
    monkeypatch.setattr(type(bench.task), "loss", forbidden)
    bench = replace(bench, recovery=replace(bench.recovery, epochs=0), baseline_ms=1.0, baseline_p90_ms=1.0)
    assert run_trial(1, PARAMS, bench, tmp_path / "trial", Listener()).state == "complete"


def test_the_same_parameters_give_the_same_plan(bench: Bench) -> None:
    first, second = (make_plan(PARAMS, rerank(PARAMS, bench), bench) for _ in range(2))
    assert first == second
    other = replace(PARAMS, beta=0.9)
    assert make_plan(other, rerank(other, bench), bench) != first


def test_a_recovery_that_rebuilds_the_network_is_caught(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpruned(self: Any, model: nn.Module, *_: Any) -> nn.Module:
        rebuilt: nn.Module = self.load_model()
        return rebuilt

    monkeypatch.setattr(type(bench.task), "recover", unpruned)
    with pytest.raises(WidthError, match="layers do not have the plan's widths"):
        run_trial(1, PARAMS, bench, tmp_path / "trial", Listener())
    assert not (tmp_path / "trial" / "result.json").exists()


def test_an_artifact_that_computes_something_else_is_caught(bench: Bench) -> None:
    model = bench.task.load_model()
    assert check_parity(bench.task.predictor(model), bench.baseline, bench.task) < 1e-4
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(
        ValueError, match=r"must match the PyTorch model within 0.001 of its largest output in fp32, got"
    ):
        check_parity(bench.task.predictor(model), bench.baseline, bench.task)


def test_the_recovered_model_is_in_the_artifact(
    done: tuple[TrialResult, Path, Listener], bench: Bench
) -> None:
    result, folder, _ = done
    artifact = replace(bench.baseline, path=next(folder.glob("*.onnx")))
    accuracy = bench.task.evaluate(open_artifact(artifact, threads=1))
    assert accuracy == pytest.approx(result.accuracy, abs=0.005)


# ---- several steps, whole blocks, random weights --------------------------------------------------


def test_several_steps_rank_what_is_left_anew(bench: Bench, shop: Shop) -> None:
    at_once = replace(PARAMS, ratio=0.6, beta=0.0)
    in_steps = replace(at_once, steps=3)
    half = make_plan(replace(at_once, ratio=0.2), rerank(at_once, bench), bench)
    plan = make_plan(in_steps, rerank(in_steps, bench), bench)
    assert plan != make_plan(at_once, rerank(at_once, bench), bench)
    assert plan == make_plan(in_steps, rerank(in_steps, bench), bench)
    for name, gone in half.removed.items():  # the first step's choice stands
        assert set(gone) <= set(plan.removed[name])
    total = int(bench.groups.channels @ bench.groups.weights)
    counts = np.array([len(plan.removed.get(group.name, ())) for group in bench.groups.groups])
    removed = int(counts @ bench.groups.weights)
    assert removed / total == pytest.approx(0.6, abs=0.05)

    found = bench.rescore("taylor", half)
    first = bench.scores["taylor"]
    assert {k: len(v) for k, v in found.layers.items()} == {k: len(v) for k, v in first.layers.items()}
    for name, cut in half.layers.items():
        if name in found.layers and cut.removed_out:
            assert not found.layers[name][list(cut.removed_out)].any()
            kept = np.setdiff1d(np.arange(cut.channels_out), cut.removed_out)
            assert found.layers[name][kept].any()
    whole = [name for name in found.layers if name not in half.layers]
    assert any(
        not np.allclose(found.layers[name], first.layers[name]) for name in whole
    )  # also where nothing went, since what is behind it changed


def test_rescored_channels_are_in_the_cache(
    bench: Bench, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(PARAMS, rerank(PARAMS, bench), bench)
    before = shop.rescore("l1", plan)
    monkeypatch.setattr("search.bench.rescore", lambda *_: pytest.fail("computed again"))
    again = shop.rescore("l1", plan)
    assert all(np.array_equal(again.layers[name], values) for name, values in before.layers.items())


@pytest.mark.parametrize("key", ["calibration", "finetune"])
def test_a_gpu_that_is_not_here_is_said_before_anything_is_measured(
    key: str, study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = getattr(study, key).model_copy(update={"device": "cuda:99"})
    file = study.model_copy(update={key: section})
    monkeypatch.setattr(search.bench, "build_profile", lambda *_, **__: pytest.fail("measured first"))
    own = Shop(file, Workspace(study.folder), notice=lambda text: None)
    with pytest.raises(StudyFileError, match=rf"{key}\.device: device must be one .*, got 'cuda:99'"):
        own.bench(file.device("ort").device())


@pytest.fixture(scope="module")
def deep(study: StudyFile) -> Bench:
    """A bench whose blocks may go."""
    file = study.model_copy(update={"search": study.search.model_copy(update={"depth": 0.5})})
    own = Shop(file, Workspace(study.folder), notice=lambda text: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.bench, "build_profile", counted_profile)
        patch.setattr(Device, "fingerprint", "print")
        return own.bench(own.study.device("ort").device())


def test_blocks_go_alone_and_together_with_channels(deep: Bench, tmp_path: Path) -> None:
    from search.export import restore

    assert [b.name for b in deep.blocks] == ["model.2.m.0", "model.4.m.0"]
    assert set(deep.block_scores) == {b.name for b in deep.blocks}
    layers_alone = TrialParams(depth=0.5, round_to=4)
    alone = make_plan(layers_alone, rerank(layers_alone, deep), deep)
    assert len(alone.blocks) == 1
    assert not alone.removed
    assert predict_ms(alone, deep.profile) < deep.profile.predict_ms({})
    gone = [layer for layer in deep.profile.layers if alone.inside_blocks(layer.layer)]
    saved = deep.profile.predict_ms({}) - predict_ms(alone, deep.profile)
    assert saved == pytest.approx(sum(layer.timing.mean_ms for layer in gone))

    both = replace(PARAMS, depth=0.9)
    scaled = replace(deep, baseline_ms=10.0, baseline_p90_ms=12.0)
    result = run_trial(1, both, scaled, tmp_path / "trial", Listener())
    assert result.state == "complete"
    plan = PruningPlan.load(tmp_path / "trial" / "plan.json")
    assert plan.blocks == ("model.2.m.0", "model.4.m.0")
    assert plan.removed
    assert all(result.details["removed_share"][layer] == 1.0 for b in deep.blocks for layer in b.layers)
    shop = type("Own", (), {"task": deep.task})()
    model, again = restore(shop, tmp_path / "trial", result)
    assert again == plan
    assert sum(p.numel() for p in model.parameters()) == result.params
    document = plan_json(plan, both, deep)
    assert document["blocks"] == list(plan.blocks)
    assert {e["layer"]: e["kept"] for e in document["layers"]}["model.2.m.0.cv1.conv"] == 0
    assert document["channels_removed"] == sum(e["channels"] - e["kept"] for e in document["layers"])
    console = io.StringIO()
    Console(file=console, width=120).print(plan_table(document))
    assert "blocks that go as a whole: model.2.m.0, model.4.m.0" in console.getvalue()


def test_depth_needs_blocks(bench: Bench, study: StudyFile) -> None:
    params = replace(PARAMS, depth=0.5)
    with pytest.raises(ValueError, match="depth must be 0 for a network without blocks"):
        make_plan(params, rerank(params, bench), bench)
    search_section = study.search.model_copy(update={"depth": 0.5, "exclude": ("model.*.m.*",)})
    file = study.model_copy(update={"search": search_section})
    own = Shop(file, Workspace(study.folder), notice=lambda text: None)
    with pytest.raises(StudyFileError, match=r"search\.depth must be 0 .* 2 were found, none of them within"):
        _ = own.blocks


def test_recovery_from_scratch_forgets_the_weights(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[nn.Module] = []

    def untouched(self: Any, model: nn.Module, recovery: Any, folder: Path, heard: Any) -> nn.Module:
        seen.append(model)
        heard(0, recovery.epochs, 0.0)
        return model

    monkeypatch.setattr(type(bench.task), "recover", untouched)
    scaled = replace(bench, baseline_ms=10.0, baseline_p90_ms=12.0)
    for number, recovery in enumerate(("finetune", "scratch", "scratch"), 1):
        params = replace(PARAMS, recovery=recovery)
        run_trial(number, params, scaled, tmp_path / f"{number}", Listener())
    tuned, first, second = (dict(model.named_parameters()) for model in seen)
    same = [name for name in tuned if torch.equal(tuned[name], first[name])]
    assert [name for name in same if tuned[name].ndim > 1] == ["model.10.dfl.conv.weight"]
    assert all(torch.equal(first[name], second[name]) for name in first)  # one seed, one start
    assert all(tuned[name].shape == first[name].shape for name in tuned)


# ---- stopping ------------------------------------------------------------------------------------


class StopAt(OpenGate):
    """Stops after one step, and remembers what it was asked."""

    def __init__(self, step: str, extra: int = 0, times: int = 1):
        self.step, self.extra, self.times = step, extra, times
        self.asked: list[tuple[Any, ...]] = []

    def _answer(self, step: str, *what: Any) -> str | None:
        self.asked.append((step, *what))
        return f"stopped at {step}" if step == self.step else None

    def planned(self, plan: PruningPlan, proxy: Proxy | None) -> str | None:
        return self._answer("plan", proxy)

    def pruned(self, params: int) -> str | None:
        return self._answer("prune", params)

    def measured(self, ratio: float, ratio_ci: tuple[float, float], size_mb: float) -> str | None:
        return self._answer("measure", ratio, ratio_ci, size_mb)

    def epoch(self, done: int, epochs: int, accuracy: float) -> str | None:
        return self._answer(f"epoch {done}", accuracy)

    def extra_epochs(self) -> int:
        self.asked.append(("extra",))
        self.times -= 1
        return self.extra if self.times >= 0 else 0


@pytest.mark.parametrize("step", ["plan", "prune", "measure", "epoch 0"])
def test_a_gate_ends_a_trial_after_any_step(bench: Bench, tmp_path: Path, step: str) -> None:
    gate, folder = StopAt(step), tmp_path / "trial"
    scaled = replace(bench, baseline_ms=10.0, baseline_p90_ms=12.0)
    result = run_trial(1, PARAMS, scaled, folder, Listener(), gate)
    assert (result.state, result.reason) == ("stopped", f"stopped at {step}")
    assert gate.asked[-1][0] == step
    assert read_result(folder / "result.json") == result
    assert {p.name for p in folder.iterdir()} == {"plan.json", "result.json"}  # and nothing half done
    assert (result.latency_ms is not None) == (step in ("measure", "epoch 0"))
    assert (result.accuracy is not None) == (step == "epoch 0")
    assert result.plan_digest == PruningPlan.load(folder / "plan.json").digest
    assert result.details["stopped_after"] == ("recover" if step == "epoch 0" else step)


def test_what_the_gate_is_told_is_what_is_recorded(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = StopAt("never", extra=1, times=2)
    recoveries: list[Recovery] = []
    recover = DetectionTask.recover

    def noted(self: DetectionTask, model: nn.Module, recovery: Recovery, *rest: Any) -> nn.Module:
        recoveries.append(recovery)
        return recover(self, model, recovery, *rest)

    monkeypatch.setattr(DetectionTask, "recover", noted)
    scaled = replace(bench, baseline_ms=10.0, baseline_p90_ms=12.0)
    result = run_trial(1, PARAMS, scaled, tmp_path / "trial", Listener(), gate)
    told = {step: what for step, *what in gate.asked}
    assert [step for step, *_ in gate.asked] == (
        ["plan", "prune", "measure", "epoch 0", "epoch 1", "extra", "epoch 2", "extra", "epoch 3", "extra"]
    )
    assert [proxy.to_json() for proxy in told["plan"]] == [result.details["proxy"]]
    assert result.details["proxy"]["kind"] == "scores"
    assert 0.5 < result.details["proxy"]["kept"] < 1.0
    assert told["prune"] == [result.params]
    assert told["measure"][0] == pytest.approx(result.latency_ms / 10.0)  # type: ignore[operator]
    assert told["measure"][2] == pytest.approx(result.details["size_mb"], rel=0.01)
    assert [told[f"epoch {n}"] for n in range(4)] == [[a] for a in result.epochs]  # two more, as granted
    # Each goes on where the one before ended, with images in another order.
    best = [max(result.epochs[:n]) for n in (2, 3)]
    assert [(r.seed, r.reestimate_images, r.accuracy) for r in recoveries] == (
        [(0, 12, None), (1, 0, best[0]), (2, 0, best[1])]
    )
    assert result.accuracy == max(result.epochs)
    assert result.details["measured"] == "before recovery, same structure"
    assert len(result.details["structure"]) == 64


def test_a_file_of_another_structure_is_measured_itself(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    skew = Skew(0.3, 0.1)

    def compared(device: Device, candidate: Artifact, baseline: Artifact, **settings: Any) -> Comparison:
        assert settings["skew"] == skew  # as the profile found it
        measured.append(candidate.digest)
        return counted_comparison(device, candidate, baseline)

    monkeypatch.setattr(search.judge, "compare", compared)
    # Not the files' own digests: where re-estimating batch norm helps nothing, the weights stay as they were.
    monkeypatch.setattr(search.judge, "structure_digest", lambda artifact: f"seen after {len(measured)}")
    still = replace(bench, recovery=replace(bench.recovery, epochs=0), baseline_ms=1.0, baseline_p90_ms=1.0)
    still = replace(still, profile=replace(bench.profile, skew=skew))
    result = run_trial(1, PARAMS, still, tmp_path / "trial", Listener())
    assert len(measured) == 2
    assert measured[-1] == result.artifact_digest
    assert result.details["measured"] == "as shipped"


@pytest.mark.parametrize("takes", [True, False])
def test_what_is_measured_and_ships_is_the_unpruned_models_file_with_other_weights(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: bool
) -> None:
    exported: list[Path] = []
    refilled: list[Artifact | None] = []

    def export(module: nn.Module, device: Device, folder: Path, *more: Any) -> Artifact:
        exported.append(folder)
        return export_artifact(module, device, folder, *more)

    def fill(artifact: Artifact, old: Any, module: nn.Module, folder: Path, *more: Any) -> Artifact | None:
        if not takes:
            module = copy.deepcopy(module)
            for tensor in module.state_dict().values():
                tensor.copy_(torch.rand(tensor.shape))
        found = refill(artifact, old, module, folder, *more)
        refilled.append(found)
        return found

    monkeypatch.setattr(search.model_files, "export_artifact", export)
    monkeypatch.setattr(search.model_files, "refill", fill)
    folder = tmp_path / "trial"
    scaled = replace(bench, baseline_ms=10.0, baseline_p90_ms=12.0)
    result = run_trial(1, PARAMS, scaled, folder, Listener())
    assert all(refilled)
    assert len(refilled) == 2
    assert exported == ([] if takes else [folder / "untrained", folder])
    assert (result.artifact_digest == refilled[-1].digest) == takes  # type: ignore[union-attr]
    assert result.details["parity"] < 1e-4
    assert not (folder / "untrained").exists()


# ---- the bench -----------------------------------------------------------------------------------


def test_scores_are_computed_once(shop: Shop, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    fresh = Shop(shop.study, shop.workspace, notice=told.append)
    with monkeypatch.context() as patch:
        patch.setattr(search.bench, "compute_scores", lambda *_, **__: pytest.fail("computed again"))
        found = fresh.scores("taylor")
    assert told == ["scores: taylor found in the cache"]
    for name, values in bench.scores["taylor"].layers.items():
        assert found.layers[name].tobytes() == values.tobytes()
    told.clear()
    again = fresh.scores("taylor", refresh=True)
    assert told == ["scores: computing taylor on 6 images"]
    assert list(again.layers) == list(found.layers)
    other = fresh.study.model_copy(
        update={"calibration": fresh.study.calibration.model_copy(update={"images": 5})}
    )
    told.clear()
    Shop(other, shop.workspace, notice=told.append).scores("taylor")
    assert told == ["scores: computing taylor on 5 images"]


def test_a_damaged_score_file_is_computed_again(study: StudyFile, tmp_path: Path) -> None:
    told: list[str] = []
    own = Shop(study, Workspace(tmp_path), notice=told.append)
    want = own.scores("taylor")
    (path,) = (tmp_path / "cache" / "scores").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    told.clear()
    again = own.scores("taylor")
    assert told[0].startswith("scores: cache refused")
    assert told[1] == "scores: computing taylor on 6 images"
    assert list(again.layers) == list(want.layers)


def test_a_profile_is_measured_once_and_again_on_another_machine(
    shop: Shop, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    fresh, device = Shop(shop.study, shop.workspace, notice=told.append), shop.study.device("ort").device()
    monkeypatch.setattr(search.bench, "build_profile", counted_profile)
    monkeypatch.setattr(Device, "fingerprint", "print")
    assert fresh.profile(device).delta_ms == bench.profile.delta_ms
    assert told == ["profile: ort found in the cache"]
    monkeypatch.setattr(Device, "fingerprint", "another")
    told.clear()
    fresh.profile(device)
    assert told == ["profile: measuring every layer on ort (another)"]


def test_a_plan_from_warm_caches_opens_no_model_and_asks_no_device(study: StudyFile, bench: Bench) -> None:
    program = (
        "import sys, search.cli as cli\n"
        "try: cli.main()\n"
        "finally: print({'torch', 'optuna', 'scipy', 'onnxruntime'} & set(sys.modules), file=sys.stderr)"
    )
    asked = ["plan", str(study.source), "--device", "ort", "--beta", "0.2", "--ratio", "0.4", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *asked, "--set", "search.round_to=4"],
        env={**os.environ, "PYTHONPATH": str(Path(search.bench.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert document["digest"] == make_plan(PARAMS, rerank(PARAMS, bench), bench).digest
    assert document["fingerprint"] == "print"
    assert done.stderr.split() == ["set()"]


def test_what_two_workers_need_at_once_the_first_makes_and_the_second_finds(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, begun, waits = shop.study.device("ort").device(), threading.Event(), threading.Event()
    made: list[Device] = []

    def slow_profile(*arguments: Any, **options: Any) -> LatencyProfile:
        made.append(arguments[0])
        begun.set()
        assert waits.wait(60)
        return counted_profile(*arguments, **options)

    def second_says(text: str) -> None:
        told.append(text)
        waits.set()

    told: list[str] = []
    monkeypatch.setattr(search.bench, "build_profile", slow_profile)
    monkeypatch.setattr(Device, "fingerprint", "print")
    first = Shop(shop.study, Workspace(tmp_path), notice=lambda text: None)
    second = Shop(shop.study, Workspace(tmp_path), notice=second_says)
    with ThreadPoolExecutor(2) as workers:
        one = workers.submit(first.profile, device)
        assert begun.wait(60)
        other = workers.submit(second.profile, device)
        assert other.result(120) == one.result(120)
    assert len(made) == 1
    assert told == ["profile-ort: waiting for another process's", "profile: ort found in the cache"]


def test_curves_are_measured_on_as_many_images_as_the_study_says(
    study: StudyFile, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def measure(
        *_: Any, images: int, batch: int, on_stage: Callable[[LossCurves], Any], **__: Any
    ) -> LossCurves:
        asked.append((images, batch))
        curves = LossCurves("taylor", ("a",), (Stage((0,), 1.0, ((9,),), ((2.0,),)),) * len(DEPTHS))
        on_stage(curves)
        return curves

    monkeypatch.setattr(search.bench, "measure_curves", measure)
    plain = study.calibration
    for few in (None, 3, 2, 3):
        section = plain.model_copy(update={"curve_images": few})
        own = Shop(
            study.model_copy(update={"calibration": section}), Workspace(tmp_path), notice=lambda _: None
        )
        own.curves("taylor", bench.profile)
    # The last one is in the cache; no batch is larger than the sample.
    batch = plain.batch
    assert asked == [(plain.images, min(batch, plain.images)), (3, min(batch, 3)), (2, min(batch, 2))]


def test_curves_go_on_from_the_last_whole_stage(
    study: StudyFile, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Shop(study, Workspace(tmp_path), notice=lambda text: None)
    begun_with: list[int] = []

    def measure(*_: Any, known: Any, on_stage: Callable[[LossCurves], Any], **__: Any) -> LossCurves:
        begun_with.append(len(known))
        stages = list(known)
        while len(stages) < len(DEPTHS):
            stages.append(Stage((len(stages),), 1.0, ((9,),), ((2.0,),)))
            on_stage(LossCurves("taylor", ("a",), tuple(stages)))
            if len(stages) == 2 and len(begun_with) == 1:
                raise KeyboardInterrupt
        return LossCurves("taylor", ("a",), tuple(stages))

    monkeypatch.setattr(search.bench, "measure_curves", measure)
    with pytest.raises(KeyboardInterrupt):
        own.curves("taylor", bench.profile)
    curves = own.curves("taylor", bench.profile)
    assert [stage.context for stage in curves.stages] == [(n,) for n in range(len(DEPTHS))]
    assert own.curves("taylor", bench.profile) == curves
    own.curves("taylor", bench.profile, refresh=True)
    assert begun_with == [0, 2, 0]


def test_the_baseline_is_exported_once(shop: Shop, bench: Bench) -> None:
    before = bench.baseline.path.stat().st_mtime_ns
    again = Shop(shop.study, shop.workspace).baseline(bench.device)
    assert again == bench.baseline
    assert again.path.stat().st_mtime_ns == before


def test_include_and_exclude_reach_the_plan(study: StudyFile) -> None:
    narrow = study.model_copy(update={"search": study.search.model_copy(update={"exclude": ("model.0.*",)})})
    names = {g.name for g in Shop(narrow, Workspace(study.folder)).groups.groups}
    assert names
    assert "model.0.conv" not in names
    assert "model.0.conv" in {g.name for g in Shop(study, Workspace(study.folder)).groups.groups}


def test_a_model_that_cannot_be_used_is_a_fault_of_the_file(study: StudyFile, tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("no model")
    wrong = study.model_copy(update={"model": str(text)})
    with pytest.raises(StudyFileError, match=r"study.yaml: 1 fault\n  model must be an Ultralytics"):
        _ = Shop(wrong, Workspace(study.folder)).task


# ---- documents and tables ------------------------------------------------------------------------


def text_of(table: Any, width: int = 250) -> str:

    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_the_plans_document(bench: Bench) -> None:
    plan = make_plan(PARAMS, rerank(PARAMS, bench), bench)
    document = json.loads(json.dumps(plan_json(plan, PARAMS, bench)))
    assert {"device", "beta", "ratio", "round_to", "channels_total", "channels_removed"} <= set(document)
    assert document["predicted_latency_ms"] == pytest.approx(predict_ms(plan, bench.profile))
    assert document["predicted_latency_ms"] < document["baseline_latency_ms"]
    lost = sum(layer["channels"] - layer["kept"] for layer in document["layers"])
    assert document["channels_removed"] == lost  # of groups and of layers, two ways of counting
    assert sum(layer["channels"] for layer in document["layers"]) >= document["channels_total"]
    assert abs(lost / document["channels_total"] - 0.4) < 0.05
    shown = text_of(plan_table(document))
    assert f"{lost} of {document['channels_total']} channels" in shown
    narrow = text_of(plan_table(document), width=80)
    cut = [layer["layer"] for layer in document["layers"] if layer["kept"] < layer["channels"]]
    assert all(f" {name} " in narrow for name in cut)


def test_the_profiles_document(bench: Bench) -> None:
    document = json.loads(json.dumps(profile_json(bench.profile)))
    assert (document["fingerprint"], document["model_ms"]) == ("print", bench.profile.model_ms)
    assert {"layer", "latency_ms", "channels", "delta_ms", "delta_norm"} <= set(document["layers"][0])
    for layer in document["layers"]:
        assert layer["delta_ms"] == pytest.approx(layer["latency_ms"] / layer["channels"])
    assert max(layer["delta_norm"] for layer in document["layers"]) == 1.0
    narrow = text_of(profile_table("ort", bench.profile), width=80)
    assert all(f" {layer['layer']} " in narrow for layer in document["layers"])


def test_the_scores_document(bench: Bench) -> None:
    scores = bench.scores["taylor"]
    document = json.loads(json.dumps(score_json(scores)))
    entry = next(layer for layer in document["layers"] if layer["layer"] == "model.0.conv")
    values = scores.layers["model.0.conv"]
    assert (entry["channels"], entry["min"], entry["max"]) == (len(values), values.min(), values.max())
    assert "model.0.conv" in text_of(score_table(scores))


def test_check_widths_knows_the_bench(bench: Bench) -> None:
    plan = make_plan(PARAMS, rerank(PARAMS, bench), bench)
    with pytest.raises(WidthError):
        check_widths(bench.task.load_model(), plan)


def test_accuracy_in_a_narrow_precision_is_the_artifacts_own(bench: Bench, tmp_path: Path) -> None:
    device = Device("narrow", "torch", threads=1, precision="bf16")
    task = bench.task
    baseline = export_artifact(
        task.deployable(task.load_model()), device, tmp_path / "baseline", task.input_shape
    )
    folder = tmp_path / "trial"
    result = run_trial(1, PARAMS, replace(bench, device=device, baseline=baseline), folder, Listener())
    shipped = replace(baseline, path=folder / "model.pt2")
    assert result.accuracy == task.evaluate(open_artifact(shipped, threads=1))
    assert result.details["parity"] > 1e-3  # which fp32 would not be allowed


def test_every_sample_of_a_measurement_is_kept(done: tuple[TrialResult, Path, Listener]) -> None:
    result, folder, _ = done
    kept = Comparison.from_json(json.loads((folder / "measurement.json").read_text()))
    assert kept.candidate.p50_ms == result.latency_raw_ms
    assert len(kept.candidate.samples_ms) == result.details["samples"]

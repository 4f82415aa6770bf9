"""The bench of a device: what all its trials share, found in the caches or made once.

Opens the task, finds the groups, computes scores, exports the unpruned model and has it profiled. Knows
neither Optuna nor MLflow.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from objectives.compute import full_precision, resolve_device
from objectives.placed import placed_on
from objectives.task import Recovery, Task
from profiles.artifact import Artifact, export_artifact
from profiles.device import Device
from profiles.latency_profile import LatencyProfile, build_profile
from profiles.lock import host_lock
from profiles.variants import Variant

from .costs import WidthCost
from .criteria import WITH_IMAGES, compute_scores
from .depth import Block, block_scores, find_blocks
from .groups import ChannelGroups, find_groups, is_selected
from .loss_curves import measure_curves
from .model_files import Exported, export_like
from .open_task import open_task
from .plan import PruningPlan
from .prune import prune
from .recall import Recalled, remember, remember_device
from .rerank import group_scores
from .rescore import rescore
from .scores import ChannelScores
from .sensitivity import LossCurves
from .shelf import Notice, Shelf
from .studyfile import StudyFile, StudyFileError
from .trial import Bench
from .variant_plan import variant_plan
from .workspace import Workspace, write_json

_log = logging.getLogger("paretoprune")


@dataclass(frozen=True)
class Shop:
    """A study's task and caches, from which the benches of its devices are made."""

    study: StudyFile
    workspace: Workspace
    notice: Notice = _log.info

    @cached_property
    def _opened(self) -> tuple[Task, float]:
        """The task, and when it began to be opened, in seconds of the epoch."""
        begun = time.time()
        try:
            return open_task(self.study), begun
        except ValueError as error:
            raise StudyFileError(self.study.source.name, [str(error)]) from error

    @property
    def task(self) -> Task:
        """The task of the study file.

        Raises:
            StudyFileError: the model or the data cannot be used; the message says which and why.
        """
        return self._opened[0]

    @cached_property
    def groups(self) -> ChannelGroups:
        model = self.task.load_model()
        groups = find_groups(self.task.traceable(model), model)
        return groups.select(self.study.search.include, self.study.search.exclude)

    def _computer(self, key: str, device: str) -> str:
        """The torch device that a key of the study file means on this machine."""
        try:
            return resolve_device(device)
        except ValueError as error:
            raise StudyFileError(self.study.source.name, [f"{key}: {error}"]) from error

    @cached_property
    def recovery(self) -> Recovery:
        section = self.study.finetune
        return Recovery(
            epochs=section.epochs,
            lr=section.lr,
            batch=section.batch,
            device=self._computer("finetune.device", section.device),
            reestimate_images=section.reestimate_images,
            threads=section.threads,
            seed=self.study.seed,
            options=dict(section.options),
        )

    @cached_property
    def shelf(self) -> Shelf:
        """What is kept of this study."""
        return Shelf(self.study, self.workspace, self.task, self.notice)

    @property
    def criteria(self) -> tuple[str, ...]:
        return self.shelf.criteria

    @property
    def curve_criteria(self) -> tuple[str, ...]:
        return self.shelf.curve_criteria

    @cached_property
    def _placed(self) -> Task:
        """The task on the device where scores and loss curves are computed."""
        return placed_on(self.task, self._computer("calibration.device", self.study.calibration.device))

    def _alone(self, what: str) -> AbstractContextManager[None]:
        """For what workers in one folder share: the first makes it, the others wait and find it."""
        return self.workspace.alone(what, lambda: self.notice(f"{what}: waiting for another process's"))

    def _task_for(self, criterion: str) -> Task:
        """Where nothing runs the model it stays on the CPU."""
        return self._placed if criterion in WITH_IMAGES else self.task

    def scores(self, criterion: str, *, refresh: bool = False) -> ChannelScores:
        """Cached scores, computed where they are missing."""
        settings = self.shelf.calibration
        images, batch = settings["images"], settings["batch"]
        sample = f" on {images} images" if criterion in WITH_IMAGES else ""

        def compute() -> ChannelScores:
            self.notice(f"scores: computing {criterion}{sample}")
            return compute_scores(
                criterion,
                self._task_for(criterion),
                **settings,
                on_batch=lambda done: _log.debug("scores: batch %d of %d", done, -(-images // batch)),
            )

        with self._alone(f"scores-{criterion}"):
            kept = None if refresh else self.shelf.scores(criterion)
            if kept is None:
                return self._keep_scores(compute)
        self.notice(f"scores: {criterion} found in the cache")
        return kept

    def rescore(self, criterion: str, plan: PruningPlan) -> ChannelScores:
        """Scores of what a plan of channels leaves, see `rescore`; cached like the unpruned network's."""
        kept = self.shelf.scores(criterion, plan)
        if kept is None:
            task = self._task_for(criterion)
            kept = self._keep_scores(lambda: rescore(task, plan, criterion, self.shelf.calibration))
        return kept

    def _keep_scores(self, compute: Callable[[], ChannelScores]) -> ChannelScores:
        with host_lock("scores"), full_precision():
            scores = compute()
        scores.save(self.shelf.scores_path(scores.criterion, scores.data_key))
        return scores

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """What can go as a whole; none where the study searches no depth."""
        search = self.study.search
        if search.depth == 0.0:
            return ()
        example = torch.from_numpy(self.task.sample_images(2))
        with host_lock("scores"):
            found = find_blocks(self.task.load_model(), example)
        left = [b for b in found if all(is_selected(n, search.include, search.exclude) for n in b.layers)]
        if not left:
            raise StudyFileError(
                self.study.source.name,
                [
                    "search.depth must be 0 for a network without blocks that can go (a shortcut around "
                    f"layers that keep the shape), got {search.depth}; {len(found)} were found, none of them "
                    "within search.include and search.exclude"
                ],
            )
        return tuple(left)

    def block_scores(self) -> dict[str, float]:
        """Cached scores of the blocks, computed where they are missing."""
        if not self.blocks:
            return {}
        settings = self.shelf.calibration
        cached = self.shelf.block_scores(self.blocks)
        if cached is not None:
            self.notice("block scores: found in the cache")
            return cached
        self.notice(f"block scores: computing {len(self.blocks)} on {settings['images']} images")
        loss = self.task.loss if settings["loss"] == "task" else self.task.outputs
        with host_lock("scores"), full_precision():
            batches = self.task.calibration(settings["images"], settings["batch"])
            found = block_scores(self._placed.load_model(), batches, loss, self.blocks)
        self.shelf.cache.put("blocks", self.shelf.block_scores_key(self.blocks), found)
        return found

    def curves(self, criterion: str, profile: LatencyProfile, *, refresh: bool = False) -> LossCurves:
        """Cached loss curves, measured where they are missing.

        Args:
            profile: of any device; only the layers' shapes are read.
        """
        scores = self.scores(criterion)
        with self._alone(f"curves-{criterion}"):
            return self._curves(criterion, scores, profile, refresh)

    def _curves(
        self, criterion: str, scores: ChannelScores, profile: LatencyProfile, refresh: bool
    ) -> LossCurves:
        cached = None if refresh else self.shelf.curves(scores, self.groups)
        if cached is not None and cached.is_whole:
            self.notice(f"loss curves: {criterion} found in the cache")
            return cached
        start, found = time.monotonic(), 0

        def on_step(done: int, steps: int) -> None:
            nonlocal found
            found += 1
            if done % 50 == 0 or done == steps:
                left_s = (time.monotonic() - start) / found * (steps - done)
                self.notice(f"loss curves: {done} of {steps} pruned networks, about {left_s:.0f} s left")

        key = self.shelf.curves_key(scores, self.groups)
        self.notice(f"loss curves: measuring every group on {self.shelf.curve_images} images")
        with full_precision():
            return measure_curves(
                self._placed,
                self.groups,
                group_scores(scores.layers, self.groups),
                WidthCost.of("macs", self.groups, profile),
                criterion=criterion,
                images=self.shelf.curve_images,
                batch=self.shelf.curve_batch,
                min_channels=self.study.search.min_channels,
                known=() if cached is None else cached.stages,
                on_step=on_step,
                # Each stage takes minutes, and what an interruption leaves is gone on from.
                on_stage=lambda curves: self.shelf.cache.put("curves", key, curves.to_json()),
            )

    def baseline(self, device: Device) -> Artifact:
        """The unpruned model exported for a device; exported once, so that every trial is measured against
        one file.
        """
        with self._alone(f"unpruned-{device.name}"):
            return self._baseline(device)

    def _baseline(self, device: Device) -> Artifact:
        folder = self.workspace.device(device.name) / "baseline"
        record = folder / "artifact.json"
        key = {
            "model_key": self.task.model_key,
            "input_shape": list(self.task.input_shape),
            "device": device.to_json(),
        }
        try:
            data = json.loads(record.read_text(encoding="utf-8"))
            if data["key"] == key:
                return Artifact.from_json(data["artifact"], folder)
        except (OSError, ValueError, KeyError):
            pass  # not there yet, or not this model's: export it
        model = self.task.load_model()
        with host_lock("export"):
            artifact = export_artifact(
                self.task.deployable(model), device, folder, self.task.input_shape, self.task.metadata(model)
            )
        write_json(record, {"key": key, "artifact": artifact.to_json()})
        return artifact

    @cached_property
    def baseline_weights(self) -> Mapping[str, Tensor]:
        """The state dict of the module that `baseline` exports."""
        return self.task.deployable(self.task.load_model()).state_dict()

    def profile(self, device: Device, *, refresh: bool = False) -> LatencyProfile:
        """The device's cached latency profile, measured where it is missing or was measured on another
        machine.
        """
        with self._alone(f"profile-{device.name}"):
            profile = self._profile(device, refresh)
            remember_device(self.workspace, device)
        return profile

    def _profile(self, device: Device, refresh: bool) -> LatencyProfile:
        if not refresh:
            cached = self.shelf.profile(device, device.fingerprint)
            if cached is not None:
                self.notice(f"profile: {device.name} found in the cache")
                return cached
        self.notice(f"profile: measuring every layer on {device.name} ({device.fingerprint})")
        folder = self.workspace.device(device.name) / "variants"
        profile = build_profile(
            device,
            lambda variant: self._variant(device, variant, folder),
            self.task.model_key,
            kind=self.study.profile.model,
            repeats=self.study.profile.repeats,
            progress=self.notice,
        )
        shutil.rmtree(folder, ignore_errors=True)  # a dozen models that nobody needs again
        self.shelf.cache.put("profile", self.shelf.profile_key(device, device.fingerprint), profile.to_json())
        return profile

    def _variant(self, device: Device, variant: Variant, folder: Path) -> Artifact:
        """A randomly pruned version of the model, untrained: latency does not depend on the weights."""
        baseline = self.baseline(device)
        if variant.ratio == 0.0:
            return baseline
        work = {spec.layer: float(spec.macs) for spec in baseline.layers}
        minimum = self.study.search.min_channels
        plan = variant_plan(variant, self.task.model_key, self.groups, work, minimum)
        model = prune(self.task.load_model(), plan, self.task.settle)
        # The seed is the variant's alone, but for the multiple.
        name = f"{variant.seed}-{variant.round_to}"
        with host_lock("export"):
            whole = Exported(baseline, self.baseline_weights)
            return export_like(whole, model, self.task, device, folder / name)[0].artifact

    def bench(self, device: Device) -> Bench:
        """Everything the trials of a device share."""
        recovery, _ = self.recovery, self._placed  # what is wrong with them shows before the minutes
        profile = self.profile(device)
        self._remember()
        return Bench(
            task=self.task,
            device=device,
            fingerprint=device.fingerprint,
            model_key=self.task.model_key,
            seed=self.study.seed,
            groups=self.groups,
            scores={criterion: self.scores(criterion) for criterion in self.criteria},
            profile=profile,
            curves={criterion: self.curves(criterion, profile) for criterion in self.curve_criteria},
            blocks=self.blocks,
            block_scores=self.block_scores(),
            rescore=self.rescore,
            baseline=self.baseline(device),
            baseline_weights=self.baseline_weights,
            recovery=recovery,
            min_channels=self.study.search.min_channels,
            latency_target=self.study.measure.target,
            latency_limit_s=self.study.measure.limit_s,
        )

    def _remember(self) -> None:
        """What was found of the task, for plans that need not open it."""
        task, begun = self._opened
        found = Recalled(task.model_key, task.data_key, task.input_shape, self.groups, self.blocks)
        remember(self.study, self.workspace, found, task.sources, begun)

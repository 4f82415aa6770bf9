"""Ultralytics' training loop on a pruned network, which it would otherwise rebuild unpruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.engine import trainer as _trainer_module
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.optim import muon as _muon_module
from ultralytics.utils.torch_utils import ModelEMA

from ..best import BestWeights
from ..compute import resolve_device
from ..task import EpochCallback, Recovery

#: Up to so many epochs the images are scaled and shifted less than by default: a damaged network has to learn
#: its own images again first, and learns none by heart in so short a time. Ultralytics drops mosaics likewise
#: for the last ten epochs.
_SHORT = 10
_GENTLE = {"scale": 0.2, "translate": 0.05}


class PrunedTrainer(DetectionTrainer):  # type: ignore[misc]  # Ultralytics ships no types
    """Ultralytics' trainer for a pruned model: trains the network it is given instead of rebuilding one from
    yaml.

    Use it as `YOLO("model.pt").train(trainer=PrunedTrainer, data=..., epochs=...)`.
    """

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """The given weights' own module, trainable.

        Raises:
            ValueError: there is no module, or its classes are not the data's.
        """
        if not isinstance(weights, nn.Module):
            raise ValueError(
                "PrunedTrainer needs a loaded model: YOLO('model.pt').train(trainer=PrunedTrainer, ...)"
            )
        classes = len(weights.names)  # type: ignore[arg-type]  # a dict that Ultralytics puts on its models
        if classes != self.data["nc"]:
            raise ValueError(f"the model detects {classes} classes, the data has {self.data['nc']}")
        return weights.float().requires_grad_(True)


class RecoveryTrainer(PrunedTrainer):
    """Ultralytics' training loop as a trial uses it: our accuracy after each epoch, no files, no loggers."""

    def __init__(
        self,
        model: nn.Module,
        recovery: Recovery,
        folder: Path,
        *,
        data: str,
        imgsz: int,
        judge: Callable[[nn.Module], float],
        on_epoch: EpochCallback,
        best: BestWeights,
    ):
        device = resolve_device(recovery.device)
        overrides = {
            "task": "detect",
            "mode": "train",
            "model": "pruned.pt",
            "data": data,
            "imgsz": imgsz,
            "epochs": recovery.epochs,
            "batch": recovery.batch,
            # A step per batch: the default accumulates to 64 images, a handful of steps in a short run.
            "nbs": recovery.batch,
            "device": device.removeprefix("cuda:") if device != "cuda" else "0",
            "seed": recovery.seed,
            "deterministic": True,
            "optimizer": "AdamW",  # "auto" would ignore lr0
            "lr0": recovery.lr if recovery.lr is not None else 1e-3,
            "lrf": 0.05,
            "warmup_epochs": 0.5,
            "warmup_bias_lr": 0.0,
            "amp": "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else False,
            "plots": False,
            "save": False,
            "val": True,
            "workers": 0,
            "verbose": False,
            "project": str(folder),
            "name": "training",
            "exist_ok": True,
            **(_GENTLE if recovery.epochs <= _SHORT else {}),
            **recovery.options,
        }
        # Ultralytics starts every experiment logger it finds installed, MLflow first; a trial is recorded by
        # us alone.
        register = _trainer_module.callbacks.add_integration_callbacks
        # It also leaves all but one core to torch for the rest of the process: on two cores, half the speed.
        threads = torch.get_num_threads()
        _trainer_module.callbacks.add_integration_callbacks = lambda instance: None
        try:
            super().__init__(overrides=overrides)
        finally:
            _trainer_module.callbacks.add_integration_callbacks = register
            torch.set_num_threads(threads)
        for hooks in self.callbacks.values():
            hooks.clear()
        self.model = model
        self._judge = judge
        self._on_epoch = on_epoch
        self._best = best

    def _setup_train(self) -> None:
        super()._setup_train()
        # The stock average needs thousands of steps to let go of the weights it started from: here those are
        # the damaged ones.
        steps = max(1, len(self.train_loader) * self.epochs)
        self.ema = ModelEMA(self.model, decay=0.98, tau=max(1.0, steps / 20))

    def optimizer_step(self) -> None:
        if self.device.type != "cpu" or not isinstance(self.optimizer, _muon_module.MuSGD):
            return super().optimizer_step()  # type: ignore[no-any-return]  # Ultralytics ships no types
        # MuSGD orthogonalises its updates in bfloat16. A CPU without instructions for that, as most are,
        # spends more time on it than on the rest of the step.
        theirs = _muon_module.zeropower_via_newtonschulz5
        _muon_module.zeropower_via_newtonschulz5 = orthogonalised
        try:
            super().optimizer_step()
        finally:
            _muon_module.zeropower_via_newtonschulz5 = theirs

    def validate(self) -> tuple[dict[str, float], float]:
        loss = float(self.loss.detach())
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss became {loss} in epoch {self.epoch + 1}")
        accuracy = self._judge(self.ema.ema)
        self._best.offer(self.ema.ema, accuracy)
        if not self._on_epoch(self.epoch + 1, self.epochs, accuracy):
            self.stop = True
        return {"mAP50-95": accuracy}, accuracy

    def save_model(self) -> bool:
        return False

    def save_metrics(self, metrics: Mapping[str, float]) -> None:
        return

    def final_eval(self) -> None:
        return


def orthogonalised(matrices: Tensor) -> Tensor:
    """About the nearest matrices with orthonormal rows, or columns where there are more rows; in float32.

    Five steps of the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024): singular values come out
    between about 0.7 and 1.2, those that were next to nothing below, which serves a step of training as well
    as 1.

    Args:
        matrices: `(..., rows, columns)`.
    """
    x: Tensor = matrices.float()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if is_tall else x

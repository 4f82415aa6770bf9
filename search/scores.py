"""Channel scores: how much the loss would change without a channel. Computed once per model and data, then
cached.

The record, and the two criteria that ask the loss: by a channel's activation map and by its weights. Knows no
device and no plan.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .activations import ActivationMaps

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT_VERSION = 1
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ChannelScores:
    """One score per channel and layer; the higher the score, the more the channel is worth keeping.

    Attributes:
        criterion: name of what was computed.
        model_key, data_key: digests of the model and of the calibration data (with its settings).
        layers: layer name to scores `(channels,)`, not negative, finite.

    Raises:
        ValueError: a score is negative, NaN or infinite.
    """

    criterion: str
    model_key: str
    data_key: str
    layers: Mapping[str, FloatArray]

    def __post_init__(self) -> None:
        for name, values in self.layers.items():
            if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
                bad = values[~np.isfinite(values) | (values < 0)]
                raise ValueError(
                    f"scores of {name} must be one finite number >= 0 per channel, got shape {values.shape} "
                    "with "
                    f"{bad[:3].tolist()}"
                )

    def save(self, path: Path) -> Path:
        """Write a safetensors file with the identity in its header; complete or not there."""
        from safetensors.numpy import save_file

        header = {
            "format_version": str(FORMAT_VERSION),
            "criterion": self.criterion,
            "model_key": self.model_key,
            "data_key": self.data_key,
            "layers": json.dumps(list(self.layers)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: two workers of one folder may compute the same scores at the same moment.
        partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial")
        save_file(
            {name: np.ascontiguousarray(v) for name, v in self.layers.items()}, partial, metadata=header
        )
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> ChannelScores:
        """Read what `save` wrote.

        Raises:
            ValueError: not such a file, truncated, or of another format version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                if header.get("format_version") != str(FORMAT_VERSION):
                    raise ValueError(
                        f"{path.name}: format_version must be {FORMAT_VERSION}, got "
                        f"{header.get('format_version')}"
                    )
                layers = {name: file.get_tensor(name) for name in json.loads(header["layers"])}
        except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} is not a readable scores file: {error}") from error
        return cls(header["criterion"], header["model_key"], header["data_key"], layers)


def taylor(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, FloatArray]:
    """First-order Taylor scores of every convolution and linear output: `|sum over the map of dL/dc * c|`.

    Source: Nechypurenko & Sorokin 2026, doi 10.30837/0135-1710.2026.189.034, equation (3).

    For each image, the product of a channel's activation map with the gradient of the loss is summed over the
    map; its absolute value is averaged over the images. A channel's map is taken where it is last a map of
    its own: behind the batch norm and the activation that follow the layer, because that is what removing the
    channel removes.

    Args:
        model: in eval mode, parameters on any device.
        batches: what `loss` takes.
        loss: differentiable scalar, summed over the batch's images.
        on_batch: called with the number of batches done.

    Returns:
        Layer name to `(channels,)` float64.

    Raises:
        ValueError: there were no batches, or a gradient is not finite.
    """
    return _by_maps(model, batches, loss, lambda product: product.abs(), on_batch)


def taylor_rise(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, FloatArray]:
    """The part of `taylor` that is harm: `max(0, -sum over the map of dL/dc * c)`, mean over the images.

    To first order an image's loss changes by `-dL/dc * c` when a channel goes. Where a network is at a
    minimum, rises and falls are as large as each other and this is half of `taylor`. Where it is not, as one
    that has lost channels already is not, the absolute value keeps channels whose loss would be a gain.

    Args, Returns, Raises: as `taylor`.
    """
    return _by_maps(model, batches, loss, lambda product: (-product).clamp(min=0.0), on_batch)


def _by_maps(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    worth: Callable[[Tensor], Tensor],
    on_batch: Callable[[int], None],
) -> dict[str, FloatArray]:
    """Mean over images of `worth` of `dL/dc * c` summed over each channel's map, `(images, channels)`."""
    import torch
    from torch import nn

    model.eval()
    names: dict[nn.Module, str] = {
        m: n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    totals: dict[str, FloatArray] = {}
    images = 0
    done = 0
    for batch in batches:
        with ActivationMaps(model, names) as maps:
            value = loss(model, batch)
            used = [(name, map_) for name, map_ in maps.items() if map_.requires_grad]
            gradients = torch.autograd.grad(value, [map_ for _, map_ in used], allow_unused=True)
        count = 0
        for (name, map_), gradient in zip(used, gradients, strict=True):
            if gradient is None:
                continue
            product = (map_.detach() * gradient).double()
            # (images, channels, rest): a linear layer on tokens has its channels last
            product = (
                product.flatten(2).sum(2)
                if product.ndim == 4
                else product.reshape(len(product), -1, product.shape[-1]).sum(1)
            )
            score = worth(product).sum(0).cpu().numpy()
            _require_finite(score, name, done)
            totals[name] = totals.get(name, 0.0) + score
            count = max(count, len(product))
        images += count
        done += 1
        on_batch(done)
    if not images:
        raise ValueError("scores need at least one calibration image, got none")
    return {name: totals[name] / images for name in names.values() if name in totals}


def taylor_weight(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, FloatArray]:
    """First-order Taylor scores by weights: `(sum over the filter of dL/dw * w) ** 2`, mean over minibatches.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", CVPR,
    doi 10.1109/CVPR.2019.01152: the first-order importance of a set of weights as one group. As there, L is
    the mean loss of a minibatch and the square is taken per minibatch, so the size of the minibatches
    matters: what images of one batch disagree about cancels before it is squared. A filter's bias counts as
    one of its weights.

    Args, Returns, Raises: as `taylor`.
    """
    import torch
    from torch import nn

    model.eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    owned = [(n, p) for n, m in layers.items() for p in m.parameters(recurse=False) if p.requires_grad]
    totals: dict[str, FloatArray] = {}
    images: list[int] = []  # of the present batch, as each layer saw it
    done = 0
    handles = [m.register_forward_hook(lambda _m, _i, out: images.append(len(out))) for m in layers.values()]
    try:
        for batch in batches:
            images.clear()
            value = loss(model, batch)
            gradients = torch.autograd.grad(value, [p for _, p in owned], allow_unused=True)
            change: dict[str, FloatArray] = {}
            for (name, parameter), gradient in zip(owned, gradients, strict=True):
                if gradient is not None:
                    product = (parameter.detach() * gradient).double().reshape(len(parameter), -1)
                    change[name] = change.get(name, 0.0) + product.sum(1).cpu().numpy()
            for name, total in change.items():
                _require_finite(total, name, done)
                totals[name] = totals.get(name, 0.0) + (total / max(images)) ** 2
            done += 1
            on_batch(done)
    finally:
        for handle in handles:
            handle.remove()
    if not done:
        raise ValueError("scores need at least one calibration image, got none")
    return {name: totals[name] / done for name in layers if name in totals}


def _require_finite(values: FloatArray, layer: str, batch: int) -> None:
    if not np.isfinite(values).all():
        raise ValueError(
            f"the gradient at {layer} is not finite on batch {batch}; check the loss on this data"
        )

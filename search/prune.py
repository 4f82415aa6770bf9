"""Physical pruning: a plan becomes a narrower network, with Torch-Pruning's layer functions.

Works on the original weights and the plan alone. Knows no scores and no devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .depth import remove_blocks
from .plan import PruningPlan

if TYPE_CHECKING:
    from torch import nn


class WidthError(RuntimeError):
    """A network does not have the widths its plan asks for."""


def prune(model: nn.Module, plan: PruningPlan, settle: Callable[[nn.Module], None]) -> nn.Module:
    """Remove a plan's blocks and channels from `model`, in place.

    Args:
        model: the original model (or a copy), every width as the plan recorded it.
        plan: what goes.
        settle: brings attributes of the framework's blocks in line with the new widths, see `Task.settle`.

    Returns:
        The same object, narrower.

    Raises:
        WidthError: the model is not the one that the plan was made for.
        ValueError: it lacks a block of the plan.
    """
    import torch_pruning as tp
    from torch import nn

    remove_blocks(model, plan.blocks)
    for name, cut in plan.layers.items():
        layer = model.get_submodule(name)
        width = _width(layer)
        if width != (cut.channels_in, cut.channels_out):
            raise WidthError(
                f"{name} must have {cut.channels_in} inputs and {cut.channels_out} outputs to apply this "
                "plan, got "
                f"{width[0]} and {width[1]}; plans hold indices into the unpruned model"
            )
        out, into = list(cut.removed_out), list(cut.removed_in)
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            if out or into:  # depthwise: input j and output j are one channel
                tp.prune_depthwise_conv_out_channels(layer, sorted({*out, *into}))
            continue
        if out:
            if isinstance(layer, nn.Conv2d):
                tp.prune_conv_out_channels(layer, out)
            elif isinstance(layer, nn.Linear):
                tp.prune_linear_out_channels(layer, out)
            else:
                tp.prune_batchnorm_out_channels(layer, out)
        if into:
            (tp.prune_conv_in_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_in_channels)(
                layer, into
            )
    settle(model)
    check_widths(model, plan)
    return model


def check_widths(model: nn.Module, plan: PruningPlan) -> None:
    """Compare a network with its plan: the widths asked for are the widths there.

    Training loops that rebuild a model from its description undo a pruning without a word; this catches it.

    Raises:
        WidthError: a layer has another width; the message names the first few.
    """
    wrong = []
    for name, cut in plan.layers.items():
        layer = model.get_submodule(name)
        want, have = (cut.kept_in, cut.kept_out), _width(layer)
        if getattr(layer, "groups", 1) > 1:
            want = (cut.kept_out, cut.kept_out)
        if have != want:
            wrong.append(f"{name} {have[0]}->{have[1]} instead of {want[0]}->{want[1]}")
    if wrong:
        raise WidthError(f"{len(wrong)} layers do not have the plan's widths: {'; '.join(wrong[:5])}")


def _width(layer: nn.Module) -> tuple[int, int]:
    """(in, out) channels by the weights themselves, not by attributes that could be stale."""
    from torch import nn

    if isinstance(layer, nn.Conv2d):
        return int(layer.weight.shape[1]) * layer.groups, int(layer.weight.shape[0])
    if isinstance(layer, nn.Linear):
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])
    weight = layer.get_parameter("weight")
    return 0, int(weight.shape[0])

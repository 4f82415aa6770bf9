"""Depth: whole residual blocks that go, each replaced by the identity.

A block can go where nothing but its shortcut would be left if its weights were zero: its output is then its
input, exactly, so the network without it is the network with the block's branch silenced. Found by trying,
not by the names of classes. Knows channels only through plans, and devices only as latencies of layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .groups import ChannelGroups
from .plan import PruningPlan
from .rerank import normalise

if TYPE_CHECKING:
    from torch import Tensor, nn


_PLAIN = (bool, int, float, str, list, tuple)


@dataclass(frozen=True)
class Block:
    """A part of a network that can be replaced by the identity.

    Attributes:
        name: module path in the original model.
        layers: its convolutions and linear layers, in order.
    """

    name: str
    layers: tuple[str, ...]


def find_blocks(model: nn.Module, example: Tensor) -> tuple[Block, ...]:
    """The smallest blocks of a model that can go, in order of the network. The model is not changed.

    A block is called once with one tensor, returns one of the same shape, holds convolutions or linear
    layers, and returns what it got once all its weights are zero. A block that ends in a ReLU does so for
    what is not negative: it can go where its input comes out of a ReLU, as in a stage of a residual network.

    Args:
        example: images `(images, 3, height, width)` as the model takes them, random or real; not constant.
    """
    import torch

    twin = copy.deepcopy(model).eval().requires_grad_(False)
    calls = _calls(twin, example)
    found: list[Block] = []
    # Children come after their parents: from the end, the smallest blocks are met first.
    for name, module in reversed(list(twin.named_modules())):
        inputs = calls.get(name, [])
        if len(inputs) != 1 or inputs[0] is None or any(b.name.startswith(f"{name}.") for b in found):
            continue
        layers = _layers(module, name)
        with torch.no_grad():
            if layers and _is_identity_without_weights(module, inputs[0]):
                found.append(Block(name, layers))
    return tuple(reversed(found))


def block_scores(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    blocks: Sequence[Block],
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """First-order Taylor scores of whole blocks: what the loss loses when a block's output becomes its input.

    Equation (3) of doi 10.30837/0135-1710.2026.189.034 with the block's own contribution, output minus input,
    in the place of a channel's map: summed over the map, absolute per image and channel, summed over channels
    and averaged over images. So a block compares with a group of channels, whose score is a sum as well.

    Args:
        model: in eval mode, parameters on any device.
        batches: what `loss` takes.
        loss: differentiable scalar, summed over the batch's images.
        blocks: of `find_blocks`.
        on_batch: called with the number of batches done.

    Returns:
        Block name to score.

    Raises:
        ValueError: there were no batches, or a gradient is not finite.
    """
    import torch

    model.eval()
    totals = {block.name: 0.0 for block in blocks}
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}

    # Copies on both sides: what stands before or behind a block may write into its tensors.
    def watch(name: str) -> list[Any]:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            entered[name] = inputs[0].detach().clone()

        def leave(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            left[name] = output
            return output.clone()

        module = model.get_submodule(name)
        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    handles = [handle for block in blocks for handle in watch(block.name)]
    images = done = 0
    try:
        for batch in batches:
            left.clear()
            value = loss(model, batch)
            gradients = torch.autograd.grad(value, list(left.values()), allow_unused=True)
            for (name, output), gradient in zip(left.items(), gradients, strict=True):
                if gradient is not None:
                    product = (gradient * (output.detach() - entered[name])).double()
                    total = float(product.reshape(*product.shape[:2], -1).sum(2).abs().sum())
                    if not math.isfinite(total):
                        raise ValueError(
                            f"the gradient at block {name} is not finite on batch {done}; "
                            "check the loss on this data"
                        )
                    totals[name] += total
            images += max((len(output) for output in left.values()), default=0)
            done += 1
            on_batch(done)
    finally:
        for handle in handles:
            handle.remove()
    if not images:
        raise ValueError("scores need at least one calibration image and one block, got none")
    return {name: total / images for name, total in totals.items()}


def weakest_blocks(
    blocks: Sequence[Block],
    scores: Mapping[str, float],
    layer_ms: Mapping[str, float],
    share: float,
    beta: float,
) -> tuple[str, ...]:
    """The blocks that go first by equation (7), a block's latency in the place of a channel's.

    Args:
        blocks: of `find_blocks`.
        scores: of `block_scores`.
        layer_ms: layer name to its latency.
        share: of the blocks to remove, in [0, 1); the nearest number of them goes.
        beta: exponent of the normalised latency, in [0, 1].

    Returns:
        Names, sorted.

    Raises:
        ValueError: a share above 0 and no blocks.
    """
    if share == 0.0:
        return ()
    if not blocks:
        raise ValueError(
            "depth must be 0 for a network without blocks that can go (a shortcut around layers of one "
            f"shape), got {share:g}"
        )
    norm = normalise({b.name: sum(layer_ms.get(layer, 0.0) for layer in b.layers) for b in blocks})
    order = sorted(blocks, key=lambda block: scores[block.name] / norm[block.name] ** beta)
    return tuple(sorted(block.name for block in order[: round(share * len(blocks))]))


def remove_blocks(model: nn.Module, blocks: Iterable[str]) -> nn.Module:
    """Put an identity in the place of each block, in place. Other layers keep their names.

    Raises:
        ValueError: the model has no module of that name.
    """
    from torch import nn

    blocks, names = tuple(blocks), {name for name, _ in model.named_modules()}
    if unknown := [name for name in blocks if name not in names]:
        raise ValueError(f"blocks must be modules of the model, got {', '.join(unknown[:3])}")
    for name in blocks:
        identity = nn.Identity()
        # Frameworks note on a module where its input comes from, and read it there.
        notes = {k: v for k, v in vars(model.get_submodule(name)).items() if isinstance(v, _PLAIN)}
        vars(identity).update({k: v for k, v in notes.items() if not k.startswith("_")})
        model.set_submodule(name, identity)
    return model


def without_blocks(plan: PruningPlan, groups: ChannelGroups, blocks: Iterable[str]) -> PruningPlan:
    """A plan of channels with blocks gone as well: what is left of it are the cuts of the other layers.

    A channel of a residual stream still goes from all layers that are left; a group that lies inside a block
    is gone with it.

    Args:
        groups: of the original model, as the plan was made for it.
        blocks: module paths.
    """
    gone = tuple(sorted(blocks))
    inside = tuple(f"{name}." for name in gone)
    left = {
        name: indices
        for name, indices in plan.removed.items()
        if not all(member.layer.startswith(inside) for member in groups.by_name[name].weighted)
    }
    layers = {name: cut for name, cut in plan.layers.items() if not name.startswith(inside)}
    return PruningPlan(plan.model_key, left, layers, gone)


def _calls(model: nn.Module, example: Tensor) -> dict[str, list[Tensor | None]]:
    """Module path to what each call of it got: one tensor, or None where the call was of another form or
    returned another shape.
    """
    import torch

    calls: dict[str, list[Tensor | None]] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            x = inputs[0] if len(inputs) == 1 else None
            fits = (
                isinstance(x, torch.Tensor) and isinstance(output, torch.Tensor) and x.shape == output.shape
            )
            calls.setdefault(name, []).append(x.clone() if fits and x is not None else None)

        return module.register_forward_hook(note)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return calls


def _layers(module: nn.Module, name: str) -> tuple[str, ...]:
    from torch import nn

    return tuple(
        f"{name}.{n}" for n, m in module.named_modules() if n and isinstance(m, (nn.Conv2d, nn.Linear))
    )


def _is_identity_without_weights(module: nn.Module, x: Tensor) -> bool:
    """Whether a block returns its input once its weights are zero; they are zero afterwards."""
    import torch

    for parameter in module.parameters():
        parameter.zero_()
    generator = torch.Generator().manual_seed(0)
    # Noise, because a dead map would make an identity of anything; positive behind a ReLU.
    noise = (
        torch.rand(x.shape, generator=generator)
        if bool((x >= 0).all())
        else (torch.randn(x.shape, generator=generator))
    )
    probe = x + noise.to(x)
    output = module(probe.clone())
    return isinstance(output, torch.Tensor) and torch.equal(output, probe)

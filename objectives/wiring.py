"""How a model's layers are wired, read from one forward pass: which layers make its output, which batch norm
follows which layer.

Works on autograd's graph, so it needs neither a tracer nor the model's source. Knows no task and no
framework's blocks.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_Layer = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Wiring:
    """What one forward pass showed.

    Attributes:
        outputs: convolutions and linear layers whose channels reach the model's output without another such
        layer between.
        batchnorms: layer to the batch norm that alone reads its output; both run once in a pass.
    """

    outputs: frozenset[str]
    batchnorms: dict[str, str]


def wiring(model: nn.Module, example: Tensor) -> Wiring:
    """Run `model` once on `example` and look at the graph. The model is not changed.

    Raises:
        ValueError: the model returns no tensor, or its output does not depend on any layer.
    """
    seen = _Pass.of(model, example)
    if not isinstance(seen.output, Tensor):
        raise ValueError(
            f"the model must return one tensor, got a {type(seen.output).__name__}; wrap it in the builder"
        )
    if seen.output.grad_fn is None:
        raise ValueError("the model's output must be differentiable, got a detached tensor")
    outputs = frozenset(
        _nearest(seen.output.grad_fn, {node: n for node, n in seen.made.items() if n in seen.layers})
    )
    if not outputs:
        raise ValueError("the model's output depends on no convolution or linear layer")
    return Wiring(outputs, seen.batchnorms())


def batchnorms(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Layer to the batch norm that alone reads its output, whatever structure of tensors the model returns.

    The model is run once and not changed. Layers that the output does not depend on are left out.
    """
    return _Pass.of(model, example).batchnorms()


@dataclass(frozen=True)
class _Pass:
    """One forward pass of a copy.

    Attributes:
        output: what the model returned.
        layers: names of convolutions and linear layers.
        runs: how often each layer and batch norm ran.
        made: node of the graph to the layer or batch norm that made it.
        read: layer or batch norm to the node that it read.
    """

    output: Any
    layers: frozenset[str]
    runs: Counter[str]
    made: dict[Any, str]
    read: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, example: Tensor) -> _Pass:
        runs: Counter[str] = Counter()
        made: dict[Any, str] = {}
        read: dict[str, Any] = {}
        # The caller may be inside `inference_mode`, where nothing has a graph.
        with torch.inference_mode(False), torch.enable_grad():
            twin = copy.deepcopy(model).eval().requires_grad_(True)
            names: dict[nn.Module, str] = {
                m: n for n, m in twin.named_modules() if isinstance(m, (*_Layer, _BatchNorm))
            }

            def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                name = names[module]
                runs[name] += 1
                made[output.grad_fn] = name
                read[name] = inputs[0].grad_fn if inputs else None

            for module in names:
                module.register_forward_hook(after)
            output = twin(example.detach().clone())
        layers = frozenset(n for m, n in names.items() if isinstance(m, _Layer))
        return cls(output, layers, runs, made, read)

    def batchnorms(self) -> dict[str, str]:
        readers: Counter[Any] = Counter()
        for node in _nodes([t.grad_fn for t in _tensors(self.output) if t.grad_fn is not None]):
            readers.update(following for following, _ in node.next_functions if following in self.made)
        return {
            self.made[node]: norm
            for norm, node in self.read.items()
            if norm not in self.layers
            and self.made.get(node) in self.layers
            and readers[node] == 1
            and self.runs[norm] == self.runs[self.made[node]] == 1
        }


def fuse_batchnorm(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy in eval mode with each batch norm folded into the layer it follows; `nn.Identity` takes its
    place.

    Layer names are kept. A batch norm that follows something else stays.
    """
    fused = copy.deepcopy(model).eval()
    for layer_name, norm_name in wiring(model, example).batchnorms.items():
        layer, norm = fused.get_submodule(layer_name), fused.get_submodule(norm_name)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue  # without running statistics it normalises by the batch itself
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            fused.set_submodule(layer_name, fuse_conv_bn_eval(layer, norm))
        elif isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            fused.set_submodule(layer_name, fuse_linear_bn_eval(layer, norm))
        else:
            continue
        fused.set_submodule(norm_name, nn.Identity())
    return fused


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _tensors(item)
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)


def _nodes(roots: Iterable[Any]) -> Iterator[Any]:
    """Every node of the graph behind `roots`, once."""
    seen = set(roots)
    waiting = list(seen)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _nearest(root: Any, made: dict[Any, str]) -> Iterator[str]:
    """Names of the layers met first on every path from `root`."""
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        if node in made:
            yield made[node]
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)

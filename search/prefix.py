"""The start of a forward pass that several networks have in common, computed once.

Networks that differ from one network in a few layers compute the same as that one up to the first of these
layers. The outputs of the modules before it are kept, for one place at a time, and handed out again. Works on
any network that calls the same modules in the same order whatever their widths; knows nothing of pruning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: A network's loss on one batch, as a number.
Loss = Callable[[nn.Module, Any], float]


class SharedPrefix:
    """Losses of networks that have their first layers in common with one network.

    The work of a loss is that of the layers from the first different one on, and going from one such place
    to one further on costs what lies between; so ask in the order in which the differing layers are run.

    Args:
        model: the network that the others are compared with; it is run, so its batch norm may move on.
        loss: of a network on one batch; calls the network once.
        batches: what the losses are summed over.

    Attributes:
        loss: sum over the batches, of the network itself.
    """

    def __init__(self, model: nn.Module, loss: Loss, batches: Sequence[Any]):
        self._model = model
        self._loss_of = loss
        self._batches = batches
        self._tape = _Tape()
        self._place = 0
        self._kept: list[dict[int, Tensor]] = [{} for _ in batches]
        self.loss = 0.0
        with torch.no_grad():
            for number, batch in enumerate(batches):
                with _watched(model, self._tape.record) if number == 0 else nullcontext():
                    self.loss += loss(model, batch)

    def loss_of(self, model: nn.Module) -> float:
        """Sum of the losses of another network over the batches, the very one that it has by itself."""
        place = self._tape.first_of(_different(self._model, model))
        if place is None:
            return self.loss
        with torch.no_grad():
            self._go_to(place)
            total = 0.0
            for batch, kept in zip(self._batches, self._kept, strict=True):
                with _watched(model, _Playback(self._tape, kept)):
                    total += self._loss_of(model, batch)
        return total

    def _go_to(self, place: int) -> None:
        """Keep what is done before a call of the tape, and only that."""
        if place == self._place:
            return
        if place < self._place:
            self._kept = [{} for _ in self._batches]
        wanted = self._tape.done_before(place)
        for number, batch in enumerate(self._batches):
            playback = _Playback(self._tape, self._kept[number], wanted, place)
            with _watched(self._model, playback), suppress(_ReachedError):
                self._loss_of(self._model, batch)
            self._kept[number] = playback.found
        self._place = place


class _Tape:
    """The calls of modules in one forward pass, numbered in the order in which they begin.

    Attributes:
        names: of the module called.
        ends: number of the first call after it and all calls inside it.
        gives_tensor: whether its output is a tensor, which can be kept.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ends: list[int] = []
        self.gives_tensor: list[bool] = []

    def record(self, name: str, run: Callable[[], Any]) -> Any:
        number = len(self.names)
        self.names.append(name)
        self.ends.append(0)
        self.gives_tensor.append(False)
        output = run()
        self.ends[number] = len(self.names)
        self.gives_tensor[number] = isinstance(output, Tensor)
        return output

    def first_of(self, names: set[str]) -> int | None:
        """The first call of any of these modules; None where none is called."""
        return next((number for number, name in enumerate(self.names) if name in names), None)

    def done_before(self, place: int) -> set[int]:
        """The calls that end before one begins, as few and as large as can be kept."""
        done: set[int] = set()
        number = 0
        while number < place:
            if self.gives_tensor[number] and self.ends[number] <= place:
                done.add(number)
                number = self.ends[number]
            else:
                number += 1
        return done


class _ReachedError(Exception):
    """The place that was wanted; ends a forward pass there."""


class _Playback:
    """Answers calls from what was kept, and keeps more on the way.

    Args:
        kept: call to output.
        wanted: calls to be kept.
        place: the call at which to end; by default none.
    """

    def __init__(
        self, tape: _Tape, kept: dict[int, Tensor], wanted: set[int] | None = None, place: float = math.inf
    ):
        self._tape = tape
        self._kept = kept
        self._wanted = wanted or set()
        self._place = place
        self._next = 0
        self.found = {number: output for number, output in kept.items() if number in self._wanted}

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:
        number = self._next
        if number == self._place:
            raise _ReachedError
        if number in self._kept:
            self._next = self._tape.ends[number]
            return self._kept[number].clone()  # what follows may well write into it
        self._next += 1
        output = run()
        if number in self._wanted:
            self.found[number] = output.clone()
        return output


@contextmanager
def _watched(model: nn.Module, around: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Have every module's forward go through `around`, by the module's name and what runs it."""

    def through(name: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return around(name, partial(plain, *args, **kwargs))

    before = []
    try:
        for name, module in model.named_modules():
            # Some networks have set a forward of the object's own already, to be put back.
            before.append((module, module.__dict__.get("forward")))
            object.__setattr__(module, "forward", partial(through, name, module.forward))
        yield
    finally:
        for module, own in before:
            if own is None:
                object.__delattr__(module, "forward")
            else:
                object.__setattr__(module, "forward", own)


def _different(one: nn.Module, other: nn.Module) -> set[str]:
    """Names of the modules whose own parameters are not equal."""
    modules = dict(other.named_modules())
    names = set()
    for name, module in one.named_modules():
        pairs = zip(module.parameters(recurse=False), modules[name].parameters(recurse=False), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            names.add(name)
    return names

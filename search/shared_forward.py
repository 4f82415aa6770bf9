"""What forward passes of a network have in common when a few of its layers change, computed once.

A network with other parameters in a few layers computes the same up to the first of these layers, and behind
it in every branch that does not see them. The outputs of such modules are kept and handed out again. Works on
any network that calls the same modules in the same order; knows nothing of pruning.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: A network's loss on one batch, as a number.
Loss = Callable[[nn.Module, Any], float]
#: What a module is called with.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class SharedForward:
    """Losses of one network with a few layers changed at a time.

    The work of a loss is that of the layers that see a difference, and going from one first difference to one
    further on costs what lies between; so ask in the order in which the differing layers are run.

    Args:
        model: the network; it is run, so its batch norm may move on.
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

    def loss_with(self, layers: Set[str], change: AbstractContextManager[object]) -> float:
        """Sum of the losses over the batches while the network is changed: the very one that it has then.

        Args:
            layers: the modules whose own parameters the change is about.
            change: entered for as long as it takes; leaves the network as it was.
        """
        different = self._tape.calls_of(layers)
        if not different:
            return self.loss
        with torch.no_grad():
            self._go_to(min(different))  # by the network as it is
            total = 0.0
            with change:
                for batch, kept in zip(self._batches, self._kept, strict=True):
                    with _watched(self._model, _Playback(self._tape, kept, different)):
                        total += self._loss_of(self._model, batch)
        return total

    def _go_to(self, place: int) -> None:
        """Keep what is done before a call of the tape, and what is known of branches behind it."""
        if place == self._place:
            return
        if place < self._place:
            self._kept = [{} for _ in self._batches]
        wanted = self._tape.done_before(place)
        for number, batch in enumerate(self._batches):
            recording = _Recording(self._tape, self._kept[number], wanted, place)
            with _watched(self._model, recording), suppress(_ReachedError):
                self._loss_of(self._model, batch)
            self._kept[number] = recording.found
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

    def record(self, name: str, inputs: Inputs, run: Callable[[], Any]) -> Any:
        number = len(self.names)
        self.names.append(name)
        self.ends.append(0)
        self.gives_tensor.append(False)
        output = run()
        self.ends[number] = len(self.names)
        self.gives_tensor[number] = isinstance(output, Tensor)
        return output

    def calls_of(self, names: Set[str]) -> list[int]:
        """The calls of any of these modules, ascending."""
        return [number for number, name in enumerate(self.names) if name in names]

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


class _Recording:
    """Runs the network up to a place, from what was kept before, and keeps what is done by then.

    Args:
        kept: call to output; calls behind the place stay as they are.
        wanted: calls to be kept.
        place: the call at which to end.
    """

    def __init__(self, tape: _Tape, kept: dict[int, Tensor], wanted: set[int], place: int):
        self._tape = tape
        self._kept = kept
        self._wanted = wanted
        self._place = place
        self._next = 0
        self.found = {n: output for n, output in kept.items() if n in wanted or n > place}

    def __call__(self, name: str, inputs: Inputs, run: Callable[[], Any]) -> Any:
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


class _Playback:
    """Runs the changed network, and leaves out what it has in common with the one that was kept.

    Args:
        kept: call to output, of all that ends before the first different call; outputs of branches that do
            not see the difference are added.
        different: calls of modules that differ, ascending.
    """

    def __init__(self, tape: _Tape, kept: dict[int, Tensor], different: Sequence[int]):
        self._tape = tape
        self._kept = kept
        self._different = different
        self._next = 0
        self._inside_same = False
        # Tensors known to hold what the unchanged network has there, and how often they had been written to.
        self._same: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def __call__(self, name: str, inputs: Inputs, run: Callable[[], Any]) -> Any:
        number = self._next
        end = self._tape.ends[number]
        if number in self._kept and (number < self._different[0] or self._is_same(number, end, inputs)):
            self._next = end
            return self._noted(self._kept[number].clone())  # what follows may well write into it
        self._next += 1
        if self._inside_same or not self._is_same(number, end, inputs):
            return run()
        self._inside_same = True
        try:
            output = run()
        finally:
            self._inside_same = False
        if not isinstance(output, Tensor):
            return output
        self._kept[number] = output.clone()
        return self._noted(output)

    def _noted(self, output: Tensor) -> Tensor:
        self._same[id(output)] = (weakref.ref(output), output._version)
        return output

    def _is_same(self, number: int, end: int, inputs: Inputs) -> bool:
        """Whether a call gives what it gives in the unchanged network: the same modules, the same inputs."""
        if bisect_left(self._different, number) < bisect_left(self._different, end):
            return False
        args, kwargs = inputs
        return bool(args) and not kwargs and all(map(self._holds_the_same, args))

    def _holds_the_same(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        known = self._same.get(id(value))
        return known is not None and known[0]() is value and known[1] == value._version


@contextmanager
def _watched(model: nn.Module, around: Callable[[str, Inputs, Callable[[], Any]], Any]) -> Iterator[None]:
    """Have every module's forward go through `around`: the module's name, what it is given, what runs it."""

    def through(name: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return around(name, (args, kwargs), partial(plain, *args, **kwargs))

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

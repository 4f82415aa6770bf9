"""The best weights seen so far: a short training can end worse than it was on the way, or than it began."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class BestWeights:
    """Keeps a copy of the state with the highest accuracy offered."""

    def __init__(self) -> None:
        self.accuracy = -1.0
        self._state: dict[str, Tensor] = {}

    def offer(self, model: nn.Module, accuracy: float) -> None:
        """Remember the model's state if its accuracy is higher than any before."""
        if accuracy > self.accuracy:
            self.accuracy = accuracy
            self._state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def restore(self, model: nn.Module) -> nn.Module:
        """Give a model of the same architecture the best state, in place.

        Raises:
            RuntimeError: nothing was offered, or the architecture differs.
        """
        if not self._state:
            raise RuntimeError("no weights were offered yet")
        model.load_state_dict(self._state)
        return model

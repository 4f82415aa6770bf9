"""The input that models are timed with: random, the same every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def example_images(shape: list[int]) -> NDArray[np.float32]:
    """Uniform in [0, 1), of the model's input shape, `(batch, channels, height, width)`."""
    import numpy as np

    return np.random.default_rng(0).random(shape, dtype=np.float32)

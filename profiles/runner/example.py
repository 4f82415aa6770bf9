"""The input that models are timed with: smooth like a photograph, the same every time.

Noise would not do: networks trained on photographs answer it with activations in the hundreds, whose SiLU is
too small for a normal number, and such numbers slow down a runtime that does not flush them to zero. In ncnn
they took up to 8% of a pruned YOLOv8n's time and nothing of another's; its own photographs hardly have any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Mean and standard deviation of pixels between 0 and 1: an evenly lit scene.
LEVEL, CONTRAST = 0.5, 0.1
#: How fast amplitudes fall with the frequency; photographs have 1 to 1.5.
FALL = 1.5
#: Share of the variance that is brightness, common to all channels; the rest is colour.
BRIGHTNESS = 0.9


def example_images(shape: list[int]) -> NDArray[np.float32]:
    """Values in [0, 1] with the spectrum of photographs.

    Args:
        shape: of the model's input, `(batch, channels, height, width)`.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    batch, channels, height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def smooth(planes: int) -> NDArray[np.float64]:
        spectrum = np.fft.rfft2(rng.standard_normal((batch, planes, height, width))) / frequency**FALL
        values = np.fft.irfft2(spectrum, s=(height, width))
        scaled: NDArray[np.float64] = values / max(values.std(), 1e-12)
        return scaled

    values = BRIGHTNESS**0.5 * smooth(1) + (1 - BRIGHTNESS) ** 0.5 * smooth(channels)
    images: NDArray[np.float32] = np.clip(LEVEL + CONTRAST * values, 0, 1).astype(np.float32)
    return images

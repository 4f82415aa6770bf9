"""The input that models are timed with: no noise, which some networks answer with very small numbers."""

from __future__ import annotations

import numpy as np
import pytest

from profiles.runner.example import CONTRAST, LEVEL, example_images


@pytest.mark.parametrize("shape", [[1, 3, 320, 320], [2, 1, 33, 64]])
def test_pixels_are_those_of_a_smooth_scene(shape: list[int]) -> None:
    images = example_images(shape)
    assert images.dtype == np.float32
    assert list(images.shape) == shape
    assert 0 <= images.min() <= images.max() <= 1
    assert images.mean() == pytest.approx(LEVEL, abs=0.02)
    assert images.std() == pytest.approx(CONTRAST, rel=0.2)
    # Neighbouring pixels are much alike; of noise they would differ by 1.4 standard deviations.
    assert np.diff(images, axis=-1).std() < 0.5 * CONTRAST
    assert np.diff(images, axis=-2).std() < 0.5 * CONTRAST


def test_images_are_the_same_every_time_and_for_the_smallest_input() -> None:
    np.testing.assert_array_equal(example_images([1, 3, 32, 32]), example_images([1, 3, 32, 32]))
    assert np.isfinite(example_images([1, 1, 1, 1])).all()


def test_colours_differ_a_little() -> None:
    red, green, _ = example_images([1, 3, 64, 64])[0]
    assert 0 < np.abs(red - green).mean() < CONTRAST

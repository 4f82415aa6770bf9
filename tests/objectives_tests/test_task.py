"""What a recovery decides by itself."""

from __future__ import annotations

import pytest

from objectives.task import Recovery


@pytest.mark.parametrize(
    ("images", "batch"), [(1, 2), (205, 2), (399, 2), (400, 4), (1599, 8), (1600, 16), (100_000, 16)]
)
def test_an_epoch_has_a_hundred_steps_where_the_batch_may_be_so_small(images: int, batch: int) -> None:
    assert Recovery().batch_for(images, 2, 16) == batch


def test_a_batch_that_is_given_stays() -> None:
    assert Recovery(batch=7).batch_for(10_000, 2, 16) == 7


def test_an_accuracy_says_nothing_of_a_model_that_is_changed_first() -> None:
    with pytest.raises(ValueError, match="accuracy must be None where reestimate_images is above 0"):
        Recovery(accuracy=0.5)
    assert Recovery(accuracy=0.5, reestimate_images=0).accuracy == 0.5

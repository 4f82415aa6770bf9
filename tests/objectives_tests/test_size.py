from __future__ import annotations

import pytest
import torch
from torch import nn

from objectives.size import count_macs, count_params, model_size_bytes


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def test_counts_equal_the_ones_by_hand() -> None:
    model = small()
    assert count_params(model) == (3 * 9 * 8 + 8) + (8 + 8) + 2 * 9 * 8 + (8 * 5 + 5)
    # 16x16 input, 8x8 maps: 27 products per value of the first, 2 * 9 of the grouped one.
    assert count_macs(model, (3, 16, 16)) == 64 * 8 * 27 + 64 * 8 * 18 + 8 * 5
    # float32, plus batch norm's two statistics and its int64 counter
    assert model_size_bytes(model) == 4 * (count_params(model) + 16) + 8


def test_the_batch_does_not_count() -> None:
    assert count_macs(small(), (4, 3, 16, 16)) == count_macs(small(), (3, 16, 16))


def test_a_transposed_convolution_counts_its_inputs() -> None:
    assert count_macs(nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5)) == 5 * 5 * 4 * 6 * 2 * 2


def test_a_layer_that_runs_twice_counts_twice_and_its_parameters_once() -> None:
    layer = nn.Conv2d(4, 4, 1, bias=False)
    twice = nn.Sequential(layer, layer)
    assert count_macs(twice, (4, 3, 3)) == 2 * count_macs(layer, (4, 3, 3))
    assert count_params(twice) == count_params(layer) == 16
    assert model_size_bytes(twice) == 64


def test_counting_leaves_the_model_as_it_was() -> None:
    model = small().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, (3, 16, 16))
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_counting_removes_its_hooks_where_the_model_fails() -> None:
    model = small().train()
    with pytest.raises(RuntimeError):
        count_macs(model, (1, 16, 16))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_resnet18_has_its_published_figures() -> None:
    from torchvision.models import resnet18

    model = resnet18()
    assert count_params(model) == 11_689_512
    assert count_macs(model, (1, 3, 224, 224)) == 1_814_073_344


def test_an_impossible_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"input_shape must be .* got \(224, 224\)"):
        count_macs(small(), (224, 224))

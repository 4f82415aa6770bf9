"""Classic classifiers from torchvision's parts, for `model: {builder: "networks:NAME", arguments: {...}}`.

Each function takes `classes` and `small`. With `small: false` the network is the published one for images of
about 224 pixels and takes torchvision's weights where there are some (`classes: 1000`). With `small: true` it
is the usual variant for 32 pixels: the first reductions are left out, and large hidden layers are smaller.
Layer names are torchvision's either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torchvision
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import MobileNetV2

#: (expansion, out, blocks, stride) of each stage: Sandler et al. 2018, table 2.
_MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
#: (expansion, kernel, stride, in, out, blocks) of each stage: Tan & Le 2019, table 1.
_EFFICIENTNET_B0 = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)


def resnet18(classes: int = 10, small: bool = False) -> nn.Module:
    """He et al. 2016."""
    return _resnet(torchvision.models.resnet18, classes, small)


def resnet50(classes: int = 10, small: bool = False) -> nn.Module:
    """He et al. 2016, stride in the 3x3 convolutions."""
    return _resnet(torchvision.models.resnet50, classes, small)


def _resnet(build: Callable[..., nn.Module], classes: int, small: bool) -> nn.Module:
    model = build(num_classes=classes)
    if small:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def mobilenet_v2(classes: int = 10, small: bool = False) -> nn.Module:
    """Sandler et al. 2018."""
    stages = [list(row) for row in _MOBILENET_V2]
    if small:
        stages[1][3] = 1
    model = MobileNetV2(num_classes=classes, inverted_residual_setting=stages)
    if small:
        model.features[0][0].stride = (1, 1)
    return model


def efficientnet_lite0(classes: int = 10, small: bool = False) -> nn.Module:
    """EfficientNet-B0 without squeeze-and-excitation and with ReLU6: EfficientNet-Lite0, TensorFlow 2020."""
    block = functools.partial(MBConv, se_layer=lambda *_, **__: nn.Identity())
    stages = [
        MBConvConfig(expand, kernel, 1 if small and i == 1 else stride, *rest, block=block)
        for i, (expand, kernel, stride, *rest) in enumerate(_EFFICIENTNET_B0)
    ]
    model = EfficientNet(stages, dropout=0.2, num_classes=classes)
    if small:
        model.features[0][0].stride = (1, 1)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.SiLU):
            model.set_submodule(name, nn.ReLU6(inplace=True))
    return model


def vgg16(classes: int = 10, small: bool = False) -> nn.Module:
    """Simonyan & Zisserman 2015, with batch norm."""
    model = torchvision.models.vgg16_bn(num_classes=classes)
    if small:
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(512, classes)
        )
    return model


def alexnet(classes: int = 10, small: bool = False) -> nn.Module:
    """Krizhevsky 2014, one tower, without batch norm."""
    model = torchvision.models.alexnet(num_classes=classes)
    if small:
        model.features[0] = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        model.features[2] = nn.MaxPool2d(2)
        model.features[5] = nn.MaxPool2d(2)
        model.features[12] = nn.MaxPool2d(2)
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(256 * 4, 1024), nn.ReLU(inplace=True),
            nn.Dropout(), nn.Linear(1024, 1024), nn.ReLU(inplace=True), nn.Linear(1024, classes),
        )  # fmt: skip
    return model

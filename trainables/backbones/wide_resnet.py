"""Wide residual nets (Zagoruyko & Komodakis 2016, arXiv 1605.07146): WRN-28-10, 36.5 million parameters, and WRN-16-4.

The blocks are those of He et al.'s pre-activation nets. The paper's optional dropout between the two convolutions of a
block is left out; `dropout` acts before the classifier, as in every net here.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from trainables.backbones.layers import IMAGENET_STEM_FROM, Dropout, initialize_convolutions
from trainables.backbones.preactivation import PreActivationBlock

STEM_WIDTH = 16
STAGE_WIDTHS = (16, 32, 64)  # times the widening factor


def wide_resnet(
    *, depth: int, widening: int, num_classes: int, dropout: float, image_size: int, channels: int
) -> nn.Module:
    """`depth` - 4 convolutions in three stages (so a multiple of 6), `widening` times as wide as those of a ResNet.

    Below 96 pixels the paper's stem (3x3, stride 1); from 96 on the ImageNet one (7x7, stride 2, max pooling).
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, STEM_WIDTH, 3, padding=1, bias=False)]
    if image_size >= IMAGENET_STEM_FROM:
        layers = [nn.Conv2d(channels, STEM_WIDTH, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, 2, padding=1)]
    inputs = STEM_WIDTH
    for index, stage_width in enumerate(STAGE_WIDTHS):
        width = widening * stage_width
        blocks = [PreActivationBlock(inputs, width, 2 if index else 1)]
        blocks += [PreActivationBlock(width, width, 1) for _ in range((depth - 4) // 6 - 1)]
        layers.append(nn.Sequential(*blocks))
        inputs = width
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, Dropout(dropout), nn.Linear(inputs, num_classes))
    initialize_convolutions(net)
    return net


wide_resnet28_10 = partial(wide_resnet, depth=28, widening=10)
wide_resnet16_4 = partial(wide_resnet, depth=16, widening=4)

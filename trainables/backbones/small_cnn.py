"""A small plain convolutional net: about 1,300 images a second of 32x32 in training, on a core of an AMD EPYC."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from trainables.backbones.layers import Dropout

WIDTHS = (32, 64, 128)
GROUPS = 8


def _stride(image_size: int) -> int:
    return 2 if image_size >= 64 else 1


def _poolings(image_size: int) -> int:
    side = max(1, -(-image_size // _stride(image_size)))
    return min(len(WIDTHS) - 1, side.bit_length() - 1)


def smallest_image(built_for: int) -> int:
    """Side in pixels of the smallest image that a net built for a size takes: 4 from 4 pixels on, 7 from 64 on."""
    return _stride(built_for) * (2 ** _poolings(built_for) - 1) + 1


def small_cnn(
    *,
    num_classes: int,
    dropout: float,
    image_size: int,
    channels: int,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Module:
    """Three 3x3 convolutions with batch norm and ReLU, max pooling between, global average pooling.

    From 64 pixels on the first convolution has stride 2.
    """
    layers: list[nn.Module] = []
    for index, width in enumerate(WIDTHS):
        stride = 1 if index else _stride(image_size)
        layers += [
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
        ]
        if index < _poolings(image_size):
            layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Dropout(dropout), nn.Linear(channels, num_classes)
    )


def small_cnn_groupnorm(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """The same with group norm (Wu & He 2018): what it makes of an image does not depend on the others of its batch."""
    return small_cnn(
        num_classes=num_classes, dropout=dropout, image_size=image_size, channels=channels, norm=_group_norm
    )


def _group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, width)

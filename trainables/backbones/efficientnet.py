"""EfficientNets (Tan & Le 2019, arXiv 1905.11946), torchvision's: B0, B3 and B4.

From 96 pixels on as published, total stride 32. From 48 to 95 pixels the stem has stride 1, and below 48 the first
strided stage as well: a 32x32 image then ends as a 4x4 map, like a 128x128 one in the published net. The weights have
the same shapes at every image size.

Stochastic depth (Huang et al. 2016) stays as torchvision has it: a residual branch is dropped with a probability that
grows with depth from 0 to 0.2. It is part of the architecture: `dropout` and `set_dropout` leave it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision import models

from trainables.backbones.layers import Dropout, fit_stem


def efficientnet(
    build: Callable[..., Any], *, num_classes: int, dropout: float, image_size: int, channels: int
) -> nn.Module:
    """One of torchvision's, with strides that fit the image size."""
    net = build(weights=None, num_classes=num_classes)
    fit_stem(net.features, image_size=image_size, channels=channels)
    net.classifier[0] = Dropout(dropout)
    out: nn.Module = net
    return out


efficientnet_b0 = partial(efficientnet, models.efficientnet_b0)
efficientnet_b3 = partial(efficientnet, models.efficientnet_b3)
efficientnet_b4 = partial(efficientnet, models.efficientnet_b4)

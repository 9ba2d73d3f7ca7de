"""ConvNeXt-T (Liu et al. 2022, arXiv 2201.03545), torchvision's.

Its stem cuts the image into patches of 4x4 pixels from 96 pixels on, 2x2 from 48 and 1x1 below: a 32x32 image then ends
as a 4x4 map. Three unpadded 2x2 convolutions of stride 2 follow, hence at least 8 pixels.

Stochastic depth stays as torchvision has it (0 to 0.1, growing with depth): `dropout` and `set_dropout` leave it alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision import models

from trainables.backbones.layers import Dropout, halvings_left_out

WIDTH = 96  # of the stem


def _patch(image_size: int) -> int:
    return 4 >> halvings_left_out(image_size)


def smallest_image(built_for: int) -> int:
    """Side in pixels of the smallest image that a net built for a size takes: three halvings of a map of patches."""
    return 8 * _patch(built_for)


def convnext_tiny(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """torchvision's, with a patch size that fits the image size and a dropout before the classifier."""
    net: Any = models.convnext_tiny(weights=None, num_classes=num_classes)
    patch = _patch(image_size)
    if (channels, patch) != (3, 4):
        stem = nn.Conv2d(channels, WIDTH, patch, stride=patch)
        nn.init.trunc_normal_(stem.weight, std=0.02)
        stem.bias = nn.Parameter(torch.zeros(WIDTH))
        net.features[0][0] = stem
    net.classifier.insert(2, Dropout(dropout))
    out: nn.Module = net
    return out

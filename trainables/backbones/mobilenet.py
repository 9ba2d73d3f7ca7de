"""MobileNetV3-Small (Howard et al. 2019, arXiv 1905.02244), torchvision's."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision import models

from trainables.backbones.layers import Dropout, fit_stem

# torchvision's momentum of 0.01 suits its 600 epochs of ImageNet; after 100 steps the running statistics that are used
# in evaluation would still be 37% their initial values. PyTorch's default of 0.1 leaves 0.003%.
NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.1)


def mobilenet_v3_small(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """Below 96 pixels the stem has stride 1, and below 48 the first block as well; the weights keep their shapes."""
    net: Any = models.mobilenet_v3_small(weights=None, num_classes=num_classes, norm_layer=NORM)
    fit_stem(net.features, image_size=image_size, channels=channels)
    net.classifier[2] = Dropout(dropout)
    out: nn.Module = net
    return out

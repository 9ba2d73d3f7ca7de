"""ResNets (He et al. 2016, arXiv 1512.03385), torchvision's, with a stem chosen by image size.

18 and 34 layers have basic blocks; 50 and 101 have bottlenecks with the stride on the 3x3 convolution ("ResNet V1.5").
ResNet-50 with the CIFAR stem has 23,705,252 parameters at 100 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision import models

from trainables.backbones.layers import IMAGENET_STEM_FROM, Dropout


def resnet(build: Callable[..., Any], *, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """One of torchvision's; below 96 pixels with the CIFAR stem (3x3, stride 1, no max pooling)."""
    net = build(weights=None, num_classes=num_classes)
    if image_size < IMAGENET_STEM_FROM:
        net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.fc = nn.Sequential(Dropout(dropout), nn.Linear(net.fc.in_features, num_classes))
    out: nn.Module = net
    return out


resnet18 = partial(resnet, models.resnet18)
resnet34 = partial(resnet, models.resnet34)
resnet50 = partial(resnet, models.resnet50)
resnet101 = partial(resnet, models.resnet101)

"""ResNets (He et al. 2016), torchvision's, with a stem chosen by image size."""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18

IMAGENET_STEM_FROM = 96  # pixels


def resnet18(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """ResNet-18; below 96 pixels with the CIFAR stem (3x3, stride 1, no max pooling)."""
    net = torchvision_resnet18(weights=None, num_classes=num_classes)
    if image_size < IMAGENET_STEM_FROM:
        net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(net.fc.in_features, num_classes))
    out: nn.Module = net
    return out

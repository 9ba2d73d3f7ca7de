"""OptimizedCIFAR10Net200K: a depthwise-separable residual net, 150,690 parameters at 10 classes and 3 channels.

A published CIFAR-10 run claims 87.42% for it; unproven (its source contradicts itself).
"""

from __future__ import annotations

from torch import Tensor, nn

from trainables.backbones.layers import IMAGENET_STEM_FROM, Dropout

STEM_WIDTH = 20
STAGES = ((20, 1), (40, 2), (80, 2), (160, 2))  # width and stride of the first of two blocks


def _separable(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class SeparableBlock(nn.Module):
    """Two depthwise-separable 3x3 convolutions around a residual, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_separable(inputs, outputs, stride), nn.ReLU(inplace=True), *_separable(outputs, outputs, 1)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, inputs, S, S] -> [N, outputs, S/stride, S/stride]."""
        out: Tensor = self.activation(self.body(x_NCHW) + self.shortcut(x_NCHW))
        return out


def efficient200k(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """Stem, four stages of two blocks, global average pooling; a stride-2 stem from 96 pixels on."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, STEM_WIDTH, 3, stride=2 if image_size >= IMAGENET_STEM_FROM else 1, padding=1, bias=False),
        nn.BatchNorm2d(STEM_WIDTH),
        nn.ReLU(inplace=True),
    ]
    width = STEM_WIDTH
    for outputs, stride in STAGES:
        layers += [SeparableBlock(width, outputs, stride), SeparableBlock(outputs, outputs, 1)]
        width = outputs
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Dropout(dropout), nn.Linear(width, num_classes)
    )

"""Pre-activation residual nets of basic blocks (He et al. 2016, "Identity mappings in deep residual networks").

`resnet44v2`: three stages of seven blocks, 44 layers with weights and 2.7 million parameters. A source of the
published runs also lists a fourth stage of three blocks: `resnet44v2_four_stages`.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from trainables.backbones.layers import IMAGENET_STEM_FROM, Dropout, initialize_convolutions

STAGES = ((32, 7), (64, 7), (128, 7))  # width and number of blocks
FOURTH_STAGE = (256, 3)


class PreActivationBlock(nn.Module):
    """Norm, ReLU and 3x3 convolution, twice, around an identity; projected by a 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.projection: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, inputs, S, S] -> [N, outputs, S/stride, S/stride]."""
        activated = self.relu(self.norm1(x_NCHW))
        shortcut = x_NCHW if self.projection is None else self.projection(activated)
        out: Tensor = self.conv2(self.relu(self.norm2(self.conv1(activated)))) + shortcut
        return out


def resnet44v2(
    *, num_classes: int, dropout: float, image_size: int, channels: int, stages: tuple[tuple[int, int], ...] = STAGES
) -> nn.Module:
    """Stem, stages of pre-activation blocks, a last norm and ReLU, global average pooling, dropout, classifier.

    The stem is a 3x3 convolution, of stride 2 from 96 pixels on.
    """
    width = stages[0][0]
    stride = 2 if image_size >= IMAGENET_STEM_FROM else 1
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)]
    for index, (outputs, blocks) in enumerate(stages):
        for block in range(blocks):
            layers.append(PreActivationBlock(width, outputs, 2 if index and not block else 1))
            width = outputs
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, Dropout(dropout), nn.Linear(width, num_classes))
    initialize_convolutions(net)
    return net


resnet44v2_four_stages = partial(resnet44v2, stages=(*STAGES, FOURTH_STAGE))

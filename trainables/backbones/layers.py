"""Layers and stem rules that several families share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_STEM_FROM = 96  # pixels: from here on the stem is the published ImageNet one


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose probability is a tensor.

    A Python number would be a constant of a compiled or captured step, and a trial with another one would compile
    again; a tensor is read when the step runs, so that `set_dropout` changes it in place.
    """

    probability: Tensor

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.register_buffer("probability", torch.tensor(float(probability)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """In training, each value is 0 with the probability and else scaled to keep the mean."""
        if not self.training:
            return x
        kept = torch.rand_like(x) >= self.probability
        return x * kept / (1 - self.probability)


def set_dropout(net: nn.Module, probability: float) -> None:
    """Give every `Dropout` of a network another probability, in place."""
    for module in net.modules():
        if isinstance(module, Dropout):
            module.probability.fill_(probability)


def halvings_left_out(image_size: int) -> int:
    """How many of the first halvings of a net of total stride 32 to leave out: 0 from 96 pixels, 1 from 48, 2 below.

    Images of 32, 64 and 128 pixels then all end as a map of 4x4.
    """
    if image_size >= IMAGENET_STEM_FROM:
        return 0
    return 1 if image_size >= IMAGENET_STEM_FROM // 2 else 2


def fit_stem(features: nn.Sequential, *, image_size: int, channels: int) -> None:
    """Fit the `features` of a torchvision mobile net, in place, to small images and to any number of channels.

    The first `halvings_left_out(image_size)` convolutions of stride 2 get stride 1; the weights keep their shapes.
    """
    convolutions = [module for module in features.modules() if isinstance(module, nn.Conv2d)]
    strided = [convolution for convolution in convolutions if convolution.stride != (1, 1)]
    for convolution in strided[: halvings_left_out(image_size)]:
        convolution.stride = (1, 1)
    first = convolutions[0]
    if channels != first.in_channels:
        first.in_channels = channels
        first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
        nn.init.kaiming_normal_(first.weight, mode="fan_out")


def initialize_convolutions(net: nn.Module) -> None:
    """Draw every convolution's weights as He et al. 2015 have it, from the number of outputs."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

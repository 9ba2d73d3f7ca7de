"""The networks. Each takes float images [N, C, S, S] and gives logits [N, num_classes]; one file a family."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from results.schema import UsageError
from trainables.backbones.efficient200k import efficient200k
from trainables.backbones.preactivation import resnet44v2, resnet44v2_four_stages
from trainables.backbones.resnet import resnet18
from trainables.backbones.small_cnn import small_cnn


class Backbone(Protocol):
    """Builds a network with freshly initialized weights (from torch's global generator)."""

    def __call__(self, *, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
        """`dropout`: probability before the classifier. `image_size`: side in pixels, for the choice of stem."""


BACKBONES: dict[str, Backbone] = {
    "small_cnn": small_cnn,
    "efficient200k": efficient200k,
    "resnet18": resnet18,
    "resnet44v2": resnet44v2,
    "resnet44v2_four_stages": resnet44v2_four_stages,
}


def check_backbone(name: str) -> None:
    """Raise UsageError, listing the choices, when there is no backbone of that name."""
    if name not in BACKBONES:
        raise UsageError(f"there is no backbone {name!r}; there are {', '.join(BACKBONES)}")

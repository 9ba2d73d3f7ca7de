"""The networks. Each takes float images [N, C, S, S] and gives logits [N, num_classes]; one file a family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from results.schema import UsageError
from trainables.backbones.convnext import convnext_tiny
from trainables.backbones.convnext import smallest_image as convnext_smallest
from trainables.backbones.efficient200k import efficient200k
from trainables.backbones.efficientnet import efficientnet_b0, efficientnet_b3, efficientnet_b4
from trainables.backbones.mobilenet import mobilenet_v3_small
from trainables.backbones.preactivation import resnet44v2, resnet44v2_four_stages
from trainables.backbones.resnet import resnet18, resnet34, resnet50, resnet101
from trainables.backbones.small_cnn import small_cnn, small_cnn_groupnorm
from trainables.backbones.small_cnn import smallest_image as small_cnn_smallest
from trainables.backbones.speedrun import (
    LARGE,
    MEDIUM,
    WhitenedConv,
    speedrun_cnn,
    speedrun_cnn_large,
    speedrun_cnn_medium,
)
from trainables.backbones.speedrun import smallest_image as speedrun_smallest
from trainables.backbones.wide_resnet import wide_resnet16_4, wide_resnet28_10


class Backbone(Protocol):
    """Builds a network with freshly initialized weights (from torch's global generator)."""

    def __call__(self, *, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
        """`dropout`: probability before the classifier. `image_size`: side in pixels, for the choice of stem."""


BACKBONES: dict[str, Backbone] = {
    "small_cnn": small_cnn,
    "efficient200k": efficient200k,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet44v2": resnet44v2,
    "resnet44v2_four_stages": resnet44v2_four_stages,
    "wide_resnet16_4": wide_resnet16_4,
    "wide_resnet28_10": wide_resnet28_10,
    "efficientnet_b0": efficientnet_b0,
    "efficientnet_b3": efficientnet_b3,
    "efficientnet_b4": efficientnet_b4,
    "convnext_tiny": convnext_tiny,
    "mobilenet_v3_small": mobilenet_v3_small,
    "speedrun_cnn": speedrun_cnn,
    "speedrun_cnn_medium": speedrun_cnn_medium,
    "speedrun_cnn_large": speedrun_cnn_large,
    "small_cnn_groupnorm": small_cnn_groupnorm,
}

# Of a net built for a size; the others pad, and take a single pixel.
SMALLEST_IMAGES: dict[str, Callable[[int], int]] = {
    "small_cnn": small_cnn_smallest,
    "small_cnn_groupnorm": small_cnn_smallest,
    "convnext_tiny": convnext_smallest,
    "speedrun_cnn": speedrun_smallest,
    "speedrun_cnn_medium": partial(speedrun_smallest, size=MEDIUM),
    "speedrun_cnn_large": partial(speedrun_smallest, size=LARGE),
}


def smallest_image(name: str, *, built_for: int = 1) -> int:
    """Side in pixels of the smallest image on which a backbone can be trained, in batches of two or more.

    A net built for large images may need larger ones than a net built for small images: `built_for` is the image size
    given to the builder. Raises UsageError for an unknown name.
    """
    check_backbone(name)
    return SMALLEST_IMAGES[name](built_for) if name in SMALLEST_IMAGES else 1


def check_backbone(name: str, *, image_size: int | None = None, built_for: int | None = None) -> None:
    """Raise UsageError, naming the choices, for an unknown backbone or one whose maps would vanish at that size.

    `built_for`: the image size given to the builder, where smaller images come first (progressive resizing).
    """
    if name not in BACKBONES:
        raise UsageError(f"there is no backbone {name!r}; there are {', '.join(BACKBONES)}")
    if image_size is None:
        return
    size = built_for or image_size
    smallest = {other: smallest_image(other, built_for=size) for other in BACKBONES}
    if image_size < smallest[name]:
        fitting = [other for other in BACKBONES if image_size >= smallest[other]]
        built = f", built for {size} pixels," if size != image_size else ""
        raise UsageError(
            f"backbone {name}{built} takes images of {smallest[name]} pixels or more, not {image_size}; "
            f"use larger images or one of {', '.join(fitting)}"
        )


def takes_images(net: nn.Module) -> bool:
    """Whether `initialize_from_images` does anything."""
    return any(isinstance(module, WhitenedConv) for module in net.modules())


def initialize_from_images(net: nn.Module, images_NCHW: Tensor) -> None:
    """Set the weights that are computed from training images, not trained; does nothing for nets without such weights.

    `images_NCHW` are normalized training images, as the net is given them; a few thousand suffice. Deterministic.
    """
    for module in net.modules():
        if isinstance(module, WhitenedConv):
            module.whiten(images_NCHW)


def parts(net: nn.Module) -> list[nn.Module]:
    """The network cut into parts from the input to the classifier, which is the last; each parameter is in one of them.

    A part is a block or a stage of the net, or a lone convolution, with the norms that follow it.
    """
    cut: list[list[nn.Module]] = []
    for name, child in net.named_children():
        for module in child.children() if name == "features" else [child]:
            has_weights = any(parameter.ndim > 1 for parameter in module.parameters())
            if has_weights or not cut:
                cut.append([module])
            elif next(module.parameters(), None) is not None:
                cut[-1].append(module)
    return [modules[0] if len(modules) == 1 else nn.ModuleList(modules) for modules in cut]

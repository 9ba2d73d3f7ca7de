"""The networks. Each takes float images [N, C, S, S] and gives logits [N, num_classes]; one file a family.

A family's file is imported when one of its networks is built: the torchvision that some of them need takes 3 s of a CPU
to import, and to know which networks there are does not even need torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from results.schema import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Backbone(Protocol):
    """Builds a network with freshly initialized weights (from torch's global generator)."""

    def __call__(self, *, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
        """`dropout`: probability before the classifier. `image_size`: side in pixels, for the choice of stem."""


def _from(family: str, name: str) -> Callable[..., Any]:
    """Return a function of a family's file that imports the file when it is called."""

    def call(*args: Any, **arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{family}"), name)(*args, **arguments)

    return call


BACKBONES: dict[str, Backbone] = {
    "small_cnn": _from("small_cnn", "small_cnn"),
    "efficient200k": _from("efficient200k", "efficient200k"),
    "resnet18": _from("resnet", "resnet18"),
    "resnet34": _from("resnet", "resnet34"),
    "resnet50": _from("resnet", "resnet50"),
    "resnet101": _from("resnet", "resnet101"),
    "resnet44v2": _from("preactivation", "resnet44v2"),
    "resnet44v2_four_stages": _from("preactivation", "resnet44v2_four_stages"),
    "wide_resnet16_4": _from("wide_resnet", "wide_resnet16_4"),
    "wide_resnet28_10": _from("wide_resnet", "wide_resnet28_10"),
    "efficientnet_b0": _from("efficientnet", "efficientnet_b0"),
    "efficientnet_b3": _from("efficientnet", "efficientnet_b3"),
    "efficientnet_b4": _from("efficientnet", "efficientnet_b4"),
    "convnext_tiny": _from("convnext", "convnext_tiny"),
    "mobilenet_v3_small": _from("mobilenet", "mobilenet_v3_small"),
    "speedrun_cnn": _from("speedrun", "speedrun_cnn"),
    "speedrun_cnn_medium": _from("speedrun", "speedrun_cnn_medium"),
    "speedrun_cnn_large": _from("speedrun", "speedrun_cnn_large"),
    "small_cnn_groupnorm": _from("small_cnn", "small_cnn_groupnorm"),
}

# Of a net built for a size; the others pad, and take a single pixel.
SMALLEST_IMAGES: dict[str, Callable[[int], int]] = {
    "small_cnn": _from("small_cnn", "smallest_image"),
    "small_cnn_groupnorm": _from("small_cnn", "smallest_image"),
    "convnext_tiny": _from("convnext", "smallest_image"),
    "speedrun_cnn": _from("speedrun", "smallest_image"),
    "speedrun_cnn_medium": _from("speedrun", "smallest_image_medium"),
    "speedrun_cnn_large": _from("speedrun", "smallest_image_large"),
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
    smallest = smallest_image(name, built_for=size)
    if image_size < smallest:
        fitting = [other for other in BACKBONES if image_size >= smallest_image(other, built_for=size)]
        built = f", built for {size} pixels," if size != image_size else ""
        raise UsageError(
            f"backbone {name}{built} takes images of {smallest} pixels or more, not {image_size}; "
            f"use larger images or one of {', '.join(fitting)}"
        )


def takes_images(net: nn.Module) -> bool:
    """Whether `initialize_from_images` does anything."""
    return any(hasattr(module, "whiten") for module in net.modules())


def initialize_from_images(net: nn.Module, images_NCHW: Tensor) -> None:
    """Set the weights that are computed from training images, not trained; does nothing for nets without such weights.

    `images_NCHW` are normalized training images, as the net is given them; a few thousand suffice. Deterministic.
    """
    for module in net.modules():
        whiten: Any = getattr(module, "whiten", None)
        if whiten is not None:
            whiten(images_NCHW)


def parts(net: nn.Module) -> list[nn.Module]:
    """The network cut into parts from the input to the classifier, which is the last; each parameter is in one of them.

    A part is a block or a stage of the net, or a lone convolution, with the norms that follow it.
    """
    from torch import nn  # not needed to know which networks there are

    cut: list[list[nn.Module]] = []
    for name, child in net.named_children():
        for module in child.children() if name == "features" else [child]:
            has_weights = any(parameter.ndim > 1 for parameter in module.parameters())
            if has_weights or not cut:
                cut.append([module])
            elif next(module.parameters(), None) is not None:
                cut[-1].append(module)
    return [modules[0] if len(modules) == 1 else nn.ModuleList(modules) for modules in cut]

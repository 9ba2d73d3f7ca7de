"""A backbone with its normalization: built from a configuration, made afresh, measured.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainables.backbones import BACKBONES, initialize_from_images, takes_images
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.precision import seeded, weights_type

INITIALIZATION_SAMPLE = 5_000


class Classifier(nn.Module):
    """A backbone that takes images in 0 to 255 and normalizes them itself, so that weights are self-contained."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, backbone: nn.Module, *, mean_C: Tensor, std_C: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean_C11", mean_C[:, None, None])
        self.register_buffer("std_C11", std_C[:, None, None])

    def normalized(self, images_NCHW: Tensor) -> Tensor:
        """Images in 0 to 255 as the backbone wants them."""
        return (images_NCHW - self.mean_C11) / self.std_C11

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Float images [N, C, H, W] in 0 to 255 -> logits [N, num_classes]."""
        logits: Tensor = self.backbone(self.normalized(images_NCHW))
        return logits


def fresh_model(config: TrainConfig, split: SplitImages, sample: Callable[[], Tensor]) -> Classifier:
    """A model on the CPU whose weights the configuration's seed decides.

    `sample` gives training images [N, C, H, W] in 0 to 255; asked for when a layer is initialized from images.
    """
    with seeded(config.seed):
        backbone = BACKBONES[config.backbone](
            num_classes=split.num_classes,
            dropout=config.dropout,
            image_size=split.image_size,
            channels=split.channels,
        )
    model = Classifier(
        backbone, mean_C=torch.from_numpy(split.mean_C.copy()), std_C=torch.from_numpy(split.std_C.copy())
    )
    if takes_images(model.backbone):
        initialize_from_images(model.backbone, model.normalized(sample()))
    return model


def unfilled_model(config: TrainConfig, *, num_classes: int, image_size: int, channels: int) -> Classifier:
    """Return a model on the CPU whose weights, the normalization's included, are still to be loaded."""
    with seeded(0):
        backbone = BACKBONES[config.backbone](
            num_classes=num_classes, dropout=config.dropout, image_size=image_size, channels=channels
        )
    model = Classifier(backbone, mean_C=torch.zeros(channels), std_C=torch.ones(channels))
    return model.to(weights_type(config.precision))


def evenly_spread(count: int, sample: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """At most `sample` indices below `count`, evenly spread: images of a class often lie together."""
    return np.linspace(0, count - 1, min(count, sample)).astype(np.int64)


def multiply_adds(model: nn.Module, *, channels: int, image_size: int) -> int:
    """Multiply-adds of one image's forward pass (convolutions and matrix products)."""
    model.eval()
    with OperationCounter() as counter, torch.no_grad():
        model(torch.zeros(1, channels, image_size, image_size))
    return counter.operations // 2


class OperationCounter(TorchDispatchMode):
    """Sums the floating-point operations of convolutions and matrix products, as torch's FlopCounterMode does.

    FlopCounterMode imports torch's compiler, which takes 3 s of a CPU in every worker.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See TorchDispatchMode: nothing here is ever compiled, so there is no compiler to keep out."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.operations += int(count(*args, **(kwargs or {}), out_val=out))
        return out

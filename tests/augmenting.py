"""Images and configurations that the tests of augmentation share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from trainables.augment import EpochDraws, augment
from trainables.config import TrainConfig

NOTHING = TrainConfig(crop_padding=0, flip=False)
EVERYTHING = TrainConfig(
    crop_padding=2,
    crop_fill="reflect",
    resized_crop_probability=0.5,
    affine_probability=0.5,
    affine_shear_degrees=10.0,
    jitter_probability=0.5,
    jitter_brightness=0.4,
    jitter_contrast=0.4,
    jitter_saturation=0.4,
    jitter_hue=0.1,
    policy="randaugment",
    cutout_size=4,
    cutout_probability=0.5,
    erasing_probability=0.5,
)
MIXED = replace(EVERYTHING, mixup_alpha=0.4, cutmix_alpha=1.0, ricap_beta=0.3)
EACH_ALONE = {
    "crop": replace(NOTHING, crop_padding=2),
    "resized_crop": replace(NOTHING, resized_crop_probability=1.0),
    "flip": replace(NOTHING, flip=True),
    "affine": replace(NOTHING, affine_probability=1.0),
    "jitter": replace(NOTHING, jitter_probability=1.0, jitter_contrast=0.5, jitter_hue=0.2),
    "autoaugment_cifar10": replace(NOTHING, policy="autoaugment_cifar10"),
    "randaugment": replace(NOTHING, policy="randaugment"),
    "trivialaugment": replace(NOTHING, policy="trivialaugment"),
    "cutout": replace(NOTHING, cutout_size=5),
    "erasing": replace(NOTHING, erasing_probability=1.0),
    "everything": EVERYTHING,
}
GREY_OR_COLOUR = pytest.mark.parametrize("channels", [1, 3])
Array = np.ndarray[Any, Any]


def noise(num_images: int, channels: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Images [B, C, H, W] of random bytes, a few of them dull: of two close values, or of one."""
    rng = np.random.default_rng([seed, size])
    images = rng.integers(0, 256, size=(num_images, channels, size, size), dtype=np.uint8)
    images[::4] = 90 + images[::4] % 2 * 20
    images[2::7] = 33
    return torch.from_numpy(images)


def draws_for(config: TrainConfig, images: torch.Tensor, **kwargs: Any) -> EpochDraws:
    """An epoch of a single batch that holds the images in their order."""
    settings = {"epoch": 1, "num_images": len(images), "batch_size": len(images), "order": np.arange(len(images))}
    return EpochDraws.draw(config, image_size=images.shape[-1], device="cpu", **{**settings, **kwargs})


def augmented(config: TrainConfig, images: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The images after augmentation in one batch."""
    fill_C = torch.full((images.shape[1],), 7.0)
    return augment(images, draws_for(config, images, **kwargs).batch(0), config=config, fill_C=fill_C)

"""Batched, per-sample augmentation where the data lives, and the randomness it uses.

Randomness is keyed by (seed, epoch, position in the training split): each epoch draws a table with a row for
every training image, so what an image gets does not depend on batches, processes or resumption.

Shape suffixes: N training images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from trainables.config import TrainConfig

# One stream a purpose: adding an operation does not change what the others draw.
ORDER, CROP, FLIP, CUTOUT, MIXUP, DROPOUT = range(6)


def generator(config: TrainConfig, *, epoch: int, stream: int) -> np.random.Generator:
    """The generator of one purpose in one epoch."""
    return np.random.default_rng([config.seed, epoch, stream])


@dataclass(frozen=True)
class EpochDraws:
    """An epoch's random numbers: a row for each training image, on the device; None for what is off."""

    order_N: Tensor
    shift_N2: Tensor | None
    flip_N: Tensor | None
    cutout_centre_N2: Tensor | None
    mixup_weight_N: Tensor | None

    @classmethod
    def draw(cls, config: TrainConfig, *, epoch: int, num_images: int, image_size: int, device: str) -> EpochDraws:
        """Draw the tables of one epoch. `order_N` is a permutation of the positions."""
        order = generator(config, epoch=epoch, stream=ORDER).permutation(num_images)
        shift = flip = cutout = mixup = None
        if config.crop_padding:
            rng = generator(config, epoch=epoch, stream=CROP)
            shift = rng.integers(0, 2 * config.crop_padding + 1, size=(num_images, 2))
        if config.flip:
            flip = generator(config, epoch=epoch, stream=FLIP).random(num_images) < 0.5
        if config.cutout_size and config.cutout_probability:
            rng = generator(config, epoch=epoch, stream=CUTOUT)
            cutout = rng.integers(0, image_size, size=(num_images, 2))
            # An untouched image has its square far outside.
            cutout[rng.random(num_images) >= config.cutout_probability] = -image_size - config.cutout_size
        if config.mixup_alpha and config.mixup_probability:
            rng = generator(config, epoch=epoch, stream=MIXUP)
            mixup = rng.beta(config.mixup_alpha, config.mixup_alpha, size=num_images).astype(np.float32)
            mixup[rng.random(num_images) >= config.mixup_probability] = 1.0
        tensors = [None if x is None else torch.from_numpy(x).to(device) for x in (order, shift, flip, cutout, mixup)]
        order_N, *rest = tensors
        assert order_N is not None
        return cls(order_N, *rest)


def augment(
    images_BCHW: Tensor, positions_B: Tensor, draws: EpochDraws, *, config: TrainConfig, fill_C: Tensor
) -> Tensor:
    """Padded crop, flip and cutout of uint8 images; float32 [B, C, H, W] in 0 to 255.

    `positions_B`: rows of the draws. `fill_C`: the colour cutout leaves behind.
    """
    if draws.shift_N2 is not None:
        images_BCHW = shifted(images_BCHW, draws.shift_N2[positions_B], padding=config.crop_padding)
    if draws.flip_N is not None:
        images_BCHW = torch.where(draws.flip_N[positions_B, None, None, None], images_BCHW.flip(-1), images_BCHW)
    images_BCHW = images_BCHW.float()
    if draws.cutout_centre_N2 is not None:
        images_BCHW = cutout(
            images_BCHW,
            draws.cutout_centre_N2[positions_B],
            size=min(config.cutout_size, images_BCHW.shape[-1] // 2),
            fill_C=fill_C,
        )
    return images_BCHW


def shifted(images_BCHW: Tensor, shift_B2: Tensor, *, padding: int) -> Tensor:
    """Crops [B, C, H, W] at (row, column) `shift_B2`, 0 to 2 x padding, of images padded with black."""
    height, width = images_BCHW.shape[-2:]
    padded = pad(images_BCHW, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.arange(len(images_BCHW), device=images_BCHW.device)
    return windows[rows, :, shift_B2[:, 0], shift_B2[:, 1]]


def cutout(images_BCHW: Tensor, centre_B2: Tensor, *, size: int, fill_C: Tensor) -> Tensor:
    """Fill the square of `size` pixels around (row, column) `centre_B2`, cut off at the borders."""
    height, width = images_BCHW.shape[-2:]
    start_B2 = centre_B2 - size // 2
    rows = torch.arange(height, device=images_BCHW.device)
    columns = torch.arange(width, device=images_BCHW.device)
    in_rows_BH = (rows >= start_B2[:, :1]) & (rows < start_B2[:, :1] + size)
    in_columns_BW = (columns >= start_B2[:, 1:]) & (columns < start_B2[:, 1:] + size)
    inside_B1HW = (in_rows_BH[:, :, None] & in_columns_BW[:, None, :])[:, None]
    return torch.where(inside_B1HW, fill_C[:, None, None], images_BCHW)

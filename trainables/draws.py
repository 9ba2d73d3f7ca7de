"""Where the randomness of an epoch comes from, and how a step finds the images that an operation is for.

Everything random is drawn on the host when an epoch begins: tables with a row for every training image, keyed by
(seed, epoch, position in the training split). Which images of which step get an operation is known there too, so a
step slices index tensors at bounds known to the host and never waits for the device.

Shape suffixes: N training images, E images that an epoch uses (whole batches) in their order, R those an operation is
for, S those of one step, X values of an operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainables.config import TrainConfig

Array = np.ndarray[Any, Any]

# One stream a purpose: adding an operation does not change what the others draw.
ORDER, CROP, FLIP, CUTOUT, MIXUP, DROPOUT = range(6)
FIRST_FLIP, RESIZED_CROP, AFFINE, JITTER, POLICY, ERASING, CUTMIX, RICAP = range(6, 14)


def generator(config: TrainConfig, *, epoch: int, stream: int, key: Sequence[int] = ()) -> np.random.Generator:
    """The generator of one purpose in one epoch. Epochs count from 1; 0 is for what a run draws once.

    `key`: numbers that tell generators of the same purpose apart.
    """
    return np.random.default_rng([config.seed, epoch, stream, *key])


@dataclass(frozen=True)
class Group:
    """The images of one step that get one operation: rows of the batch, and float32 values, a row for each."""

    index_S: Tensor
    values_SX: Tensor


@dataclass(frozen=True)
class Grouped:
    """The images of an epoch that get one of several kinds of operation, sorted by step, then kind."""

    index_R: Tensor
    values_RX: Tensor
    bounds: list[int]
    kinds: int

    @classmethod
    def by_kind(
        cls, kind_E: Array, values_EX: Array, *, kinds: int, batch_size: int, device: str | torch.device
    ) -> Grouped:
        """Sort the images whose `kind_E` is 0 to `kinds` - 1; others (-1) get nothing."""
        rows_R = np.flatnonzero(kind_E >= 0)
        key_R = rows_R // batch_size * kinds + kind_E[rows_R]
        if kinds > 1:
            by_key = np.argsort(key_R, kind="stable")
            rows_R, key_R = rows_R[by_key], key_R[by_key]
        num_keys = len(kind_E) // batch_size * kinds
        return cls(
            index_R=torch.from_numpy(rows_R % batch_size).to(device),
            values_RX=torch.from_numpy(values_EX[rows_R].astype(np.float32)).to(device),
            bounds=np.searchsorted(key_R, np.arange(num_keys + 1)).tolist(),
            kinds=kinds,
        )

    @classmethod
    def where(cls, applies_E: Array, values_EX: Array, *, batch_size: int, device: str | torch.device) -> Grouped:
        """The images for which `applies_E` is true."""
        return cls.by_kind(applies_E.astype(np.int64) - 1, values_EX, kinds=1, batch_size=batch_size, device=device)

    def of_step(self, step: int) -> Iterator[tuple[int, Group]]:
        """The kinds that some image of a step gets, and these images."""
        for kind in range(self.kinds):
            group = self.of_kind(step, kind)
            if group is not None:
                yield kind, group

    def of_kind(self, step: int, kind: int = 0) -> Group | None:
        """The images of a step that get one kind; None if there are none."""
        start, end = self.bounds[step * self.kinds + kind : step * self.kinds + kind + 2]
        return Group(self.index_R[start:end], self.values_RX[start:end]) if start < end else None


def rectangles(
    rng: np.random.Generator,
    *,
    num_images: int,
    image_size: int,
    largest_side: int,
    areas: tuple[float, float],
    ratios: tuple[float, float],
    attempts: int = 10,
) -> tuple[Array, Array, Array]:
    """Heights, widths, and whether one was found: shares of the area are uniform, ratios width/height log-uniform.

    As Szegedy et al. (2015) and Zhong et al. (2020) do, up to `attempts` rectangles are drawn for an image, and the
    first whose sides are 1 to `largest_side` pixels counts.
    """
    area = rng.uniform(*areas, size=(num_images, attempts)) * image_size**2
    ratio = np.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1]), size=(num_images, attempts)))
    height = width = np.zeros(num_images, dtype=np.int64)
    found = np.zeros(num_images, dtype=bool)
    for attempt in range(attempts):
        h = np.rint(np.sqrt(area[:, attempt] / ratio[:, attempt])).astype(np.int64)
        w = np.rint(np.sqrt(area[:, attempt] * ratio[:, attempt])).astype(np.int64)
        fits = (np.minimum(h, w) >= 1) & (np.maximum(h, w) <= largest_side)
        height, width = np.where(fits & ~found, h, height), np.where(fits & ~found, w, width)
        found = found | fits
    return height, width, found


def places(rng: np.random.Generator, sides_N: Array, *, image_size: int) -> Array:
    """Where a side of so many pixels begins, uniform over the places inside the image."""
    return (rng.random(sides_N.shape) * (image_size - sides_N + 1)).astype(np.int64)

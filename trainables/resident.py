"""Where a training loop gets its batches from; and images that lie as one tensor where the model trains.

Shape suffixes: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from results.schema import IntArray
from trainables.augment import EpochDraws, augment
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.draws import ORDER, generator
from trainables.mixing import SoftTargets, mix, reach, without_first
from trainables.parallel import ALONE, Ranks

LARGEST_EVALUATION_BATCH = 500
EVALUATION_PIXELS = 500 * 64 * 64


class TrainingImages(Protocol):
    """A dataset that a model can be trained and evaluated on."""

    @property
    def split(self) -> SplitImages:
        """Labels, splits, shapes."""

    @property
    def device(self) -> str:
        """The type of device that batches come on."""

    @property
    def device_bytes(self) -> int:
        """What the dataset itself takes of the device's memory."""

    @property
    def ranks(self) -> Ranks:
        """The processes that divide every batch, and which of them this is."""

    def batches(self, config: TrainConfig, *, epoch: int, image_size: int) -> Iterator[tuple[Tensor, SoftTargets]]:
        """An epoch's augmented batches: float images [B, C, H, W] in 0 to 255, and their targets.

        The last partial batch is dropped. Sides are `image_size`, which may be below that of the dataset. Where several
        ranks divide the batches, this rank's share of each.
        """

    def evaluation_batches(self, indices_N: IntArray) -> Iterator[Tensor]:
        """Plain float images [N, C, H, W] in 0 to 255, in the order of the indices."""


def batch_size_of(config: TrainConfig, split: SplitImages) -> int:
    """Images in a step: the configuration's, or all there are."""
    return min(config.batch_size, len(split.train))


def evaluation_batch_size(image_size: int) -> int:
    """Images evaluated at a time: 500 up to 64 pixels a side, fewer of larger ones."""
    return min(LARGEST_EVALUATION_BATCH, max(1, EVALUATION_PIXELS // image_size**2))


def memory_format(config: TrainConfig) -> torch.memory_format:
    """How a batch's pixels lie in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


@dataclass(frozen=True, eq=False)
class ResidentImages:
    """A dataset on the device where the model trains.

    On a GPU the pixels' channels lie together, as the augmentation wants them; on a CPU all processes share the pixels
    as they were loaded.
    """

    split: SplitImages
    images_NCHW: Tensor
    labels_N: Tensor
    train_N: Tensor
    mean_C: Tensor
    ranks: Ranks = ALONE

    @classmethod
    def on(cls, device: str, split: SplitImages, *, ranks: Ranks = ALONE) -> ResidentImages:
        """Move a dataset to a device; on a CPU the pixels are shared, not copied. `ranks`: who shares the batches."""
        if split.encoded is not None:
            raise ValueError("these images were loaded encoded, to be streamed: nothing is resident")
        images, labels, train, mean = (
            shared_tensor(array).to(device) for array in (split.images_NCHW, split.labels_N, split.train, split.mean_C)
        )
        if device != "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        return cls(split, images, labels, train, mean, ranks)

    @property
    def device(self) -> str:
        """Where the images are."""
        return self.images_NCHW.device.type

    @property
    def device_bytes(self) -> int:
        """See TrainingImages."""
        return self.images_NCHW.nbytes + self.labels_N.nbytes + self.train_N.nbytes

    def batches(self, config: TrainConfig, *, epoch: int, image_size: int) -> Iterator[tuple[Tensor, SoftTargets]]:
        """See TrainingImages."""
        batch_size, num_images = batch_size_of(config, self.split), len(self.split.train)
        order, before = None, 0
        if self.ranks.several:
            before = reach(config)  # images of other ranks that this one's are mixed with
            order = generator(config, epoch=epoch, stream=ORDER).permutation(num_images)
            order = self.ranks.order(order, batch_size=batch_size, reach=before)
        num_rows = batch_size if order is None else before + len(self.ranks.share(batch_size))
        draws = EpochDraws.draw(
            config,
            epoch=epoch,
            num_images=num_images,
            image_size=self.split.image_size,
            device=self.device,
            batch_size=num_rows,
            order=order,
        )
        order_N = self.train_N[draws.order_N]
        for step in range(num_images // batch_size):
            rows = draws.batch(step)
            indices_B = order_N[step * num_rows :][:num_rows]
            images_BCHW = augment(self._gathered(indices_B), rows, config=config, fill_C=self.mean_C)
            images_BCHW, targets = mix(images_BCHW, self.labels_N.index_select(0, indices_B), rows.mixing)
            if before:
                images_BCHW, targets = images_BCHW[before:], without_first(targets, before)
            yield at_size(images_BCHW, image_size).contiguous(memory_format=memory_format(config)), targets

    def _gathered(self, indices_B: Tensor) -> Tensor:
        """Some images, in the memory format that they have here."""
        if self.images_NCHW.is_contiguous():
            return self.images_NCHW.index_select(0, indices_B)
        images_NHWC = self.images_NCHW.permute(0, 2, 3, 1)  # an index_select of its own would lose the format
        return images_NHWC.index_select(0, indices_B).permute(0, 3, 1, 2)

    def evaluation_batches(self, indices_N: IntArray) -> Iterator[Tensor]:
        """See TrainingImages."""
        on_device = torch.from_numpy(np.array(indices_N)).to(self.device)
        for chunk in on_device.split(evaluation_batch_size(self.split.image_size)):
            yield self._gathered(chunk).float()


@dataclass(frozen=True, eq=False)
class WatchedImages:
    """Images that call `on_evaluation_batch` before each batch of an evaluation, which ends with what it raises."""

    images: TrainingImages
    on_evaluation_batch: Callable[[], None]

    @property
    def split(self) -> SplitImages:
        """See TrainingImages."""
        return self.images.split

    @property
    def device(self) -> str:
        """See TrainingImages."""
        return self.images.device

    @property
    def device_bytes(self) -> int:
        """See TrainingImages."""
        return self.images.device_bytes

    @property
    def ranks(self) -> Ranks:
        """See TrainingImages."""
        return self.images.ranks

    def batches(self, config: TrainConfig, *, epoch: int, image_size: int) -> Iterator[tuple[Tensor, SoftTargets]]:
        """See TrainingImages."""
        return self.images.batches(config, epoch=epoch, image_size=image_size)

    def evaluation_batches(self, indices_N: IntArray) -> Iterator[Tensor]:
        """See TrainingImages."""
        for batch in self.images.evaluation_batches(indices_N):
            self.on_evaluation_batch()
            yield batch


def alone(images: TrainingImages) -> TrainingImages:
    """The images for a rank that does something without the others."""
    if not images.ranks.several:
        return images
    assert isinstance(images, ResidentImages)  # no others are divided
    return replace(images, ranks=ALONE)


def at_size(images_BCHW: Tensor, side: int) -> Tensor:
    """Images scaled to a side, antialiased; the same tensor when they have it."""
    if images_BCHW.shape[-1] == side:
        return images_BCHW
    return interpolate(images_BCHW, size=side, mode="bilinear", antialias=True).clamp_(0, 255)


def shared_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor over the array's memory, which nothing here writes to (Ray hands arrays out read-only)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)

"""Images that are decoded and augmented while a model trains, in processes of their own: for datasets that do not
fit in memory, and for the published albumentations pipelines.

Import this module only where `config.pipeline` is not `resident`: albumentations is slow to import.

What an image gets is keyed by (seed, epoch, position in the training split), so it does not depend on batches,
processes or resumption.

Shape suffixes: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # before the import, which asks the network for a newer version

import albumentations as alb
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from results.schema import IntArray, UsageError
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.draws import ORDER, generator
from trainables.image_files import EncodedImage, Pixels, decode_squares, decode_whole
from trainables.mixing import MixingDraws, SoftTargets, mix
from trainables.parallel import ALONE, Ranks
from trainables.resident import batch_size_of, evaluation_batch_size, memory_format

# A stream of random numbers of its own, far from those that draws.py counts up from 0.
PIPELINE = 1000
FOOD101_SIDE = 224
FOOD101_HOLE = 32


def efficient200k(image_size: int) -> alb.Compose:
    """What the 150,690-parameter network was trained with on CIFAR-10: probabilities as published, limits not.

    A reconstruction: limits are the library's defaults; for shift-scale-rotate, which it has since replaced by
    Affine, those of the replaced one (6.25% of the side, 10%, 45 degrees, the border reflected). Holes are 1 or 2
    of a tenth to a fifth of the side. Images of another size are first scaled by the short side and cropped in
    the middle.
    """
    return alb.Compose(
        [
            alb.SmallestMaxSize(image_size, area_for_downscale="image"),
            alb.CenterCrop(image_size, image_size),
            alb.HorizontalFlip(p=0.5),
            _shift_scale_rotate(p=0.5),
            alb.RandomBrightnessContrast(p=0.5),
            alb.HueSaturationValue(p=0.5),
            alb.CoarseDropout(p=0.3),
        ]
    )


def food101(image_size: int) -> alb.Compose:
    """The pipeline that the Food-101 networks were planned with: operations as published, few limits, no probabilities.

    Given: 8 holes of 32 pixels, brightness and contrast by .3, HSV by 20 / 30 / 20. A reconstruction for the rest:
    each operation but the crop touches half of the images, and limits are the library's defaults. Where 2.0.8 has
    defaults that leave little of an image, they are those of 1.3, whose argument names the source uses: noise with
    a variance of 10 to 50 levels (not a deviation of 51 to 112), hue by .2 (not .5), a blur of 3 to 7 pixels. Holes
    shrink with images below 224 pixels; at 32 pixels one of 32 would be everything.
    """
    hole = max(1, min(FOOD101_HOLE, round(FOOD101_HOLE * image_size / FOOD101_SIDE)))
    return alb.Compose(
        [
            alb.RandomResizedCrop((image_size, image_size), area_for_downscale="image"),
            alb.HorizontalFlip(p=0.5),
            alb.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2, p=0.5),
            _shift_scale_rotate(p=0.5),
            alb.CoarseDropout(
                num_holes_range=(8, 8), hole_height_range=(hole, hole), hole_width_range=(hole, hole), p=0.5
            ),
            alb.RandomBrightnessContrast(brightness_limit=0.3, contrast_limit=0.3, p=0.5),
            alb.HueSaturationValue(hue_shift_limit=20, sat_shift_limit=30, val_shift_limit=20, p=0.5),
            alb.GaussNoise(std_range=(10**0.5 / 255, 50**0.5 / 255), p=0.5),
            alb.GaussianBlur(blur_limit=(3, 7), sigma_limit=(0.8, 1.4), p=0.5),
            alb.RandomGamma(gamma_limit=(80, 120), p=0.5),
        ]
    )


def _shift_scale_rotate(*, p: float) -> alb.Affine:
    return alb.Affine(
        translate_percent=(-0.0625, 0.0625),
        scale=(0.9, 1.1),
        rotate=(-45, 45),
        keep_ratio=True,
        border_mode=cv2.BORDER_REFLECT_101,
        p=p,
    )


PIPELINES: dict[str, Callable[[int], alb.Compose]] = {"efficient200k": efficient200k, "food101": food101}


def build_pipeline(name: str, *, image_size: int) -> alb.Compose:
    """A pipeline of PIPELINES for RGB images [H, W, 3] of any size, to squares of `image_size`.

    albumentations warns of an argument that it does not know and goes on without it; here that is an error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PIPELINES[name](image_size)


class Request(NamedTuple):
    """One image to augment: its key is (seed, epoch, PIPELINE, position in the training split)."""

    key: tuple[int, int, int, int]
    image: EncodedImage | Pixels


class AugmentedBatches(Dataset[Tensor | str]):
    """Uint8 batches [B, S, S, C] for lists of requests; or which image cannot be read, and why.

    The reason is a value because torch would wrap an exception in a worker's traceback, which keeps workers waiting.

    Requests carry the encoded image, so that a worker holds none of the dataset. Grey images pass through
    a pipeline as three equal channels, of which the first is kept: operations on hue and saturation leave them be.
    """

    def __init__(self, pipeline: str, *, image_size: int, channels: int) -> None:
        self.pipeline = pipeline
        self.image_size = image_size
        self.channels = channels

    @cached_property
    def _compose(self) -> alb.Compose:
        # OpenCV's own threads would compete with the other workers and trials, one thread each.
        cv2.setNumThreads(0)
        return build_pipeline(self.pipeline, image_size=self.image_size)

    def __getitem__(self, requests: Sequence[Request]) -> Tensor | str:
        try:
            return torch.from_numpy(np.stack([self._augmented(request) for request in requests]))
        except UsageError as error:
            return str(error)

    def _augmented(self, request: Request) -> Pixels:
        rng = np.random.default_rng(request.key)
        # Not set_random_seed: that gives each operation the same stream, so that those of one probability are
        # applied all together or not at all.
        self._compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        augmented: Pixels = self._compose(image=_rgb(request.image))["image"]
        return augmented[..., : self.channels]


def _rgb(image: EncodedImage | Pixels) -> Pixels:
    """Pixels [H, W, 3] of an encoded image or of [C, H, W]."""
    if isinstance(image, EncodedImage):
        return decode_whole(image)
    return np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """A dataset whose training images are decoded and augmented by `config.pipeline` in worker processes."""

    split: SplitImages
    device: str

    @classmethod
    def on(cls, device: str, split: SplitImages) -> StreamedImages:
        """A dataset whose batches come on a device."""
        return cls(split, torch.device(device).type)

    @property
    def device_bytes(self) -> int:
        """See TrainingImages: nothing stays on the device."""
        return 0

    @property
    def ranks(self) -> Ranks:
        """See TrainingImages: streamed batches are not divided."""
        return ALONE

    def batches(self, config: TrainConfig, *, epoch: int, image_size: int) -> Iterator[tuple[Tensor, SoftTargets]]:
        """See TrainingImages. Raises UsageError, naming it, for a file that can no longer be read."""
        batch_size = batch_size_of(config, self.split)
        num_images = len(self.split.train)
        order_N = generator(config, epoch=epoch, stream=ORDER).permutation(num_images)
        used_E = order_N[: num_images // batch_size * batch_size]
        positions = np.split(used_E, num_images // batch_size)
        # All labels at once: moving a batch's would make every step wait for the device.
        labels_E = torch.from_numpy(self.split.labels_N[self.split.train[used_E]]).to(self.device)
        mixing = MixingDraws.draw(
            config,
            epoch=epoch,
            num_images=num_images,
            image_size=image_size,
            device=self.device,
            batch_size=batch_size,
            used_E=used_E,
        )
        loader = self._loader(config, positions, epoch=epoch, image_size=image_size)
        for step, images_BHWC in enumerate(loader):
            if isinstance(images_BHWC, str):
                raise UsageError(images_BHWC)
            labels_B = labels_E[step * batch_size :][:batch_size]
            images_BCHW = images_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
            images_BCHW, targets = mix(images_BCHW, labels_B, mixing.step(step))
            yield images_BCHW.contiguous(memory_format=memory_format(config)), targets

    def _loader(
        self, config: TrainConfig, positions: list[IntArray], *, epoch: int, image_size: int
    ) -> DataLoader[Tensor | str]:
        requests = ([self._request(config, epoch, int(p)) for p in batch] for batch in positions)
        return DataLoader(
            AugmentedBatches(config.pipeline, image_size=image_size, channels=self.split.channels),
            sampler=requests,
            batch_size=None,
            num_workers=config.loader_workers,
            multiprocessing_context=_worker_context() if config.loader_workers else None,
            worker_init_fn=_end_with_the_trainer,
            collate_fn=_as_it_is,
            pin_memory=self.device == "cuda",
            generator=torch.Generator(),  # without one it would draw from torch's global numbers, which dropout uses
        )

    def _request(self, config: TrainConfig, epoch: int, position: int) -> Request:
        index = self.split.train[position]
        image = self.split.images_NCHW[index] if self.split.encoded is None else self.split.encoded[index]
        return Request((config.seed, epoch, PIPELINE, position), image)

    def evaluation_batches(self, indices_N: IntArray) -> Iterator[Tensor]:
        """See TrainingImages: the short side scaled to the dataset's size, the centre square, decoded in threads."""
        split = self.split
        size = evaluation_batch_size(split.image_size)
        for start in range(0, len(indices_N), size):
            chunk = indices_N[start : start + size]
            if split.encoded is None:
                pixels_NCHW = split.images_NCHW[chunk]
            else:
                images = [split.encoded[index] for index in chunk]
                pixels_NCHW = decode_squares(images, image_size=split.image_size, channels=split.channels)
            yield torch.from_numpy(pixels_NCHW).to(self.device).float()


def _as_it_is(batch: Any) -> Any:
    return batch


def _worker_context() -> BaseContext:
    """Workers are forked from a server process that has one thread and has imported what they need.

    A trainer has threads (Ray's, torch's), and a fork of it can inherit a lock that nobody will release. Spawned
    workers would each import torch and albumentations again, in every epoch.
    """
    context = multiprocessing.get_context("forkserver")
    # A worker runs the imports of the trainer's main module again; in a Ray actor that took .6 s an epoch without this.
    slow_to_import = [name for name in ("ray", "pandas", "optuna") if name in sys.modules]
    context.set_forkserver_preload([__name__, *slow_to_import])
    return context


def _end_with_the_trainer(_worker: int) -> None:
    """End this worker when the trainer ends, even by SIGKILL; torch only looks at the parent, the fork server."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def wait() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

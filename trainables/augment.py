"""Batched, per-sample augmentation of uint8 images where they live: which draws an epoch needs, and how to apply them.

The order is that of TrainConfig's fields: crop, flip, affine, then the policy's geometric operations, all but the first
two as one interpolation; jitter and the policy's colour operations, rounded to bytes after each as on single images;
cutout and erasing. A policy's geometry thus precedes its colours whatever their order. Only operations that look at
other pixels (contrast, sharpness, autocontrast, equalize) can tell, by the black that geometry brought in.

What an image gets depends on (seed, epoch, its position in the training split) alone: see `draws.py`.

Shape suffixes: N training images, E images that an epoch uses in their order, B batch, S images concerned, C channels,
H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainables.colour import COLOUR_OPERATORS
from trainables.config import TrainConfig
from trainables.draws import (
    AFFINE,
    CROP,
    CUTOUT,
    ERASING,
    FIRST_FLIP,
    FLIP,
    JITTER,
    ORDER,
    POLICY,
    RESIZED_CROP,
    Array,
    Group,
    Grouped,
    generator,
)
from trainables.geometry import (
    draw_affine,
    draw_boxes,
    draw_cutout,
    draw_erasing,
    erasing_side,
    fill_rectangles,
    padded,
    policy_maps,
    put,
    resample,
    windows,
)
from trainables.mixing import MixingDraws, StepMixing
from trainables.policies import COLOURS, ID, Operations, draw_jitter, draw_policy


@dataclass(frozen=True)
class BatchDraws:
    """What the images of one step get; None for what none of them gets."""

    start_B2: Tensor | None
    flip: Group | None
    warp: Group | None
    colours: list[tuple[str, Group]]
    cutout: Group | None
    erasing: Group | None
    mixing: StepMixing


@dataclass(frozen=True)
class EpochDraws:
    """What the images of an epoch get, on the device; None for what is off."""

    order_N: Tensor
    batch_size: int
    start_E2: Tensor | None
    flips: Grouped | None
    warps: Grouped | None
    colour_slots: list[Grouped]
    cutouts: Grouped | None
    erasings: Grouped | None
    mixing: MixingDraws

    @classmethod
    def draw(
        cls,
        config: TrainConfig,
        *,
        epoch: int,
        num_images: int,
        image_size: int,
        device: str | torch.device,
        batch_size: int,
        order: Array | None = None,
    ) -> EpochDraws:
        """Draw an epoch's random numbers. `order`: positions in the training split; None: a random permutation."""
        if order is None:
            order = generator(config, epoch=epoch, stream=ORDER).permutation(num_images)
        used_E = order[: len(order) // batch_size * batch_size]

        def grouped(drawn: tuple[Array, Array] | None) -> Grouped | None:
            if drawn is None:
                return None
            values, applies = drawn
            return Grouped.where(applies[used_E], values[used_E], batch_size=batch_size, device=device)

        tables = _Tables(config, epoch, num_images, image_size)
        boxes, policy = tables.boxes(), tables.policy()
        colours = [operations for operations in (tables.jitter(), policy) if operations is not None]
        start = tables.window_starts(None if boxes is None else boxes[1])
        return cls(
            order_N=torch.from_numpy(order).to(device),
            batch_size=batch_size,
            start_E2=None if start is None else torch.from_numpy(start[used_E]).to(device),
            flips=grouped(tables.flips()),
            warps=grouped(tables.warps(boxes, policy)),
            colour_slots=[
                slot
                for operations in colours
                for slot in _colour_slots(operations, used_E, batch_size=batch_size, device=device)
            ],
            cutouts=grouped(tables.cutouts()),
            erasings=grouped(tables.erasings()),
            mixing=MixingDraws.draw(
                config,
                epoch=epoch,
                num_images=num_images,
                image_size=image_size,
                device=device,
                batch_size=batch_size,
                used_E=used_E,
            ),
        )

    def batch(self, step: int) -> BatchDraws:
        """What the images `order_N[step * batch_size :][:batch_size]` get."""

        def group(of: Grouped | None) -> Group | None:
            return None if of is None else of.of_kind(step)

        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        return BatchDraws(
            start_B2=None if self.start_E2 is None else self.start_E2[part],
            flip=group(self.flips),
            warp=group(self.warps),
            colours=[(COLOURS[kind], found) for slot in self.colour_slots for kind, found in slot.of_step(step)],
            cutout=group(self.cutouts),
            erasing=group(self.erasings),
            mixing=self.mixing.step(step),
        )


@dataclass(frozen=True)
class _Tables:
    """The tables of one epoch, a row for each training image: values, and whether the image gets them at all."""

    config: TrainConfig
    epoch: int
    num_images: int
    image_size: int

    def rng(self, stream: int) -> np.random.Generator:
        return generator(self.config, epoch=self.epoch, stream=stream)

    def boxes(self) -> tuple[Array, Array] | None:
        if not self.config.resized_crop_probability:
            return None
        return draw_boxes(self.rng(RESIZED_CROP), self.config, num_images=self.num_images, image_size=self.image_size)

    def window_starts(self, boxed_N: Array | None) -> Array | None:
        """Row and column [N, 2] of each image's window in the padded image: the middle where a box replaces it."""
        padding = self.config.crop_padding
        if not padding:
            return None
        start_N2 = self.rng(CROP).integers(0, 2 * padding + 1, size=(self.num_images, 2))
        return start_N2 if boxed_N is None else np.where(boxed_N[:, None], padding, start_N2)

    def flips(self) -> tuple[Array, Array] | None:
        if not self.config.flip:
            return None
        if self.config.alternating_flip:
            first_N = generator(self.config, epoch=0, stream=FIRST_FLIP).random(self.num_images) < 0.5
            flipped_N = first_N ^ (self.epoch % 2 == 0)
        else:
            flipped_N = self.rng(FLIP).random(self.num_images) < 0.5
        return np.empty((self.num_images, 0)), flipped_N

    def warps(self, boxes: tuple[Array, Array] | None, policy: Operations | None) -> tuple[Array, Array] | None:
        """For `resample`: six numbers of the map, then four of the box where images have boxes."""
        maps_N33 = np.eye(3)
        applies_N: Array = np.zeros(self.num_images, dtype=bool)
        if self.config.affine_probability:
            affine_N33, applies_N = draw_affine(self.rng(AFFINE), self.config, num_images=self.num_images)
            maps_N33 = np.where(applies_N[:, None, None], affine_N33, maps_N33)
        if policy is not None:
            policy_N33, moved_N = policy_maps(policy, image_size=self.image_size)
            maps_N33, applies_N = maps_N33 @ policy_N33, applies_N | moved_N
        maps_N6 = np.broadcast_to(maps_N33, (self.num_images, 3, 3))[:, :2].reshape(-1, 6)
        if boxes is None:
            return (maps_N6, applies_N) if applies_N.any() else None
        box_N4, boxed_N = boxes
        box_N4 = np.where(boxed_N[:, None], box_N4, (0, 0, self.image_size, self.image_size))
        return np.concatenate([maps_N6, box_N4], -1), applies_N | boxed_N

    def jitter(self) -> Operations | None:
        if not self.config.jitter_probability:
            return None
        return draw_jitter(self.rng(JITTER), self.config, num_images=self.num_images)

    def policy(self) -> Operations | None:
        if self.config.policy == "none" or not self.config.policy_probability:
            return None
        return draw_policy(self.rng(POLICY), self.config, num_images=self.num_images, image_size=self.image_size)

    def cutouts(self) -> tuple[Array, Array] | None:
        if not self.config.cutout_size:
            return None
        return draw_cutout(self.rng(CUTOUT), self.config, num_images=self.num_images, image_size=self.image_size)

    def erasings(self) -> tuple[Array, Array] | None:
        if not self.config.erasing_probability:
            return None
        return draw_erasing(self.rng(ERASING), self.config, num_images=self.num_images, image_size=self.image_size)


def _colour_slots(
    operations: Operations, used_E: Array, *, batch_size: int, device: str | torch.device
) -> list[Grouped]:
    """For each slot, the images that get each of COLOURS there."""
    colour_of = np.full(len(ID), -1)
    colour_of[[ID[name] for name in COLOURS]] = range(len(COLOURS))
    return [
        Grouped.by_kind(
            colour_of[operation_N[used_E]],
            level_N[used_E, None],
            kinds=len(COLOURS),
            batch_size=batch_size,
            device=device,
        )
        for operation_N, level_N in zip(operations.operation_NS.T, operations.level_NS.T, strict=True)
    ]


def augment(images_BCHW: Tensor, draws: BatchDraws, *, config: TrainConfig, fill_C: Tensor) -> Tensor:
    """Augmented copies of uint8 images; float32 [B, C, H, W] in 0 to 255, channels_last in memory.

    Fastest on images that are channels_last already. `fill_C`: the colour that cutout and erasing leave behind.
    """
    size = images_BCHW.shape[-1]
    images_BHWC = cropped_and_flipped(_channels_together(images_BCHW), draws, config=config)
    if draws.warp is not None:
        index_S, values_SX = draws.warp.index_S, draws.warp.values_SX
        box_S4 = values_SX[:, 6:] if values_SX.shape[1] > 6 else None
        warped = resample(images_BHWC.index_select(0, index_S), values_SX[:, :6].unflatten(1, (2, 3)), box_S4)
        put(images_BHWC, index_S, warped)
    for name, group in draws.colours:
        changed = COLOUR_OPERATORS[name](images_BHWC.index_select(0, group.index_S), group.values_SX[:, 0])
        put(images_BHWC, group.index_S, changed)
    floats_BHWC = images_BHWC.float()
    holes = ((draws.cutout, min(config.cutout_size, size // 2)), (draws.erasing, erasing_side(size)))
    for hole, side in holes:
        if hole is not None:
            fill_rectangles(floats_BHWC, hole.index_S, hole.values_SX, side=side, fill_C=fill_C)
    return floats_BHWC.permute(0, 3, 1, 2)


def _channels_together(images_BCHW: Tensor) -> Tensor:
    """Contiguous images [B, H, W, C]."""
    images_BHWC = images_BCHW.permute(0, 2, 3, 1)
    if images_BHWC.is_contiguous() or images_BCHW.device.type != "cpu":
        return images_BHWC.contiguous()
    # On a CPU torch moves floats much faster than bytes.
    return images_BHWC.float().contiguous().to(torch.uint8)


def cropped_and_flipped(images_BHWC: Tensor, draws: BatchDraws, *, config: TrainConfig) -> Tensor:
    """New images: each one's window of the padded image, mirrored where told; no pixel changes its value."""
    if draws.start_B2 is None:
        images_BHWC = images_BHWC.clone()
    else:
        wide_BHWC = padded(images_BHWC, padding=config.crop_padding, fill=config.crop_fill)
        images_BHWC = windows(wide_BHWC, draws.start_B2, size=images_BHWC.shape[1])
    if draws.flip is not None:
        flipped = images_BHWC.index_select(0, draws.flip.index_S).flip(2)
        put(images_BHWC, draws.flip.index_S, flipped)
    return images_BHWC

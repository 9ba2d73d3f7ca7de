"""Augmentation of whole batches: draws in their ranges, images that do not affect each other, pixels that stay pixels.

Shape suffixes: B batch, S images, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from tests.augmenting import EACH_ALONE, EVERYTHING, GREY_OR_COLOUR, MIXED, NOTHING, augmented, draws_for, noise
from trainables.augment import EpochDraws, augment
from trainables.config import TrainConfig
from trainables.geometry import (
    draw_boxes,
    draw_cutout,
    draw_erasing,
    erasing_side,
)
from trainables.mixing import mix

# --- shapes and places that are drawn ---


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([7, 8, 31, 32]), st.floats(0.1, 1.0), st.floats(0.2, 1.0))
def test_boxes_lie_inside_the_image_and_keep_to_their_limits(
    seed: int, size: int, min_area: float, min_ratio: float
) -> None:
    config = TrainConfig(
        resized_crop_min_area=min_area, resized_crop_min_ratio=min_ratio, resized_crop_max_ratio=1 / min_ratio
    )
    boxes, _ = draw_boxes(np.random.default_rng(seed), config, num_images=200, image_size=size)
    left, top, width, height = boxes.T
    assert (np.minimum(left, top) >= 0).all()
    assert (np.minimum(width, height) >= 1).all()
    assert (left + width <= size).all()
    assert (top + height <= size).all()
    # Sides are rounded to whole pixels.
    assert ((width + 0.5) * (height + 0.5) >= min_area * size**2).all()
    assert ((width + 0.5) / (height - 0.5) >= min_ratio).all()
    assert ((width - 0.5) / (height + 0.5) <= 1 / min_ratio).all()


def test_boxes_that_cannot_be_found_are_the_largest_in_the_middle() -> None:
    config = TrainConfig(resized_crop_min_area=1.0, resized_crop_min_ratio=0.5, resized_crop_max_ratio=0.5)
    boxes, _ = draw_boxes(np.random.default_rng(0), config, num_images=3, image_size=32)
    assert boxes.tolist() == [[8, 0, 16, 32]] * 3


def test_areas_and_ratios_of_boxes_spread_over_their_range() -> None:
    config = TrainConfig(resized_crop_min_area=0.2, resized_crop_max_area=0.6)
    boxes, _ = draw_boxes(np.random.default_rng(0), config, num_images=20_000, image_size=224)
    area, ratio = boxes[:, 2] * boxes[:, 3] / 224**2, boxes[:, 2] / boxes[:, 3]
    assert np.quantile(area, [0.01, 0.5, 0.99]) == pytest.approx([0.204, 0.4, 0.596], abs=0.01)
    assert np.quantile(np.log(ratio), [0.01, 0.5, 0.99]) == pytest.approx([-0.28, 0, 0.28], abs=0.02)
    room = 224 - boxes[:, 2]
    assert (boxes[:, 0] / room).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("size", [7, 8, 32])
def test_erased_rectangles_have_their_published_areas(size: int) -> None:
    config = replace(NOTHING, erasing_probability=0.5)
    rectangles, applies = draw_erasing(np.random.default_rng(0), config, num_images=5_000, image_size=size)
    height, width = (rectangles[:, 2:] - rectangles[:, :2])[applies].T
    assert applies.mean() == pytest.approx(0.5, abs=0.03)
    assert (rectangles[applies] >= 0).all()
    assert (rectangles[applies] <= size).all()
    assert max(height.max(), width.max()) <= erasing_side(size)
    assert ((height - 0.5) * (width - 0.5) <= 0.33 * size**2).all()
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * size**2).all()


def test_cutout_never_hides_a_whole_small_image() -> None:
    white = torch.full((64, 1, 8, 8), 255, dtype=torch.uint8)
    hidden = (augmented(replace(NOTHING, cutout_size=16), white) == 7).sum((1, 2, 3))
    assert hidden.max() == 16
    assert hidden.min() >= 4


def test_cutout_squares_are_cut_off_at_the_borders() -> None:
    squares, _ = draw_cutout(np.random.default_rng(0), TrainConfig(cutout_size=4), num_images=500, image_size=9)
    sides = squares[:, 2:] - squares[:, :2]
    assert set(map(tuple, sides.tolist())) == {(h, w) for h in (2, 3, 4) for w in (2, 3, 4)}
    assert squares.min() == 0
    assert squares.max() == 9


# --- whole augmentation ---


def test_crop_flip_and_cutout_are_those_that_past_runs_drew() -> None:
    config = TrainConfig(seed=5, crop_padding=3, cutout_size=4, cutout_probability=0.6)
    images, fill = noise(24, size=16), 7.0
    order = np.random.default_rng([5, 2, 0]).permutation(24)
    shift = np.random.default_rng([5, 2, 1]).integers(0, 7, size=(24, 2))
    flipped = np.random.default_rng([5, 2, 2]).random(24) < 0.5
    rng = np.random.default_rng([5, 2, 3])
    centre, cut = rng.integers(0, 16, size=(24, 2)), rng.random(24) < 0.6
    draws = EpochDraws.draw(config, epoch=2, num_images=24, image_size=16, device="cpu", batch_size=10)
    assert draws.order_N.tolist() == order.tolist()
    for step in range(2):
        positions = draws.order_N[step * 10 : step * 10 + 10]
        found = augment(images[positions], draws.batch(step), config=config, fill_C=torch.full((3,), fill))
        for position, image in zip(positions.tolist(), found, strict=True):
            row, column = shift[position]
            expected = pad(images[position].float(), (3,) * 4)[:, row : row + 16, column : column + 16]
            expected = expected.flip(-1) if flipped[position] else expected.clone()
            if cut[position]:
                top, left = np.maximum(centre[position] - 2, 0)
                bottom, right = centre[position] + 2
                expected[:, top:bottom, left:right] = fill
            assert torch.equal(image, expected)


def test_alternating_flip_mirrors_every_image_in_every_other_epoch() -> None:
    config = replace(NOTHING, flip=True, alternating_flip=True)
    images = noise(40)
    epochs = [augmented(config, images, epoch=epoch) for epoch in (1, 2, 3)]
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[0], epochs[1].flip(-1))
    mirrored = (epochs[0] == images.flip(-1)).flatten(1).all(1).float().mean()
    assert 0.2 < mirrored < 0.8
    assert not torch.equal(augmented(replace(config, seed=1), images), epochs[0])


@GREY_OR_COLOUR
@pytest.mark.parametrize("size", [7, 8, 31])
@pytest.mark.parametrize("config", EACH_ALONE.values(), ids=EACH_ALONE.keys())
def test_pixels_stay_pixels(config: TrainConfig, size: int, channels: int) -> None:
    images = noise(40, channels, size)
    before = images.clone()
    found = augmented(config, images)
    assert found.shape == images.shape
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.min() >= 0
    assert found.max() <= 255
    assert torch.equal(images, before)
    assert not torch.equal(found, images.float())


@pytest.mark.parametrize("config", EACH_ALONE.values(), ids=EACH_ALONE.keys())
def test_images_do_not_affect_each_other(config: TrainConfig) -> None:
    images, fill_C = noise(24), torch.full((3,), 7.0)
    together = augmented(config, images)
    order = np.random.default_rng(1).permutation(24)
    permuted = augmented(config, images, order=order)
    assert not torch.equal(permuted, augmented(config, images[order]))
    draws = draws_for(config, images, order=order, batch_size=1)
    for step, position in enumerate(order):
        alone = augment(images[position : position + 1], draws.batch(step), config=config, fill_C=fill_C)
        assert torch.equal(alone[0], together[position])
    draws = draws_for(config, images, order=order)
    assert torch.equal(augment(images[order], draws.batch(0), config=config, fill_C=fill_C), together[order])


@pytest.mark.parametrize("config", EACH_ALONE.values(), ids=EACH_ALONE.keys())
def test_augmentation_repeats_itself_and_epochs_and_seeds_differ(config: TrainConfig) -> None:
    images = noise(24)
    found = augmented(config, images)
    assert torch.equal(augmented(config, images), found)
    assert not torch.equal(augmented(config, images, epoch=2), found)
    assert not torch.equal(augmented(replace(config, seed=1), images), found)


def test_memory_format_does_not_change_pixels() -> None:
    images = noise(24)
    assert torch.equal(
        augmented(EVERYTHING, images.contiguous(memory_format=torch.channels_last)), augmented(EVERYTHING, images)
    )


def test_with_probability_0_nothing_happens() -> None:
    never = {name: 0.0 for name in vars(EVERYTHING) if name.endswith("_probability")}
    images = noise(24)
    config = replace(MIXED, crop_padding=0, flip=False, **never)  # type: ignore[arg-type]
    found = augmented(config, images)
    assert torch.equal(found, images.float())
    mixed, targets = mix(found, torch.arange(24), draws_for(config, images).batch(0).mixing)
    assert torch.equal(mixed, images.float())
    assert targets.labels_BK.shape == (24, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "trivialaugment"},
        {"jitter_probability": 1.0},
        {"cutout_size": 5},
        {"mixup_alpha": 1.0, "ricap_beta": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_switching_one_operation_on_leaves_the_others_draws_alone(change: dict[str, Any]) -> None:
    images = noise(30)
    config = replace(TrainConfig(), affine_probability=0.5)
    plain, changed = draws_for(config, images), draws_for(replace(config, **change), images)
    assert plain.start_E2 is not None
    assert torch.equal(plain.start_E2, changed.start_E2)
    assert torch.equal(plain.flips.index_R, changed.flips.index_R)
    assert set(plain.warps.index_R.tolist()) <= set(changed.warps.index_R.tolist())

"""Augmentation: every operator agrees with torchvision's, every draw is in its range, images do not affect each other.

Shape suffixes: B batch, S images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    InterpolationMode,
    RandAugment,
    TrivialAugmentWide,
    _functional_tensor,
    autoaugment,
)
from torchvision.transforms import functional as tv

from trainables.augment import EpochDraws, augment
from trainables.colour import COLOUR_OPERATORS
from trainables.config import TrainConfig
from trainables.draws import generator
from trainables.geometry import (
    draw_affine,
    draw_boxes,
    draw_cutout,
    draw_erasing,
    erasing_side,
    fill_rectangles,
    padded,
    policy_maps,
    resample,
    windows,
)
from trainables.mixing import SoftTargets, cutmix_boxes, mix, ricap_patches, shares
from trainables.policies import (
    AUTOAUGMENT_CIFAR10,
    COLOURS,
    FACTORS,
    GEOMETRIC,
    ID,
    OPERATIONS,
    SIGNED,
    Operations,
    draw_jitter,
    draw_policy,
    narrow_magnitudes,
    wide_magnitudes,
)

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


# --- colours ---

TORCHVISION: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "Brightness": tv.adjust_brightness,
    "Color": tv.adjust_saturation,
    "Contrast": tv.adjust_contrast,
    "Sharpness": tv.adjust_sharpness,
    "Posterize": lambda image, bits: tv.posterize(image, int(bits)),
    "Solarize": tv.solarize,
    "AutoContrast": lambda image, _: tv.autocontrast(image),
    "Equalize": lambda image, _: tv.equalize(image),
    "Invert": lambda image, _: tv.invert(image),
    "Hue": tv.adjust_hue,
}
FACTOR_LEVELS = (0.0, 0.01, 0.1, 0.4, 0.82, 1.0, 1.3, 1.9, 1.99)
LEVELS = {
    **dict.fromkeys(FACTORS, FACTOR_LEVELS),
    "Posterize": (2, 3, 4, 5, 6, 7, 8, 4, 4),
    "Solarize": (0, 255, 63.75, 127.5, 128, 1, 254, 110, 111),
    "Hue": (-0.5, -0.31, -0.1, 0.0, 0.05, 0.2, 1 / 3, 0.5, 0.01),
}


@GREY_OR_COLOUR
@pytest.mark.parametrize("size", [7, 8, 31, 32])
@pytest.mark.parametrize("name", COLOUR_OPERATORS)
def test_colour_operators_equal_torchvisions(name: str, size: int, channels: int) -> None:
    levels = LEVELS.get(name, (0.0,) * 9)
    images = noise(len(levels), channels, size)
    expected = torch.stack([TORCHVISION[name](image, level) for image, level in zip(images, levels, strict=True)])
    found = COLOUR_OPERATORS[name](images.permute(0, 2, 3, 1).contiguous(), torch.tensor(levels, dtype=torch.float64))
    difference = (found.permute(0, 3, 1, 2).int() - expected.int()).abs()
    # Going to hue, saturation, value and back rounds differently now and then.
    assert difference.max() <= (name == "Hue")
    assert (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("name", COLOUR_OPERATORS)
def test_colour_operators_leave_their_argument_alone(name: str) -> None:
    images = noise(3).permute(0, 2, 3, 1).contiguous()
    before = images.clone()
    COLOUR_OPERATORS[name](images, torch.full((3,), 0.5, dtype=torch.float64) * (8 if name == "Posterize" else 1))
    assert torch.equal(images, before)


# --- geometry ---


def geometric(steps: list[tuple[str, float]], image: torch.Tensor) -> torch.Tensor:
    """An image [C, H, W] after some geometric operations in one interpolation."""
    operations = Operations(np.array([[ID[name] for name, _ in steps]]), np.array([[level for _, level in steps]]))
    maps, moved = policy_maps(operations, image_size=image.shape[-1])
    assert moved.all()
    return resample(image.permute(1, 2, 0)[None], torch.from_numpy(maps[:, :2])).permute(0, 3, 1, 2)[0]


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """That bytes are `exact` rounded; where it lies half way between two, either will do."""
    assert found.dtype == torch.uint8
    assert (found.float() - exact).abs().max() <= 0.502


def one_after_the_other(steps: list[tuple[str, float]], image: torch.Tensor) -> torch.Tensor:
    for name, level in steps:
        image = autoaugment._apply_op(image, name, level, InterpolationMode.BILINEAR, None)
    return image


@GREY_OR_COLOUR
@pytest.mark.parametrize("size", [7, 8, 31, 32])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operators_equal_torchvisions(name: str, size: int, channels: int) -> None:
    scale = {"Shear": 0.3, "Trans": size / 3, "Rotat": 30}[name[:5]]
    for share in (-1, -0.53, 0.11, 1):
        level = float(int(share * scale)) if name.startswith("Trans") else share * scale
        image = noise(2, channels, size, seed=size)[1]
        assert_rounded(geometric([(name, level)], image), one_after_the_other([(name, level)], image.float()))


def smooth_image(size: int = 32) -> torch.Tensor:
    place = torch.linspace(0, math.pi, size)
    waves = torch.stack([torch.sin(place)[:, None] * torch.cos(place * (k + 1)) for k in range(3)])
    return (waves * 120 + 128).to(torch.uint8)


@pytest.mark.parametrize("second", GEOMETRIC)
@pytest.mark.parametrize("first", GEOMETRIC)
def test_two_geometric_operators_in_one_interpolation_equal_one_after_the_other(first: str, second: str) -> None:
    levels = {"ShearX": 0.2, "ShearY": -0.15, "TranslateX": 4.0, "TranslateY": -3.0, "Rotate": 20.0}
    steps = [(first, levels[first]), (second, levels[second])]
    image = smooth_image()
    together, apart = geometric(steps, image).int(), one_after_the_other(steps, image).int()
    interior = (slice(None), slice(10, 22), slice(10, 22))
    assert (together[interior] - apart[interior]).abs().max() <= 3
    # The order counts: a wrong one would be found out.
    if {first, second} == {"Rotate", "TranslateX"}:
        swapped = geometric(steps[::-1], image).int()
        assert (swapped[interior] - apart[interior]).abs().max() > 3


def test_a_random_affine_map_equals_torchvisions() -> None:
    config = TrainConfig(affine_probability=1.0, affine_shear_degrees=20.0, affine_degrees=40.0)
    turn, shift_x, shift_y, growth, shear = np.random.default_rng(5).uniform(-1, 1, size=(5, 6))
    maps, applies = draw_affine(np.random.default_rng(5), config, num_images=6)
    images = noise(6, size=31)
    found = resample(images.permute(0, 2, 3, 1), torch.from_numpy(maps[:, :2])).permute(0, 3, 1, 2)
    assert applies.all()
    for i, image in enumerate(images):
        matrix = tv._get_inverse_affine_matrix(
            [0.0, 0.0],
            -40 * turn[i],
            [31 * 0.0625 * shift_x[i], 31 * 0.0625 * shift_y[i]],
            1 + 0.1 * growth[i],
            [20 * shear[i], 0.0],
        )
        assert_rounded(found[i], _functional_tensor.affine(image.float(), matrix, interpolation="bilinear"))


def resized(image: torch.Tensor, box: tuple[int, int, int, int], map_23: torch.Tensor | None = None) -> torch.Tensor:
    map_23 = torch.eye(3)[:2] if map_23 is None else map_23
    found = resample(image.permute(1, 2, 0)[None], map_23[None], torch.tensor([box], dtype=torch.float64))
    return found.permute(0, 3, 1, 2)[0]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([7, 8, 31, 32]), st.sampled_from([1, 3]))
def test_a_resized_crop_equals_torchvisions(data: st.DataObject, size: int, channels: int) -> None:
    width, height = data.draw(st.integers(1, size)), data.draw(st.integers(1, size))
    left, top = data.draw(st.integers(0, size - width)), data.draw(st.integers(0, size - height))
    image = noise(2, channels, size, seed=size)[1]
    expected = tv.resized_crop(image.float(), top, left, height, width, [size, size], antialias=False)
    assert_rounded(resized(image, (left, top, width, height)), expected)


def test_nothing_outside_a_resized_crop_is_seen_when_it_is_turned() -> None:
    image = torch.full((1, 32, 32), 255, dtype=torch.uint8)
    image[:, 8:24, 8:24] = 100
    turn = torch.from_numpy(policy_maps(Operations(np.array([[ID["Rotate"]]]), np.array([[45.0]])), image_size=32)[0])
    turned = resized(image, (8, 8, 16, 16), turn[0, :2])
    assert turned.max() == 100
    cut = tv.resized_crop(image.float(), 8, 8, 16, 16, [32, 32], antialias=False)
    assert_rounded(turned, one_after_the_other([("Rotate", 45.0)], cut))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from(["black", "reflect"]), st.sampled_from([1, 3]))
def test_a_window_of_the_padded_image_equals_torch_pad_and_slicing(
    row: int, column: int, fill: str, channels: int
) -> None:
    images = noise(2, channels, 7)
    mode = "constant" if fill == "black" else "reflect"
    expected = pad(images.float(), (3, 3, 3, 3), mode=mode)[:, :, row : row + 7, column : column + 7]
    wide = padded(images.permute(0, 2, 3, 1).contiguous(), padding=3, fill=fill)
    found = windows(wide, torch.tensor([[row, column]] * 2), size=7)
    assert torch.equal(found.permute(0, 3, 1, 2).float(), expected)


def test_reflection_goes_on_beyond_the_opposite_border() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).expand(3, 3)[None, :, :, None].contiguous()
    wide = padded(image, padding=5, fill="reflect")
    assert wide[0, 0, :, 0].tolist() == [20, 10, 20, 30, 20, 10, 20, 30, 20, 10, 20, 30, 20]


def test_rectangles_are_filled_exactly() -> None:
    images = torch.zeros(3, 6, 6, 1)
    rectangles = torch.tensor([[1, 2, 4, 6], [0, 0, 1, 1]])
    fill_rectangles(images, torch.tensor([2, 0]), rectangles, side=5, fill_C=torch.tensor([7.0]))
    assert (images[2, ..., 0] == 7).nonzero().tolist() == [[r, c] for r in range(1, 4) for c in range(2, 6)]
    assert (images[0, ..., 0] == 7).nonzero().tolist() == [[0, 0]]
    assert (images[1] == 0).all()


# --- policies ---


def test_the_autoaugment_policy_is_torchvisions() -> None:
    assert list(AUTOAUGMENT_CIFAR10) == AutoAugment(AutoAugmentPolicy.CIFAR10).policies


@pytest.mark.parametrize("size", [8, 31, 32, 224])
@pytest.mark.parametrize("policy", ["autoaugment_cifar10", "randaugment", "trivialaugment"])
def test_magnitudes_are_torchvisions(policy: str, size: int) -> None:
    space, table = {
        "autoaugment_cifar10": (
            AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(10, (size, size)),
            narrow_magnitudes(bins=10, image_size=size),
        ),
        "randaugment": (
            RandAugment()._augmentation_space(31, (size, size)),
            narrow_magnitudes(bins=31, image_size=size),
        ),
        "trivialaugment": (TrivialAugmentWide()._augmentation_space(31), wide_magnitudes()),
    }[policy]
    for name, (magnitudes, signed) in space.items():
        assert (table[ID[name]] == magnitudes.numpy().astype(np.float64)).all(), name
        assert signed == (name in SIGNED), name


def test_autoaugment_draws_each_pair_with_its_probabilities_and_levels() -> None:
    drawn = draw_policy(
        np.random.default_rng(0), TrainConfig(policy="autoaugment_cifar10"), num_images=50_000, image_size=32
    )
    share = {name: (drawn.operation_NS == ID[name]).any(1).mean() for name in OPERATIONS}
    # Rotate is in one pair of 25, with probability 0.7; ShearY in two, with 0.5 and 0.2.
    assert share["Rotate"] == pytest.approx(0.7 / 25, abs=0.003)
    assert share["ShearY"] == pytest.approx(0.7 / 25, abs=0.003)
    assert share["ShearX"] == share["Hue"] == 0
    rotated = drawn.level_NS[drawn.operation_NS == ID["Rotate"]]
    # The third of ten magnitudes from 0 to 30 degrees, either way.
    assert set(np.abs(rotated).round(4)) == {6.6667}
    assert (rotated > 0).mean() == pytest.approx(0.5, abs=0.05)
    shifted = drawn.level_NS[drawn.operation_NS == ID["TranslateX"]]
    # The last of ten, 150 / 331 of 32 pixels, and the last but one, truncated.
    assert set(np.abs(shifted)) == {14, 12}
    assert set(drawn.level_NS[drawn.operation_NS == ID["Brightness"]].round(6)) >= {1.9, 0.1}


@pytest.mark.parametrize(("policy", "slots"), [("randaugment", 3), ("trivialaugment", 1)])
def test_random_policies_choose_their_fourteen_operations_alike(policy: str, slots: int) -> None:
    config = TrainConfig(policy=policy, randaugment_num_ops=3, randaugment_magnitude=30, policy_probability=0.7)
    drawn = draw_policy(np.random.default_rng(0), config, num_images=30_000, image_size=32)
    assert drawn.operation_NS.shape == (30_000, slots)
    share = np.bincount(drawn.operation_NS[:, 0], minlength=len(OPERATIONS)) / 30_000
    for name in OPERATIONS:
        expected = {"Invert": 0, "Hue": 0, "Identity": 0.3 + 0.7 / 14}.get(name, 0.7 / 14)
        assert share[ID[name]] == pytest.approx(expected, abs=0.01), name
    degrees = np.abs(drawn.level_NS[drawn.operation_NS == ID["Rotate"]])
    assert len(set(degrees)) == {"randaugment": 1, "trivialaugment": 31}[policy]
    assert degrees.max() == {"randaugment": 30, "trivialaugment": 135}[policy]
    bits = drawn.level_NS[drawn.operation_NS == ID["Posterize"]]
    assert bits.min() == {"randaugment": 4, "trivialaugment": 2}[policy]


def test_jitter_factors_stay_within_their_strengths() -> None:
    config = replace(EACH_ALONE["jitter"], jitter_probability=0.4)
    drawn = draw_jitter(np.random.default_rng(0), config, num_images=20_000)
    contrast_N, hue_N = drawn.level_NS.T
    assert (drawn.operation_NS[:, 0] == ID["Contrast"]).mean() == pytest.approx(0.4, abs=0.02)
    assert ((drawn.operation_NS == ID["Identity"]).all(1) | (drawn.operation_NS != ID["Identity"]).all(1)).all()
    assert 0.5 <= contrast_N.min() < 0.51
    assert 1.49 < contrast_N.max() <= 1.5
    assert -0.2 <= hue_N.min() < -0.19
    assert 0.19 < hue_N.max() <= 0.2


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


def test_a_policy_is_torchvisions_on_single_images() -> None:
    config = replace(NOTHING, policy="randaugment", seed=3)
    images = noise(60, size=31)
    found = augmented(config, images)
    drawn = draw_policy(generator(config, epoch=1, stream=10), config, num_images=60, image_size=31)
    alike = 0
    for image, result, operations, levels in zip(images, found, drawn.operation_NS, drawn.level_NS, strict=True):
        names = [OPERATIONS[operation] for operation in operations]
        # torchvision alternates; here geometry comes first, and in one interpolation.
        if sum(name in GEOMETRIC for name in names) == 2 or names[1] in GEOMETRIC:
            continue
        for name, level in zip(names, levels, strict=True):
            if name in GEOMETRIC:
                image = one_after_the_other([(name, level)], image)
            elif name in COLOURS:
                image = TORCHVISION[name](image, level)
        alike += 1
        assert (result - image.float()).abs().mean() < 0.5, names
    assert alike > 30


# --- mixing ---

KINDS_OF_MIXING = {
    "mixup": (replace(NOTHING, mixup_alpha=1.0), 2),
    "cutmix": (replace(NOTHING, cutmix_alpha=1.0), 2),
    "ricap": (replace(NOTHING, ricap_beta=0.3), 4),
    "some": (replace(NOTHING, cutmix_alpha=1.0, cutmix_probability=0.3, mixup_alpha=1.0, mixup_probability=0.3), 2),
    "all": (replace(NOTHING, mixup_alpha=0.4, cutmix_alpha=1.0, ricap_beta=0.3), 4),
    "none": (NOTHING, 1),
}
MIXINGS = pytest.mark.parametrize(("config", "num_labels"), KINDS_OF_MIXING.values(), ids=KINDS_OF_MIXING.keys())


@MIXINGS
@pytest.mark.parametrize("size", [7, 8])
def test_labels_weigh_what_their_images_fill(config: TrainConfig, num_labels: int, size: int) -> None:
    batch_size = 16
    # Image b is 1 in channel b and 0 elsewhere: a mixed image's channel means are the shares of its sources.
    images = torch.eye(batch_size)[:, :, None, None].expand(-1, -1, size, size).contiguous()
    draws = EpochDraws.draw(config, epoch=1, num_images=64, image_size=size, device="cpu", batch_size=batch_size)
    for step in range(4):
        mixed, targets = mix(images, torch.arange(batch_size), draws.batch(step).mixing)
        assert targets.labels_BK.shape == targets.weights_BK.shape == (batch_size, num_labels)
        assert targets.weights_BK.dtype == torch.float32
        weight_of_source = torch.zeros(batch_size, batch_size).scatter_add_(1, targets.labels_BK, targets.weights_BK)
        assert torch.allclose(mixed.mean((2, 3)), weight_of_source, atol=1e-6)
        assert torch.allclose(targets.weights_BK.sum(1), torch.ones(batch_size), atol=1e-6)


def test_patches_are_whole_pieces_of_their_images() -> None:
    """RICAP by slicing, as in its paper's listing."""
    config = replace(NOTHING, ricap_beta=1.0)
    images = noise(12, size=9).float()
    draws = draws_for(config, images)
    mixed, targets = mix(images, torch.arange(12), draws.batch(0).mixing)
    numbers, _ = ricap_patches(generator(config, epoch=1, stream=13), 1.0, num_images=12, image_size=9)
    for b, (row, column, *moves) in enumerate(numbers):
        corners = [(0, 0, row, column), (0, column, row, 9), (row, 0, 9, column), (row, column, 9, 9)]
        for k, (top, left, bottom, right) in enumerate(corners):
            down, across = moves[k], moves[4 + k]
            piece = images[(b - k) % 12, :, top + down : bottom + down, left + across : right + across]
            assert torch.equal(mixed[b, :, top:bottom, left:right], piece)
            assert targets.weights_BK[b, k] == pytest.approx((bottom - top) * (right - left) / 81)


def test_cutmix_puts_a_box_of_the_partner_into_the_image() -> None:
    config = replace(NOTHING, cutmix_alpha=1.0)
    images = noise(12, size=9).float()
    mixed, targets = mix(images, torch.arange(12), draws_for(config, images).batch(0).mixing)
    boxes, _ = cutmix_boxes(generator(config, epoch=1, stream=12), 1.0, num_images=12, image_size=9)
    for b, (top, left, bottom, right) in enumerate(boxes):
        expected = images[b].clone()
        expected[:, top:bottom, left:right] = images[b - 1, :, top:bottom, left:right]
        assert torch.equal(mixed[b], expected)
        assert targets.weights_BK[b, 1] == pytest.approx((bottom - top) * (right - left) / 81)


def test_mixup_weights_are_those_that_past_runs_drew() -> None:
    config = replace(NOTHING, seed=4, mixup_alpha=0.5, mixup_probability=0.7)
    rng = np.random.default_rng([4, 3, 4])
    weight = rng.beta(0.5, 0.5, size=20).astype(np.float32)
    weight[rng.random(20) >= 0.7] = 1
    images = noise(20).float()
    mixed, targets = mix(images, torch.arange(20), draws_for(config, images, epoch=3).batch(0).mixing)
    assert (targets.weights_BK[:, 0].numpy() == weight).all()
    weight_B111 = torch.from_numpy(weight)[:, None, None, None]
    assert torch.equal(mixed, torch.lerp(images.roll(1, 0), images, weight_B111))


def test_shares_of_mixings_that_are_too_large_are_divided_by_their_sum() -> None:
    config = KINDS_OF_MIXING["all"][0]
    assert shares(config) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert shares(replace(config, mixup_probability=0.2, cutmix_probability=0.3, ricap_probability=0.1)) == (
        pytest.approx((0.2, 0.3, 0.1))
    )
    assert shares(replace(config, ricap_beta=0.0, mixup_probability=0.5)) == pytest.approx((1 / 3, 2 / 3, 0))
    draws = EpochDraws.draw(config, epoch=1, num_images=6000, image_size=32, device="cpu", batch_size=6000)
    mixing = draws.batch(0).mixing
    assert mixing.ricap is not None
    assert len(mixing.ricap.index_S) == pytest.approx(2000, abs=120)
    assert (mixing.mixup_weight_B < 1).sum().item() == pytest.approx(2000, abs=120)


def test_cutmix_boxes_have_the_size_that_is_drawn() -> None:
    _, share = cutmix_boxes(np.random.default_rng(0), 1.0, num_images=20_000, image_size=32)
    assert share.min() == 0
    # Half of the image on average before boxes are cut off at the borders, which a third of them loses.
    assert 0.3 < share.mean() < 0.5


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, torch.tensor(0.1)], ids=["none", "number", "tensor"])
def test_the_loss_is_the_cross_entropy_against_soft_targets(label_smoothing: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(5, (6, 4))
    weights = torch.rand(6, 4)
    weights /= weights.sum(1, keepdim=True)
    soft = torch.zeros(6, 5).scatter_add_(1, labels, weights)
    expected = cross_entropy(logits, soft, label_smoothing=float(label_smoothing))
    assert SoftTargets(labels, weights).loss(logits, label_smoothing).item() == pytest.approx(expected.item(), rel=1e-6)
    single = SoftTargets(labels[:, :1], torch.ones(6, 1)).loss(logits, label_smoothing)
    expected = cross_entropy(logits, labels[:, 0], label_smoothing=float(label_smoothing))
    assert single.item() == pytest.approx(expected.item(), rel=1e-6)


def test_right_predictions_count_by_the_weight_of_their_label() -> None:
    targets = SoftTargets(torch.tensor([[0, 1], [2, 2], [1, 0]]), torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]))
    logits = torch.eye(3)[[1, 2, 2]]
    # .3 of the first image, all of the second, nothing of the third.
    assert targets.correct(logits).item() == pytest.approx(1.3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([7, 8, 31]), st.sampled_from([1, 3]))
def test_everything_at_once_keeps_pixels_and_weights_in_range(
    seed: int, batch_size: int, size: int, channels: int
) -> None:
    config = replace(MIXED, seed=seed)
    images = noise(2 * batch_size, channels, size, seed=seed)
    draws = EpochDraws.draw(
        config, epoch=1, num_images=len(images), image_size=size, device="cpu", batch_size=batch_size
    )
    for step in range(2):
        positions = draws.order_N[step * batch_size :][:batch_size]
        drawn = draws.batch(step)
        found = augment(images[positions], drawn, config=config, fill_C=torch.full((channels,), 7.0))
        mixed, targets = mix(found, positions, drawn.mixing)
        assert mixed.shape == (batch_size, channels, size, size)
        assert mixed.min() >= 0
        assert mixed.max() <= 255
        assert torch.allclose(targets.weights_BK.sum(1), torch.ones(batch_size), atol=1e-6)
        assert (targets.labels_BK[:, 0] == positions).all()


class OperatorNames(TorchDispatchMode):
    """Notes the names of the operators that are called, and of index types that hide a search."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        if func.overloadpacket.__name__.startswith("index"):
            indices = [x for arg in args if isinstance(arg, list | tuple) for x in arg if isinstance(x, torch.Tensor)]
            self.names |= {"boolean index" for x in indices if x.dtype == torch.bool}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["autoaugment_cifar10", "randaugment", "trivialaugment"])
def test_a_step_never_waits_for_the_device(policy: str) -> None:
    config = replace(MIXED, policy=policy)
    images = noise(64)
    draws = draws_for(config, images)
    with OperatorNames() as called:
        drawn = draws.batch(0)
        found = augment(images, drawn, config=config, fill_C=torch.full((3,), 7.0))
        mixed, targets = mix(found, torch.arange(64) % 3, drawn.mixing)
        logits = mixed.mean((2, 3))
        targets.correct(logits + targets.loss(logits, torch.tensor(0.1)))
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "boolean index"}
    assert "grid_sampler_2d" in called.names
    assert not called.names & (waiting | {"repeat_interleave", "histc", "equal", "item"})

"""Image operators and policies agree with torchvision's, parameter by parameter.

Shape suffixes: B batch, S images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
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

from tests.augmenting import EACH_ALONE, GREY_OR_COLOUR, NOTHING, augmented, noise
from trainables.colour import COLOUR_OPERATORS
from trainables.config import TrainConfig
from trainables.draws import generator
from trainables.geometry import (
    draw_affine,
    fill_rectangles,
    padded,
    policy_maps,
    resample,
    windows,
)
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

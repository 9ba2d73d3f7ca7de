"""Augmentation policies: which operations an image gets, and how strong. Drawn on the host, for all images at once.

Magnitudes are those of torchvision's transforms of the same names. Shape suffixes: N images, S slots (operations that
follow each other), M magnitudes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainables.colour import COLOUR_OPERATORS
from trainables.config import TrainConfig
from trainables.draws import Array

GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
COLOURS = tuple(COLOUR_OPERATORS)
OPERATIONS = (*GEOMETRIC, *COLOURS, "Identity")
ID = {name: number for number, name in enumerate(OPERATIONS)}
SIGNED = {*GEOMETRIC, "Brightness", "Color", "Contrast", "Sharpness"}
FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")
"""Operations whose level is a factor: 1 plus or minus the magnitude."""

# AutoAugment (Cubuk et al. 2019), table 7: the 25 sub-policies found on CIFAR-10, two steps each, as
# (operation, probability, magnitude's number of 0 to 9).
Step = tuple[str, float, int | None]
AUTOAUGMENT_CIFAR10: tuple[tuple[Step, Step], ...] = (
    (("Invert", 0.1, None), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, None), ("Equalize", 0.9, None)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, None), ("Equalize", 0.5, None)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, None), ("AutoContrast", 0.4, None)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, None)),
    (("Equalize", 0.2, None), ("AutoContrast", 0.6, None)),
    (("Equalize", 0.2, None), ("Equalize", 0.6, None)),
    (("Color", 0.9, 9), ("Equalize", 0.6, None)),
    (("AutoContrast", 0.8, None), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, None)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, None), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, None), ("Invert", 0.1, None)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, None)),
)


@dataclass(frozen=True)
class Operations:
    """What each image gets, slot after slot: numbers of OPERATIONS and their levels.

    A level is pixels (Translate), degrees (Rotate, counter-clockwise), source pixels a pixel (Shear), a factor
    (FACTORS), bits kept (Posterize), the smallest value inverted (Solarize) or turns of the circle (Hue).
    """

    operation_NS: Array
    level_NS: Array


def magnitudes(*, bins: int, shear: float, translate: float, degrees: float, blend: float, bits: int) -> Array:
    """A row of `bins` magnitudes for every operation, from none to the largest given; `bits`: most bits dropped."""
    largest = {
        **dict.fromkeys(("ShearX", "ShearY"), shear),
        **dict.fromkeys(("TranslateX", "TranslateY"), translate),
        "Rotate": degrees,
        **dict.fromkeys(FACTORS, blend),
    }
    rows = np.zeros((len(OPERATIONS), bins))
    for name, last in largest.items():
        # torch's, not numpy's: they differ in the last bit, and some levels are truncated.
        rows[ID[name]] = torch.linspace(0, last, bins).numpy()
    rows[ID["Posterize"]] = 8 - np.rint(np.arange(bins) / ((bins - 1) / bits))
    rows[ID["Solarize"]] = torch.linspace(255, 0, bins).numpy()
    return rows


def narrow_magnitudes(*, bins: int, image_size: int) -> Array:
    """The magnitudes of AutoAugment (10 bins) and RandAugment (31)."""
    translate = 150 / 331 * image_size
    return magnitudes(bins=bins, shear=0.3, translate=translate, degrees=30, blend=0.9, bits=4)


def wide_magnitudes() -> Array:
    """The magnitudes of TrivialAugment's wide space."""
    return magnitudes(bins=31, shear=0.99, translate=32, degrees=135, blend=0.99, bits=6)


RANDOM_CHOICE = np.array([number for name, number in ID.items() if name not in {"Invert", "Hue"}])
"""What RandAugment and TrivialAugment choose from."""


def _levels(operation: Array, magnitude: Array, negative: Array) -> Array:
    """Signed levels of operations with magnitudes, negative where told and where the operation has two directions."""
    signed = np.isin(np.arange(len(OPERATIONS)), [ID[name] for name in SIGNED])[operation]
    factor = np.isin(np.arange(len(OPERATIONS)), [ID[name] for name in FACTORS])[operation]
    whole = np.isin(np.arange(len(OPERATIONS)), [ID["TranslateX"], ID["TranslateY"]])[operation]
    level = np.where(whole, np.trunc(magnitude), magnitude)
    return np.where(signed & negative, -level, level) + factor


def autoaugment_cifar10(
    rng: np.random.Generator, config: TrainConfig, *, num_images: int, image_size: int
) -> Operations:
    """One of 25 pairs of operations, each of which happens with its own probability (Cubuk et al. 2019)."""
    steps = [step for pair in AUTOAUGMENT_CIFAR10 for step in pair]
    names, probabilities, numbers = zip(*steps, strict=True)
    pair_N = rng.integers(len(AUTOAUGMENT_CIFAR10), size=num_images)
    happens_NS = rng.random((num_images, 2)) <= np.array(probabilities).reshape(-1, 2)[pair_N]
    negative_NS = rng.integers(2, size=(num_images, 2)) == 0
    operation_NS = np.array([ID[name] for name in names]).reshape(-1, 2)[pair_N]
    number_NS = np.array([number or 0 for number in numbers]).reshape(-1, 2)[pair_N]
    table = narrow_magnitudes(bins=10, image_size=image_size)
    level_NS = _levels(operation_NS, table[operation_NS, number_NS], negative_NS)
    return Operations(np.where(happens_NS, operation_NS, ID["Identity"]), level_NS)


def randaugment(rng: np.random.Generator, config: TrainConfig, *, num_images: int, image_size: int) -> Operations:
    """So many operations chosen at random, all of the same magnitude of 0 to 30 (Cubuk et al. 2020)."""
    shape = (num_images, config.randaugment_num_ops)
    operation_NS = RANDOM_CHOICE[rng.integers(len(RANDOM_CHOICE), size=shape)]
    table = narrow_magnitudes(bins=31, image_size=image_size)
    level_NS = _levels(operation_NS, table[operation_NS, config.randaugment_magnitude], rng.random(shape) < 0.5)
    return Operations(operation_NS, level_NS)


def trivialaugment(rng: np.random.Generator, config: TrainConfig, *, num_images: int, image_size: int) -> Operations:
    """One operation of a random, wide magnitude (Mueller & Hutter 2021)."""
    shape = (num_images, 1)
    operation_NS = RANDOM_CHOICE[rng.integers(len(RANDOM_CHOICE), size=shape)]
    magnitude_NS = wide_magnitudes()[operation_NS, rng.integers(31, size=shape)]
    return Operations(operation_NS, _levels(operation_NS, magnitude_NS, rng.random(shape) < 0.5))


POLICIES = {
    "autoaugment_cifar10": autoaugment_cifar10,
    "randaugment": randaugment,
    "trivialaugment": trivialaugment,
}


def draw_policy(rng: np.random.Generator, config: TrainConfig, *, num_images: int, image_size: int) -> Operations:
    """The operations of the configured policy, for its share of the images."""
    drawn = POLICIES[config.policy](rng, config, num_images=num_images, image_size=image_size)
    spared_N1 = rng.random((num_images, 1)) >= config.policy_probability
    return Operations(np.where(spared_N1, ID["Identity"], drawn.operation_NS), drawn.level_NS)


def draw_jitter(rng: np.random.Generator, config: TrainConfig, *, num_images: int) -> Operations:
    """Brightness, contrast, saturation and hue, in this order, for the jittered share of the images."""
    strengths = {
        "Brightness": config.jitter_brightness,
        "Contrast": config.jitter_contrast,
        "Color": config.jitter_saturation,
        "Hue": config.jitter_hue,
    }
    names = [name for name, strength in strengths.items() if strength > 0]
    change_NS = rng.uniform(-1, 1, size=(num_images, 4))[:, [list(strengths).index(name) for name in names]]
    level_NS = change_NS * [strengths[name] for name in names] + np.isin(names, FACTORS)
    spared_N1 = rng.random((num_images, 1)) >= config.jitter_probability
    return Operations(np.where(spared_N1, ID["Identity"], [ID[name] for name in names]), level_NS)

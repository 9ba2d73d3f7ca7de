"""How strongly a configuration regularizes, as one number within a search space."""

from __future__ import annotations

import math
from collections.abc import Mapping

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from results.schema import Scalar

REGULARIZERS = (
    "dropout",
    "weight_decay",
    "label_smoothing",
    "mixup_alpha",
    "mixup_probability",
    "cutmix_alpha",
    "cutmix_probability",
    "ricap_beta",
    "ricap_probability",
    "cutout_size",
    "cutout_probability",
    "erasing_probability",
    "policy_probability",
    "randaugment_num_ops",
    "randaugment_magnitude",
    "resized_crop_probability",
    "affine_probability",
    "jitter_probability",
)
"""Fields of TrainConfig of which more regularizes more."""


def strength(config: Mapping[str, Scalar], dimensions: Mapping[str, BaseDistribution]) -> float | None:
    """The mean place of the searched regularizers within their ranges: 0 all weakest, 1 all strongest.

    `config`: a value for every field. Places are linear, or logarithmic where the dimension is; a value outside of a
    range, of the base configuration where a conditional space does not search it, is at its nearer end. None when the
    space searches none. The measure is this project's own.
    """
    places = [_place(dimensions[name], config[name]) for name in REGULARIZERS if _is_ordered(dimensions.get(name))]
    return sum(places) / len(places) if places else None


def _is_ordered(distribution: BaseDistribution | None) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return all(isinstance(choice, int | float) for choice in distribution.choices)
    return isinstance(distribution, FloatDistribution | IntDistribution)


def _place(distribution: BaseDistribution, value: Scalar) -> float:
    assert isinstance(value, int | float)
    if isinstance(distribution, CategoricalDistribution):
        ordered = sorted(distribution.choices, key=float)  # type: ignore[arg-type]  # numbers all of them
        return sum(choice < value for choice in ordered) / max(1, len(ordered) - 1)  # type: ignore[operator]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high = float(distribution.low), float(distribution.high)
    if low == high:
        return 0.5
    value = min(max(float(value), low), high)
    if distribution.log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)

"""The learning rate, step by step: a linear warmup, then one of SCHEDULES."""

from __future__ import annotations

import math
from collections.abc import Callable

from trainables.config import TrainConfig


def learning_rate(step: int, *, steps_per_epoch: int, batch_size: int, config: TrainConfig) -> float:
    """The rate of a step; steps count from 0.

    Linear scaling with the batch size (Goyal et al. 2017) where `lr_batch_size` says what `lr` is meant for. Warmup
    takes at most half of the training, so that a short run still decays.
    """
    total = config.max_epochs * steps_per_epoch
    warmup = min(config.warmup_epochs * steps_per_epoch, total / 2)
    peak = config.lr * (batch_size / config.lr_batch_size if config.lr_batch_size else 1.0)
    if step < warmup:
        return peak * _warmup((step + 1) / warmup, config)
    return peak * SCHEDULES[config.schedule]((step - warmup) / (total - warmup), config)


def _warmup(progress: float, config: TrainConfig) -> float:
    """Factor on the peak after a share `progress` in (0, 1] of the warmup; more than a warmup is the peak."""
    start, progress = config.initial_lr_fraction, min(1.0, progress)
    if config.schedule == "one_cycle":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return start + (1 - start) * progress


def _half_cosine(progress: float, config: TrainConfig) -> float:
    floor = config.final_lr_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _cosine_restarts(progress: float, config: TrainConfig) -> float:
    """Cycles that double in length; the last one that begins is stretched to the end of the training."""
    epochs = config.max_epochs - min(config.warmup_epochs, config.max_epochs / 2)
    start, length = 0.0, config.restart_epochs / epochs
    # The next cycle begins only if it ends in time too: a rate left high at the end would cost the last epochs.
    while start + length <= progress and start + 3 * length <= 1 + 1e-9:
        start, length = start + length, 2 * length
    end = start + length if start + 3 * length <= 1 + 1e-9 else 1.0
    return _half_cosine((progress - start) / (end - start), config)


def _warmup_stable_decay(progress: float, config: TrainConfig) -> float:
    """The peak, then a linear fall over the last `decay_fraction` of all epochs (Haegele et al. 2024)."""
    epochs = config.max_epochs
    left = (1 - progress) * (epochs - min(config.warmup_epochs, epochs / 2))
    decay = config.decay_fraction * epochs
    floor = config.final_lr_fraction
    return 1.0 if left >= decay else floor + (1 - floor) * left / decay


SCHEDULES: dict[str, Callable[[float, TrainConfig], float]] = {
    "cosine": _half_cosine,
    "cosine_restarts": _cosine_restarts,
    "one_cycle": _half_cosine,
    "warmup_stable_decay": _warmup_stable_decay,
    "constant": lambda progress, config: 1.0,
}
"""Factor on the peak rate after a share of the steps that follow the warmup. Cosine and its restarts: Loshchilov &
Hutter 2017; one cycle: Smith & Topin 2018, whose warmup is half a cosine too."""


def image_size_in(epoch: int, *, full_size: int, config: TrainConfig) -> int:
    """The side of training images in an epoch, counted from 1: at most five sizes, multiples of 4 but for the ends."""
    start = config.initial_image_size
    ramp = config.full_size_at * config.max_epochs
    if start is None or start >= full_size or epoch - 1 >= ramp:
        return full_size
    levels = 4
    level = int((epoch - 1) / ramp * levels)
    side = start + (full_size - start) * level / levels
    return start if level == 0 else max(start, int(side) // 4 * 4)


def num_frozen_parts(epoch: int, *, num_parts: int, config: TrainConfig) -> int:
    """Return how many parts, counted from the input, do not learn in an epoch; the classifier always does."""
    if epoch <= config.unfreeze_epochs:
        return math.ceil((num_parts - 1) * (1 - (epoch - 1) / config.unfreeze_epochs))
    return min(1, num_parts - 1) if 0 < config.stem_epochs < epoch else 0

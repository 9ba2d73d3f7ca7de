"""What trainings cost: seconds, from the measured speed of their parts. Arithmetic only; knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainables.config import NUM_VIEWS, TrainConfig
from trainables.course import Leg
from trainables.datasets import SplitImages
from trainables.loop import CLEAN_TRAIN_SAMPLE
from trainables.resident import batch_size_of
from trainables.step_timing import Speed, sides_of
from trainables.variants import is_snapshot


def epoch_seconds(config: TrainConfig, split: SplitImages, speed: Speed) -> list[float]:
    """Seconds of each epoch of a schedule: training steps and evaluation."""
    steps = len(split.train) // batch_size_of(config, split)
    evaluation = images_evaluated(config, split) * speed.image_seconds
    return [speed.epoch_seconds + steps * speed.step_seconds_at(side) + evaluation for side in sides_of(config, split)]


def images_evaluated(config: TrainConfig, split: SplitImages) -> int:
    """Images predicted after every epoch: select, twice where an average is evaluated too, and a sample of train."""
    return len(split.select) * (2 if config.ema_decay else 1) + min(CLEAN_TRAIN_SAMPLE, len(split.train))


def images_predicted_at_the_end(config: TrainConfig, split: SplitImages) -> int:
    """Images predicted for what a trial that was trained to its end stores, each view counted."""
    held_out = len(split.select) + len(split.estimate) + len(split.test)
    views = NUM_VIEWS[config.test_time_augmentation]
    seen_from_views = held_out * views if views > 1 else 0
    predicted = held_out - len(split.select) + seen_from_views
    if config.ema_decay:
        predicted += held_out + seen_from_views
    snapshots = sum(is_snapshot(epoch, config) for epoch in range(1, config.max_epochs + 1))
    averages = 2 if snapshots > 1 else 0  # the mean of all, and that of some
    return predicted + (snapshots + averages) * held_out


def course_seconds(config: TrainConfig, course: Iterable[Leg], split: SplitImages, speed: Speed) -> list[float]:
    """Seconds of each epoch that a trial trains on its course."""
    seconds: list[float] = []
    for leg in course:
        seconds += epoch_seconds(leg.config(config), split, speed)[leg.start : leg.end]
    return seconds


def training_seconds(config: TrainConfig, course: Sequence[Leg], split: SplitImages, speed: Speed) -> float:
    """Seconds of a trial that nothing stops, its network's building and its last predictions included."""
    ending = images_predicted_at_the_end(config, split) * speed.image_seconds
    return speed.build_seconds + sum(course_seconds(config, course, split, speed)) + ending

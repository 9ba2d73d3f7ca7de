"""How long the parts of a training take on this machine's CPU, measured on a few steps with its real batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.evaluation import for_evaluation, predict_batches
from trainables.learner import Learner
from trainables.mixing import SoftTargets
from trainables.precision import seeded
from trainables.resident import TrainingImages, batch_size_of, evaluation_batch_size
from trainables.schedules import image_size_in

ROUNDS = 5
STEPS_TIMED = 3
LEAST_ROUND_SECONDS = 0.1
MOST_STEP_SECONDS = 2.0
"""What takes longer is measured on part of a batch, and scaled up."""
PROBE_IMAGES = 16
T = TypeVar("T")
Batch = tuple[Tensor, SoftTargets]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds that the parts of one training take on the machine where they were measured.

    `step_seconds`: of a training step with its input part, by the side of its images. `epoch_seconds`: of what an epoch
    does once, before its first batch. `image_seconds`: of the prediction for one image. `build_seconds`: of building
    the network.
    """

    step_seconds: Mapping[int, float]
    epoch_seconds: float
    image_seconds: float
    build_seconds: float

    def step_seconds_at(self, side: int) -> float:
        """Seconds of a step on images of a side; between the sides measured, linear in the number of pixels."""
        small, large = min(self.step_seconds), max(self.step_seconds)
        least, most = self.step_seconds[small], self.step_seconds[large]
        if small == large:
            return most
        return least + (most - least) * (side**2 - small**2) / (large**2 - small**2)


@dataclass(frozen=True)
class Meter:
    """Measures trainings in this process, which has been set up for a trial's `threads`.

    `check` is called before anything that is timed; what it raises ends the measurement.
    """

    images: TrainingImages
    threads: int
    check: Callable[[], None] = lambda: None

    def speed(self, config: TrainConfig) -> Speed:
        """Measure the parts of a training on a few of its own batches; torch's generators stay as they were."""
        watch = self._stopwatch(config)
        sides = sides_of(config, self.images.split)
        with seeded(config.seed):
            built, learner = watch.time(lambda: Learner(config, self.images))
            timed = {side: self._time_epoch(learner, config, side, watch) for side in {min(sides), max(sides)}}
            image_seconds = self._time_prediction(learner, config, watch)
        return Speed(
            step_seconds={side: step for side, (step, _) in timed.items()},
            epoch_seconds=timed[max(sides)][1],
            image_seconds=image_seconds,
            build_seconds=built,
        )

    def bfloat16_ratios(self, config: TrainConfig, *, least: float = 0.0, rounds: int = ROUNDS) -> list[float]:
        """The seconds of a float32 step divided by those of a bfloat16 step, for each round; the types take turns.

        A step is forward, backward and the optimizer's. Ends after the first round whose ratio is below `least`.
        """
        watch = self._stopwatch(config)
        with seeded(config.seed):
            learners = [Learner(replace(config, precision=name), self.images) for name in ("float32", "bfloat16")]
            batch = next(self.images.batches(config, epoch=1, image_size=self.images.split.image_size))
            parts, seconds = zip(*(watch.affordable(learner, config, batch) for learner in learners), strict=True)
            part = min(parts, key=lambda part: len(part[0]))
            count = max(1, math.ceil(LEAST_ROUND_SECONDS / max(*seconds, 1e-6)))
            ratios: list[float] = []
            while len(ratios) < rounds and (not ratios or ratios[-1] >= least):
                float32, bfloat16 = (watch.steps(learner, part, count) for learner in learners)
                ratios.append(float32 / bfloat16)
        return ratios

    def _stopwatch(self, config: TrainConfig) -> Stopwatch:
        alone = self.threads == 1 and config.pipeline == "resident"
        return Stopwatch(time.thread_time if alone else time.perf_counter, self.check)

    def _time_epoch(self, learner: Learner, config: TrainConfig, side: int, watch: Stopwatch) -> tuple[float, float]:
        """Seconds of a step with its input part, the least of a few, and of what precedes an epoch's first batch."""
        split = self.images.split
        batches = self.images.batches(config, epoch=1, image_size=side)
        inputs: list[float] = []
        for _ in range(min(len(split.train) // batch_size_of(config, split), 1 + STEPS_TIMED)):
            seconds, batch = watch.time(lambda: next(batches))
            inputs.append(seconds)
        part, seconds = watch.affordable(learner, config, batch)
        seconds = min([seconds, *(watch.steps(learner, part, 1) for _ in range(STEPS_TIMED))])
        return min(inputs) + seconds * len(batch[0]) / len(part[0]), inputs[0] - min(inputs)

    def _time_prediction(self, learner: Learner, config: TrainConfig, watch: Stopwatch) -> float:
        """Seconds of the prediction for one image in a batch as large as evaluation has them, or as is affordable."""
        network = for_evaluation(learner.evaluated, "cpu")
        train_N = self.images.split.train[: evaluation_batch_size(self.images.split.image_size)]
        seconds, count = math.inf, min(PROBE_IMAGES, len(train_N))
        for _ in range(1 + STEPS_TIMED):
            batches = self.images.evaluation_batches(train_N[:count])
            took, _ = watch.time(partial(predict_batches, network, batches, device="cpu", precision=config.precision))
            seconds = min(seconds, took / count)
            count = min(len(train_N), max(count, int(MOST_STEP_SECONDS / max(seconds, 1e-9))))
        return seconds


@dataclass(frozen=True)
class Stopwatch:
    """Times what is called, by the CPU time of this thread where it does all of the work, which other processes
    disturb less, or by the wall clock."""

    now: Callable[[], float]
    check: Callable[[], None]

    def time(self, call: Callable[[], T]) -> tuple[float, T]:
        """The seconds that a call takes, and what it returns."""
        self.check()
        start = self.now()
        returned = call()
        return self.now() - start, returned

    def steps(self, learner: Learner, batch: Batch, count: int) -> float:
        """Mean seconds of so many steps. Their learning rate is 0: the weights stay as they are."""
        return sum(self.time(partial(learner.step, *batch, lr=0.0))[0] for _ in range(count)) / count

    def affordable(self, learner: Learner, config: TrainConfig, batch: Batch) -> tuple[Batch, float]:
        """As much of a batch as takes a few seconds, and the seconds that a first step with it took."""
        learner.begin_epoch()
        whole = len(batch[0])
        probe = min(whole, max(PROBE_IMAGES, 2 * config.accumulation_steps))
        seconds = self.steps(learner, first_images(batch, probe), 1)
        part = first_images(batch, min(whole, max(probe, int(probe * MOST_STEP_SECONDS / max(seconds, 1e-6)))))
        return part, self.steps(learner, part, 1)


def sides_of(config: TrainConfig, split: SplitImages) -> list[int]:
    """The side of the training images in each epoch of a schedule, in pixels."""
    epochs = range(1, config.max_epochs + 1)
    return [image_size_in(epoch, full_size=split.image_size, config=config) for epoch in epochs]


def first_images(batch: Batch, count: int) -> Batch:
    """The first images of a batch and their targets."""
    images, targets = batch
    taught = targets.teacher_log_probs_BC
    first = replace(
        targets,
        labels_BK=targets.labels_BK[:count],
        weights_BK=targets.weights_BK[:count],
        teacher_log_probs_BC=None if taught is None else taught[:count],
    )
    return images[:count], first

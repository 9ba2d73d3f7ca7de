"""What trainings cost: seconds, from the measured speed of their parts. Arithmetic only; knows nothing of Ray."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.plan import SearchPlan
from orchestrator.rehearsal import TrialSeconds, rehearse
from results.history import History
from trainables.config import NUM_VIEWS, TrainConfig
from trainables.course import Leg, whole
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
    """Images predicted for what a trial that was trained to its end stores, each view counted.

    What the last weights make of select is known by then. A mean of snapshots has its batch norms' statistics renewed,
    which is a pass over the training images; the greedy soup tries a mean for each further snapshot.
    """
    unknown = len(split.estimate) + len(split.test)
    held_out = len(split.select) + unknown
    views = NUM_VIEWS[config.test_time_augmentation]
    predicted = unknown if views == 1 else held_out * views
    if config.ema_decay:
        predicted += unknown
    snapshots = sum(is_snapshot(epoch, config) for epoch in range(1, config.max_epochs + 1))
    if snapshots > 1:
        predicted += snapshots * len(split.train) + (snapshots - 1) * len(split.select) + 2 * held_out
    return predicted + snapshots * held_out


def course_seconds(config: TrainConfig, course: Iterable[Leg], split: SplitImages, speed: Speed) -> list[float]:
    """Seconds of each epoch that a trial trains on its course."""
    seconds: list[float] = []
    for leg in course:
        seconds += epoch_seconds(leg.config(config), split, speed)[leg.start : leg.end]
    return seconds


def trial_seconds(config: TrainConfig, course: Sequence[Leg], split: SplitImages, speed: Speed) -> TrialSeconds:
    """Seconds of the parts of a trial."""
    return TrialSeconds(
        building=speed.build_seconds,
        epochs=course_seconds(config, course, split, speed),
        ending=images_predicted_at_the_end(config, split) * speed.image_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a search has left to train. `begun`: epochs that each unfinished trial has behind it."""

    new_trials: int
    finalists: int
    begun: Sequence[int] = ()

    @classmethod
    def of(cls, plan: SearchPlan, history: History | None) -> Left:
        """What a plan's experiment lacks; `history`: None of one that has not begun."""
        if history is None:
            return cls(new_trials=plan.space.budget.num_trials, finalists=plan.finalists * plan.seeds)
        finalists = plan.finalists * plan.seeds - history.num_started["finalist"]
        return cls(
            new_trials=max(0, plan.space.budget.num_trials - history.num_started[plan.stage]),
            finalists=max(0, finalists),
            begun=[trial.last_epoch for trial in history.unfinished],
        )

    @property
    def num_trials(self) -> int:
        """Trials that are still to end."""
        return self.new_trials + self.finalists + len(self.begun)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the rest of a search is expected to take with `workers` trials at a time, each on so many `cpus`.

    `trial_seconds`: of a trial that nothing stops, for each network. `work_seconds`: of all trials together, on `cpus`
    each. `saved_share`: of the work of trials that nothing stops, by early stopping. `ended_after`: when each further
    trial has ended.
    """

    left: Left
    workers: int
    cpus: int
    trial_seconds: Sequence[float]
    work_seconds: float
    wall_seconds: float
    saved_share: float
    ended_after: Sequence[float]

    def num_ended_after(self, seconds: float) -> int:
        """Trials that have ended after so many seconds."""
        return sum(ended <= seconds for ended in self.ended_after)


def estimate_search(
    plan: SearchPlan,
    split: SplitImages,
    speeds: Mapping[TrainConfig, Speed],
    *,
    workers: int,
    cpus: int,
    left: Left,
    start_seconds: float = 0.0,
) -> Estimate:
    """Estimate what a search takes. `speeds`: of a configuration of each network that it may train.

    `start_seconds`: until a worker is ready. A search that has begun is expected to continue as a whole one would go.
    """
    course = plan.make_halving().course
    trials = [trial_seconds(config, course, split, speed) for config, speed in speeds.items()]
    finals = [
        trial_seconds(config, whole(plan.space.budget.max_epochs), split, speed).whole
        for config, speed in speeds.items()
    ]
    rehearsed = rehearse(plan, trials, workers=workers)
    num_trials, mean = plan.space.budget.num_trials, statistics.mean(trial.whole for trial in trials)
    share_left = left.new_trials / num_trials
    of_begun = sum(max(0.0, mean * (1 - epochs / len(trials[0].epochs))) for epochs in left.begun)
    of_finalists = left.finalists * statistics.mean(finals)
    return Estimate(
        left=left,
        workers=workers,
        cpus=cpus,
        trial_seconds=[trial.whole for trial in trials],
        work_seconds=workers * start_seconds + share_left * rehearsed.work_seconds + of_begun + of_finalists,
        wall_seconds=start_seconds
        + share_left * rehearsed.wall_seconds
        + of_begun / workers
        + math.ceil(left.finalists / workers) * statistics.mean(finals),
        saved_share=max(0.0, 1 - rehearsed.work_seconds / (num_trials * mean)),
        ended_after=[start_seconds + of_begun / workers + ended for ended in rehearsed.ended_after[: left.new_trials]],
    )

"""The course of a trial's training: usually one schedule from beginning to end, for some strategies of early stopping
several legs, each with a schedule of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from results.schema import EpochResult, Scalar
from trainables.config import TrainConfig

STABLE_SCHEDULE = "warmup_stable_decay"


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A stretch of training, from epoch `start` (0: from scratch) to epoch `end` of a schedule.

    `start` above 0 goes on from where the last leg that is part of the trunk ended. `changes` are fields of the
    trial's configuration that this leg has otherwise.
    """

    end: int
    start: int = 0
    trunk: bool = False
    changes: dict[str, Scalar] = field(default_factory=dict)

    @property
    def num_epochs(self) -> int:
        """Epochs that are trained in it."""
        return self.end - self.start

    def config(self, config: TrainConfig) -> TrainConfig:
        """A trial's configuration as this leg has it; warmup and unfreezing fit into a shorter schedule."""
        max_epochs = int(self.changes.get("max_epochs") or config.max_epochs)
        fitted: dict[str, Scalar] = {
            "warmup_epochs": min(config.warmup_epochs, float(max_epochs)),
            "unfreeze_epochs": min(config.unfreeze_epochs, max_epochs),
        }
        return config.having({**fitted, **self.changes})


def num_epochs(course: Sequence[Leg]) -> int:
    """Epochs that a trial trains on the whole course."""
    return sum(leg.num_epochs for leg in course)


def whole(max_epochs: int) -> tuple[Leg, ...]:
    """One schedule, from beginning to end."""
    return (Leg(end=max_epochs),)


def complete_schedules(budgets: Sequence[int]) -> tuple[Leg, ...]:
    """For each budget, in epochs, a training of its own from scratch whose schedule ends with it."""
    return tuple(Leg(end=budget, changes={"max_epochs": budget}) for budget in budgets)


def trunk_and_branches(rungs: Sequence[int], *, max_epochs: int, branch_epochs: Sequence[int]) -> tuple[Leg, ...]:
    """A constant rate that falls over the end of the training, and after each rung a branch off it in which the rate
    falls to zero at once (Haegele et al. 2024, "Scaling laws and compute-optimal training beyond fixed durations")."""
    legs: list[Leg] = []
    reached = 0
    stable: dict[str, Scalar] = {"schedule": STABLE_SCHEDULE}
    for rung, length in zip(rungs, branch_epochs, strict=True):
        decay: dict[str, Scalar] = {"max_epochs": rung + length, "decay_fraction": length / (rung + length)}
        legs.append(Leg(start=reached, end=rung, trunk=True, changes=stable))
        legs.append(Leg(start=rung, end=rung + length, changes={**stable, **decay}))
        reached = rung
    return (*legs, Leg(start=reached, end=max_epochs, trunk=True, changes=stable))


def legs_from(values: Sequence[dict[str, Any]]) -> tuple[Leg, ...]:
    """Legs from plain values, as `dataclasses.asdict` makes them."""
    return tuple(Leg(**leg) for leg in values)


@dataclass
class Progress:
    """Where a trial stands on its course. Epochs are counted anew on each leg's own line of training, and through the
    whole trial: `numbers` are the trial's counts of the epochs on the present line, `results` all that was yielded."""

    course: tuple[Leg, ...]
    leg: int = 0
    numbers: list[int] = field(default_factory=list)
    results: list[EpochResult] = field(default_factory=list)
    trunk: dict[str, Any] = field(default_factory=dict)
    trunk_numbers: list[int] = field(default_factory=list)

    def add(self, result: EpochResult) -> EpochResult:
        """An epoch of the present line as the trial counts it."""
        self.numbers.append(len(self.results) + 1)
        counted = replace(result, epoch=self.numbers[-1], best_epoch=self.numbers[result.best_epoch - 1])
        self.results.append(counted)
        return counted

    @property
    def leg_ended(self) -> bool:
        """Whether the present leg has all its epochs."""
        return len(self.numbers) >= self.course[self.leg].end

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        ended = self.leg_ended and self.leg == len(self.course) - 1
        return ended or (bool(self.results) and (self.results[-1].diverged or self.results[-1].out_of_patience))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        names = ("leg", "numbers", "trunk", "trunk_numbers")
        return {**{n: getattr(self, n) for n in names}, "results": [asdict(result) for result in self.results]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where a saved state stood."""
        for name, value in state.items():
            setattr(self, name, value)
        self.results = [EpochResult(**result) for result in state["results"]]


def whole_so_far(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The progress of a training of a single leg, for resume files of versions that knew no other."""
    return {"numbers": list(range(1, len(results) + 1)), "results": list(results)}

"""A search on invented or recorded trainings: the real strategies of early stopping, workers that report in turns, and
a budget of epochs in which everything counts that a strategy trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from orchestrator.halving import Candidate, Halving, Verdict
from trainables.course import Leg, num_epochs

WORKERS = 2
Status = Literal["running", "waiting", "stopped", "completed"]


class Training(Protocol):
    """What a trial would report."""

    @property
    def strength(self) -> float:
        """Of its regularization, in [0, 1]."""

    def reading(self, leg: Leg, epoch: int, *, average: bool) -> float:
        """The validation score after an epoch of a leg, of the averaged or the raw weights."""


@dataclass
class SimulatedTrial:
    """A trial of a simulated search. `scores`: one an epoch trained. `control`: never stopped."""

    number: int
    training: Training
    control: bool
    steps: Iterator[tuple[Leg, int]]
    scores: list[float] = field(default_factory=list)
    status: Status = "running"
    counts: bool = True

    @property
    def trial_id(self) -> str:
        """As strategies know it."""
        return f"t{self.number:05d}"

    @property
    def observed(self) -> float:
        """The trial's value as the project defines it: that of its best epoch."""
        return max(self.scores)


class Proposals(Protocol):
    """Where configurations come from, and who is told what became of them."""

    def ask(self, number: int) -> Training | None:
        """The next configuration's training, None if there is none left."""

    def tell(self, trial: SimulatedTrial, forecast: float | None) -> None:
        """Called when a trial has completed, been stopped, or begun to wait. `forecast`: of a stopped trial's end."""


def steps(course: Sequence[Leg]) -> Iterator[tuple[Leg, int]]:
    """Every epoch of a course, as a leg and the epoch of the leg's schedule."""
    return ((leg, epoch) for leg in course for epoch in range(leg.start + 1, leg.end + 1))


@dataclass
class SimulatedSearch:
    """A search, one trained epoch at a time.

    `control_fraction` of the trials, chosen beforehand, are never stopped. `forecaster` looks on, and says how stopped
    trials would have ended, where the strategy cannot.
    """

    halving: Halving
    proposals: Proposals
    control_rng: np.random.Generator
    control_fraction: float = 0.0
    forecaster: Halving | None = None
    workers: int = WORKERS
    trials: dict[str, SimulatedTrial] = field(default_factory=dict)
    running: deque[SimulatedTrial] = field(default_factory=deque)

    def run(self, budget_epochs: int) -> list[SimulatedTrial]:
        """All trials, once the epochs are spent or nothing is left to train."""
        for _ in range(budget_epochs):
            if not self.advance():
                break
        return list(self.trials.values())

    def advance(self) -> bool:
        """Train one epoch of the trial whose turn it is; False if there is nothing to train."""
        while len(self.running) < self.workers and (trial := self._next_trial()) is not None:
            self.running.append(trial)
        if not self.running:
            return False
        trial = self.running.popleft()
        self._train_epoch(trial)
        if trial.status == "running":
            self.running.append(trial)
        else:
            self.proposals.tell(trial, (self.forecaster or self.halving).forecast(trial.trial_id))
        return True

    def _next_trial(self) -> SimulatedTrial | None:
        """A promoted trial, or a new one."""
        promoted = self.halving.next_promotion()
        if promoted is not None:
            self.halving.release(promoted)
            self.trials[promoted].status = "running"
            return self.trials[promoted]
        training = self.proposals.ask(len(self.trials))
        if training is None:
            return None
        control = bool(self.control_rng.random() < self.control_fraction)
        trial = SimulatedTrial(len(self.trials), training, control, steps(self.halving.course))
        self.trials[trial.trial_id] = trial
        return trial

    def _train_epoch(self, trial: SimulatedTrial) -> None:
        """One more epoch of a trial, and what becomes of it."""
        leg, epoch = next(trial.steps)
        score = trial.training.reading(leg, epoch, average=self.halving.judges_average)
        trial.scores.append(score)
        verdict = self._judge(trial, score)
        if len(trial.scores) == num_epochs(self.halving.course):
            trial.status = "completed"
        elif verdict != "continue" and trial.control:
            trial.counts = False
            if verdict == "pause":
                self.halving.release(trial.trial_id)
        elif verdict != "continue":
            trial.status = "stopped" if verdict == "stop" else "waiting"

    def _judge(self, trial: SimulatedTrial, score: float) -> Verdict:
        """What the strategy says; the forecaster only listens."""
        candidate, epoch = Candidate(trial.trial_id, trial.training.strength), len(trial.scores)
        if self.forecaster is not None:
            self.forecaster.judge(candidate, epoch=epoch, score=score, counts=trial.counts)
        return self.halving.judge(candidate, epoch=epoch, score=score, counts=trial.counts).verdict


def picked(trials: Sequence[SimulatedTrial]) -> SimulatedTrial:
    """The trial that the search would hand over: the best completed one by its observed validation score; if none has
    completed, the best by its last reading."""
    completed = [trial for trial in trials if trial.status == "completed"]
    if completed:
        return max(completed, key=lambda trial: trial.observed)
    return max((trial for trial in trials if trial.scores), key=lambda trial: trial.scores[-1])

"""Strategies of early stopping by rungs. What is decided is a pure function of what was told, in the order it came.

A rung is a number of epochs after which a trial is compared with others that came so far.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from orchestrator.forecasting import RungTable
from results.schema import Scalar
from trainables.course import STABLE_SCHEDULE, Leg, complete_schedules, trunk_and_branches, whole

BANDS = 3
BRANCH_FRACTION = 0.25
LEAST_ENDED = 3
OPTIMISM = 1.0
Verdict = Literal["continue", "stop", "pause"]


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What a strategy is made for: the first rung at `grace_epochs`, each next one `factor` times later."""

    grace_epochs: int
    max_epochs: int
    factor: float

    @property
    def rungs(self) -> list[int]:
        """Epochs of the rungs, all below `max_epochs`."""
        rungs: list[int] = []
        epochs = float(self.grace_epochs)
        while int(epochs) < self.max_epochs:
            if int(epochs) not in rungs:
                rungs.append(int(epochs))
            epochs *= self.factor
        return rungs


@dataclass(frozen=True)
class Candidate:
    """A trial as a strategy knows it. `strength`: of its regularization, 0 for the weakest in the space, 1 for the
    strongest."""

    trial_id: str
    strength: float = 0.5


@dataclass(frozen=True)
class Judgement:
    """`pause`: the trial waits until `Halving.next_promotion` names it. `rung`: 1 for the first, None between rungs."""

    verdict: Verdict
    rung: int | None = None


class Halving:
    """Every trial is trained to its end; what all strategies have in common, for them to override.

    A strategy's state is what it has been told by `judge` and `release`; replaying a log restores it.
    """

    judges_average: ClassVar[bool] = True
    """Whether rungs compare figures of the weights' moving average, where there is one, or of the raw weights."""
    needs_average: ClassVar[bool] = False
    changes: ClassVar[dict[str, Scalar]] = {}
    """Fields of every trial's configuration that the strategy sets."""

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder
        self.course: tuple[Leg, ...] = whole(ladder.max_epochs)
        self.rung_epochs: list[int] = []

    def judge(
        self, candidate: Candidate, *, epoch: int, score: float, last: bool = False, counts: bool = True
    ) -> Judgement:
        """Take note of a trial's score (higher is better) after an epoch, and say whether it goes on.

        Called for every epoch of every trial, the last included, unless it is not finite. `epoch` counts all epochs
        trained in the trial. `last`: the trial ends with it in any case. `counts`: whether others are to be compared
        with it from now on.
        """
        return Judgement("continue")

    def next_promotion(self) -> str | None:
        """The waiting trial that may go on now, if there is one."""
        return None

    def release(self, trial_id: str) -> None:
        """Take note that a trial waits no more: it goes on, or the search ends without it."""
        raise ValueError(f"{trial_id} does not wait")

    def is_waiting(self, trial_id: str) -> bool:
        """Whether a trial has been paused and not released since."""
        return False

    def forecast(self, trial_id: str) -> float | None:
        """The score that a trial would have ended with, as far as the strategy can tell; None if it cannot."""
        return None


def among(score: float, others: np.ndarray, *, factor: float) -> Verdict:
    """Whether a score is among the upper 1/factor of others; the first always is."""
    if not len(others):
        return "continue"
    return "continue" if score >= float(np.quantile(others, 1 - 1 / factor)) else "stop"


class Rungs(Halving):
    """A strategy that compares trials at rungs."""

    def __init__(self, ladder: Ladder) -> None:
        super().__init__(ladder)
        self.rung_epochs = ladder.rungs
        self.rungs: list[dict[str, float]] = [{} for _ in self.rung_epochs]

    def judge(
        self, candidate: Candidate, *, epoch: int, score: float, last: bool = False, counts: bool = True
    ) -> Judgement:
        """See Halving."""
        if epoch not in self.rung_epochs:
            return Judgement("continue")
        index = self.rung_epochs.index(epoch)
        verdict = self._compare(candidate, index, score)
        if counts:
            self.rungs[index][candidate.trial_id] = score
        return Judgement(verdict, index + 1)

    def _compare(self, candidate: Candidate, index: int, score: float) -> Verdict:
        """The verdict on a trial at a rung that does not know it yet."""
        raise NotImplementedError


class Asha(Rungs):
    """Asynchronous successive halving, the stopping variant of Ray Tune (Li et al. 2020, "A system for massively
    parallel hyperparameter tuning"): a trial that comes to a rung goes on unless its value is below the
    (1 - 1/factor) quantile of the values recorded there before it. The first one always goes on.
    """

    judges_average = False

    def _compare(self, candidate: Candidate, index: int, score: float) -> Verdict:
        return among(score, np.fromiter(self.rungs[index].values(), float), factor=self.ladder.factor)


class AshaOfAverages(Asha):
    """`Asha` whose rungs compare the moving averages of the weights, which fluctuate less at a high learning rate."""

    judges_average = True
    needs_average = True


class Stratified(Rungs):
    """Rungs compare a trial only with those whose regularization is about as strong: within a third of the strengths
    seen at the rung so far. Strong regularization, which learns more slowly, is not measured against weak."""

    def __init__(self, ladder: Ladder) -> None:
        super().__init__(ladder)
        self._strengths: list[dict[str, float]] = [{} for _ in self.rung_epochs]

    def judge(
        self, candidate: Candidate, *, epoch: int, score: float, last: bool = False, counts: bool = True
    ) -> Judgement:
        """See Halving."""
        judgement = super().judge(candidate, epoch=epoch, score=score, last=last, counts=counts)
        if counts and judgement.rung is not None:
            self._strengths[judgement.rung - 1][candidate.trial_id] = candidate.strength
        return judgement

    def _compare(self, candidate: Candidate, index: int, score: float) -> Verdict:
        strengths = np.fromiter(self._strengths[index].values(), float)
        scores = np.fromiter(self.rungs[index].values(), float)
        if len(scores) < BANDS:
            return "continue"
        limits = np.quantile(strengths, np.arange(1, BANDS) / BANDS)
        same = np.searchsorted(limits, strengths) == np.searchsorted(limits, candidate.strength)
        return among(score, scores[same], factor=self.ladder.factor)


class Stable(Asha):
    """`Asha` on a constant learning rate: a rung's value is that of a short branch in which the rate falls to zero, so
    that trials are compared as if they ended there. A branch takes a quarter of the epochs before it."""

    judges_average = True
    changes: ClassVar[dict[str, Scalar]] = {"schedule": STABLE_SCHEDULE}

    def __init__(self, ladder: Ladder) -> None:
        super().__init__(ladder)
        rungs = ladder.rungs
        lengths = [max(1, round(BRANCH_FRACTION * rung)) for rung in rungs]
        self.course = trunk_and_branches(rungs, max_epochs=ladder.max_epochs, branch_epochs=lengths)
        self.rung_epochs = [rung + sum(lengths[: i + 1]) for i, rung in enumerate(rungs)]


class Promotion(Rungs):
    """Asynchronous successive halving as published (Li et al. 2020, algorithm 2): at each rung a trial has finished a
    schedule of its own and waits; when it comes to be among the upper 1/factor of the rung it is trained anew with the
    next rung's schedule."""

    def __init__(self, ladder: Ladder) -> None:
        super().__init__(ladder)
        budgets = [*ladder.rungs, ladder.max_epochs]
        self.course = complete_schedules(budgets)
        self.rung_epochs = [sum(budgets[: i + 1]) for i in range(len(budgets) - 1)]
        self._waiting: list[set[str]] = [set() for _ in self.rung_epochs]
        self._ranked: list[list[tuple[float, str]]] = [[] for _ in self.rung_epochs]  # negated scores: the best first

    def judge(
        self, candidate: Candidate, *, epoch: int, score: float, last: bool = False, counts: bool = True
    ) -> Judgement:
        """See Halving."""
        judgement = super().judge(candidate, epoch=epoch, score=score, last=last, counts=counts)
        if judgement.rung is not None:
            self._waiting[judgement.rung - 1].add(candidate.trial_id)
            if counts:
                bisect.insort(self._ranked[judgement.rung - 1], (-score, candidate.trial_id))
        return judgement

    def _compare(self, candidate: Candidate, index: int, score: float) -> Verdict:
        return "pause"

    def next_promotion(self) -> str | None:
        """See Halving: the best of the highest rung that has one."""
        for ranked, waiting in zip(reversed(self._ranked), reversed(self._waiting), strict=True):
            upper = ranked[: int(len(ranked) / self.ladder.factor)] if waiting else []
            chosen = next((trial_id for _, trial_id in upper if trial_id in waiting), None)
            if chosen is not None:
                return chosen
        return None

    def release(self, trial_id: str) -> None:
        """See Halving."""
        waiting = next((w for w in self._waiting if trial_id in w), None)
        if waiting is None:
            raise ValueError(f"{trial_id} does not wait")
        waiting.remove(trial_id)

    def is_waiting(self, trial_id: str) -> bool:
        """See Halving."""
        return any(trial_id in waiting for waiting in self._waiting)


class Forecasting(Halving):
    """Rungs compare what trials are expected to end with, not what they have: see orchestrator/forecasting.py.

    A trial goes on unless `OPTIMISM` standard deviations above its own forecast lie below the upper 1/factor of the
    forecasts of the others that came to the rung, those that were stopped there included. Until `LEAST_ENDED` trials
    have ended nothing is known of what strength of regularization does, and none is stopped. A score is the best so
    far, as a trial's final one is: that of its best epoch.
    """

    def __init__(self, ladder: Ladder) -> None:
        super().__init__(ladder)
        self.rung_epochs = ladder.rungs
        self.rungs = [RungTable() for _ in self.rung_epochs]
        self._best: dict[str, float] = {}

    def judge(
        self, candidate: Candidate, *, epoch: int, score: float, last: bool = False, counts: bool = True
    ) -> Judgement:
        """See Halving. Trials whose score no longer counts are learned from all the same."""
        trial_id = candidate.trial_id
        best = self._best[trial_id] = max(score, self._best.get(trial_id, score))
        if last or epoch == self.ladder.max_epochs:
            self._end(trial_id, best)
        if epoch not in self.rung_epochs:
            return Judgement("continue")
        index = self.rung_epochs.index(epoch)
        verdict = self._compare(self.rungs[index], candidate, best)
        self.rungs[index].put(trial_id, score=best, strength=candidate.strength, counts=counts)
        return Judgement(verdict, index + 1)

    def _end(self, trial_id: str, final: float) -> None:
        """Learn from a trial that was trained to its end."""
        for rung in self.rungs:
            if trial_id in rung:
                rung.end(trial_id, final=final)

    def _compare(self, rung: RungTable, candidate: Candidate, score: float) -> Verdict:
        """The verdict on a trial at a rung that does not know it yet."""
        regression = rung.regression(least=LEAST_ENDED)
        if regression is None:
            return "continue"
        own = np.array([score]), np.array([candidate.strength])
        hoped = (regression.mean(*own) + OPTIMISM * regression.deviation(*own))[0]
        others = regression.mean(rung.scores[rung.counted], rung.strengths[rung.counted])
        return among(hoped, others, factor=self.ladder.factor)

    def forecast(self, trial_id: str) -> float | None:
        """See Halving: from the latest rung that the trial came to."""
        reached = [rung for rung in self.rungs if trial_id in rung]
        regression = reached[-1].regression(least=LEAST_ENDED) if reached else None
        return None if regression is None else float(regression.mean(*reached[-1].row(trial_id))[0])


HALVINGS: dict[str, type[Halving]] = {
    "asha": Asha,
    "asha_ema": AshaOfAverages,
    "promote": Promotion,
    "stable": Stable,
    "stratified": Stratified,
    "forecast": Forecasting,
    "none": Halving,
}

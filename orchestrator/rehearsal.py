"""A search rehearsed before it begins: its real strategy of early stopping on invented scores, on an invented clock.

Who is stopped depends on scores that nobody knows yet. Invented ones have a part that lasts and a part that passes:
after a share s of its epochs a trial's score correlates with its final one by r + (1 - r) s, with r =
EARLY_CORRELATION. Results are means over several rehearsals.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from orchestrator.audit import is_control
from orchestrator.halving import Candidate, Halving, Judgement
from orchestrator.plan import SearchPlan

EARLY_CORRELATION = 0.3
"""Trials stopped in rehearsals with it, and in real searches: of 30 under `forecast` on digits (README) 10.7 and 9; in
results/reference, of 40 under `forecast` in cifar100_ensembles 14.6 and 13, in cifar100_audited 10.9 and 6, of 24 under
`asha` in cifar100_small_cnn 14.6 and 13. From 0 to 0.9 those under `forecast` grow by half, those under `asha` stay."""
MOST_REHEARSALS = 8
EPOCHS_OF_ALL_REHEARSALS = 20_000
MOST_TRIALS = 1_000


@dataclass(frozen=True, kw_only=True)
class TrialSeconds:
    """Seconds of a trial: of building its network, of each epoch of its course, of predicting at its end."""

    building: float
    epochs: Sequence[float]
    ending: float

    @property
    def whole(self) -> float:
        """Seconds of a trial that nothing stops."""
        return self.building + sum(self.epochs) + self.ending


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """Means over rehearsals of a search without its finalists.

    `work_seconds`: of all trials together. `wall_seconds`: from the first trial's beginning to the end of
    the last one. `ended_after`: when each further trial has ended.
    """

    work_seconds: float
    wall_seconds: float
    ended_after: Sequence[float]


@dataclass
class _Trial:
    number: int
    seconds: TrialSeconds
    control: bool
    final: float
    passing: float
    strength: float
    epochs: int = 0

    @property
    def trial_id(self) -> str:
        return f"t{self.number:05d}"

    @property
    def finished(self) -> bool:
        return self.epochs == len(self.seconds.epochs)

    def next_seconds(self) -> float:
        """Seconds until it reports again."""
        first = self.seconds.building if not self.epochs else 0.0
        last = self.seconds.ending if self.epochs + 1 == len(self.seconds.epochs) else 0.0
        return first + self.seconds.epochs[self.epochs] + last

    def score(self) -> float:
        """The validation score after its epochs so far: rising, and closer to the final rank every time."""
        share = self.epochs / len(self.seconds.epochs)
        correlation = EARLY_CORRELATION + (1 - EARLY_CORRELATION) * share
        return 10 * share + correlation * self.final + (1 - correlation**2) ** 0.5 * self.passing


@dataclass
class _Search:
    """One rehearsal, in progress."""

    halving: Halving
    trials: Iterator[_Trial]
    workers: int
    most_epochs: float
    now: float = 0.0
    work: float = 0.0
    epochs: int = 0
    ended_at: list[float] = field(default_factory=list)
    waiting: dict[str, _Trial] = field(default_factory=dict)
    _reports: list[tuple[float, int, _Trial]] = field(default_factory=list)

    def run(self) -> None:
        """Train until nothing is left to train."""
        while self._fill() or self._reports:
            self.now, _, trial = heapq.heappop(self._reports)
            trial.epochs += 1
            self.epochs += 1
            verdict = self._judge(trial).verdict
            if trial.finished or verdict == "stop":
                self.ended_at.append(self.now)
            elif verdict == "pause":
                self.waiting[trial.trial_id] = trial
            else:
                self._train(trial)

    def _fill(self) -> bool:
        """Give every free worker a trial. Returns whether anybody trains."""
        while len(self._reports) < self.workers and (trial := self._next()) is not None:
            self._train(trial)
        return bool(self._reports)

    def _next(self) -> _Trial | None:
        promoted = self.halving.next_promotion()
        if promoted is not None:
            self.halving.release(promoted)
            return self.waiting.pop(promoted)
        return next(self.trials, None) if self.epochs < self.most_epochs else None

    def _train(self, trial: _Trial) -> None:
        seconds = trial.next_seconds()
        self.work += seconds
        heapq.heappush(self._reports, (self.now + seconds, trial.number, trial))

    def _judge(self, trial: _Trial) -> Judgement:
        candidate = Candidate(trial.trial_id, trial.strength)
        judged = self.halving.judge(candidate, epoch=trial.epochs, score=trial.score(), last=trial.finished)
        if not trial.control or judged.verdict == "continue":
            return judged
        if judged.verdict == "pause":
            self.halving.release(trial.trial_id)
        return Judgement("continue", judged.rung)


def rehearse(plan: SearchPlan, seconds: Sequence[TrialSeconds], *, workers: int) -> Rehearsed:
    """Rehearse a plan's search, its trials taking turns in what `seconds` says of the networks it may train."""
    num_trials = min(plan.space.budget.num_trials, MOST_TRIALS)
    scale = plan.space.budget.num_trials / num_trials
    epochs = num_trials * len(seconds[0].epochs)
    times = max(1, min(MOST_REHEARSALS, EPOCHS_OF_ALL_REHEARSALS // epochs))
    searches = []
    for seed in range(times):
        most_epochs = (plan.space.budget.max_total_epochs or math.inf) / scale
        search = _Search(plan.make_halving(), _invented(plan, seconds, num_trials, seed), workers, most_epochs)
        search.run()
        searches.append(search)
    return Rehearsed(
        work_seconds=scale * float(np.mean([search.work for search in searches])),
        wall_seconds=scale * float(np.mean([search.now for search in searches])),
        ended_after=_mean_of_each([sorted(search.ended_at) for search in searches]),
    )


def _mean_of_each(ended_at: Sequence[Sequence[float]]) -> list[float]:
    """When each further trial had ended, on average; trials that waited to the end were never trained further."""
    shortest = min(len(times) for times in ended_at)
    return [float(np.mean([times[place] for times in ended_at])) for place in range(shortest)]


def _invented(plan: SearchPlan, seconds: Sequence[TrialSeconds], num_trials: int, seed: int) -> Iterator[_Trial]:
    rng = np.random.default_rng(seed)
    baselines = len(plan.space.complete_baselines())
    for number, of_network in zip(range(num_trials), itertools.cycle(seconds), strict=False):
        chosen = is_control(number, share=plan.control_fraction, seed=plan.seed)
        final, passing, strength = rng.normal(), rng.normal(), rng.random()
        yield _Trial(number, of_network, chosen and number >= baselines, final, passing, strength)

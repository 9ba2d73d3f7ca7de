"""Which configuration to try next: Optuna's TPE over a search space, seeded so that a resume does not repeat itself.

There are two studies. The one in the journal is a projection of the event log for people to look at. The one that is
sampled from is in memory and made anew by every driver: it may know more (trials of earlier searches), less (trials
that do not lie in the space any more, or are long past) and other values (extrapolated ones) than the journal.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

from orchestrator.pareto import best_first
from results.history import TrialHistory
from results.schema import Scalar
from results.study import (
    Objectives,
    Outcome,
    StudyJournal,
    directions,
    frozen_trial,
    outcome,
    values_at_best,
    write_outcome,
)
from search_spaces.conditional import Draw
from search_spaces.space import SearchSpace

MOST_STARTUP_TRIALS = 10
# TPE calls the best 10% good, but 25 at most, and the newest 25 count fully: a model of the best 100 and the newest 400
# separates good from bad as one of all trials does, at a cost that stays.
MOST_TOLD = 1000
BEST_KEPT = 100
NEWEST_KEPT = 400
Origin = Literal["baseline", "recipe", "startup", "model", "finalist"]
Extrapolate = Callable[[TrialHistory], float | None]
SamplerAfter = Callable[[int], optuna.samplers.BaseSampler]


@dataclass(frozen=True)
class Proposal:
    """Values for every active dimension, and where each was drawn from.

    `number` is the trial's in the journal. `origin`: given (a baseline or recipe), drawn at random, or by TPE's model.
    """

    number: int
    params: dict[str, Scalar]
    distributions: dict[str, BaseDistribution]
    origin: Origin


def startup_trials(*, num_trials: int, max_concurrent: int) -> int:
    """How many trials must have ended before TPE's model draws, so that at most a third is drawn without it.

    While one is awaited the others running beside it are drawn without the model too.
    """
    return max(1, min(MOST_STARTUP_TRIALS, num_trials // 3 - (max_concurrent - 1)))


def make_sampler(
    *, num_trials: int, max_concurrent: int, seed: int, trials_so_far: int, conditional: bool = False
) -> optuna.samplers.TPESampler:
    """Multivariate TPE with constant liar (Watanabe 2023).

    The seed depends on the number of trials so far, so that a resumed search goes on drawing new points. The dimensions
    of a `conditional` space are modelled in groups that are active together; otherwise those that are not always
    active would be drawn one by one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=startup_trials(num_trials=num_trials, max_concurrent=max_concurrent),
            multivariate=True,
            group=conditional,
            constant_liar=True,
            seed=(seed * 1_000_003 + trials_so_far) % 2**32,
        )


class Proposer:
    """Asks the sampling study for configurations; tells it and the journal what became of them."""

    def __init__(
        self,
        study_path: Path,
        *,
        name: str,
        space: SearchSpace,
        sampler_after: SamplerAfter,
        given: Sequence[Mapping[str, Scalar]],
        given_origin: Literal["baseline", "recipe"] = "baseline",
    ) -> None:
        """`sampler_after`: a sampler for the number of trials so far.

        `given`: configurations to begin with that have not been started yet, and what to call their origin.
        """
        self._path = study_path
        self._journal = StudyJournal(study_path, name=name, objectives=space.objectives)
        self._space = space
        self._given = deque(given)
        self._given_origin: Origin = given_origin
        self._sampling = SamplingStudy(space.objectives, sampler_after, trials_so_far=self._journal.num_trials)

    def recall(self, trials: Iterable[TrialHistory], *, extrapolate: Extrapolate = lambda trial: None) -> None:
        """Tell the sampling study, once, of every trial of the experiment so far.

        Those that lie in the space are told, pruned ones with the value that `extrapolate` gives, as by `tell`.
        """
        past = list(trials)
        if self._journal.num_trials != len(past):  # the numbers of new trials would be wrong
            raise ValueError(f"{self._path} has {self._journal.num_trials} trials and the event log {len(past)}")
        self.learn(filter(_is_searched, past), extrapolate=extrapolate)

    def learn(self, trials: Iterable[TrialHistory], *, extrapolate: Extrapolate = lambda trial: None) -> None:
        """Tell the sampling study of trials, also of other experiments, as far as they lie in the space."""
        sampled = [self._sampled(trial, extrapolate(trial)) for trial in trials]
        self._sampling.add([trial for trial in sampled if trial is not None])

    def ask(self) -> Proposal:
        """The next configuration; its number is the trial's."""
        given = self._given.popleft() if self._given else None
        trial = self._sampling.ask(given)
        point = self._space.point(from_optuna(trial))
        # TPE fills the relative parameters only when it draws from its model.
        origin: Origin = self._given_origin if given is not None else "model" if trial.relative_params else "startup"
        number = self._journal.start(params=point.params, distributions=point.distributions, origin=origin)
        self._sampling.name(trial, _trial_id(number))
        return Proposal(number, point.params, point.distributions, origin)

    def repeat(self, trial: TrialHistory) -> Proposal:
        """A trial's configuration once more, of which the sampling study learns nothing."""
        distributions = {name: json_to_distribution(text) for name, text in trial.started.distributions.items()}
        params = dict(trial.started.params)
        number = self._journal.start(params=params, distributions=distributions, origin="finalist")
        return Proposal(number, params, distributions, "finalist")

    def tell(self, trial: TrialHistory, *, extrapolated: float | None = None) -> None:
        """Tell both studies how a trial ended, as DESIGN's table of states says.

        The sampling study is told a pruned trial that has an `extrapolated` value as complete with that value.
        """
        self._journal.end(trial)
        self._sampling.tell(trial.trial_id, sampled_outcome(trial, self._space.objectives, extrapolated=extrapolated))

    def _sampled(self, trial: TrialHistory, extrapolated: float | None) -> FrozenTrial | None:
        """A trial as the sampling study knows it; None when it does not lie in the space."""
        point = self._space.locate(trial.started.config)
        if point is None:
            return None
        told = sampled_outcome(trial, self._space.objectives, extrapolated=extrapolated)
        # A running trial is known by its name when it ends. Trials of other experiments have ended.
        attrs = {"trial_id": trial.trial_id} if trial.ended is None else {}
        return frozen_trial(told, params=point.params, distributions=point.distributions, user_attrs=attrs)


def _is_searched(trial: TrialHistory) -> bool:
    return trial.started.stage == "search"


def _trial_id(number: int) -> str:
    return f"t{number:05d}"


def from_optuna(trial: optuna.Trial) -> Draw:
    """Values from a trial that was asked for."""

    def draw(name: str, distribution: BaseDistribution) -> Scalar:
        d = distribution
        if isinstance(d, FloatDistribution):
            return trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
        if isinstance(d, IntDistribution):
            return trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
        assert isinstance(d, optuna.distributions.CategoricalDistribution)
        return trial.suggest_categorical(name, d.choices)

    return draw


def sampled_outcome(trial: TrialHistory, objectives: Objectives, *, extrapolated: float | None = None) -> Outcome:
    """What the sampling study is told of a trial.

    With several objectives pruned trials have no values: Optuna's TPE cannot rank them by those of the epochs.
    """
    told = outcome(trial, objectives)
    if len(objectives) > 1:
        told = replace(told, intermediate_values={})
    pruned = trial.ended is not None and trial.ended.status == "pruned"
    at_best = values_at_best(trial, objectives) if pruned else None
    if extrapolated is None or at_best is None:
        return told
    return Outcome(TrialState.COMPLETE, [extrapolated, *at_best[1:]], {})


class SamplingStudy:
    """A study in memory that forgets: past MOST_TOLD ended trials only the best BEST_KEPT and newest NEWEST_KEPT stay.

    Running trials stay too, and are told by the name that they were given.
    """

    def __init__(self, objectives: Objectives, sampler_after: SamplerAfter, *, trials_so_far: int) -> None:
        """`trials_so_far`: of the search, whether they are told here or not."""
        self._objectives = objectives
        self._sampler_after = sampler_after
        self._asked = trials_so_far
        self._running: dict[str, int] = {}
        self._num_told = 0
        self._begin()

    def _begin(self) -> None:
        # A sampler remembers how far it has read its study: each study needs one of its own.
        self._storage = optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(
            storage=self._storage, directions=directions(self._objectives), sampler=self._sampler_after(self._asked)
        )
        self._study_key = self._storage.get_study_id_from_name(self._study.study_name)

    @property
    def trials(self) -> list[FrozenTrial]:
        """What it knows, the oldest first."""
        return self._study.get_trials(deepcopy=False)

    def add(self, trials: Sequence[FrozenTrial]) -> None:
        """Take in trials, running ones with the name `trial_id` in their attributes."""
        for trial in self._kept(trials):
            key = self._storage.create_new_trial(self._study_key, template_trial=trial)
            if trial.state is TrialState.RUNNING:
                self._running[trial.user_attrs["trial_id"]] = key
            else:
                self._num_told += 1
        self._forget()

    def ask(self, given: Mapping[str, Scalar] | None = None) -> optuna.Trial:
        """A running trial whose values are drawn as they are asked for, or as given."""
        if given is not None:
            self._study.enqueue_trial(dict(given))
        self._asked += 1
        return self._study.ask()

    def name(self, trial: optuna.Trial, trial_id: str) -> None:
        """Give a trial that was asked for the name under which it is told."""
        trial.set_user_attr("trial_id", trial_id)
        self._running[trial_id] = self._storage.get_trial_id_from_study_id_trial_number(self._study_key, trial.number)

    def tell(self, trial_id: str, told: Outcome) -> None:
        """Take in how a trial ended. One that is not in here, since it lies outside of the space, stays out."""
        key = self._running.pop(trial_id, None)
        if key is not None:
            write_outcome(self._storage, key, told)
            self._num_told += 1
            self._forget()

    def _forget(self) -> None:
        if self._num_told > MOST_TOLD:
            trials = self.trials
            self._running, self._num_told = {}, 0
            self._begin()
            self.add(trials)

    def _kept(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """The trials that are remembered, in their order."""
        told = [place for place, trial in enumerate(trials) if trial.state.is_finished()]
        if len(told) <= MOST_TOLD:
            return list(trials)
        useful = [place for place in told if trials[place].state is not TrialState.FAIL]  # TPE does not look at these
        best = ranked([trials[place] for place in useful], self._objectives, wanted=BEST_KEPT)
        kept = {*useful[-NEWEST_KEPT:], *(useful[place] for place in best)}
        return [trial for place, trial in enumerate(trials) if place in kept or not trial.state.is_finished()]


def ranked(trials: Sequence[FrozenTrial], objectives: Objectives, *, wanted: int) -> list[int]:
    """The places of the best of complete and pruned trials, in the order in which TPE ranks them."""
    modes = list(objectives.values())
    complete = [place for place, trial in enumerate(trials) if trial.state is TrialState.COMPLETE]
    values_NK = np.array([trials[place].values for place in complete])
    best = [complete[place] for place in best_first(values_NK, modes, wanted=wanted)] if complete else []
    sign = -1.0 if modes[0] == "max" else 1.0

    def pruned_key(place: int) -> tuple[int, float]:
        values = trials[place].intermediate_values
        return (-max(values), sign * values[max(values)]) if values else (1, 0.0)

    pruned = [place for place, trial in enumerate(trials) if trial.state is TrialState.PRUNED]
    return [*best, *sorted(pruned, key=pruned_key)][:wanted]

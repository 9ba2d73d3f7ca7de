"""Which configuration to try next: Optuna's TPE over a search space, seeded so that a resume does not repeat itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
from optuna.distributions import BaseDistribution

from results.history import TrialHistory
from results.schema import Scalar
from results.study import final_value, intermediate_values, open_study, trial_state

MOST_STARTUP_TRIALS = 10
Origin = Literal["baseline", "recipe", "startup", "model", "finalist"]


@dataclass(frozen=True)
class Proposal:
    """Values for every dimension. `origin`: given (a baseline or recipe), drawn at random, or drawn by TPE's model."""

    number: int
    params: dict[str, Scalar]
    distributions: dict[str, BaseDistribution]
    origin: Origin


def startup_trials(*, num_trials: int, max_concurrent: int) -> int:
    """How many trials must have ended before TPE's model draws, so that at most a third is drawn without it.

    While one is awaited the others running beside it are drawn without the model too.
    """
    return max(1, min(MOST_STARTUP_TRIALS, num_trials // 3 - (max_concurrent - 1)))


def make_sampler(*, num_trials: int, max_concurrent: int, seed: int, trials_so_far: int) -> optuna.samplers.TPESampler:
    """Multivariate TPE with constant liar (Watanabe 2023).

    The seed depends on the number of trials so far, so that a resumed search goes on drawing new points.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=startup_trials(num_trials=num_trials, max_concurrent=max_concurrent),
            multivariate=True,
            constant_liar=True,
            seed=(seed * 1_000_003 + trials_so_far) % 2**32,
        )


class Proposer:
    """Asks the study for configurations and tells it what became of them."""

    def __init__(
        self,
        study_path: Path,
        *,
        name: str,
        metric: str,
        mode: str,
        dimensions: Mapping[str, BaseDistribution],
        sampler: optuna.samplers.BaseSampler,
        given: Sequence[Mapping[str, Scalar]],
        given_origin: Literal["baseline", "recipe"] = "baseline",
    ) -> None:
        """`given`: configurations to begin with that have not been started yet, and what to call their origin."""
        self._study = open_study(study_path, name=name, mode=mode, sampler=sampler)
        self._metric = metric
        self._dimensions = dict(dimensions)
        for params in given:
            self._study.enqueue_trial(dict(params), user_attrs={"origin": given_origin})

    def ask(self) -> Proposal:
        """The next configuration; its number is the trial's."""
        trial = self._study.ask(self._dimensions)
        # TPE fills the relative parameters only when it draws from its model.
        drawn: Origin = "model" if trial.relative_params else "startup"
        origin: Origin = trial.user_attrs.get("origin", drawn)
        trial.set_user_attr("origin", origin)
        trial.set_user_attr("trial_id", f"t{trial.number:05d}")
        return Proposal(trial.number, dict(trial.params), dict(trial.distributions), origin)

    def repeat(self, trial: TrialHistory) -> Proposal:
        """A trial's configuration once more."""
        self._study.enqueue_trial(dict(trial.started.params), user_attrs={"origin": "finalist"})
        return self.ask()

    def tell(self, trial: TrialHistory, *, extrapolated: float | None = None) -> None:
        """Tell the study how a trial ended, as DESIGN's table of states says."""
        number = int(trial.trial_id[1:])
        storage = self._study._storage
        trial_key = storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
        for epoch, value in intermediate_values(trial, metric=self._metric).items():
            storage.set_trial_intermediate_value(trial_key, epoch, value)
        self._study.tell(number, final_value(trial, metric=self._metric), state=trial_state(trial))

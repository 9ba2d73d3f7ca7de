"""Early stopping replayed on recorded trainings: which configurations would have been kept, at what cost.

Configurations come in random order from those recorded. No sampler can be replayed, so that "none" is random search
here. What each strategy picks is chosen by validation (the select split) only.

Intervals are of the mean over orders, for other pools of configurations: `POOLS` times the configurations are drawn
anew with replacement (Efron 1979) and everything is replayed, in `ORDERS_PER_POOL` orders. The spread over so few
orders is in them too, so they are too wide rather than too narrow. The best of a pool is the best by its own test
figures, hence flattered by their noise: no strategy reaches a regret of 0 on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from simulated_search import SimulatedSearch, SimulatedTrial, picked

from orchestrator.halving import HALVINGS, Ladder
from results.schema import FloatArray, UsageError
from trainables.course import Leg

DIMENSIONS = ("dropout", "weight_decay", "mixup_alpha", "label_smoothing", "cutout_size")
LOGARITHMIC = ("weight_decay",)
ORDERS = 200
POOLS = 100
ORDERS_PER_POOL = 5
BEST_SHARE = 0.1
Curves = dict[str, tuple[FloatArray, FloatArray]]


@dataclass(frozen=True, kw_only=True)
class RecordedTraining:
    """One training of a configuration. `curves`: of each run, the averaged and the raw weights' scores an epoch.

    `finals`: what a pick is worth in the end, by the run that its strategy ends with.
    """

    config_id: str
    strength: float
    max_epochs: int
    curves: Curves
    finals: dict[str, float]

    def reading(self, leg: Leg, epoch: int, *, average: bool) -> float:
        """See simulated_search.Training."""
        averaged, raw = self.curves[_run_of(leg, self.max_epochs)]
        return float((averaged if average else raw)[epoch - 1])


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Recorded configurations, each with one training or more. `scored_by`: the figure that `finals` are."""

    configurations: list[list[RecordedTraining]]
    max_epochs: int
    scored_by: str
    runs: frozenset[str]

    def serves(self, halving: str, ladder: Ladder) -> bool:
        """Whether all runs that a strategy needs were recorded."""
        return {_run_of(leg, ladder.max_epochs) for leg in HALVINGS[halving](ladder).course} <= self.runs


def _run_of(leg: Leg, max_epochs: int) -> str:
    """The recorded run that has a leg's epochs."""
    if leg.trunk:
        return "stable"
    if "schedule" in leg.changes:
        return f"branch_{leg.start}"
    return "full" if leg.end == max_epochs else f"short_{leg.end}"


def read_pool(path: Path) -> Pool:
    """A recorded pool (a file pool.parquet, or a folder with it or with its parts), or an experiment's folder.

    A pool is scored by test accuracy. An experiment is scored by validation accuracy, since its test images are not to
    be touched, and only its trials that reached `max_epochs` are replayed.
    """
    if (path / "trials").is_dir():
        return _of_experiment(path)
    files = [path] if path.is_file() else sorted(path.glob("pool.parquet")) or sorted(path.glob("parts/*.parquet"))
    if not files:
        raise UsageError(f"{path}: no pool.parquet, no parts/ and no trials/; wanted a recorded pool or an experiment")
    return _of_rows(pd.concat([pd.read_parquet(file) for file in files], ignore_index=True))


def _of_rows(rows: pd.DataFrame) -> Pool:
    """A pool from rows of (config_id, seed, run, epoch)."""
    max_epochs = int(rows.loc[rows["run"] == "full", "epoch"].max())
    rows = rows.assign(strength=strengths(rows))
    trainings: dict[str, list[RecordedTraining]] = {}
    runs = frozenset(rows["run"])
    for (config_id, _), own in rows.groupby(["config_id", "seed"]):
        by_run = {str(run): of_run.sort_values("epoch") for run, of_run in own.groupby("run")}
        tests = {run: float(of_run["test_accuracy"].iloc[-1]) for run, of_run in by_run.items()}
        if runs - set(by_run) or not np.isfinite([tests["full"], tests.get("stable", 0.0)]).all():
            continue  # diverged: a search would have recorded it as failed
        training = RecordedTraining(
            config_id=str(config_id),
            strength=float(own["strength"].iloc[0]),
            max_epochs=max_epochs,
            curves={run: _curve(of_run) for run, of_run in by_run.items()},
            finals={run: tests[run] for run in ("full", "stable") if run in tests},
        )
        trainings.setdefault(str(config_id), []).append(training)
    return Pool(configurations=list(trainings.values()), max_epochs=max_epochs, scored_by="test_accuracy", runs=runs)


def _of_experiment(folder: Path) -> Pool:
    """The trials of an experiment that reached its `max_epochs`."""
    trials = pd.read_parquet(folder / "trials")
    epochs = pd.read_parquet(folder / "epochs")
    max_epochs = int(trials["max_epochs"].max())
    done = trials[(trials["status"] == "completed") & (trials["epochs_trained"] == max_epochs)]
    done = done.rename(columns={f"config.{name}": name for name in DIMENSIONS})
    curves = {str(trial_id): _curve(own.sort_values("epoch")) for trial_id, own in epochs.groupby("trial_id")}
    configurations = [
        [
            RecordedTraining(
                config_id=trial_id,
                strength=strength,
                max_epochs=max_epochs,
                curves={"full": curves[trial_id]},
                finals={"full": float(curves[trial_id][0].max())},
            )
        ]
        for trial_id, strength in zip(done["trial_id"], strengths(done), strict=True)
        if trial_id in curves
    ]
    if len(configurations) < 2:
        raise UsageError(f"{folder}: {len(configurations)} trials reached {max_epochs} epochs; wanted at least two")
    return Pool(
        configurations=configurations, max_epochs=max_epochs, scored_by="val_accuracy", runs=frozenset({"full"})
    )


def _curve(rows: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """Scores of the averaged and the raw weights, an epoch each; runs that begin later are filled up with nan."""
    missing = int(rows["epoch"].iloc[0]) - 1
    columns = (rows["val_accuracy"], rows["raw_val_accuracy"].fillna(rows["val_accuracy"]))
    averaged, raw = (np.concatenate([np.full(missing, np.nan), column.to_numpy(float)]) for column in columns)
    return averaged, raw


def strengths(configs: pd.DataFrame) -> FloatArray:
    """Of regularization: the mean place, from 0 to 1, of the dimensions' values among all that occur."""
    places = []
    for name in DIMENSIONS:
        values = configs[name].to_numpy(float) if name in configs else np.zeros(len(configs))
        values = np.log10(np.maximum(values, 1e-12)) if name in LOGARITHMIC else values
        width = values.max() - values.min()
        if width > 0:
            places.append((values - values.min()) / width)
    return np.mean(places, axis=0) if places else np.full(len(configs), 0.5)


@dataclass
class RandomOrder:
    """Proposals: every configuration once, in random order, with one of its trainings."""

    pool: Pool
    drawn: Sequence[int]
    rng: np.random.Generator
    order: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = list(self.rng.permutation(np.asarray(self.drawn)))

    def ask(self, number: int) -> RecordedTraining | None:
        """See simulated_search.Proposals."""
        if number >= len(self.order):
            return None
        trainings = self.pool.configurations[self.order[number]]
        return trainings[int(self.rng.integers(len(trainings)))]

    def tell(self, trial: SimulatedTrial, forecast: float | None) -> None:
        """Random search does not learn."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One order after a budget. `kept_best`: a configuration of the best tenth was trained to its end."""

    budget_epochs: int
    regret: float
    kept_best: bool
    epochs: int


def replay(pool: Pool, search: SimulatedSearch, *, drawn: Sequence[int], budgets: Sequence[int]) -> list[Replay]:
    """One order, looked at after each of `budgets` epochs, in ascending order.

    What is picked is worth the mean over its configuration's trainings, so that a lucky one does not count as better.
    """
    run = "stable" if search.halving.course[-1].trunk else "full"
    worth = {trainings[0].config_id: mean_final(trainings, run) for trainings in pool.configurations}
    full = {pool.configurations[i][0].config_id: mean_final(pool.configurations[i], "full") for i in drawn}
    best = sorted(full, key=lambda config_id: -full[config_id])[: math.ceil(BEST_SHARE * len(full))]
    found: list[Replay] = []
    spent = 0
    for budget in budgets:
        while spent < budget and search.advance():
            spent += 1
        trials = list(search.trials.values())
        kept = {_config_id(trial) for trial in trials if trial.status == "completed"}
        regret = full[best[0]] - worth[_config_id(picked(trials))]
        found.append(Replay(budget_epochs=budget, regret=regret, kept_best=not kept.isdisjoint(best), epochs=spent))
    return found


def mean_final(trainings: Sequence[RecordedTraining], run: str) -> float:
    """What a configuration's runs are worth, over its trainings."""
    return float(np.mean([training.finals.get(run, math.nan) for training in trainings]))


def _config_id(trial: SimulatedTrial) -> str:
    assert isinstance(trial.training, RecordedTraining)
    return trial.training.config_id


def replayed(
    pool: Pool, halving: str, *, ladder: Ladder, budgets: Sequence[int], control_fraction: float, seed: int
) -> pd.DataFrame:
    """Rows of (pool_draw, order, budget_epochs, ...); pool_draw -1 is the pool itself. The same orders for every
    strategy."""
    size = len(pool.configurations)
    draws = [(-1, np.arange(size), ORDERS)]
    draws += [(d, np.random.default_rng([seed, 1, d]).integers(0, size, size), ORDERS_PER_POOL) for d in range(POOLS)]
    rows = []
    for draw, drawn, orders in draws:
        for order in range(orders):
            search = SimulatedSearch(
                HALVINGS[halving](ladder),
                RandomOrder(pool, drawn, np.random.default_rng([seed, 2, draw + 1, order])),
                np.random.default_rng([seed, 3, draw + 1, order]),
                control_fraction,
            )
            found = replay(pool, search, drawn=drawn, budgets=budgets)
            rows += [{"strategy": halving, "pool_draw": draw, "order": order, **asdict(replay)} for replay in found]
    return pd.DataFrame(rows)

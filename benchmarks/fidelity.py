"""What early stopping costs when stronger regularization learns more slowly and ends better.

    python benchmarks/fidelity.py synthetic --output FOLDER      # invented curves (benchmarks/crossing_curves.py)
    python benchmarks/fidelity.py table FILE ...                 # what `synthetic` wrote, in one table
    python benchmarks/fidelity.py --pool FOLDER                  # recorded trainings (benchmarks/pool.py)

Every strategy gets the same number of epochs, in which all that it trains counts. Synthetic: regret is the optimum's
true final score minus that of the trial picked, in points of accuracy, over seeds of instance, sampler and noise that
are the same for all strategies.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
import pandas as pd
from crossing_curves import DIMENSIONS, CrossingCurves, CurveTraining
from fidelity_tables import print_replays, print_synthetic
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from pool import read_pool, replayed
from rich.console import Console
from simulated_search import WORKERS, SimulatedSearch, SimulatedTrial, picked

from orchestrator.halving import HALVINGS, Forecasting, Ladder
from orchestrator.proposals import startup_trials
from results.schema import UsageError

SPACE: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in DIMENSIONS}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """`told`: how the sampler learns of stopped trials, as PRUNED with their intermediate values, or as COMPLETE with
    the final value that `forecast` expects (by a forecaster that looks on, where the strategy has none of its own)."""

    halving: str
    told: Literal["pruned", "forecast"] = "pruned"
    sampler: Literal["tpe", "random"] = "tpe"


CONTESTANTS = {
    **{name: Contestant(halving=name) for name in HALVINGS},
    "random": Contestant(halving="none", sampler="random"),
    **{f"{name}, told": Contestant(halving=name, told="forecast") for name in ("asha_ema", "stratified", "forecast")},
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One simulated search."""

    strategy: str
    severity: float
    seed: int
    max_epochs: int
    grace_epochs: int
    budget_epochs: int
    control_fraction: float


class OptunaProposals:
    """An in-memory study over invented curves.

    A trial that begins to wait is told as PRUNED, and added as COMPLETE once it was promoted and has ended: a study
    cannot be told twice.
    """

    def __init__(self, curves: CrossingCurves, contestant: Contestant, *, num_trials: int, seed: int) -> None:
        self._curves = curves
        self._told = contestant.told
        self._study = optuna.create_study(direction="maximize", sampler=_sampler(contestant, num_trials, seed))
        self._trials: list[optuna.Trial] = []
        self._closed: set[int] = set()

    def ask(self, number: int) -> CurveTraining:
        """See simulated_search.Proposals."""
        trial = self._study.ask(SPACE)
        self._trials.append(trial)
        return self._curves.training(number, strength=trial.params["strength"], lr=trial.params["lr"])

    def tell(self, trial: SimulatedTrial, forecast: float | None) -> None:
        """See simulated_search.Proposals."""
        asked = self._trials[trial.number]
        again = trial.number in self._closed
        self._closed.add(trial.number)
        if trial.status == "completed" and again:
            self._study.add_trial(create_trial(params=asked.params, distributions=SPACE, value=trial.observed))
        elif trial.status == "completed":
            self._study.tell(asked, trial.observed)
        elif self._told == "forecast" and forecast is not None:
            self._study.tell(asked, forecast)
        elif not again:
            for epoch, score in enumerate(trial.scores, start=1):
                asked.report(score, epoch)
            self._study.tell(asked, state=TrialState.PRUNED)


def _sampler(contestant: Contestant, num_trials: int, seed: int) -> optuna.samplers.BaseSampler:
    """As orchestrator.proposals makes it."""
    if contestant.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=startup_trials(num_trials=num_trials, max_concurrent=WORKERS),
            multivariate=True,
            constant_liar=True,
            seed=seed,
        )


def simulated(job: Job) -> SimulatedSearch:
    """A search on invented curves, its budget spent."""
    contestant = CONTESTANTS[job.strategy]
    curves = CrossingCurves.draw(job.seed, severity=job.severity, max_epochs=job.max_epochs)
    ladder = Ladder(grace_epochs=job.grace_epochs, max_epochs=job.max_epochs, factor=3.0)
    own = contestant.told == "pruned" or isinstance(HALVINGS[contestant.halving](ladder), Forecasting)
    search = SimulatedSearch(
        HALVINGS[contestant.halving](ladder),
        OptunaProposals(curves, contestant, num_trials=job.budget_epochs // job.max_epochs, seed=job.seed),
        np.random.default_rng([job.seed, 3]),
        job.control_fraction,
        None if own else Forecasting(ladder),
    )
    search.run(job.budget_epochs)
    return search


def outcome(job: Job) -> dict[str, float | int | str]:
    """A row of the results: how far the pick of one search is from the optimum."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = simulated(job)
    training = picked(list(search.trials.values())).training
    assert isinstance(training, CurveTraining)
    curves = training.curves
    trials = search.trials.values()
    return {
        **asdict(job),
        "regret": curves.final(curves.best_strength, curves.best_rate) - training.final,
        "picked_strength": training.x,
        "num_trials": len(trials),
        "completed": sum(trial.status == "completed" for trial in trials),
        "epochs_trained": sum(len(trial.scores) for trial in trials),
    }


def synthetic(args: argparse.Namespace) -> pd.DataFrame:
    """All searches on invented curves."""
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs = [
        Job(
            strategy=strategy,
            severity=severity,
            seed=seed,
            max_epochs=args.epochs,
            grace_epochs=args.grace,
            budget_epochs=args.budget * args.epochs,
            control_fraction=args.control_fraction,
        )
        for severity, strategy, seed in product(args.severities, args.strategies, seeds)
    ]
    with multiprocessing.get_context("forkserver").Pool(args.processes) as workers:
        return pd.DataFrame(list(workers.imap(outcome, jobs, chunksize=10)))


def replays(args: argparse.Namespace) -> pd.DataFrame:
    """All replays of a recorded pool."""
    pool = read_pool(args.pool)
    ladder = Ladder(grace_epochs=args.grace or pool.max_epochs // 9, max_epochs=pool.max_epochs, factor=3.0)
    budgets = [budget * pool.max_epochs for budget in sorted(args.budgets)]
    tables = [
        replayed(pool, name, ladder=ladder, budgets=budgets, control_fraction=args.control_fraction, seed=args.seed)
        for name in args.strategies or HALVINGS
        if pool.serves(name, ladder)
    ]
    rows = pd.concat(tables, ignore_index=True)
    return rows.assign(scored_by=pool.scored_by, max_epochs=pool.max_epochs, configurations=len(pool.configurations))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python benchmarks/fidelity.py", description=(__doc__ or "").split("\n")[0])
    modes = top.add_subparsers(dest="mode", required=True)
    invented = modes.add_parser("synthetic", help="on invented curves that cross")
    invented.add_argument("--seeds", type=int, default=200)
    invented.add_argument("--first-seed", type=int, default=0)
    invented.add_argument("--severities", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    invented.add_argument("--strategies", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    invented.add_argument("--processes", type=int, default=2)
    invented.add_argument("--epochs", type=int, default=27, help="of a whole training")
    invented.add_argument("--grace", type=int, default=3, help="epochs before the first rung")
    invented.add_argument("--budget", type=int, default=24, help="in whole trainings")
    recorded = modes.add_parser("pool", help="on recorded trainings")
    recorded.add_argument("--pool", type=Path, required=True, help="a recorded pool, or an experiment's folder")
    recorded.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16], help="in whole trainings")
    recorded.add_argument("--strategies", nargs="+", choices=list(HALVINGS))
    recorded.add_argument("--grace", type=int, help="epochs before the first rung (a ninth)")
    recorded.add_argument("--seed", type=int, default=0)
    stored = modes.add_parser("table", help="what `synthetic` wrote")
    stored.add_argument("files", type=Path, nargs="+")
    for mode in (invented, recorded):
        mode.add_argument("--control-fraction", type=float, default=0.0, help="of trials that are never stopped")
    for mode in (invented, recorded, stored):
        mode.add_argument("--output", type=Path, help="a folder for the rows, as parquet")
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, and write."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--pool"]:
        words.insert(0, "pool")
    args = parser().parse_args(words)
    if args.mode == "table":
        rows = pd.concat(map(pd.read_parquet, args.files), ignore_index=True)
    else:
        rows = synthetic(args) if args.mode == "synthetic" else replays(args)
    (print_replays if args.mode == "pool" else print_synthetic)(rows, Console(width=120))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(args.output / f"{'pool' if args.mode == 'pool' else 'synthetic'}.parquet", index=False)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"error: {error}")

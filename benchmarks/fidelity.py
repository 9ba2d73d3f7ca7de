"""What early stopping costs when stronger regularization learns more slowly and ends better.

    python -m benchmarks.fidelity synthetic --output FOLDER      # invented curves (benchmarks/crossing_curves.py)
    python -m benchmarks.fidelity pool --pool FOLDER             # recorded trainings (benchmarks/pool.py)

Every strategy gets the same number of epochs, in which all that it trains counts. Synthetic: regret is the optimum's
true final score minus that of the trial picked, in points of accuracy, over seeds of instance, sampler and noise that
are the same for all strategies. Intervals: 95%, bootstrap over the seeds, paired for the ratio to `asha`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from rich.console import Console
from rich.table import Table

from benchmarks.crossing_curves import DIMENSIONS, CrossingCurves, CurveTraining
from benchmarks.pool import read_pool, replayed
from benchmarks.simulated_search import WORKERS, SimulatedSearch, SimulatedTrial, picked
from orchestrator.halving import HALVINGS, Forecasting, Ladder
from orchestrator.proposals import startup_trials
from orchestrator.statistics import interval, resampled_means
from results.schema import FloatArray

SPACE: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in DIMENSIONS}
REFERENCE = "asha"
POINTS = 100


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


def with_interval(values_N: FloatArray, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval."""
    low, high = interval(resampled_means(values_N[:, None], np.random.default_rng(seed))[:, 0])
    return float(values_N.mean()), low, high


def ratio_with_interval(values_N: FloatArray, to_N: FloatArray, *, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of two means over the same seeds, and its 95% interval by paired bootstrap."""
    means_R2 = resampled_means(np.stack([values_N, to_N], axis=1), np.random.default_rng(seed))
    low, high = interval(means_R2[:, 0] / means_R2[:, 1])
    return float(values_N.mean() / to_N.mean()), low, high


def summary(rows: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Per severity and strategy: mean regret in points with its interval, the ratio to REFERENCE, trials."""
    regrets = rows.pivot(index="seed", columns=["severity", "strategy"], values="regret")
    counts = rows.groupby(["severity", "strategy"])[["num_trials", "completed", "picked_strength"]].mean()
    for severity, strategy in regrets.columns:
        values = regrets[severity, strategy].to_numpy(float)
        yield {
            "severity": severity,
            "strategy": strategy,
            "regret": with_interval(POINTS * values),
            "ratio": _ratio(regrets, severity, strategy),
            **counts.loc[(severity, strategy)].to_dict(),
        }


def _ratio(regrets: pd.DataFrame, severity: float, strategy: str) -> tuple[float, float, float] | None:
    """The ratio to REFERENCE, if it took part."""
    if (severity, REFERENCE) not in regrets.columns:
        return None
    reference = regrets[severity, REFERENCE].to_numpy(float)
    return ratio_with_interval(regrets[severity, strategy].to_numpy(float), reference)


def cell(figure: tuple[float, float, float] | None) -> str:
    """A figure with its interval."""
    return "" if figure is None else f"{figure[0]:.2f} [{figure[1]:.2f}, {figure[2]:.2f}]"


def print_synthetic(rows: pd.DataFrame, console: Console) -> None:
    """The table of regrets."""
    table = Table("severity", "strategy", "regret, points (95%)", f"ratio to {REFERENCE}", "trials", "to the end", "x")
    for row in summary(rows):
        counts = (f"{row['num_trials']:.0f}", f"{row['completed']:.0f}", f"{row['picked_strength']:.2f}")
        table.add_row(f"{row['severity']:g}", str(row["strategy"]), cell(row["regret"]), cell(row["ratio"]), *counts)  # type: ignore[arg-type]
    console.print(table)


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


def print_replays(rows: pd.DataFrame, console: Console) -> None:
    """The table of regrets on a recorded pool."""
    first = rows.iloc[0]
    told = f"{first['configurations']} configurations, {first['max_epochs']} epochs, scored by {first['scored_by']}"
    table = Table("budget", "strategy", "regret, points (95%)", "best tenth kept (95%)", "epochs spent", title=told)
    for (budget, strategy), own in rows.groupby(["budget_epochs", "strategy"], sort=False):
        means = own.groupby("pool_draw")[["regret", "kept_best", "epochs"]].mean()
        pools = means.drop(index=-1)
        regret, kept = (
            (factor * means.loc[-1, name], *interval(factor * pools[name].to_numpy(float)))
            for name, factor in (("regret", POINTS), ("kept_best", 1))
        )
        epochs = f"{means.loc[-1, 'epochs']:.0f}"
        table.add_row(f"{budget / first['max_epochs']:g} E", str(strategy), cell(regret), cell(kept), epochs)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=(__doc__ or "").split("\n")[0])
    modes = top.add_subparsers(dest="mode", required=True)
    invented = modes.add_parser("synthetic", help="on invented curves that cross")
    invented.add_argument("--seeds", type=int, default=200)
    invented.add_argument("--first-seed", type=int, default=0)
    invented.add_argument("--severities", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    invented.add_argument("--strategies", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    invented.add_argument("--processes", type=int, default=2)
    invented.add_argument("--epochs", type=int, default=27, help="of a whole training")
    invented.add_argument("--grace", type=int, default=9, help="epochs before the first rung")
    invented.add_argument("--budget", type=int, default=24, help="in whole trainings")
    recorded = modes.add_parser("pool", help="on recorded trainings")
    recorded.add_argument("--pool", type=Path, required=True, help="a recorded pool, or an experiment's folder")
    recorded.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 16], help="in whole trainings")
    recorded.add_argument("--strategies", nargs="+", choices=list(HALVINGS))
    recorded.add_argument("--grace", type=int, help="epochs before the first rung (a ninth)")
    recorded.add_argument("--seed", type=int, default=0)
    for mode in (invented, recorded):
        mode.add_argument("--control-fraction", type=float, default=0.0, help="of trials that are never stopped")
        mode.add_argument("--output", type=Path, help="a folder for the rows, as parquet")
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, and write."""
    args = parser().parse_args(argv)
    console = Console(width=120)
    rows = synthetic(args) if args.mode == "synthetic" else replays(args)
    (print_synthetic if args.mode == "synthetic" else print_replays)(rows, console)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(args.output / f"{args.mode}.parquet", index=False)


if __name__ == "__main__":
    main()

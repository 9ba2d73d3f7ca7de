"""What one more trial costs with reused actors, and what it would cost without: the ratio of two slopes.

    python benchmarks/trial_overhead.py

Each trial is one epoch of a small net on 12 images, so that nearly all of its time is overhead. Searches of 10,
20 and 40 trials, two at a time, are run in turns, with and without reuse, on one Ray cluster, and timed from the end
of the first trial to the end of the last; the slope of seconds over trials is the marginal cost. (The first actors of
a search take four to eight seconds to start, which would drown the slope with reuse.)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import optuna
from rich.console import Console

from orchestrator import driver
from orchestrator.console import SearchConsole
from orchestrator.plan import SearchPlan
from orchestrator.ray_cluster import ray_cluster
from orchestrator.searcher import Resources, fit
from results.store import Experiment
from search_spaces.space import load_space

SIZES = (10, 20, 40)
ROUNDS = 2
OVERRIDES = {"max_epochs": 1, "train_fraction": 0.01}


def seconds(results_dir: Path, *, num_trials: int, reuse_actors: bool, name: str) -> float:
    """How long a search of so many trials takes, from the end of its first to the end of its last."""
    plan = SearchPlan(source=load_space("digits"), overrides=OVERRIDES, num_trials=num_trials, seed=0, halving="none")
    data = driver.load_data(plan, "unused")
    experiment = Experiment.create(results_dir, name=name, info=plan.info(name=name, data=data, command="benchmark"))
    console = SearchConsole(Console(quiet=True), num_trials=num_trials, metric=plan.space.metric)
    with experiment.driving():
        ledger = driver.make_ledger(experiment, plan, max_concurrent=2, notify=console.changed)
        with console.watching(ledger):
            fit(ledger, data, Resources("cpu", 1, 0.0, 2), reuse_actors=reuse_actors)
    if len(experiment.trials()) != num_trials:
        raise RuntimeError(f"{name}: {len(experiment.trials())} of {num_trials} trials ended")
    ended = [trial.ended.at for trial in experiment.history.ended if trial.ended]
    return max(ended) - min(ended)


def main() -> None:
    """Print the times, the two slopes and their ratio."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    times: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder, ray_cluster(None, threads=1):
        seconds(Path(folder), num_trials=4, reuse_actors=True, name="warm-up")
        for round_number in range(ROUNDS):
            for num_trials in SIZES:
                for reuse in (True, False):
                    name = f"r{round_number}-{num_trials}-{reuse}"
                    elapsed = seconds(Path(folder), num_trials=num_trials, reuse_actors=reuse, name=name)
                    times[reuse].append((num_trials, elapsed))
                    print(f"{num_trials} trials, {'reused' if reuse else 'new'} actors: {elapsed:.1f} s", flush=True)
    slopes = {reuse: np.polyfit(*np.array(points).T, deg=1)[0] for reuse, points in times.items()}
    print(f"marginal cost of a trial: {slopes[True]:.3f} s with reused actors, {slopes[False]:.3f} s with new ones")
    print(f"ratio: {slopes[False] / slopes[True]:.1f}")


if __name__ == "__main__":
    main()

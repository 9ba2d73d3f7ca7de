"""The test beds of early stopping: curves that cross as their formula says, budgets that add up, replays by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from crossing_curves import NOISELESS, CrossingCurves
from fidelity import CONTESTANTS, Job, main, simulated
from pool import RandomOrder, read_pool, replay
from scipy.stats import spearmanr
from simulated_search import SimulatedSearch, picked

from orchestrator.halving import HALVINGS, Ladder
from results.schema import UsageError
from trainables.course import num_epochs, whole

LADDER = Ladder(grace_epochs=3, max_epochs=27, factor=3.0)
JOB = Job(strategy="asha", severity=0.5, seed=7, max_epochs=27, grace_epochs=3, budget_epochs=270, control_fraction=0.0)


def curves(severity: float, *, seed: int = 0) -> CrossingCurves:
    """An instance without noise."""
    return CrossingCurves.draw(seed, severity=severity, max_epochs=27, noise=NOISELESS)


@pytest.mark.parametrize("halving", list(HALVINGS))
def test_at_severity_0_every_early_figure_ranks_as_the_final_score_does(halving: str) -> None:
    strategy = HALVINGS[halving](LADDER)
    instance = curves(0.0)
    points = np.random.default_rng(0).uniform(size=(40, 2))
    trainings = [instance.training(i, strength=x, lr=lr) for i, (x, lr) in enumerate(points)]
    for leg in strategy.course:
        for average in (False, True):
            early = [training.reading(leg, leg.start + 1, average=average) for training in trainings]
            assert spearmanr(early, [training.final for training in trainings]).statistic == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(20))
def test_at_severity_1_the_first_rung_ranks_strengths_upside_down(seed: int) -> None:
    instance = curves(1.0, seed=seed)
    (leg,) = whole(27)
    trainings = [instance.training(0, strength=x, lr=0.5) for x in np.linspace(0, instance.best_strength, 9)]
    for average in (False, True):
        early = [training.reading(leg, 3, average=average) for training in trainings]
        assert spearmanr(early, [training.final for training in trainings]).statistic == pytest.approx(-1.0)


@pytest.mark.parametrize("halving", list(HALVINGS))
def test_every_course_ends_at_the_true_final_score(halving: str) -> None:
    instance = curves(0.7)
    training = instance.training(0, strength=0.6, lr=0.4)
    last = HALVINGS[halving](LADDER).course[-1]
    assert training.reading(last, 27, average=False) == pytest.approx(training.final)


@pytest.mark.parametrize("strategy", list(CONTESTANTS))
@pytest.mark.parametrize("control_fraction", [0.0, 0.3])
def test_every_epoch_that_a_strategy_trains_is_paid_from_the_budget(strategy: str, control_fraction: float) -> None:
    search = simulated(replace(JOB, strategy=strategy, control_fraction=control_fraction))
    trials = list(search.trials.values())
    assert sum(len(trial.scores) for trial in trials) == JOB.budget_epochs
    length = num_epochs(search.halving.course)
    for trial in trials:
        if trial.status == "completed":
            assert len(trial.scores) == length
        elif trial.status != "running":
            assert len(trial.scores) in search.halving.rung_epochs
            assert not trial.control


def test_searches_are_the_same_for_the_same_seed() -> None:
    first, second = (list(simulated(JOB).trials.values()) for _ in range(2))
    assert [trial.scores for trial in first] == [trial.scores for trial in second]


def pool_rows() -> pd.DataFrame:
    """Three configurations of 9 epochs, rungs at 1 and 3. The stronger, the slower, and the better in the end."""
    ends = {0: (0.0, 0.30, 0.35, 0.40, 0.42), 1: (0.2, 0.20, 0.30, 0.50, 0.47), 2: (0.4, 0.10, 0.20, 0.45, 0.51)}
    rows = []
    for config_id, (dropout, first, third, last, test) in ends.items():
        scores = [first, first, third, third, third, third, third, third, last]
        for epoch, score in enumerate(scores, start=1):
            rows.append(
                {
                    "config_id": config_id,
                    "seed": 0,
                    "run": "full",
                    "epoch": epoch,
                    "dropout": dropout,
                    "val_accuracy": score,
                    "raw_val_accuracy": score,
                    "test_accuracy": test if epoch == 9 else np.nan,
                }
            )
    return pd.DataFrame(rows)


def test_a_replay_of_three_configurations_by_hand(tmp_path: Path) -> None:
    """One at a time, in the order 1, 0, 2, ASHA with rungs 1 and 3.

    Configuration 1 comes first and passes: 9 epochs. 0 passes rung 1 (0.30 over 0.20) and rung 3 (0.35 over 0.30): 9
    epochs. 2 has 0.10, below the upper third: 1 epoch. 1 has the better validation (0.50): test 0.47, the best 0.51.
    After 9 epochs 1 alone has ended; after 5 too it is the only one that has begun.
    """
    pool_rows().to_parquet(tmp_path / "pool.parquet")
    pool = read_pool(tmp_path)
    ladder = Ladder(grace_epochs=1, max_epochs=9, factor=3.0)
    order = RandomOrder(pool, [0, 1, 2], np.random.default_rng(0))
    order.order = [1, 0, 2]
    search = SimulatedSearch(HALVINGS["asha"](ladder), order, np.random.default_rng(0), workers=1)
    found = replay(pool, search, drawn=[0, 1, 2], budgets=[5, 9, 100])
    assert [result.epochs for result in found] == [5, 9, 9 + 9 + 1]
    assert [result.regret for result in found] == pytest.approx([0.51 - 0.47] * 3)
    assert not any(result.kept_best for result in found)  # the best tenth of three is configuration 2
    assert [len(trial.scores) for trial in search.trials.values()] == [9, 9, 1]
    assert [trial.training.strength for trial in search.trials.values()] == pytest.approx([0.5, 0.0, 1.0])


def test_a_pool_serves_only_strategies_whose_runs_were_recorded(tmp_path: Path) -> None:
    pool_rows().to_parquet(tmp_path / "pool.parquet")
    pool = read_pool(tmp_path)
    ladder = Ladder(grace_epochs=1, max_epochs=9, factor=3.0)
    assert {name for name in HALVINGS if not pool.serves(name, ladder)} == {"promote", "stable"}


def experiment(folder: Path) -> Path:
    """An experiment's folder: the three configurations, and one that was stopped."""
    rows = pool_rows()
    (folder / "trials").mkdir(parents=True)
    (folder / "epochs").mkdir()
    epochs = rows.assign(trial_id=[f"t{number:05d}" for number in rows["config_id"]])
    epochs.to_parquet(folder / "epochs" / "part.parquet")
    trials = epochs.groupby("trial_id", as_index=False).agg({"dropout": "first"})
    trials = trials.rename(columns={"dropout": "config.dropout"}).assign(
        status=["completed", "completed", "pruned"], epochs_trained=[9, 9, 3], max_epochs=9
    )
    trials.to_parquet(folder / "trials" / "part.parquet")
    return folder


def test_an_ordinary_experiment_is_scored_by_validation_and_by_trials_that_ended(tmp_path: Path) -> None:
    pool = read_pool(experiment(tmp_path / "mine"))
    assert pool.scored_by == "val_accuracy"
    assert [trainings[0].finals for trainings in pool.configurations] == [{"full": 0.40}, {"full": 0.50}]


def test_a_folder_that_is_no_pool_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no pool\.parquet"):
        read_pool(tmp_path)


def test_the_pick_is_the_best_that_completed() -> None:
    trials = list(simulated(JOB).trials.values())
    pick = picked(trials)
    assert pick.status == "completed"
    assert pick.observed == max(trial.observed for trial in trials if trial.status == "completed")


def test_every_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--seeds", "3", "--severities", "1", "--strategies", "asha", "none", "--processes", "1", "--budget", "4"]
    main(["synthetic", *few, "--output", str(tmp_path)])
    rows = pd.read_parquet(tmp_path / "synthetic.parquet")
    assert len(rows) == 6
    assert (rows["regret"] >= 0).all()
    main(["table", str(tmp_path / "synthetic.parquet")])
    assert "1.00 [1.00, 1.00]" in capsys.readouterr().out  # asha's ratio to asha
    pool_rows().to_parquet(tmp_path / "pool.parquet")
    main(["pool", "--pool", str(tmp_path / "pool.parquet"), "--budgets", "2", "--strategies", "asha", "none"])
    assert "best tenth" in capsys.readouterr().out

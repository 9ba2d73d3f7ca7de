"""With --no-test nothing is predicted for the test split, until an ensemble is to be scored on it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from optuna.distributions import FloatDistribution

from orchestrator import ensemble, search, train
from orchestrator.driver import load_data, make_ledger
from orchestrator.plan import SearchPlan, resumed
from orchestrator.search import ensemble_command
from results.analysis import ensemble_scores
from results.schema import EstimatePredictions, SelectPredictions, TestPredictions, UsageError
from results.store import Experiment
from tests.simulation import plan
from trainables.config import TrainConfig
from trainables.datasets import load_dataset
from trainables.resident import ResidentImages
from trainables.trial import run_trial

BASE = TrainConfig(
    train_fraction=0.2, batch_size=64, crop_padding=1, flip=False, ema_decay=0.9, test_time_augmentation="flip"
)
RATES = (0.1, 0.05)


def search_plan(*, predicts_test: bool) -> SearchPlan:
    return plan(
        base=BASE,
        num_trials=len(RATES),
        dimensions={"lr": FloatDistribution(1e-6, 0.3, log=True)},
        baselines=tuple({"lr": rate} for rate in RATES),
        halving="none",
        predicts_test=predicts_test,
    )


def search_without_ray(folder: Path, *, predicts_test: bool) -> Experiment:
    """Real trials, one after the other."""
    of = search_plan(predicts_test=predicts_test)
    data = load_data(of, "unused")
    images = ResidentImages.on("cpu", data)
    experiment = Experiment.create(folder, name="small", info=of.info(name="small", data=data, command="searched"))
    with experiment.driving():
        ledger = make_ledger(experiment, of, max_concurrent=1)
        while (assignment := ledger.next_trial()) is not None:
            config = TrainConfig(**assignment.config)  # type: ignore[arg-type]
            for result in run_trial(config, images, files=experiment.files(assignment.trial_id)):
                ledger.report(assignment.trial_id, result, node="here")
    return experiment


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The same search with and without predictions for test."""
    folders = {predicts_test: tmp_path_factory.mktemp("searched") for predicts_test in (True, False)}
    for predicts_test, folder in folders.items():
        search_without_ray(folder, predicts_test=predicts_test)
    return folders


@pytest.fixture
def without(searched: dict[bool, Path], tmp_path: Path) -> Experiment:
    shutil.copytree(searched[False], tmp_path / "runs")
    return Experiment.open(tmp_path / "runs", "small")


def make_ensemble(experiment: Experiment, *arguments: str) -> None:
    given = ["--results-dir", experiment.results_dir, "--experiment", "small", "--top-k", "2"]
    assert ensemble.main([*given, *arguments]) == 0


def splits_scored(experiment: Experiment, ensemble_id: str = "e0001") -> list[str]:
    scores = ensemble_scores(experiment.results_dir)
    return sorted(scores.loc[scores["ensemble_id"] == ensemble_id, "split"].unique())


def test_trials_predict_select_and_estimate_alone(without: Experiment) -> None:
    assert without.info["predicts_test"] is False
    for trial_id in without.history.trials:
        for counts in without.stored_counts(trial_id).values():
            assert set(counts) == {"select", "estimate"}
        assert len(without.predictions(trial_id, SelectPredictions).labels_N)
        assert len(without.predictions(trial_id, EstimatePredictions).labels_N)


def test_an_ensemble_can_leave_test_alone_too(without: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    make_ensemble(without, "--no-test")
    said = capsys.readouterr().out
    assert "test: left alone (--no-test)" in said
    assert "predicting" not in said
    assert splits_scored(without) == ["estimate", "select"]
    for trial_id in without.history.trials:
        assert all("test" not in counts for counts in without.stored_counts(trial_id).values())


def test_test_is_predicted_once_when_it_is_scored_and_as_the_trial_would_have(
    without: Experiment, searched: dict[bool, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    select = without.predictions("t00000", SelectPredictions, variant="tta")
    make_ensemble(without)
    assert "small: predicting the test split with t00000, t00001" in capsys.readouterr().out
    assert splits_scored(without) == ["estimate", "select", "test"]
    with_test = Experiment.open(searched[True], "small")
    assert with_test.info["split_hash"] == without.info["split_hash"]
    for trial_id in without.history.trials:
        assert without.stored_counts(trial_id) == with_test.stored_counts(trial_id)
        for variant in without.stored_counts(trial_id):
            found = without.predictions(trial_id, TestPredictions, variant=variant)
            expected = with_test.predictions(trial_id, TestPredictions, variant=variant)
            assert np.array_equal(found.logits_NC, expected.logits_NC)
            assert np.array_equal(found.labels_N, expected.labels_N)
    after = without.predictions("t00000", SelectPredictions, variant="tta")
    assert np.array_equal(select.logits_NC, after.logits_NC)
    make_ensemble(without)
    assert "predicting" not in capsys.readouterr().out


def test_an_ensemble_of_trials_with_test_predictions_can_leave_test_alone(
    searched: dict[bool, Path], tmp_path: Path
) -> None:
    shutil.copytree(searched[True], tmp_path / "runs")
    experiment = Experiment.open(tmp_path / "runs", "small")
    make_ensemble(experiment, "--no-test")
    assert splits_scored(experiment) == ["estimate", "select"]


def test_the_images_and_the_hash_stay_as_they_are() -> None:
    data = load_dataset("digits", data_dir="unused")
    without_test = data.without_test()
    assert without_test.sizes() == {**data.sizes(), "test": 0}
    assert without_test.split_hash == data.split_hash
    assert without_test.images_NCHW is data.images_NCHW


def test_a_resume_keeps_test_out_of_sight(without: Experiment, searched: dict[bool, Path]) -> None:
    assert not resumed(search_plan(predicts_test=True), without.info).predicts_test
    with pytest.raises(UsageError, match="--no-test, but experiment 'small' was begun without it"):
        resumed(search_plan(predicts_test=False), Experiment.open(searched[True], "small").info)


def test_the_next_command_of_a_search_says_where_the_images_are(without: Experiment) -> None:
    with without.driving():
        ledger = make_ledger(without, search_plan(predicts_test=False), max_concurrent=1)
        command = ensemble_command(ledger, argparse.Namespace(results_dir=without.results_dir, data_dir="mine"))
    assert "--top-k 2 --data-dir mine --results-dir" in command


def test_test_cannot_be_left_out_where_nothing_else_would_be_evaluated() -> None:
    with pytest.raises(UsageError, match="--no-test with val_fraction=0 leaves no images to evaluate on"):
        train.plan_from(train.parse(["resnet44v2", "--no-test"]))


@pytest.mark.parametrize(
    "plan_of",
    [
        lambda *flags: search.plan_from(search.parse(["digits", *flags])),
        lambda *flags: train.plan_from(train.parse(["speedrun", *flags])),
    ],
)
def test_searches_and_trainings_predict_test_unless_told_otherwise(plan_of: Callable[..., SearchPlan]) -> None:
    assert plan_of().predicts_test
    assert not plan_of("--no-test").predicts_test

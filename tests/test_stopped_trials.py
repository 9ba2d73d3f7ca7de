"""Trials that were stopped early have weights and no predictions, until somebody asks for them."""

from __future__ import annotations

import argparse
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from PIL import Image

from orchestrator import ensemble
from orchestrator.driver import load_data, make_ledger
from orchestrator.plan import SearchPlan
from orchestrator.predicting import predict_stopped, predict_variant
from orchestrator.search import ensemble_command
from orchestrator.stopped import stopped_without_predictions
from results.events import CheckpointRemoved
from results.schema import PREDICTIONS, DataWarning, SelectPredictions, UsageError
from results.store import Experiment, TrialFiles
from tests.simulation import plan
from tests.test_event_log import snapshot
from trainables.config import TrainConfig
from trainables.evaluation import predictions
from trainables.resident import ResidentImages
from trainables.stored import best_predictions, stored_model
from trainables.trial import run_trial
from trainables.validation import log_softmax, nll

BASE = TrainConfig(
    train_fraction=0.2,
    batch_size=64,
    crop_padding=1,
    flip=False,
    ema_decay=0.9,
    test_time_augmentation="flip_shift",
)
RATES = (0.1, 1e-6, 2e-6, 3e-6)  # the first one learns and is trained to its end; no other passes a rung


def search_plan() -> SearchPlan:
    return plan(
        base=BASE,
        num_trials=len(RATES),
        dimensions={"lr": FloatDistribution(1e-6, 0.3, log=True)},
        baselines=tuple({"lr": rate} for rate in RATES),
        grace_epochs=1,
    )


def train_all(experiment: Experiment, images: ResidentImages) -> None:
    """Search without Ray: real trials, one after the other."""
    with experiment.driving():
        ledger = make_ledger(experiment, search_plan(), max_concurrent=1)
        while (assignment := ledger.next_trial()) is not None:
            config = TrainConfig(**assignment.config)  # type: ignore[arg-type]
            files = experiment.files(assignment.trial_id)
            for result in run_trial(config, images, files=files, rung_epochs=assignment.rung_epochs):
                if not ledger.report(assignment.trial_id, result, node="here"):
                    break


@pytest.fixture(scope="module")
def images() -> ResidentImages:
    return ResidentImages.on("cpu", load_data(search_plan(), "unused"))


@pytest.fixture(scope="module")
def searched(images: ResidentImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    info = search_plan().info(name="small", data=images.split, command="searched without Ray")
    train_all(Experiment.create(folder, name="small", info=info), images)
    return folder


@pytest.fixture
def experiment(searched: Path, tmp_path: Path) -> Experiment:
    """The search, in a folder of the test's own."""
    shutil.copytree(searched, tmp_path / "runs")
    return Experiment.open(tmp_path / "runs", "small")


def made(experiment: Experiment, *arguments: str) -> None:
    given = ["--results-dir", experiment.results_dir, "--experiment", "small", "--include-stopped"]
    assert ensemble.main([*given, "--top-k", "2", *arguments]) == 0


def with_predictions(experiment: Experiment) -> list[str]:
    trials = Experiment.open(experiment.results_dir, "small").trials()
    return list(trials.loc[trials["predictions"] != "", "trial_id"])


# --- what is stored ---


def test_a_stopped_trial_has_weights_and_no_predictions(experiment: Experiment) -> None:
    trials = experiment.trials().set_index("trial_id")
    assert trials["status"].tolist() == ["completed", "pruned", "pruned", "pruned"]
    assert trials.loc["t00000", "predictions"] == "predictions/t00000.parquet"
    assert (trials["predictions"].iloc[1:] == "").all()
    assert [path.stem for path in (experiment.root / "predictions").iterdir()] == ["t00000"]
    for trial_id, checkpoint in trials["checkpoint"].items():
        assert checkpoint == f"checkpoints/{trial_id}/best.safetensors"
        assert (experiment.root / checkpoint).exists()
    with pytest.raises(
        UsageError,
        match=r"Cannot read predictions of small/t00001: it was stopped early, and they have not been asked for. "
        r"Fix: python -m orchestrator.ensemble --experiment small --include-stopped makes them",
    ):
        experiment.predictions("t00001", SelectPredictions)


def test_stored_weights_predict_what_the_trial_itself_would_have_stored(images: ResidentImages, tmp_path: Path) -> None:
    """One pass over all views gives, to the bit, what a pass over the plain images and one over the views give."""
    files = TrialFiles(str(tmp_path), "t00000", 0)
    config = replace(BASE, max_epochs=3)
    results = list(itertools.islice(run_trial(config, images, files=files, rung_epochs=(2,)), 2))
    assert not files.predictions.exists()
    kinds = list(PREDICTIONS.values())
    made = best_predictions(files, config, images, kinds)
    assert list(made) == ["best", "tta"]
    model = stored_model(files, "best", config, images)
    for variant, views in (("best", "none"), ("tta", config.test_time_augmentation)):
        for kind, found in zip(kinds, made[variant], strict=True):
            expected = predictions(model, images, kind, views=views)
            assert type(found) is kind
            assert np.array_equal(found.logits_NC, expected.logits_NC)
            assert np.array_equal(found.example_ids_N, expected.example_ids_N)
    best = results[results[-1].best_epoch - 1]
    assert nll(log_softmax(made["best"][0].logits_NC), made["best"][0].labels_N) == best.val_nll


# --- asked for ---


def test_an_ensemble_with_stopped_trials_predicts_with_them_once(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    made(experiment)
    said = capsys.readouterr().out
    assert "small: predicting 646 images with t00001, t00002, t00003 (stopped early, so they have weights" in said
    assert with_predictions(experiment) == ["t00000", "t00001", "t00002", "t00003"]
    files = {path: path.stat().st_mtime_ns for path in (experiment.root / "predictions").iterdir()}
    assert len(files) == 4
    made(experiment)
    assert "predicting" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (experiment.root / "predictions").iterdir()} == files
    now = Experiment.open(experiment.results_dir, "small")
    for row in now.trials().itertuples():
        select = now.predictions(row.trial_id, SelectPredictions)
        assert nll(log_softmax(select.logits_NC), select.labels_N) == row.val_nll
        assert set(now.stored_counts(row.trial_id)) >= {"best", "tta"}
    before = snapshot(now.root)
    now.rebuild()
    assert snapshot(now.root) == before


def test_without_being_asked_for_a_stopped_trial_is_no_candidate(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--results-dir", experiment.results_dir, "--experiment", "small"]
    with pytest.raises(UsageError, match=r"only 1 completed trials .* add --include-stopped for 3 more"):
        ensemble.main([*arguments, "--top-k", "2"])
    assert ensemble.main([*arguments, "--top-k", "1"]) == 0
    assert with_predictions(experiment) == ["t00000"]


def test_only_what_may_be_a_candidate_is_predicted_with(experiment: Experiment) -> None:
    expression = "(variant == 'tta' and lr < 1.5e-6) or status == 'completed'"
    made(experiment, "--candidates", expression)
    assert with_predictions(experiment) == ["t00000", "t00001"]
    assert stopped_without_predictions([Experiment.open(experiment.results_dir, "small")]) == {
        "small": ["t00002", "t00003"]
    }


def test_what_was_predicted_before_a_failure_is_kept_and_the_rest_follows(experiment: Experiment) -> None:
    damaged = experiment.files("t00002").best
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    expected = r"Cannot predict with the best weights of t00002: .*/best.safetensors is damaged.* Fix: restore the file"
    with pytest.raises(UsageError, match=expected):
        made(experiment)
    assert with_predictions(experiment) == ["t00000", "t00001"]
    damaged.write_bytes(whole)
    first = experiment.root / "predictions" / "t00001.parquet"
    before = first.stat().st_mtime_ns
    made(experiment)
    assert with_predictions(experiment) == ["t00000", "t00001", "t00002", "t00003"]
    assert first.stat().st_mtime_ns == before


def test_a_file_that_a_killed_process_left_unrecorded_is_made_again(experiment: Experiment) -> None:
    """Killed between the file and its event, the row still names no file, and the next call completes it."""
    left = experiment.root / "predictions" / "t00001.parquet"
    left.write_bytes(b"whatever is there")
    assert with_predictions(experiment) == ["t00000"]
    predict_stopped(experiment, ["t00001"])
    select = experiment.predictions("t00001", SelectPredictions)
    assert len(select.labels_N) == experiment.info["split_sizes"]["select"]
    assert with_predictions(experiment) == ["t00000", "t00001"]


def test_a_moved_folder_is_predicted_with_where_it_is(experiment: Experiment, tmp_path: Path) -> None:
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    moved = Experiment.open(tmp_path / "elsewhere", "small")
    made(moved)
    assert len(with_predictions(moved)) == 4
    assert not (tmp_path / "runs").exists()


def test_the_raw_weights_are_averaged_over_views_when_that_is_asked_for(
    experiment: Experiment, images: ResidentImages
) -> None:
    before = experiment.stored_counts("t00000")
    assert set(before) == {"best", "tta", "raw"}
    plain = experiment.predictions("t00000", SelectPredictions, variant="raw")
    predict_variant(experiment, ["t00000"], "raw_tta")
    assert experiment.stored_counts("t00000") == {**before, "raw_tta": before["raw"]}
    assert np.array_equal(experiment.predictions("t00000", SelectPredictions, variant="raw").logits_NC, plain.logits_NC)
    model = stored_model(experiment.files("t00000"), "raw", replace(BASE, max_epochs=9), images)
    for kind in PREDICTIONS.values():
        found = experiment.predictions("t00000", kind, variant="raw_tta")
        expected = predictions(model, images, kind, views=BASE.test_time_augmentation)
        assert np.array_equal(found.logits_NC, expected.logits_NC)
    path = experiment.root / "predictions" / "t00000.parquet"
    at = path.stat().st_mtime_ns
    predict_variant(experiment, ["t00000"], "raw_tta")
    assert path.stat().st_mtime_ns == at


# --- what cannot be predicted ---


def test_trials_without_weights_are_named_and_left_out(experiment: Experiment) -> None:
    with experiment.driving():
        for trial_id in ("t00001", "t00002"):
            experiment.record(CheckpointRemoved(at=1.0, trial_id=trial_id))
            experiment.tidy(experiment.history.trials[trial_id])
    with pytest.raises(UsageError, match=r"small/t00001: its weights were removed. Fix: .* larger --keep-checkpoints"):
        predict_stopped(experiment, ["t00001"])
    with pytest.raises(UsageError, match=r"small/t00001: it was stopped early, and its weights were removed. Fix: "):
        experiment.predictions("t00001", SelectPredictions)
    left_out = r"2 trials of small that were stopped early are left out: .*\(--keep-checkpoints 10\)"
    with pytest.warns(DataWarning, match=left_out):
        made(experiment)
    assert with_predictions(experiment) == ["t00000", "t00003"]
    with pytest.warns(DataWarning, match=left_out), pytest.raises(UsageError, match="--top-k 3 but only 2 trials"):
        made(experiment, "--top-k", "3")


def test_other_images_than_those_of_the_training_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, name in itertools.product(range(8), ("cat", "dog")):
        path = tmp_path / "photos" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    for dataset, cause in (
        (f"folder:{tmp_path}/photos", "photos has split hash .*, wanted "),
        (f"folder:{tmp_path}/gone", "gone is not a folder"),
    ):
        with pytest.raises(
            UsageError, match=f"Cannot predict with trials of small: .*{cause}.*Fix: say where .* --data-dir"
        ):
            made(experiment, "--dataset", dataset)
    assert with_predictions(experiment) == ["t00000"]


def test_the_command_that_a_search_ends_with_says_where_the_images_are(experiment: Experiment) -> None:
    with experiment.driving():
        ledger = make_ledger(experiment, search_plan(), max_concurrent=1)
        command = ensemble_command(ledger, argparse.Namespace(results_dir=experiment.results_dir, data_dir="my data"))
    expected = "--experiment small --top-k 2 --include-stopped --data-dir 'my data' --results-dir"
    assert expected in command
    assert sum(trial.may_be_member for trial in experiment.history.ended) == 4

"""Recipes: each trains on real images, states where it comes from; the command that runs them."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from safetensors.torch import load_file

from orchestrator.train import main
from orchestrator.training_console import print_results
from results.schema import SelectPredictions, TestPredictions, UsageError
from results.store import Experiment, TrialFiles
from tests.background import PATIENCE, running, wait_until
from tests.conftest import ROOT, CommandLine
from tests.simulation import ledger_of, new_experiment
from trainables.backbones import BACKBONES
from trainables.config import TrainConfig
from trainables.datasets import LabelledImages, SplitImages, load_dataset, split
from trainables.loop import train
from trainables.recipes import RECIPES, recipe_named
from trainables.resident import ResidentImages, WatchedImages
from trainables.trial import images_on, run_trial

CIFAR100 = ROOT.parent / "shared" / "data" / "cifar100"
HEAVY = {"resnet50", "resnet101", "efficientnet_b3", "efficientnet_b4", "convnext_tiny"}
FEW_STEPS = {
    "max_epochs": 1,
    "patience": 0,
    "warmup_epochs": 0.0,
    "unfreeze_epochs": 0,
    "batch_size": 16,
    "lr_batch_size": None,
}


@pytest.fixture(scope="module")
def photographs() -> SplitImages:
    """64 real photographs of four classes to train on, 16 more as the test set: scikit-learn's two, in 32x32 tiles."""
    from sklearn.datasets import load_sample_images

    tiles, labels = [], []
    for label, photograph in enumerate(load_sample_images().images):
        for half in (0, 1):
            part = photograph[:, half * 320 : half * 320 + 320]
            found = [part[r : r + 32, c : c + 32] for r in range(0, 416, 64) for c in range(0, 320, 64)][:20]
            tiles += found
            labels += [2 * label + half] * len(found)
    order = np.random.default_rng(0).permutation(len(tiles))
    pixels = np.stack(tiles)[order].transpose(0, 3, 1, 2).copy()
    names = ("temple left", "temple right", "flower left", "flower right")
    return split(LabelledImages(pixels, np.array(labels)[order], 16, names), val_fraction=0.0)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if r.config.backbone in HEAVY else ()) for n, r in RECIPES.items()]
)
def test_every_recipe_trains_for_an_epoch_on_real_images(name: str, photographs: SplitImages) -> None:
    config = RECIPES[name].config
    few = replace(config, image_size=None, val_fraction=0.0, loader_workers=0, initial_image_size=None, **FEW_STEPS)  # type: ignore[arg-type]
    (result,) = train(few, images_on("cpu", photographs, config=few))
    assert np.isfinite(result.train_loss)
    assert not result.diverged
    assert result.grad_norm > 0


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR100.exists(), reason="real CIFAR-100 is not beside this checkout")
def test_the_speedrun_learns_real_cifar100_in_two_epochs_of_few_images() -> None:
    data = load_dataset("cifar100", data_dir=CIFAR100, train_fraction=0.05)
    config = replace(RECIPES["speedrun"].config, max_epochs=2, warmup_epochs=0.5, batch_size=64, train_fraction=0.05)
    results = list(train(config, images_on("cpu", data, config=config)))
    assert results[-1].val_accuracy > 0.05  # chance is 0.01
    assert results[-1].train_loss < results[0].train_loss


def test_every_recipe_says_where_it_comes_from_and_what_was_published() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.source, name
        assert recipe.published, name
        assert recipe.config.backbone in BACKBONES


def test_the_large_batch_recipe_is_the_published_one() -> None:
    config = RECIPES["resnet50_large_batch"].config
    assert config.lr * config.batch_size / config.lr_batch_size == 0.8
    assert config.lr * config.initial_lr_fraction * 8 == pytest.approx(1e-5)
    assert config.lr * config.final_lr_fraction * 8 == pytest.approx(1e-6)


def test_an_unknown_recipe_lists_the_choices() -> None:
    with pytest.raises(UsageError, match="no recipe 'vgg'; there are resnet50_large_batch, resnet44v2"):
        recipe_named("vgg")


# --- the command ---

QUICK = ("speedrun", "--dataset", "digits", "--set", "batch_size=64", "warmup_epochs=0.5", "initial_image_size=none")


def test_the_list_names_every_recipe_with_cost_and_expectation(command: CommandLine) -> None:
    shown = command("orchestrator.train", "--list")
    assert shown.returncode == 0, shown.stderr
    for name, recipe in RECIPES.items():
        assert name in shown.stdout
        assert recipe.published in shown.stdout
    assert "multiply-adds" in shown.stdout


def test_a_recipe_is_recorded_as_a_trial_of_stage_single(command: CommandLine, tmp_path: Path) -> None:
    done = command(
        "orchestrator.train", *QUICK, "monitor=val_nll", "--max-epochs", "2", "--results-dir", "runs", "--name", "mine"
    )
    assert done.returncode == 0, done.stderr
    assert "completed after 2 epochs" in done.stdout
    (trial,) = pd.read_parquet(tmp_path / "runs/mine/trials").to_dict("records")
    assert (trial["stage"], trial["origin"], trial["status"]) == ("single", "recipe", "completed")
    assert trial["regularization_verdict"] in done.stdout
    assert trial["config.monitor"] == "val_nll"
    assert len(pd.read_parquet(tmp_path / "runs/mine/epochs")) == 2
    experiment = Experiment.open(tmp_path / "runs", "mine")
    plain, tta = (experiment.predictions("t00000", TestPredictions, variant=v) for v in ("best", "tta"))
    assert len(plain.labels_N) == len(tta.labels_N) == 359
    assert not np.array_equal(plain.logits_NC, tta.logits_NC)
    assert load_file(tmp_path / "runs/mine" / trial["checkpoint"])
    assert json.loads((tmp_path / "runs/mine/experiment.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_training_killed_and_resumed_equals_one_never_stopped(command: CommandLine, tmp_path: Path) -> None:
    arguments = (*QUICK, "--max-epochs", "6", "--results-dir", "runs", "--threads", "1")
    whole = command("orchestrator.train", *arguments, "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "output"
    for number, more, status in ((signal.SIGKILL, [], -signal.SIGKILL), (signal.SIGTERM, ["--resume"], 130)):
        output.write_text("")
        with running(tmp_path, "orchestrator.train", *arguments, "--name", "killed", *more, output=output) as process:
            wait_until(lambda: "\nepoch " in output.read_text(), process, output)
            process.send_signal(number)
            assert process.wait(timeout=PATIENCE) == status, output.read_text()
    assert "--resume" in output.read_text()
    resumed = command("orchestrator.train", *arguments, "--name", "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    logits = [
        Experiment.open(tmp_path / "runs", name).predictions("t00000", SelectPredictions).logits_NC
        for name in ("whole", "killed")
    ]
    assert np.array_equal(*logits)
    epochs = pd.read_parquet(tmp_path / "runs/killed/epochs").epoch
    assert epochs.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "there is no recipe 'nope'"),
        (("speedrun", "--dataset", "digits", "--max-epochs", "1"), "warmup_epochs=2 is more than max_epochs=1"),
        (("speedrun", "--dataset", "digits"), "initial_image_size=24 is more than the images' 8 pixels"),
        ((*QUICK, "optimizer=sgd", "precision=float16", "--device", "cpu"), "precision=float16 on a CPU"),
        ((*QUICK, "monitor=val_loss"), "monitor='val_loss': wanted one of val_accuracy, val_nll"),
        ((*QUICK, "image_size=100000"), "image_size=100000: wanted 1 to 2048"),
        ((*QUICK, "--threads", "5000"), "--threads 5000, but this machine has"),
        ((*QUICK, "policy=auto"), "policy='auto': wanted one of none, autoaugment_cifar10"),
        ((*QUICK, "backbone=convnext_tiny", "image_size=4"), "convnext_tiny takes images of 8 pixels or more, not 4"),
        ((*QUICK, "seed=3"), "give --seed"),
        ((*QUICK, "val_fraction=0", "patience=2"), "patience=2 with val_fraction=0"),
        (("speedrun", "--resume", "--name", "gone"), "there is no experiment 'gone'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(message)):
        main(list(arguments))
    assert not (tmp_path / "results").exists()


def test_an_experiment_of_a_search_is_not_gone_on_with_as_a_training(command: CommandLine, tmp_path: Path) -> None:
    first = command("orchestrator.train", *QUICK, "--max-epochs", "1", "--results-dir", "runs", "--name", "mine")
    assert first.returncode == 0, first.stderr
    other = command("orchestrator.search", "digits", "--results-dir", "runs", "--name", "mine", "--resume")
    assert other.returncode == 2
    assert "is of stage single, not search" in other.stderr
    again = command("orchestrator.train", *QUICK, "--max-epochs", "1", "--results-dir", "runs", "--name", "mine")
    assert again.returncode == 2
    assert "add --resume to go on with it" in again.stderr


def test_a_diverged_training_fails_and_says_what_to_do(command: CommandLine) -> None:
    done = command("orchestrator.train", *QUICK, "lr=1e30", "--max-epochs", "2")
    assert done.returncode == 1
    assert "error: the training diverged at epoch 1; lower lr; with another --name" in done.stderr


def test_a_damaged_resume_file_is_named_with_the_remedy_which_works(tmp_path: Path, digits: SplitImages) -> None:
    config = TrainConfig(max_epochs=3, batch_size=64, lr=0.05)
    data = images_on("cpu", digits, config=config)
    files = TrialFiles(str(tmp_path), "t00000", 0)
    first = run_trial(config, data, files=files)
    begun = [next(first), next(first)]
    files.resume.write_bytes(files.resume.read_bytes()[:3000])
    with pytest.raises(UsageError, match=r"resume\.pt cannot be read .*; remove it and resume again"):
        next(run_trial(config, data, files=files, epochs_recorded=2))
    files.resume.unlink()
    (last,) = run_trial(config, data, files=files, epochs_recorded=2)
    assert last.epoch == 3
    assert last.val_nll == list(train(config, data))[-1].val_nll
    assert [r.epoch for r in begun] == [1, 2]


def test_an_evaluation_can_be_interrupted(digits: SplitImages) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    data = WatchedImages(ResidentImages.on("cpu", digits), stop)
    with pytest.raises(Stop):
        next(train(TrainConfig(max_epochs=1, batch_size=64), data))


def test_a_flag_and_a_set_that_disagree_are_refused(command: CommandLine) -> None:
    refused = command("orchestrator.train", "speedrun", "--dataset", "digits", "--set", "dataset=cifar10")
    assert refused.returncode == 2
    assert refused.stderr == "error: --dataset digits and --set dataset=cifar10 disagree; give one of them\n"


def test_a_training_that_failed_for_a_reason_of_its_own_says_that_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        ledger = ledger_of(experiment)
        assignment = ledger.next_trial()
        assert assignment is not None
        ledger.failed(assignment.trial_id, "batch_size=4096 does not fit")
    assert print_results(Console(), experiment) == 1
    assert capsys.readouterr().err == "error: batch_size=4096 does not fit; with another --name\n"

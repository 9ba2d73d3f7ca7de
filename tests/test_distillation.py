"""Distillation: the loss is the published one, teachers see what students see, each student beside its control."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from orchestrator import cli, distill
from orchestrator.distillation import PairedDifference, ensemble_accuracies, kept_share
from orchestrator.plan import resumed
from orchestrator.serving import load_ensemble
from results.schema import DataWarning, DistillationRecord, SelectPredictions, TestPredictions, UsageError
from results.store import Experiment
from tests.serving import make_ensemble, trained_experiment
from tests.simulation import plan
from trainables.config import TrainConfig
from trainables.datasets import SplitImages, load_dataset
from trainables.distillation import DistilledImages, distilled_loss, softened_divergence
from trainables.evaluation import predict, predictions
from trainables.learner import Learner
from trainables.loop import TrainState, train
from trainables.mixing import SoftTargets
from trainables.resident import ResidentImages, TrainingImages

SMALL = TrainConfig(max_epochs=2, batch_size=64, lr=0.05, crop_padding=1, flip=False, seed=3)
STUDENT = replace(SMALL, distill_weight=0.9, mixup_alpha=0.4, label_smoothing=0.1, dropout=0.2)


def final_logits(config: TrainConfig, data: TrainingImages) -> np.ndarray:
    state = TrainState(config, data)
    for _ in train(config, data, state=state):
        pass
    return predictions(state.best_model(), data, SelectPredictions).logits_NC


def by_brightness(images_BCHW: Tensor) -> Tensor:
    """A teacher: log-probabilities [B, 10] that depend on the image."""
    return (images_BCHW.mean((1, 2, 3))[:, None] * torch.linspace(-0.1, 0.1, 10)).log_softmax(-1)


# --- the loss ---


def test_the_loss_worked_out_by_hand() -> None:
    """Teacher 0.8 and 0.2, T = 2: the roots, 2 to 1, so 2/3 and 1/3. Student 1/2 and 1/2, softened or not.

    KL = 2/3 ln(4/3) + 1/3 ln(2/3) = 0.1917880 - 0.1351550 = 0.0566330, times T^2 = 4: 0.2265320.
    Hard: ln 2 = 0.6931472. With weight 0.75: 0.75 x 0.2265320 + 0.25 x 0.6931472 = 0.3431858.
    """
    logits, teacher = torch.zeros(1, 2), torch.tensor([[0.8, 0.2]]).log()
    divergence = softened_divergence(logits, teacher, 2.0)
    assert float(divergence) == pytest.approx(0.2265320, abs=1e-6)
    loss = distilled_loss(torch.tensor(math.log(2)), logits, teacher, weight=0.75, temperature=2.0)
    assert float(loss) == pytest.approx(0.3431858, abs=1e-6)


def test_a_student_that_equals_its_teacher_has_no_gradient() -> None:
    logits = torch.randn(16, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hard = cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
    loss = distilled_loss(hard, logits, logits.detach().log_softmax(-1), weight=1.0, temperature=4.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-7
    other = softened_divergence(logits, -logits.detach(), 4.0)
    assert torch.autograd.grad(other, logits)[0].abs().max() > 1e-2


def test_the_divergence_is_of_one_size_at_high_temperatures() -> None:
    """At high T it tends to half the variance of the logits' differences over the classes (Hinton et al. 2015)."""
    teacher, student = torch.tensor([[1.0, -1.0, 0.0]]), torch.zeros(1, 3)
    expected = float(teacher.var(unbiased=False)) / 2
    assert float(softened_divergence(student, teacher.log_softmax(-1), 50.0)) == pytest.approx(expected, rel=0.02)


def test_the_step_takes_the_loss_of_the_configuration(resident_digits: ResidentImages) -> None:
    config = replace(STUDENT, distill_weight=0.3, distill_temperature=2.5, dropout=0.0)
    learner = Learner(config, resident_digits)
    images, targets = next(DistilledImages(resident_digits, by_brightness).batches(config, epoch=1, image_size=8))
    learner.begin_epoch()
    with torch.no_grad():
        logits = learner.model(images)
    teacher = (by_brightness(images) / 2.5).softmax(-1)
    divergence = (teacher * (teacher.log() - (logits / 2.5).log_softmax(-1))).sum(1).mean()
    expected = 0.7 * targets.loss(logits, label_smoothing=0.1) + 0.3 * 2.5**2 * divergence
    learner.begin_epoch()
    learner.step(images, targets, lr=0.0)
    assert float(learner.loss_sum) == pytest.approx(float(expected), rel=1e-5)
    assert float(learner.correct) == pytest.approx(float(targets.correct(logits)), rel=1e-5)


# --- training ---


def test_without_weight_a_teacher_changes_nothing_to_the_bit(resident_digits: ResidentImages) -> None:
    plain = replace(STUDENT, distill_weight=0.0)
    taught = DistilledImages(resident_digits, by_brightness)
    assert np.array_equal(final_logits(plain, taught), final_logits(plain, resident_digits))
    assert not np.array_equal(final_logits(STUDENT, taught), final_logits(plain, resident_digits))


@pytest.mark.parametrize("parts", [1, 3])
def test_students_repeat_themselves_to_the_bit(parts: int, resident_digits: ResidentImages) -> None:
    config = replace(STUDENT, accumulation_steps=parts)
    taught = DistilledImages(resident_digits, by_brightness)
    assert np.array_equal(final_logits(config, taught), final_logits(config, taught))


def test_accumulated_parts_have_their_own_share_of_the_teacher(resident_digits: ResidentImages) -> None:
    """Without batch statistics: the net's norms are in evaluation mode."""
    config = replace(STUDENT, dropout=0.0, weight_decay=0.0)
    taught = DistilledImages(resident_digits, by_brightness)
    found = []
    for parts in (1, 3):
        learner = Learner(replace(config, accumulation_steps=parts), taught)
        learner.begin_epoch()
        learner.model.eval()
        for images, targets in taught.batches(config, epoch=1, image_size=8):
            learner.step(images, targets, lr=0.01)
        found.append(learner)
    assert float(found[1].loss_sum) == pytest.approx(float(found[0].loss_sum), rel=1e-5)
    for mine, theirs in zip(found[1].model.parameters(), found[0].model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_warm_learner_takes_on_another_weight_and_temperature(resident_digits: ResidentImages) -> None:
    taught = DistilledImages(resident_digits, by_brightness)
    second = replace(STUDENT, distill_weight=0.4, distill_temperature=1.5, seed=9)
    first = TrainState(STUDENT, taught)
    next(train(STUDENT, taught, state=first))
    warm = TrainState(second, taught, learner=first.learner)
    assert warm.learner is first.learner
    for _ in train(second, taught, state=warm):
        pass
    assert np.array_equal(
        predictions(warm.best_model(), taught, SelectPredictions).logits_NC, final_logits(second, taught)
    )
    assert not first.learner.fits(replace(second, distill_weight=0.0), taught)


def test_the_teacher_sees_the_very_images_that_the_student_sees_at_its_own_size(
    resident_digits: ResidentImages,
) -> None:
    seen: list[Tensor] = []

    def watching(images_BCHW: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(images_BCHW)
        return by_brightness(images_BCHW)

    taught = DistilledImages(resident_digits, watching)
    for images, targets in taught.batches(STUDENT, epoch=1, image_size=8):
        assert torch.is_grad_enabled()
        assert seen[-1] is images
        assert torch.equal(targets.teacher_log_probs_BC, by_brightness(images))
    for images, _ in taught.batches(STUDENT, epoch=1, image_size=4):
        assert images.shape[-1] == 4
        assert seen[-1].shape[-1] == 8


def test_a_configuration_that_wants_a_teacher_is_refused_without_one(resident_digits: ResidentImages) -> None:
    with pytest.raises(UsageError, match=r"distill_weight=0\.9, but there is no teacher to learn from; wanted python"):
        next(train(STUDENT, resident_digits))
    with pytest.raises(UsageError, match="distill_weight above 0 without a teacher to learn from"):
        plan(base=STUDENT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_weight": 1.5}, r"distill_weight=1\.5: wanted a probability or fraction in \[0, 1\]"),
        ({"distill_weight": -0.1}, r"distill_weight=-0\.1: wanted"),
        ({"distill_temperature": 0.0}, r"distill_temperature=0\.0: wanted a finite number above 0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **changes)


def test_a_student_learns_a_good_teachers_labels_where_its_own_are_random(digits: SplitImages) -> None:
    """The teacher knows the classes' mean images; the labels that are trained on are drawn."""
    true_N, train_N = digits.labels_N, digits.train
    drawn_N = np.random.default_rng(0).integers(0, 10, len(true_N))
    blind = ResidentImages.on("cpu", replace(digits, labels_N=drawn_N))
    images = torch.from_numpy(digits.images_NCHW.copy()).float()
    means = torch.stack([images[train_N[true_N[train_N] == c]].mean(0) for c in range(10)]).flatten(1)

    def knowing(images_BCHW: Tensor) -> Tensor:
        return (-(torch.cdist(images_BCHW.flatten(1), means) ** 2) / 5000).log_softmax(-1)

    expected = knowing(images[digits.test]).argmax(1).numpy()
    config = replace(SMALL, max_epochs=6, crop_padding=0, distill_weight=0.9, distill_temperature=2.0)
    agreement = {}
    for weight in (0.9, 0.0):
        state = TrainState(replace(config, distill_weight=weight), blind)
        taught = DistilledImages(blind, knowing)
        state = TrainState(replace(config, distill_weight=weight), taught)
        for _ in train(replace(config, distill_weight=weight), taught, state=state):
            pass
        agreement[weight] = float((predict(state.learner.model, taught, digits.test).argmax(1) == expected).mean())
    assert agreement[0.9] > 0.85
    assert agreement[0.0] < 0.3  # chance is 0.1


def test_the_soft_targets_of_plain_images_have_no_teacher(resident_digits: ResidentImages) -> None:
    _, targets = next(resident_digits.batches(STUDENT, epoch=1, image_size=8))
    assert isinstance(targets, SoftTargets)
    assert targets.teacher_log_probs_BC is None


# --- what is said of it ---


def records(differences: list[float], *, alone: float = 0.8) -> list[DistillationRecord]:
    return [
        DistillationRecord(
            seed=seed,
            student=f"s/t{seed:05d}",
            alone=f"a/t{seed:05d}",
            split="estimate",
            metric="accuracy",
            student_value=alone + difference,
            alone_value=alone,
            difference=difference,
        )
        for seed, difference in enumerate(differences)
    ]


def test_the_interval_worked_out_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1, standard error 1 / sqrt(3) = 0.57735; t(0.975, 2) = 4.30265; reach 2.48414."""
    found = PairedDifference.of([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 2.48414, abs=1e-5)
    assert found.high == pytest.approx(2 + 2.48414, abs=1e-5)
    assert not found.excludes_zero
    assert PairedDifference.of([2.9, 3.0, 3.1]).excludes_zero
    assert PairedDifference.of([-2.9, -3.0, -3.1]).excludes_zero
    assert not PairedDifference.of([3.0]).excludes_zero
    assert not PairedDifference.of([3.0, 3.0]).excludes_zero


def test_a_share_of_the_gain_is_stated_only_where_a_difference_is_shown() -> None:
    shown = kept_share(records([0.029, 0.030, 0.031]), 0.86)
    assert shown.startswith("accuracy on estimate: students are better than alone: +0.0300 [")
    assert shown.endswith("], 50% of the ensemble's gain (+0.0600)")
    assert "no difference shown" in kept_share(records([-0.03, 0.0, 0.09]), 0.86)
    assert "%" not in kept_share(records([-0.03, 0.0, 0.09]), 0.86)
    assert "one seed gives no interval" in kept_share(records([0.03]), 0.86)
    assert "the ensemble has no gain over the network alone (-0.1000)" in kept_share(records([0.03, 0.031]), 0.7)
    assert "students are worse than alone" in kept_share(records([-0.03, -0.031]), None)


# --- the command ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, resident_digits: ResidentImages) -> Path:
    """A results folder with an ensemble of digits."""
    folder = tmp_path_factory.mktemp("made")
    make_ensemble(trained_experiment(folder, resident_digits))
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def command(runs: Path, *arguments: str, seeds: int = 2) -> list[str]:
    driving = ["--results-dir", str(runs), "--max-epochs", "2", "--device", "cpu", "--threads", "1"]
    driving += ["--train-fraction", "0.3"]
    return [*driving, "--seeds", str(seeds), *arguments]


def distilled(runs: Path, *arguments: str, seeds: int = 2) -> int:
    return distill.main(command(runs, *arguments, seeds=seeds))


def logits_of(runs: Path, name: str, trial_id: str) -> np.ndarray:
    return Experiment.open(runs, name).predictions(trial_id, TestPredictions).logits_NC


@pytest.fixture(scope="module")
def finished(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder after two students and their controls, never interrupted."""
    runs = Path(shutil.copytree(made, tmp_path_factory.mktemp("finished") / "runs"))
    assert distilled(runs) == 0
    return runs


STUDENTS, ALONE = "digits-e0001-small_cnn", "digits-e0001-small_cnn-alone"


def test_students_and_their_controls_are_recorded_in_pairs(finished: Path) -> None:
    students, alone = (Experiment.open(finished, name).trials() for name in (STUDENTS, ALONE))
    assert students["stage"].tolist() == ["distilled"] * 2
    assert alone["stage"].tolist() == ["single"] * 2
    assert students["seed"].tolist() == alone["seed"].tolist() == [0, 1]
    assert students["status"].tolist() == alone["status"].tolist() == ["completed"] * 2
    same = [name for name in students if name.startswith("config.") and "distill" not in name]
    assert students[same].equals(alone[same])
    assert students["config.distill_weight"].tolist() == [0.5] * 2
    assert alone["config.distill_weight"].tolist() == [0.0] * 2
    assert (students["origin"] == "recipe").all()


def test_the_comparison_is_stored_as_it_is_defined(finished: Path) -> None:
    stored = pd.read_parquet(finished / STUDENTS / "distillation.parquet")
    assert len(stored) == 2 * 3 * 2  # seeds, splits, metrics
    assert np.allclose(stored["student_value"] - stored["alone_value"], stored["difference"])
    row = stored.query("seed == 1 and split == 'test' and metric == 'accuracy'").iloc[0]
    assert (row["student"], row["alone"]) == (f"{STUDENTS}/t00001", f"{ALONE}/t00001")
    found = Experiment.open(finished, STUDENTS).predictions("t00001", TestPredictions)
    assert row["student_value"] == (found.logits_NC.argmax(1) == found.labels_N).mean()


def test_each_is_the_training_of_its_configuration(finished: Path) -> None:
    few = ResidentImages.on("cpu", load_dataset("digits", data_dir="unused", train_fraction=0.3))
    ensemble = load_ensemble(finished / "digits" / "ensembles" / "e0001")
    taught = DistilledImages(few, ensemble.log_probabilities)
    for name, data in ((STUDENTS, taught), (ALONE, few)):
        experiment = Experiment.open(finished, name)
        config = TrainConfig(**experiment.history.trials["t00001"].started.config)  # type: ignore[arg-type]
        stored = experiment.predictions("t00001", SelectPredictions).logits_NC
        assert np.array_equal(final_logits(config, data), stored)


def test_the_teacher_is_recorded(finished: Path) -> None:
    info = json.loads((finished / STUDENTS / "experiment.json").read_text())
    assert (info["teacher"]["experiment"], info["teacher"]["ensemble_id"]) == ("digits", "e0001")
    assert json.loads((finished / ALONE / "experiment.json").read_text())["teacher"] is None
    assert info["state"] == "finished"


def test_the_tables_show_each_seed_the_mean_and_the_ensemble(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distilled(finished, "--resume") == 0
    shown = capsys.readouterr().out
    assert "epoch 1/2" not in shown  # nothing was left to train
    assert "estimate: read once, after training" in shown
    assert "test: for information" in shown
    assert re.search(r"seed 1 +0\.\d{4} +0\.\d{4} +[+-]0\.\d{4}", shown)
    assert re.search(r"mean +0\.\d{4} +0\.\d{4} +[+-]0\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]", shown)
    assert re.search(r"the ensemble +0\.\d{4}", shown)
    assert re.search(r"accuracy on estimate: (no difference shown|students (better|worse) than alone)", shown)


class Killed(BaseException):
    """The process is gone: nothing more is written."""


def dying_after(checks: int, error: type[BaseException], *, runs: Path) -> Callable[[], None]:
    """Raise an error in the check after so many, counted from the moment when the students' experiment is there."""
    left = iter(range(checks))

    def check() -> None:
        if (runs / STUDENTS / "experiment.json").exists() and next(left, None) is None:
            raise error

    return check


@pytest.mark.parametrize("checks", [3, 15, 30, 44, 58, 92])
def test_killed_at_any_moment_and_resumed_equals_never_killed(
    checks: int, runs: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(cli.INTERRUPTS, "check", dying_after(checks, Killed, runs=runs))
        with pytest.raises(Killed):
            distilled(runs)
    assert distilled(runs, "--resume") == 0
    for name in (STUDENTS, ALONE):
        for trial_id in ("t00000", "t00001"):
            assert np.array_equal(logits_of(runs, name, trial_id), logits_of(finished, name, trial_id))
        assert Experiment.open(runs, name).epochs()["epoch"].tolist() == [1, 2, 1, 2]
    stored = [pd.read_parquet(folder / STUDENTS / "distillation.parquet") for folder in (runs, finished)]
    assert stored[0].equals(stored[1])


def test_an_interrupt_says_how_to_go_on(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.INTERRUPTS, "check", dying_after(15, cli.Interrupted, runs=runs))
    assert distilled(runs) == cli.INTERRUPTED
    assert "--resume" in capsys.readouterr().out
    assert json.loads((runs / STUDENTS / "experiment.json").read_text())["state"] == "interrupted"


def test_a_resume_takes_what_is_not_given_from_the_experiment_and_adds_seeds(runs: Path) -> None:
    first = ("--backbone", "efficient200k", "--distill-weight", "0.5", "--seed", "7", "--name", "mine")
    assert distilled(runs, *first, "--without-control", seeds=1) == 0
    assert not (runs / "mine-alone").exists()
    assert not (runs / "mine" / "distillation.parquet").exists()
    assert distilled(runs, "--resume", "--name", "mine", seeds=2) == 0
    for name, weight in (("mine", 0.5), ("mine-alone", 0.0)):
        trials = Experiment.open(runs, name).trials()
        assert trials["seed"].tolist() == [7, 8]
        assert trials["backbone"].tolist() == ["efficient200k"] * 2
        assert trials["config.distill_weight"].tolist() == [weight] * 2
    assert len(pd.read_parquet(runs / "mine" / "distillation.parquet")) == 12


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PAR1")])
def test_scores_that_cannot_be_read_are_warned_of_and_left_out(damage: Callable[[Path], object], runs: Path) -> None:
    damage(runs / "digits" / "ensembles" / "e0001" / "scores.parquet")
    with pytest.warns(DataWarning, match=r"scores\.parquet cannot be read"):
        assert ensemble_accuracies(Experiment.open(runs, "digits"), "e0001") == {}


def test_one_seed_says_that_it_gives_no_interval(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distilled(runs, seeds=1) == 0
    assert "one seed gives no interval" in capsys.readouterr().out


def test_a_diverged_student_is_a_failure_that_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distilled(runs, "--set", "lr=1e30", "--without-control", seeds=1) == cli.FAILED
    assert f"error: {STUDENTS}/t00000 failed (diverged at epoch 1); lower lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--experiment", "gone"), "there is no experiment 'gone' in .*; there are: digits"),
        (("--ensemble", "e0009"), "experiment 'digits' has no ensemble 'e0009'; there are: e0001; make one with"),
        (("--backbone", "vgg"), "there is no backbone 'vgg'; there are small_cnn"),
        (("--set", "image_size=12"), "was trained on images of 8 pixels a side, the dataset has 12; give --dataset"),
        (("--set", "val_fraction=0.5"), "was trained on digits with split hash .*: it may have seen what is held out"),
        (("--set", "distill_weight=0"), "distill_weight=0: there is nothing to learn from a teacher"),
        (("--distill-weight", "0.5", "--set", "distill_weight=0.6"), "--distill-weight 0.5 and --set .* disagree"),
        (("--set", "seed=3"), "give --seed"),
        (("--threads", "5000"), "--threads 5000, but this machine has"),
        (("--resume",), "nothing has been distilled in"),
        (("--name", "digits"), "experiment 'digits' exists already in"),
        (("--name", "a/b"), "'a/b' is not a name"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    arguments: tuple[str, ...], message: str, runs: Path
) -> None:
    before = sorted(path.name for path in runs.iterdir())
    with pytest.raises(UsageError, match=message):
        distilled(runs, *arguments)
    assert sorted(path.name for path in runs.iterdir()) == before


def test_without_any_ensemble_it_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no experiment in .* has an ensemble; make one with python -m orchestrator"):
        distilled(tmp_path)


def test_a_dataset_of_other_classes_is_refused(runs: Path) -> None:
    described = runs / "digits" / "ensembles" / "e0001" / "ensemble.json"
    content = json.loads(described.read_text())
    described.write_text(json.dumps({**content, "split_hash": "0" * 16}))
    with pytest.raises(UsageError, match="with split hash 0000000000000000, these images have"):
        distilled(runs)


def test_an_ensemble_that_votes_cannot_teach(runs: Path) -> None:
    make_ensemble(Experiment.open(runs, "digits"), "vote", ensemble_id="e0002")
    with pytest.raises(UsageError, match="combiner 'vote' gives no probabilities; a student learns from probabilities"):
        distilled(runs)  # the newest
    assert distilled(runs, "--ensemble", "e0001", "--without-control", seeds=1) == 0


def test_a_teacher_that_was_changed_is_not_gone_on_with(runs: Path) -> None:
    assert distilled(runs, "--without-control", seeds=1) == 0
    described = runs / "digits" / "ensembles" / "e0001" / "ensemble.json"
    content = json.loads(described.read_text())
    described.write_text(json.dumps({**content, "temperature": content["temperature"] * 1.5}))
    with pytest.raises(UsageError, match=r"learns from ensemble digits/e0001 \(.*\), not digits/e0001 \(.*\); restore"):
        distilled(runs, "--without-control", "--resume", seeds=1)


def test_a_control_in_the_way_is_found_before_anything_is_trained(runs: Path) -> None:
    shutil.copytree(runs / "digits", runs / ALONE)
    with pytest.raises(UsageError, match=f"experiment '{ALONE}' exists already"):
        distilled(runs, "--ensemble", "e0001", "--experiment", "digits")
    assert not (runs / STUDENTS).exists()


def test_an_experiment_recorded_before_there_were_teachers_is_gone_on_with() -> None:
    old = plan(num_trials=8)
    base = {k: v for k, v in old.space.describe()["base"].items() if not k.startswith("distill_")}
    info = {
        "name": "old",
        "space": {**json.loads(json.dumps(old.space.describe())), "base": base},
        "overrides": {},
        "seed": 0,
        "halving": "asha",
        "keep_checkpoints": 10,
        "command": "of then",
    }
    assert resumed(plan(num_trials=8), info).space.base == old.space.base
    with pytest.raises(UsageError, match=r"base\.dropout was 0\.0 and is 0\.1"):
        resumed(plan(num_trials=8, base=TrainConfig(dropout=0.1)), info)

"""Trainings by Ray Train's workers, with real kills: every epoch is recorded once, and is what one process would do."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from orchestrator import cli, train
from orchestrator.ray_cluster import not_reachable
from results.events import TrialRetried, read_events
from results.schema import TestPredictions, UsageError
from results.store import Experiment, TrialFiles
from tests.background import (
    PATIENCE,
    epochs_in_log,
    running,
    still_there,
    training_workers,
    wait_for_a_moment,
    wait_for_epochs,
    wait_until,
)
from tests.commands import Command
from tests.conftest import CLUSTER_CPUS, CommandLine, command_environment, run_command
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.learner import Learner
from trainables.precision import peak_flops
from trainables.resident import ResidentImages
from trainables.trial import check_resumable, serialized

EPOCHS = 40
# No batch statistics and double precision: what it computes does not depend on the number of workers.
SETTINGS = [
    *("dataset=digits", "backbone=small_cnn_groupnorm", "precision=float64", "image_size=16", "batch_size=46"),
    *("train_fraction=0.4", f"max_epochs={EPOCHS}", "warmup_epochs=1", "initial_image_size=none", "mixup_alpha=0.4"),
    *("cutout_size=4", "test_time_augmentation=flip", "lr=0.05", "ema_decay=0.9"),
]
ARGUMENTS = ["speedrun", "--set", *SETTINGS, "--results-dir", "runs", "--name", "many"]


@dataclass(frozen=True)
class Training:
    """A training that workers divided among them, what its drivers printed, and the same training by one process."""

    divided: Experiment
    alone: Experiment
    output: Path


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training whose workers and drivers were killed and told to stop."""
    folder = tmp_path_factory.mktemp("training")
    root, output = folder / "runs" / "many", folder / "output"
    rng = np.random.default_rng()
    end_workers_and_driver(folder, root, output, rng)
    kill_driver(folder, root, output, rng)
    arguments = [*ARGUMENTS, "--num-workers", "1", "--resume"]
    with running(folder, "orchestrator.train", *arguments, output=output) as process:
        assert process.wait(timeout=PATIENCE) == 0, output.read_text()
    done = run_command(folder, "orchestrator.train", *ARGUMENTS[:-1], "alone")
    assert done.returncode == 0, done.stdout + done.stderr
    return Training(*(Experiment.open(root.parent, name) for name in ("many", "alone")), output)


def end_workers_and_driver(folder: Path, root: Path, output: Path, rng: np.random.Generator) -> None:
    """Kill a worker, tell another one to stop, then the driver, each after an epoch."""
    arguments = [*ARGUMENTS, "--num-workers", "2"]
    with running(folder, "orchestrator.train", *arguments, output=output) as process:
        for restarts, what in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
            workers = workers_after_an_epoch(root, process, output, rng)
            workers[rng.integers(2)].send_signal(what)
            wait_until(lambda: output.read_text().count("going on after") >= restarts, process, output)  # noqa: B023
        workers = workers_after_an_epoch(root, process, output, rng)
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 130, output.read_text()
    assert not still_there(workers)


def kill_driver(folder: Path, root: Path, output: Path, rng: np.random.Generator) -> None:
    """Resume, and kill the driver after an epoch."""
    arguments = [*ARGUMENTS, "--num-workers", "2", "--resume"]
    with running(folder, "orchestrator.train", *arguments, output=output) as process:
        workers = workers_after_an_epoch(root, process, output, rng)
        process.kill()
    assert not still_there(workers)


def workers_after_an_epoch(
    root: Path, process: Command, output: Path, rng: np.random.Generator
) -> list[psutil.Process]:
    """Wait for one more epoch, and a moment. Returns the workers that train the next one."""
    wait_for_epochs(root, epochs_in_log(root) + 1, process, output)
    delay = rng.uniform(0, 0.5)
    print(f"a signal {delay:.3f} s after an epoch")
    wait_for_a_moment(delay, root, epochs=2)
    workers = training_workers(process.pid)
    assert len(workers) == 2
    return workers


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(6 * PATIENCE)
def test_kills_of_workers_and_drivers_lose_no_epoch(training: Training) -> None:
    text = training.output.read_text()
    assert "interrupted; nothing is lost. To go on:\n  python -m orchestrator.train speedrun" in text
    assert "going on after epoch" in text
    epochs, (trial,) = training.divided.epochs(), training.divided.trials().to_dict("records")
    assert epochs["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert (trial["stage"], trial["status"], trial["epochs_trained"]) == ("large_batch", "completed", EPOCHS)
    # A worker that was told to leave is no failure; one that was killed is.
    events = read_events(training.divided.root / "events")
    assert sum(isinstance(event, TrialRetried) for event in events) == trial["retries"] == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(6 * PATIENCE)
def test_kills_of_workers_and_drivers_change_no_figure(training: Training) -> None:
    epochs, expected = training.divided.epochs(), training.alone.epochs()
    np.testing.assert_allclose(epochs["train_loss"], expected["train_loss"], rtol=1e-8)
    np.testing.assert_allclose(epochs["grad_norm"], expected["grad_norm"], rtol=1e-7)
    # Of labels whose weights have single precision.
    np.testing.assert_allclose(epochs["train_accuracy"], expected["train_accuracy"], rtol=1e-6)
    both = (training.divided, training.alone)
    variants, of_one = (experiment.stored_counts("t00000") for experiment in both)
    assert variants == of_one
    for variant in variants:
        ours, theirs = (experiment.predictions("t00000", TestPredictions, variant=variant) for experiment in both)
        np.testing.assert_allclose(ours.logits_NC.astype(float), theirs.logits_NC.astype(float), atol=0.02)


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_that_always_fails_ends_with_the_reason(tmp_path: Path, command: CommandLine) -> None:
    done = command("orchestrator.train", *ARGUMENTS, "--set", "crop_padding=1000000", "--num-workers", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "allocate" in done.stderr
    trial = Experiment.open(tmp_path / "runs", "many").trials().iloc[0]
    assert (trial["status"], trial["stop_reason"], trial["retries"]) == ("failed", "error", 3)


@pytest.mark.ray
@pytest.mark.slow
def test_what_ray_cannot_serve_makes_no_experiment(ray_address: str, tmp_path: Path, command: CommandLine) -> None:
    many = str(1 + CLUSTER_CPUS)
    arguments = ["speedrun", "--set", "dataset=digits", "initial_image_size=none", "batch_size=64", "--device", "cpu"]
    there = ["--address", ray_address]
    for more, message in (
        (["--num-workers", many, *there], f"--num-workers {many}, but Ray sees {CLUSTER_CPUS} CPU"),
        (["--elastic", f"{many}:{many}0", *there], f"--elastic {many}:{many}0, but Ray sees {CLUSTER_CPUS} CPU"),
        (["--num-workers", "1", "--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster answers there"),
    ):
        done = command("orchestrator.train", *arguments, *more)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr
        assert not (tmp_path / "results" / "runs" / "speedrun").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--elastic", "3:2"], "'3:2': wanted MIN:MAX, such as 1:8"),
        (["--elastic", "4"], "'4': wanted MIN:MAX, such as 1:8"),
        (["--num-workers", "0"], "wanted a whole number, 1 or more"),
        (["--num-workers", "2", "--elastic", "1:2"], "not allowed with argument"),
        (["--track", "tensorboard"], "--track is for --num-workers or --elastic: give one of them"),
        (["--address", "auto"], "--address is for --num-workers or --elastic: give one of them"),
    ],
)
def test_wrong_flags_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.parse(["speedrun", *arguments])
    assert message in capsys.readouterr().err


def test_a_recipe_for_another_dataset_is_refused_with_what_to_say_instead() -> None:
    with pytest.raises(UsageError, match=r"recipe speedrun is for cifar100, .* say --set dataset=digits"):
        train.plan_from(train.parse(["speedrun", "--dataset", "digits", "--num-workers", "2"]))
    plan = train.plan_from(train.parse(["speedrun", "--set", "dataset=digits", "--num-workers", "2"]))
    assert (plan.stage, plan.space.base.dataset) == ("large_batch", "digits")
    assert train.plan_from(train.parse(["speedrun", "--dataset", "digits"])).stage == "single"


def test_hosts_that_do_not_see_the_results_are_named_with_the_fix() -> None:
    message = not_reachable(Path("runs"), ["b", "a"])
    assert message.startswith("--results-dir runs is not seen from a, b, where workers may train")
    assert "a folder that all hosts share" in message


def test_a_checkpoint_of_another_network_is_refused(digits: SplitImages, tmp_path: Path) -> None:
    files = TrialFiles(str(tmp_path), "t00000", 0)
    config = TrainConfig()
    check_resumable(config, digits, files)
    files.replace(files.resume, serialized(Learner(config, ResidentImages.on("cpu", digits)).state_dict()))
    check_resumable(config, digits, files)
    other = TrainConfig(backbone="resnet18")
    with pytest.raises(UsageError, match=r"resume.pt is of another network than resnet18 \(it has backbone.conv1"):
        check_resumable(other, digits, files)


def test_a_training_without_workers_does_not_need_ray() -> None:
    code = "import sys; sys.modules['ray'] = None; from orchestrator import train; sys.exit(train.main(['--list']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=command_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == cli.DONE, done.stderr


def test_what_a_device_can_do_is_known_by_its_name() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("") is None

"""Trainings by Ray Train's workers, with real kills: every epoch is recorded once, and is what one process would do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from orchestrator import cli, train
from orchestrator.ray_cluster import not_reachable
from results.events import TrialRetried, read_events
from results.schema import TestPredictions, UsageError
from results.store import Experiment, TrialFiles
from tests.background import PATIENCE, epochs_in_log, running, training_workers, wait_for_epochs, wait_until
from tests.conftest import CommandLine, command_environment
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


def wait_for_text(text: str, times: int, process: subprocess.Popen[bytes], output: Path) -> None:
    wait_until(lambda: output.read_text().count(text) >= times, process, output)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_of_workers_and_drivers_lose_nothing_and_change_nothing(tmp_path: Path, command: CommandLine) -> None:
    root, output = tmp_path / "runs" / "many", tmp_path / "output"
    rng = np.random.default_rng()
    moments = [
        ("worker", signal.SIGKILL, "2"),
        ("driver", signal.SIGKILL, "2"),
        ("worker", signal.SIGTERM, "2"),
        ("driver", signal.SIGTERM, "2"),
    ]
    for number, (whom, what, num_workers) in enumerate(moments):
        resume = ["--resume"] if number else []
        before = epochs_in_log(root)
        with running(
            tmp_path, "orchestrator.train", *ARGUMENTS, "--num-workers", num_workers, *resume, output=output
        ) as process:
            wait_for_epochs(root, before + 1, process, output)
            delay = rng.uniform(0, 0.5)
            print(f"{what.name} to a {whom} {delay:.3f} s after an epoch")
            time.sleep(delay)
            workers = training_workers(process.pid)
            assert len(workers) == 2
            victim = process if whom == "driver" else workers[rng.integers(2)]
            restarts = output.read_text().count("going on after")
            victim.send_signal(what)
            if whom == "worker":
                wait_for_text("going on after", restarts + 1, process, output)
                wait_for_epochs(root, epochs_in_log(root) + 1, process, output)
                process.kill()
            elif what is signal.SIGTERM:
                assert process.wait(timeout=PATIENCE) == 130, output.read_text()
        psutil.wait_procs(workers, timeout=15)
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    with running(
        tmp_path, "orchestrator.train", *ARGUMENTS, "--num-workers", "1", "--resume", output=output
    ) as process:
        assert process.wait(timeout=PATIENCE) == 0, output.read_text()

    text = output.read_text()
    assert "interrupted; nothing is lost. To go on:\n  python -m orchestrator.train speedrun" in text
    assert "going on after epoch" in text
    experiment = Experiment.open(root.parent, "many")
    epochs, (trial,) = experiment.epochs(), experiment.trials().to_dict("records")
    assert epochs["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert (trial["stage"], trial["status"], trial["epochs_trained"]) == ("large_batch", "completed", EPOCHS)
    # A worker that was told to leave is no failure; one that was killed is.
    assert sum(isinstance(event, TrialRetried) for event in read_events(root / "events")) == trial["retries"] == 1

    done = command("orchestrator.train", *ARGUMENTS[:-1], "alone", timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = Experiment.open(root.parent, "alone")
    expected = alone.epochs()
    np.testing.assert_allclose(epochs["train_loss"], expected["train_loss"], rtol=1e-8)
    np.testing.assert_allclose(epochs["grad_norm"], expected["grad_norm"], rtol=1e-7)
    # Of labels whose weights have single precision.
    np.testing.assert_allclose(epochs["train_accuracy"], expected["train_accuracy"], rtol=1e-6)
    variants = experiment.stored_counts("t00000")
    assert variants == alone.stored_counts("t00000")
    for variant in variants:
        ours, theirs = (e.predictions("t00000", TestPredictions, variant=variant) for e in (experiment, alone))
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
def test_what_ray_cannot_serve_makes_no_experiment(tmp_path: Path, command: CommandLine) -> None:
    many = str(1 + (os.cpu_count() or 1))
    arguments = ["speedrun", "--set", "dataset=digits", "initial_image_size=none", "batch_size=64", "--device", "cpu"]
    for more, message in (
        (["--num-workers", many], f"--num-workers {many}, but Ray sees {int(many) - 1} CPU"),
        (["--elastic", f"{many}:{many}0"], f"--elastic {many}:{many}0, but Ray sees {int(many) - 1} CPU"),
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

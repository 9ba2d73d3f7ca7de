"""Real searches on real Ray clusters, with real signals: nothing is lost."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator.driver import make_ledger
from orchestrator.plan import SearchPlan, resumed
from results.events import EpochReported, TrialStarted, read_events
from results.schema import SelectPredictions, TestPredictions
from results.store import Experiment, TrialFiles
from results.study import open_study
from search_spaces.space import load_space
from tests.background import epochs_in_log, running, training_workers, wait_for_epochs
from tests.conftest import CommandLine
from tests.test_event_log import snapshot
from tests.test_search_logic import rung_state
from trainables.config import TrainConfig
from trainables.datasets import load_dataset
from trainables.resident import ResidentImages
from trainables.trial import run_trial

pytestmark = pytest.mark.ray

# Epochs of a third of a second: long enough to be hit by a signal.
SLOW_SPACE = """
from optuna.distributions import FloatDistribution
from search_spaces.space import Budget, SearchSpace
from trainables.config import TrainConfig

SPACE = SearchSpace(
    base=TrainConfig(dataset="digits", backbone="efficient200k", batch_size=64, crop_padding=1, flip=False,
                     image_size=12, train_fraction=0.4, ema_decay=0.9),
    dimensions={"dropout": FloatDistribution(0.0, 0.5), "lr": FloatDistribution(1e-3, 0.3, log=True)},
    baselines=({"dropout": 0.1, "lr": 0.05},),
    budget=Budget(num_trials=10, max_epochs=9),
)
"""


def fresh_weights(trial: TrialStarted, folder: Path, *, epochs: int) -> bytes:
    """The best weights of a trial's configuration after so many epochs, trained here from scratch on one thread."""
    config = TrainConfig(**trial.config)
    data = load_dataset("digits", data_dir="unused", image_size=config.image_size, train_fraction=config.train_fraction)
    folder.mkdir(exist_ok=True)
    files = TrialFiles(str(folder), trial.trial_id, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = run_trial(config, ResidentImages.on("cpu", data), files=files, rung_epochs=(3,))
        list(itertools.islice(training, epochs))
    finally:
        torch.set_num_threads(threads)
    return files.best.read_bytes()


def test_five_kills_lose_nothing_and_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_SPACE)
    root, output = tmp_path / "runs" / "slow", tmp_path / "output"
    arguments = ["slow.py", "--results-dir", "runs", "--halving", "asha"]
    rows: dict[str, str] = {}
    delays = np.random.default_rng().uniform(0.0, 1.5, size=5)
    print("killed so long after an epoch:", delays)
    for number, delay in enumerate(delays):
        resume = ["--resume"] if number else []
        before = epochs_in_log(root)
        with running(tmp_path, "orchestrator.search", *arguments, *resume, output=output) as process:
            wait_for_epochs(root, before + 2, process, output)
            killed_at = time.monotonic() + delay
            while time.monotonic() < killed_at and epochs_in_log(root) < before + 4:  # five times four is not all
                time.sleep(0.01)
            workers = training_workers(process.pid)
            assert process.poll() is None, output.read_text()
            process.kill()
        assert workers
        psutil.wait_procs(workers, timeout=10)
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
        still = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
        time.sleep(1)
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == still
        now = ended_rows(root)
        assert {trial_id: now[trial_id] for trial_id in rows} == rows
        rows = now
    with running(tmp_path, "orchestrator.search", *arguments, "--resume", output=output) as process:
        assert process.wait(timeout=240) == 0, output.read_text()

    now = ended_rows(root)
    assert {trial_id: now[trial_id] for trial_id in rows} == rows
    assert sorted(now) == [f"t{i:05d}" for i in range(10)]
    experiment = Experiment.open(root.parent, "slow")
    epochs = experiment.epochs()
    for _, of_trial in epochs.groupby("trial_id"):
        assert of_trial["epoch"].tolist() == list(range(1, len(of_trial) + 1))
    assert not list(root.rglob("*.tmp"))
    before_rebuild = snapshot(root)
    experiment.rebuild()
    assert snapshot(root) == before_rebuild
    rung = {
        event.trial_id: event.result.raw_val_accuracy
        for event in read_events(root / "events")
        if isinstance(event, EpochReported) and event.result.epoch == 3
    }
    with experiment.driving():
        assert rung_state(replayed(experiment)) == [rung]

    # Every trial, killed and resumed or trained by a reused actor, equals one trained afresh.
    for trial_id, trial in experiment.history.trials.items():
        fresh = fresh_weights(trial.started, tmp_path / "fresh", epochs=trial.last_epoch)
        assert experiment.weights(trial_id, "best").read_bytes() == fresh, trial_id
        assert trial.has_predictions == trial.completed


def replayed(experiment: Experiment) -> object:
    """The halving of a search, restored from its log."""
    source = load_space(str(experiment.root.parent.parent / "slow.py"))
    plan = SearchPlan(source=source, overrides={}, num_trials=None, seed=0, halving="asha")
    plan = resumed(plan, experiment.info)
    return make_ledger(experiment, plan, max_concurrent=2).halving


def ended_rows(root: Path) -> dict[str, str]:
    """The rows of ended trials as texts, without the one column that retention may change."""
    rows = pq.read_table(root / "trials").drop_columns("checkpoint").to_pylist()
    return {row["trial_id"]: repr(row) for row in rows}


def test_a_killed_worker_is_replaced_and_its_trial_goes_on(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_SPACE)
    root, output = tmp_path / "runs" / "slow", tmp_path / "output"
    arguments = ["slow.py", "--results-dir", "runs", "--num-trials", "2", "--halving", "none"]
    with running(tmp_path, "orchestrator.search", *arguments, output=output) as process:
        wait_for_epochs(root, 4, process, output)
        training_workers(process.pid)[0].kill()
        assert process.wait(timeout=240) == 0, output.read_text()
    experiment = Experiment.open(root.parent, "slow")
    trials = experiment.trials()
    assert trials["status"].tolist() == ["completed", "completed"]
    assert sorted(trials["retries"]) == [0, 1]
    assert (trials["epochs_trained"] == 9).all()
    for trial_id in trials["trial_id"]:
        fresh = fresh_weights(experiment.history.trials[trial_id].started, tmp_path / "fresh", epochs=9)
        assert experiment.weights(trial_id, "best").read_bytes() == fresh


FAULTY_SPACE = """
from optuna.distributions import FloatDistribution, IntDistribution
from search_spaces.space import Budget, SearchSpace
from trainables.config import TrainConfig

SPACE = SearchSpace(
    base=TrainConfig(dataset="digits", batch_size=64, lr=0.05, crop_padding=1, flip=False),
    dimensions={"lr": FloatDistribution(1e-3, 1e30, log=True), "crop_padding": IntDistribution(0, 1_000_000),
                "dropout": FloatDistribution(0.0, 0.5)},
    baselines=(
        {"lr": 1e30},                # diverges
        {"crop_padding": 1_000_000}, # cannot be allocated: raises in the worker
        {"lr": 0.05},
        {"lr": 0.1},
    ),
    budget=Budget(num_trials=4, max_epochs=3),
)
"""


def test_a_diverged_and_a_crashed_trial_do_not_end_the_search(tmp_path: Path, command: CommandLine) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY_SPACE)
    done = command("orchestrator.search", "faulty.py", "--results-dir", "runs", "--halving", "none")
    assert done.returncode == 0, done.stdout + done.stderr
    experiment = Experiment.open(tmp_path / "runs", "faulty")
    trials = experiment.trials().set_index("trial_id")
    assert trials["status"].tolist() == ["failed", "failed", "completed", "completed"]
    assert trials.loc["t00000", "stop_reason"].startswith("diverged at epoch")
    assert trials.loc["t00001", "stop_reason"] == "error"
    assert "allocate" in trials.loc["t00001", "error"]
    assert trials.loc["t00001", "retries"] == 2
    study = open_study(experiment.study_path, name="faulty", mode="max")
    states = [t.state for t in study.get_trials()]
    S = optuna.trial.TrialState
    assert states == [S.PRUNED, S.FAIL, S.COMPLETE, S.COMPLETE]
    assert "2 done, 0 stopped early, 2 failed" in done.stdout


def test_sigint_stops_within_seconds_and_a_moved_folder_resumes(tmp_path: Path, command: CommandLine) -> None:
    # Trials of 20 epochs: both are far from their ends when the signal comes, after four epochs between them.
    (tmp_path / "slow.py").write_text(SLOW_SPACE.replace("max_epochs=9", "max_epochs=20"))
    root, output = tmp_path / "runs" / "slow", tmp_path / "output"
    with running(
        tmp_path, "orchestrator.search", "slow.py", "--results-dir", "runs", "--num-trials", "2", output=output
    ) as process:
        wait_for_epochs(root, 4, process, output)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert time.monotonic() - started < 30  # on a busy machine too
    assert "To go on:\n  python -m orchestrator.search slow.py --results-dir runs --num-trials 2 --resume" in (
        output.read_text()
    )
    assert '"state": "interrupted"' in (root / "experiment.json").read_text()
    assert Experiment.open(root.parent, "slow").history.unfinished
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    done = command("orchestrator.search", "slow.py", "--results-dir", "elsewhere", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    moved = Experiment.open(tmp_path / "elsewhere", "slow")
    assert len(moved.trials()) == 2
    assert moved.history.state == "finished"
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_search_and_it_resumes_when_there_is_room(small_disk: Path, command: CommandLine) -> None:
    arguments = ["digits", "--results-dir", str(small_disk), "--num-trials", "4", "--max-epochs", "6"]
    full = command("orchestrator.search", *arguments)
    assert full.returncode == 1, full.stdout + full.stderr
    assert "No space left on device" in full.stderr
    assert "--resume" in full.stderr
    assert "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = command("orchestrator.search", *arguments, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    trials = Experiment.open(small_disk, "digits").trials()
    assert len(trials) == 4
    assert set(trials["status"]) <= {"completed", "pruned"}


def test_a_search_and_its_ensemble_from_the_command_line(tmp_path: Path, command: CommandLine) -> None:
    done = command("orchestrator.search", "digits", "--num-trials", "8", "--halving", "none", "--set", "ema_decay=0.9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 trials: 8 done, 0 stopped early, 0 failed" in done.stdout
    next_command = done.stdout.rstrip().splitlines()[-1].split()
    assert next_command[:3] == ["python", "-m", "orchestrator.ensemble"]
    made = command("orchestrator.ensemble", *next_command[3:])
    assert made.returncode == 0, made.stdout + made.stderr
    for heading in (
        "estimate: read once, after choosing (117 images;",
        "test: scored once, never chosen on (359 images;",
    ):
        assert heading in made.stdout
    root = tmp_path / "results" / "runs" / "digits"
    scores = pd.read_parquet(root / "ensembles" / "e0001" / "scores.parquet")
    chosen = scores.query("chosen and metric == 'accuracy'").set_index("split")
    assert list(chosen.index) == ["select", "estimate", "test"]
    assert (chosen["gain_ci_low"] <= chosen["gain"]).all()
    assert (chosen["k"] == 5).all()
    # The figures in the row are those of the stored logits, which are those of the stored weights.
    experiment = Experiment.open(root.parent, "digits")
    trial = experiment.trials().iloc[0]
    select = experiment.predictions(trial["trial_id"], SelectPredictions)
    assert (select.logits_NC.argmax(1) == select.labels_N).mean() == trial["val_accuracy"]
    assert len(experiment.predictions(trial["trial_id"], TestPredictions).labels_N) == 359
    assert re.fullmatch(r"checkpoints/t\d{5}/best.safetensors", trial["checkpoint"])
    again = command("orchestrator.search", "digits", "--num-trials", "8")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_search_that_ray_cannot_serve_makes_no_experiment(tmp_path: Path, command: CommandLine) -> None:
    for arguments, message in (
        (["--device", "cuda"], "--device cuda, but Ray sees no GPU; give --device cpu"),
        (["--cpus-per-trial", "4096"], "a trial wants 4096 CPUs and 0 GPUs, and there are"),
        (["--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster answers there"),
    ):
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        done = command("orchestrator.search", "digits", *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "results").exists()


def test_a_second_driver_is_refused_and_sigterm_is_an_interrupt_too(tmp_path: Path, command: CommandLine) -> None:
    (tmp_path / "slow.py").write_text(SLOW_SPACE)
    root, output = tmp_path / "runs" / "slow", tmp_path / "output"
    # So many trials that the first driver cannot be done before the second has been refused.
    arguments = ["slow.py", "--results-dir", "runs", "--num-trials", "1000"]
    with running(tmp_path, "orchestrator.search", *arguments, output=output) as process:
        wait_for_epochs(root, 1, process, output)
        second = command("orchestrator.search", *arguments, "--resume")
        assert second.returncode == 2
        assert "being written to by another process" in second.stderr
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=60) == 130
    assert "interrupted; nothing is lost" in output.read_text()
    assert Experiment.open(root.parent, "slow").history.state == "interrupted"


def test_a_search_whose_every_trial_fails_is_failed(tmp_path: Path, command: CommandLine) -> None:
    done = command("orchestrator.search", "digits", "--num-trials", "2", "--set", "lr=1e30")
    assert done.returncode == 1
    assert "error: every trial failed, the last one so: diverged at epoch" in done.stderr
    assert len(Experiment.open(tmp_path / "results" / "runs", "digits").trials()) == 2

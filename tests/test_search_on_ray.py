"""Real searches on real Ray clusters: what the command prints and leaves, and what it does with what goes wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch

from results.schema import SelectPredictions, TestPredictions
from results.store import Experiment
from results.study import open_study
from tests.background import PATIENCE
from tests.conftest import CLUSTER_CPUS, CommandLine, command_environment, run_command

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_TRIALS, RUNG = 24, 2
ARGUMENTS = [
    *("digits", "--num-trials", str(NUM_TRIALS), "--max-epochs", "6", "--train-fraction", "0.2"),
    *("--control-fraction", "0.5", "--finalists", "1", "--set", "ema_decay=0.9"),
]
STATES = {"completed": "Complete", "pruned": "Pruned", "failed": "Fail"}


@dataclass(frozen=True)
class Search:
    """A search that has ended: what it printed, and what it left below `folder`."""

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def experiment(self) -> Experiment:
        """What it left."""
        return Experiment.open(self.folder / "results" / "runs", "digits")

    @property
    def trials(self) -> pd.DataFrame:
        """A row for each trial."""
        return pd.read_parquet(self.experiment.root / "trials")

    @property
    def epochs(self) -> pd.DataFrame:
        """A row for each epoch."""
        return pd.read_parquet(self.experiment.root / "epochs")


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search as a user starts it, on a cluster of its own."""
    folder = tmp_path_factory.mktemp("search")
    done = run_command(folder, "orchestrator.search", *ARGUMENTS)
    assert done.returncode == 0, done.stdout + done.stderr
    return Search(folder, done)


def test_the_command_starts_from_a_shell() -> None:
    command = [sys.executable, "-m", "orchestrator.search", "no such space"]
    done = subprocess.run(command, env=command_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no search space 'no such space'; there are cifar10, ")


def test_a_search_ends_with_its_numbers_and_the_command_for_an_ensemble(search: Search) -> None:
    status = search.trials["status"].value_counts()
    done, stopped = status["completed"], status.get("pruned", 0)
    assert done + stopped == NUM_TRIALS + 1  # a finalist
    assert f"{NUM_TRIALS + 1} trials: {done} done, {stopped} stopped early, 0 failed" in search.done.stdout
    next_command = search.done.stdout.rstrip().splitlines()[-1].split()
    assert next_command[:3] == ["python", "-m", "orchestrator.ensemble"]
    made = run_command(search.folder, "orchestrator.ensemble", *next_command[3:])
    assert made.returncode == 0, made.stdout + made.stderr
    for heading in (
        "estimate: read once, after choosing (117 images;",
        "test: scored once, never chosen on (359 images;",
    ):
        assert heading in made.stdout
    scores = pd.read_parquet(search.experiment.root / "ensembles" / "e0001" / "scores.parquet")
    chosen = scores.query("chosen and metric == 'accuracy'").set_index("split")
    assert list(chosen.index) == ["select", "estimate", "test"]
    assert (chosen["gain_ci_low"] <= chosen["gain"]).all()
    assert (chosen["k"] == 5).all()


def test_the_figures_of_a_row_are_those_of_the_stored_logits(search: Search) -> None:
    trial = search.trials[search.trials["status"] == "completed"].iloc[0]
    select = search.experiment.predictions(trial["trial_id"], SelectPredictions)
    assert (select.logits_NC.argmax(1) == select.labels_N).mean() == trial["val_accuracy"]
    assert len(search.experiment.predictions(trial["trial_id"], TestPredictions).labels_N) == 359
    assert re.fullmatch(r"checkpoints/t\d{5}/best.safetensors", trial["checkpoint"])


def test_a_name_that_is_taken_is_refused(search: Search) -> None:
    again = run_command(search.folder, "orchestrator.search", "digits", "--num-trials", "8")
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_search_prints_what_its_controls_say_of_early_stopping(search: Search) -> None:
    trials, epochs = search.trials, search.epochs
    controls = trials[trials["control"] & (trials["stage"] == "search")]
    assert len(controls) >= 10
    assert set(controls["status"]) == {"completed"}
    rows = epochs[epochs["rung"].notna() & epochs["trial_id"].isin(controls["trial_id"])].set_index("trial_id")
    assert set(rows["epoch"]) == {RUNG}
    assert set(rows["decision"]) <= {"continue", "spared"}
    final = controls.set_index("trial_id")["val_accuracy"]
    correlation = rows["val_accuracy"].rank().corr(final.loc[rows.index].rank())
    assert (
        f"rung 1 (epoch {RUNG}), {len(rows)} controls: rank correlation with the final value {correlation:+.2f}"
        in search.done.stdout
    )
    spared = rows.index[rows["decision"] == "spared"]
    best = final.drop(spared).max()
    printed = re.search(r"of (\d+) that would have been stopped, (\d+) ended best", search.done.stdout)
    assert bool(printed) == bool(len(spared))
    if printed:
        assert [int(number) for number in printed.groups()] == [len(spared), int((final[spared] > best).sum())]
    (finalist,) = trials[trials["stage"] == "finalist"].to_dict("records")
    assert f"{finalist['finalist_of']}  val_accuracy" in search.done.stdout


def test_the_dashboard_shows_the_states_and_values_of_the_tables(search: Search) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dashboard = [str(Path(sys.executable).with_name("optuna-dashboard")), str(search.experiment.root / "study.journal")]
    process = subprocess.Popen([*dashboard, "--port", str(port), "--server", "wsgiref", "--quiet"])
    try:
        (study,) = fetched(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
        shown = fetched(f"http://127.0.0.1:{port}/api/studies/{study['study_id']}")["trials"]
    finally:
        process.kill()
        process.wait()
    trials, epochs = search.trials, search.epochs
    assert [f"t{trial['number']:05d}" for trial in shown] == trials["trial_id"].tolist()
    for trial, row in zip(shown, trials.to_dict("records"), strict=True):
        assert trial["state"] == STATES[row["status"]]
        if row["status"] == "completed":
            assert trial["values"] == [row["val_accuracy"]]
        curve = epochs[epochs["trial_id"] == row["trial_id"]].set_index("epoch")["val_accuracy"]
        assert {v["step"]: v["value"] for v in trial["intermediate_values"]} == curve.to_dict()


def fetched(url: str) -> dict[str, Any]:
    """JSON from a server that may be about to start."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.URLError:
            assert time.monotonic() < deadline, url
            time.sleep(0.2)


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


def test_a_diverged_and_a_crashed_trial_do_not_end_the_search(
    ray_address: str, tmp_path: Path, command: CommandLine
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY_SPACE)
    arguments = ["faulty.py", "--results-dir", "runs", "--halving", "none", "--max-concurrent", "1"]
    done = command("orchestrator.search", *arguments, "--address", ray_address)
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


def test_a_search_whose_every_trial_fails_is_failed(ray_address: str, tmp_path: Path, command: CommandLine) -> None:
    arguments = ["digits", "--num-trials", "2", "--set", "lr=1e30", "--max-concurrent", "1", "--address", ray_address]
    done = command("orchestrator.search", *arguments)
    assert done.returncode == 1
    assert "error: every trial failed, the last one so: diverged at epoch" in done.stderr
    assert len(Experiment.open(tmp_path / "results" / "runs", "digits").trials()) == 2


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


def test_a_full_disk_ends_the_search_and_it_resumes_when_there_is_room(
    small_disk: Path, ray_address: str, command: CommandLine
) -> None:
    arguments = ["digits", "--results-dir", str(small_disk), "--num-trials", "4", "--max-epochs", "6"]
    arguments += ["--max-concurrent", "1", "--address", ray_address]
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


def test_a_search_that_ray_cannot_serve_makes_no_experiment(
    ray_address: str, tmp_path: Path, command: CommandLine
) -> None:
    there = ["--address", ray_address]
    for arguments, message in (
        (["--device", "cuda", *there], "--device cuda, but Ray sees no GPU; give --device cpu"),
        (["--cpus-per-trial", "4096", *there], f"a trial wants 4096 CPUs and 0 GPUs, and there are {CLUSTER_CPUS} and"),
        (["--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster answers there"),
    ):
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        done = command("orchestrator.search", "digits", *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "results").exists()

"""One search that is ended again and again, by signals and kills: nothing is lost, and nothing comes out different."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator.driver import make_ledger
from orchestrator.plan import SearchPlan, resumed
from results.events import EpochReported, TrialStarted, read_events
from results.schema import UsageError
from results.store import Experiment, TrialFiles
from search_spaces.space import load_space
from tests.background import (
    PATIENCE,
    SLOW_SPACE,
    epochs_in_log,
    running,
    still_there,
    training_workers,
    wait_for_a_moment,
    wait_for_epochs,
)
from tests.conftest import run_command
from tests.test_event_log import snapshot
from tests.test_search_logic import rung_state
from trainables.config import TrainConfig
from trainables.datasets import load_dataset
from trainables.resident import ResidentImages
from trainables.trial import run_trial

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(6 * PATIENCE)]

NUM_TRIALS, MAX_EPOCHS, RUNG = 10, 9, 3


@dataclass(frozen=True)
class Ending:
    """What there was when a driver had ended, by itself or after a signal."""

    sent: signal.Signals | None
    results_dir: str
    status: int
    printed: str
    state: str
    unfinished: list[str]
    rows: dict[str, str]
    workers: int
    workers_left: int
    written_later: list[Path]


@dataclass
class Interrupted:
    """A search, what each of its drivers left, and what happened to a second driver."""

    folder: Path
    results_dir: str = "runs"
    endings: list[Ending] = field(default_factory=list)
    refusals: list[subprocess.CompletedProcess[str]] = field(default_factory=list)

    @property
    def root(self) -> Path:
        """The experiment's folder."""
        return self.folder / self.results_dir / "slow"

    @property
    def experiment(self) -> Experiment:
        """The experiment as it stands."""
        return Experiment.open(self.root.parent, "slow")

    @property
    def arguments(self) -> list[str]:
        """Of the command: the first one, or one that resumes."""
        resume = ["--resume"] if self.root.exists() else []
        return ["slow.py", "--results-dir", self.results_dir, "--halving", "asha", *resume]

    def after(self, *signals: signal.Signals) -> list[Ending]:
        """What there was after some signals."""
        return [ending for ending in self.endings if ending.sent in signals]

    def drive_until(self, number: signal.Signals, *, delay: float) -> None:
        """Start or resume, and send a signal so many seconds after two more epochs, or two epochs later."""
        output, before = self.folder / f"output-{len(self.endings)}", epochs_in_log(self.root)
        with running(self.folder, "orchestrator.search", *self.arguments, output=output) as process:
            wait_for_epochs(self.root, before + 2, process, output)
            with pytest.raises(UsageError, match="being written to by another process"), self.experiment.driving():
                pass
            wait_for_a_moment(delay, self.root, epochs=2)
            workers = training_workers(process.pid)
            process.send_signal(number)
            status = process.wait(timeout=PATIENCE)
        left = still_there(workers)
        self.endings.append(self._ending(number, status, output.read_text(), len(workers), len(left)))

    def _ending(self, number: signal.Signals | None, status: int, printed: str, workers: int, left: int) -> Ending:
        files = modified(self.root)
        time.sleep(1)  # time for a process that still writes
        later = [path for path, at in modified(self.root).items() if files.get(path) != at]
        history = self.experiment.history
        unfinished = [trial.trial_id for trial in history.unfinished]
        return Ending(
            number,
            self.results_dir,
            status,
            printed,
            history.state,
            unfinished,
            ended_rows(self.root),
            workers,
            left,
            later,
        )

    def try_a_second_driver(self) -> None:
        """Resume by a command while this process drives."""
        with self.experiment.driving():
            self.refusals.append(run_command(self.folder, "orchestrator.search", *self.arguments))

    def move(self, results_dir: str) -> None:
        """Put the results elsewhere."""
        shutil.move(self.root.parent, self.folder / results_dir)
        self.results_dir = results_dir

    def finish_without_one_worker(self) -> None:
        """Resume, kill a worker, and wait for the end."""
        output, before = self.folder / "last-output", epochs_in_log(self.root)
        with running(self.folder, "orchestrator.search", *self.arguments, output=output) as process:
            wait_for_epochs(self.root, before + 1, process, output)
            training_workers(process.pid)[0].kill()
            status = process.wait(timeout=PATIENCE)
        self.endings.append(self._ending(None, status, output.read_text(), 2, 0))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL), id="ended in all ways"),
        pytest.param((signal.SIGKILL,) * 5, id="killed five times", marks=pytest.mark.soak),
    ],
)
def search(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A search that was ended several times, moved, robbed of a worker, and got to its end."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "slow.py").write_text(SLOW_SPACE.format(num_trials=NUM_TRIALS, max_epochs=MAX_EPOCHS))
    search = Interrupted(folder)
    delays = np.random.default_rng().uniform(0.0, 1.5, size=len(request.param))
    print("seconds between an epoch and a signal:", delays)
    for number, delay in zip(request.param, delays, strict=True):
        search.drive_until(number, delay=delay)
        if len(search.endings) == 1:
            search.try_a_second_driver()
            search.move("elsewhere")
    search.finish_without_one_worker()
    return search


def modified(root: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def ended_rows(root: Path) -> dict[str, str]:
    """The rows of ended trials as texts, without the one column that retention may change."""
    rows = pq.read_table(root / "trials").drop_columns("checkpoint").to_pylist()
    return {row["trial_id"]: repr(row) for row in rows}


def test_a_signal_ends_a_search_in_order_and_says_how_to_resume(search: Interrupted) -> None:
    for ending in search.after(signal.SIGTERM, signal.SIGINT):
        assert (ending.status, ending.state) == (130, "interrupted")
        assert ending.unfinished
        assert "interrupted; nothing is lost" in ending.printed
        command = f"python -m orchestrator.search slow.py --results-dir {ending.results_dir} --halving asha --resume"
        assert f"To go on:\n  {command}" in ending.printed


def test_a_killed_driver_leaves_a_search_that_runs_as_far_as_anybody_knows(search: Interrupted) -> None:
    killed = search.after(signal.SIGKILL)
    assert [(ending.status, ending.state) for ending in killed] == [(-signal.SIGKILL, "running")] * len(killed)


def test_an_ended_driver_takes_its_workers_along_and_nothing_is_written_later(search: Interrupted) -> None:
    for ending in search.endings[:-1]:
        assert ending.workers
        assert not ending.workers_left
        assert ending.written_later == []


def test_a_second_driver_is_refused(search: Interrupted) -> None:
    (second,) = search.refusals
    assert second.returncode == 2
    assert "being written to by another process" in second.stderr


def test_a_moved_folder_resumes_where_it_is_now(search: Interrupted) -> None:
    assert search.experiment.history.state == "finished"
    assert not (search.folder / "runs").exists()


def test_rows_of_ended_trials_outlive_every_ending(search: Interrupted) -> None:
    for before, after in itertools.pairwise(search.endings):
        assert {trial_id: after.rows[trial_id] for trial_id in before.rows} == before.rows
    assert sorted(search.endings[-1].rows) == [f"t{number:05d}" for number in range(NUM_TRIALS)]


def test_every_epoch_is_recorded_once_and_the_tables_are_those_of_the_log(search: Interrupted) -> None:
    for _, of_trial in search.experiment.epochs().groupby("trial_id"):
        assert of_trial["epoch"].tolist() == list(range(1, len(of_trial) + 1))
    assert not list(search.root.rglob("*.tmp"))
    before = snapshot(search.root)
    search.experiment.rebuild()
    assert snapshot(search.root) == before


def test_a_killed_worker_is_replaced_and_its_trial_goes_on(search: Interrupted) -> None:
    assert search.endings[-1].status == 0
    trials = search.experiment.trials()
    assert sorted(trials["retries"]) == [0] * (NUM_TRIALS - 1) + [1]
    assert set(trials["status"]) <= {"completed", "pruned"}


def test_early_stopping_goes_on_with_the_rung_of_all_drivers(search: Interrupted) -> None:
    rung = {
        event.trial_id: event.result.raw_val_accuracy
        for event in read_events(search.root / "events")
        if isinstance(event, EpochReported) and event.result.epoch == RUNG
    }
    assert len(rung) == NUM_TRIALS
    experiment = search.experiment
    with experiment.driving():
        assert rung_state(replayed(experiment)) == [rung]


def replayed(experiment: Experiment) -> object:
    """The halving of a search, restored from its log."""
    source = load_space(str(experiment.root.parent.parent / "slow.py"))
    plan = SearchPlan(source=source, overrides={}, num_trials=None, seed=0, halving="asha")
    plan = resumed(plan, experiment.info)
    return make_ledger(experiment, plan, max_concurrent=2).halving


def test_every_trial_equals_one_that_nothing_happened_to(search: Interrupted) -> None:
    experiment = search.experiment
    for trial_id, trial in experiment.history.trials.items():
        fresh = fresh_weights(trial.started, search.folder / "fresh", epochs=trial.last_epoch)
        assert experiment.weights(trial_id, "best").read_bytes() == fresh, trial_id
        assert trial.has_predictions == trial.completed


def fresh_weights(trial: TrialStarted, folder: Path, *, epochs: int) -> bytes:
    """The best weights of a trial's configuration after so many epochs, trained here from scratch on one thread."""
    config = TrainConfig(**trial.config)
    data = load_dataset("digits", data_dir="unused", image_size=config.image_size, train_fraction=config.train_fraction)
    folder.mkdir(exist_ok=True)
    files = TrialFiles(str(folder), trial.trial_id, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = run_trial(config, ResidentImages.on("cpu", data), files=files, rung_epochs=(RUNG,))
        list(itertools.islice(training, epochs))
    finally:
        torch.set_num_threads(threads)
    return files.best.read_bytes()

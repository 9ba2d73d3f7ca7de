"""`trials/` and `epochs/` as others read them: every row once, at any moment, however a writer ends."""

from __future__ import annotations

import inspect
import math
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import duckdb
import optuna
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from orchestrator import driver, halving, proposals
from orchestrator.ledger import Assignment, Ledger
from results import parts, study
from results.events import Decided, EpochReported, TrialEnded, TrialStarted
from results.schema import EpochResult
from results.store import Experiment
from tests.conftest import ROOT
from tests.simulation import LEARNING, advance, epoch_result, ledger_of, new_experiment, run_search


def by_pandas(folder: Path, columns: list[str]) -> list[tuple[Any, ...]]:
    return list(pd.read_parquet(folder, columns=columns).itertuples(index=False, name=None))


def by_duckdb(folder: Path, columns: list[str]) -> list[tuple[Any, ...]]:
    return duckdb.sql(f"select {', '.join(columns)} from '{folder}/*.parquet'").fetchall()


def by_polars(folder: Path, columns: list[str]) -> list[tuple[Any, ...]]:
    return pl.scan_parquet(f"{folder}/*.parquet").select(columns).collect().rows()


LOUD = (duckdb.Error, pl.exceptions.PolarsError, pl.exceptions.PanicException)
READERS = {"pandas": by_pandas, "duckdb": by_duckdb, "polars": by_polars}
Reader = Callable[[Path, list[str]], list[tuple[Any, ...]]]


def check_tables(root: Path, reader: Reader) -> tuple[set[str], set[tuple[str, int]]]:
    """The trials and the epochs that a reader finds; fails when one is there twice, or a trial without its epochs."""
    trials = reader(root / "trials", ["trial_id", "epochs_trained"])
    epochs = reader(root / "epochs", ["trial_id", "epoch"])
    assert len({trial_id for trial_id, _ in trials}) == len(trials)
    assert len(set(epochs)) == len(epochs)
    for trial_id, epochs_trained in trials:
        assert {(trial_id, epoch + 1) for epoch in range(epochs_trained)} <= set(epochs)
    return {trial_id for trial_id, _ in trials}, set(epochs)


def record_trials(experiment: Experiment, numbers: Collection[int], *, epochs: int) -> None:
    """Trials that start, report in turns and end, without anybody deciding."""
    for number in numbers:
        start = TrialStarted(
            at=1.0,
            trial_id=f"t{number:05d}",
            stage="search",
            origin="startup",
            seed=number,
            config={"dataset": "sim", "backbone": "sim", "max_epochs": epochs, "mixup_alpha": 0.0},
            params={},
            distributions={},
        )
        experiment.record(start)
    for epoch in range(1, epochs + 1):
        for number in numbers:
            trial_id = f"t{number:05d}"
            experiment.record(
                EpochReported(at=2.0, trial_id=trial_id, node="", result=epoch_result(epoch, 0.5)),
                Decided(at=2.0, trial_id=trial_id, epoch=epoch, rung=None, decision="continue"),
            )
    for number in numbers:
        experiment.record(
            TrialEnded(
                at=3.0,
                trial_id=f"t{number:05d}",
                status="completed",
                stop_reason="",
                has_predictions=False,
                has_checkpoint=False,
            )
        )


def write_for_a_while(results_dir: str, name: str) -> None:
    """What another process writes while this one reads."""
    parts.BLOCK, parts.EPOCHS_SECONDS = 5, 0.0
    experiment = Experiment.open(results_dir, name)
    with experiment.driving():
        for first in range(0, 24, 3):
            record_trials(experiment, range(first, first + 3), epochs=2)


def test_readers_find_every_row_once_while_another_process_writes(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    writer = multiprocessing.get_context("spawn").Process(target=write_for_a_while, args=(str(tmp_path), "sim"))
    writer.start()
    trials: set[str] = set()
    epochs: set[tuple[str, int]] = set()
    looks = 0
    while writer.exitcode is None or looks < len(READERS):
        reader = READERS[list(READERS)[looks % len(READERS)]]
        try:
            now_trials, now_epochs = check_tables(experiment.root, reader)
        except LOUD:  # they ask for a file's size or footer before they open it; it may be another one then
            assert reader is not by_pandas
            continue
        assert trials <= now_trials  # nothing that was there is missing later
        assert epochs <= now_epochs
        trials, epochs = now_trials, now_epochs
        looks += 1
    writer.join()
    assert writer.exitcode == 0
    assert looks > len(READERS)
    for reader in READERS.values():
        trials, epochs = check_tables(experiment.root, reader)
        assert len(trials) == 24
        assert len(epochs) == 48


class Killed(BaseException):
    """What stands for a SIGKILL: nothing catches it, and nothing can be written after it."""


@contextmanager
def killed_at(change: int, *, after: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be killed just before or just after the so-manieth change that is made to a table's files."""
    left = change

    def dying(function: Callable[..., None]) -> Callable[..., None]:
        def run(path: Path, *args: Any, **kwargs: Any) -> None:
            nonlocal left
            if path.suffix == ".parquet":
                left -= 1
                if left < 0 or (left == 0 and not after):
                    raise Killed
                function(path, *args, **kwargs)
                if left == 0:
                    raise Killed
            else:
                function(path, *args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(parts, "replace_file", dying(parts.replace_file))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("change", [3, 5, 9, 14])
def test_a_writer_killed_anywhere_leaves_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int, after: bool
) -> None:
    monkeypatch.setattr(parts, "BLOCK", 3)
    experiment = new_experiment(tmp_path)
    with killed_at(change, after=after, monkeypatch=monkeypatch):
        run_search(experiment, LEARNING, num_trials=8)
    for reader in READERS.values():
        trials, _ = check_tables(experiment.root, reader)
        # At the kill one end may be in the log without its row; those before it have theirs.
        ended = {trial.trial_id for trial in Experiment.open(tmp_path, "sim").history.endings[:-1]}
        assert ended <= trials
    with killed_at(1, after=after, monkeypatch=monkeypatch):  # and so while the next driver writes all of them anew
        Experiment.open(tmp_path, "sim").rebuild()
    assert check_tables(experiment.root, by_pandas)[0] >= ended
    run_search(experiment, LEARNING, num_trials=8)
    for reader in READERS.values():
        assert check_tables(experiment.root, reader)[0] == {f"t{number:05d}" for number in range(8)}


def as_older_versions_wrote(root: Path) -> None:
    """Give every trial a part of its own."""
    for folder in ("trials", "epochs"):
        for path in list((root / folder).iterdir()):
            table = pq.read_table(path)
            for trial_id in set(table["trial_id"].to_pylist()):
                rows = table.filter([value == trial_id for value in table["trial_id"].to_pylist()])
                pq.write_table(rows, root / folder / f"{trial_id}.parquet")
            path.unlink()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("change", [1, 9, 12, 21])
def test_a_folder_of_an_older_version_is_read_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int, after: bool
) -> None:
    monkeypatch.setattr(parts, "BLOCK", 3)
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=8)
    trials, epochs = experiment.trials(), experiment.epochs()
    as_older_versions_wrote(experiment.root)
    pd.testing.assert_frame_equal(experiment.trials(), trials)
    pd.testing.assert_frame_equal(experiment.epochs(), epochs)
    with killed_at(change, after=after, monkeypatch=monkeypatch):
        Experiment.open(tmp_path, "sim").rebuild()
    for reader in READERS.values():
        found = reader(experiment.root / "epochs", ["trial_id", "epoch"])
        assert len(set(found)) == len(found)
    run_search(experiment, LEARNING, num_trials=10)
    for reader in READERS.values():
        assert len(check_tables(experiment.root, reader)[0]) == 10
    assert {path.name for path in (experiment.root / "trials").iterdir()} == {
        "schema.parquet",
        *(f"t{first:05d}-t{first + 2:05d}.parquet" for first in (0, 3, 6, 9)),
    }


def test_epochs_of_running_trials_wait_and_none_is_missing_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "EPOCHS_SECONDS", math.inf)
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        advance(ledger_of(experiment, num_trials=2), LEARNING, steps=2)
        assert len(experiment.epochs()) == 0
        monkeypatch.setattr(parts, "EPOCHS_SECONDS", 0.0)
        experiment.catch_up()
        assert len(experiment.epochs()) == 2
        monkeypatch.setattr(parts, "EPOCHS_SECONDS", math.inf)
        advance(ledger_of(experiment, num_trials=2), LEARNING, steps=2)
        of_trials = experiment.epochs().groupby("trial_id").size()
        assert of_trials.to_dict() == {"t00000": 1, "t00001": 2}  # the second has diverged: an end is written at once
    assert len(experiment.epochs()) == 4


COUNTED = (str(ROOT / "results"), str(ROOT / "orchestrator"))
NOT_COUNTED = {inspect.getfile(module) for module in (halving, proposals, study)}  # have tests of their own


@contextmanager
def counting_opcodes() -> Iterator[list[int]]:
    """How many Python instructions the ledger and the store execute."""
    count = [0]

    def trace(frame: FrameType, kind: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(COUNTED) or name in NOT_COUNTED:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count[0] += kind == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def one_trial(ledger: Ledger, curve: Callable[[Assignment, int], EpochResult]) -> None:
    assignment = ledger.next_trial()
    assert assignment is not None
    path = ledger.experiment.files(assignment.trial_id).best
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    epoch = 1
    while ledger.report(assignment.trial_id, curve(assignment, epoch), node=""):
        epoch += 1


@pytest.mark.slow
def test_a_trial_costs_the_driver_the_same_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "make_sampler", lambda **_: optuna.samplers.RandomSampler(seed=0))
    monkeypatch.setattr(parts, "BLOCK", 10)
    monkeypatch.setattr(parts, "EPOCHS_SECONDS", math.inf)
    written: list[int] = []
    replace_file = parts.replace_file

    def counting(path: Path, content: bytes, *, sync: bool) -> None:
        written.append(len(content))
        replace_file(path, content, sync=sync)

    monkeypatch.setattr(parts, "replace_file", counting)
    experiment = new_experiment(tmp_path)
    per_fifty: list[tuple[int, int, int]] = []
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=300, baselines=(), keep_checkpoints=5)
        for _ in range(6):
            written.clear()
            for _ in range(40):
                one_trial(ledger, LEARNING)
            with counting_opcodes() as opcodes:
                for _ in range(10):
                    one_trial(ledger, LEARNING)
            per_fifty.append((len(written), sum(written), opcodes[0]))
    writes, num_bytes, instructions = ([figures[i] for figures in per_fifty] for i in range(3))
    assert max(writes) <= 50 * 3  # its epochs, its row, and that of a trial whose weights go
    assert max(num_bytes[1:]) < 1.2 * min(num_bytes[1:])
    assert max(instructions[1:]) < 1.5 * min(instructions[1:])  # some trials have three epochs, some nine
    assert len(list((experiment.root / "trials").iterdir())) == 1 + 300 // 10

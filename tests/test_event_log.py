"""The event log is the truth: it survives torn writes, and everything else can be rebuilt from it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from results import parts
from results.events import Decided, EpochReported, EventLog, decode, encode, read_events
from results.files import replace_file
from results.schema import (
    DataWarning,
    EstimatePredictions,
    SelectPredictions,
    TestPredictions,
    UsageError,
)
from results.store import Experiment, ExperimentLocked, Superseded, TrialFiles, names
from results.study import open_study
from tests.simulation import LEARNING, epoch_result, new_experiment, run_search

FLOATS = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=100)
@given(FLOATS, st.none() | FLOATS, st.text())
def test_events_round_trip_whatever_the_figures(loss: float, nll: float | None, node: str) -> None:
    event = EpochReported(at=1.5, trial_id="t00001", node=node, result=epoch_result(1, 0.5, loss=loss, nll=nll))
    line = encode(event)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert repr(decode(line)) == repr(event)  # repr, since NaN is not equal to itself


def decided(epoch: int) -> Decided:
    return Decided(at=float(epoch), trial_id="t00000", epoch=epoch, rung=None, decision="continue")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.integers(1, 200))
def test_a_torn_last_line_is_dropped_and_only_it(tmp_path: Path, torn_bytes: int) -> None:
    folder = tmp_path / str(torn_bytes)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    log = EventLog(folder)
    log.append(decided(1), decided(2))
    log.close()
    with log.segment.open("rb+") as file:
        whole = file.seek(0, 2)
        last = whole // 2
        file.truncate(whole - min(torn_bytes, last))
    log = EventLog(folder)
    log.append(decided(3))
    log.close()
    assert list(read_events(folder)) == [decided(1), decided(3)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(decided(1), decided(2))
    log.close()
    log.segment.write_text("garbage\n" + log.segment.read_text())
    with pytest.raises(UsageError, match=r"000001.jsonl, line 1 is not an event"):
        list(read_events(tmp_path))


def test_nothing_is_appended_after_a_failed_write(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.close()  # the descriptor is gone, as on a failing disk
    for message in ("Bad file descriptor", "could not be written to earlier"):
        with pytest.raises(OSError, match=message):
            log.append(decided(1))


def snapshot(root: Path) -> dict[str, object]:
    """Everything in a folder that is projected from the log, as comparable values."""
    tables = {
        str(path.relative_to(root)): repr(pq.read_table(path).to_pylist())  # NaN is not equal to itself
        for folder in ("trials", "epochs")
        for path in sorted((root / folder).iterdir())
    }
    study = open_study(root / "study.journal", name=root.name, mode="max")
    trials = [
        (t.number, t.state, t.values, *map(in_order, (t.params, t.intermediate_values, t.user_attrs, t.distributions)))
        for t in study.get_trials()
    ]
    info = json.loads((root / "experiment.json").read_text())
    return {**tables, "study": repr(trials), "info": info}


def in_order(mapping: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return sorted(mapping.items())


def test_a_rebuilt_folder_equals_the_live_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BLOCK", 5)
    experiment = new_experiment(tmp_path, num_trials=12)
    run_search(experiment, LEARNING, num_trials=12)
    before = snapshot(experiment.root)
    assert len(before) == 2 * 4 + 2  # tables of three parts and their schema, the study and experiment.json
    for folder in ("trials", "epochs"):
        shutil.rmtree(experiment.root / folder)
    (experiment.root / "study.journal").unlink()
    (experiment.root / "experiment.json").unlink()
    Experiment.open(tmp_path, experiment.name).rebuild()
    assert snapshot(experiment.root) == before


def test_a_truncated_part_is_named_the_others_load_and_rebuild_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "BLOCK", 2)
    experiment = new_experiment(tmp_path, num_trials=6)
    run_search(experiment, LEARNING, num_trials=6)
    part = experiment.root / "trials" / "t00002-t00003.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.warns(DataWarning, match=r"t00002-t00003.parquet cannot be read .* orchestrator.rebuild"):
        assert list(experiment.trials()["trial_id"]) == ["t00000", "t00001", "t00004", "t00005"]
    experiment.rebuild()
    assert len(experiment.trials()) == 6


def test_the_study_has_the_states_of_the_design(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path, num_trials=12)
    run_search(experiment, LEARNING, num_trials=12)
    trials = experiment.trials().set_index("trial_id")
    study = open_study(experiment.study_path, name=experiment.name, mode="max")
    states = {f"t{t.number:05d}": t.state.name for t in study.get_trials()}
    for trial_id, row in trials.iterrows():
        diverged = row["stop_reason"].startswith("diverged")
        expected = {"completed": "COMPLETE", "pruned": "PRUNED", "failed": "PRUNED" if diverged else "FAIL"}
        assert states[trial_id] == expected[row["status"]]
        told = study.get_trials()[int(trial_id[1:])]
        if diverged:
            assert told.intermediate_values == {}
            assert told.value is None
        elif row["status"] == "pruned":
            assert list(told.intermediate_values) == list(range(1, row["epochs_trained"] + 1))
    assert {"completed", "pruned", "failed"} <= set(trials["status"])
    assert study.best_value == trials.loc[trials["status"] == "completed", "val_accuracy"].max()


def test_tables_are_read_by_pandas_as_they_are(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path, num_trials=4)
    run_search(experiment, LEARNING, num_trials=4)
    trials = pd.read_parquet(experiment.root / "trials")
    assert list(trials["trial_id"]) == [f"t{i:05d}" for i in range(4)]
    assert trials["config.dropout"].notna().all()
    epochs = pd.read_parquet(experiment.root / "epochs")
    assert epochs.groupby("trial_id")["epoch"].agg(list).map(lambda e: e == list(range(1, len(e) + 1))).all()


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    other = Experiment.open(tmp_path, experiment.name)
    with experiment.driving(), pytest.raises(ExperimentLocked, match="being written to by another process"):
        other.rebuild()
    other.rebuild()


def test_writing_needs_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="only inside `driving"):
        new_experiment(tmp_path).record(decided(1))


def test_a_worker_of_an_earlier_driver_cannot_write(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        files = experiment.files("t00000")
        files.replace(files.resume, b"current")
    experiment.rebuild()
    with pytest.raises(Superseded, match="driver 1; driver 2 has taken over"):
        files.replace(files.resume, b"late")
    assert files.resume.read_text() == "current"
    assert [p.name for p in files.resume.parent.iterdir()] == ["resume.pt"]


def test_experiments_exist_once(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path, name="twice")
    with pytest.raises(UsageError, match=r"'twice' exists already .* add --resume .* or choose another --name"):
        Experiment.create(tmp_path, name="twice", info=experiment.info)
    with pytest.raises(UsageError, match=r"no experiment 'thrice' in .*; there are: twice"):
        Experiment.open(tmp_path, "thrice")
    with pytest.raises(UsageError, match=r"'\.\./x' is not a name"):
        Experiment.check_new(tmp_path, "../x")


def test_experiments_are_listed_newest_last(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        new_experiment(tmp_path, name=name)
    assert names(tmp_path) == ["b", "a", "c"]


def test_a_results_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to .*/file; choose another --results-dir"):
        Experiment.create(tmp_path / "file", name="x", info=experiment.info)


def test_a_replacement_that_is_not_permitted_leaves_the_old_file(tmp_path: Path) -> None:
    def forbid() -> None:
        raise Superseded("too late")

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(Superseded, match="too late"):
        replace_file(path, b"new", sync=True, permitted=forbid)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_predictions_round_trip(tmp_path: Path, num: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = (SelectPredictions, EstimatePredictions, TestPredictions)
    predictions = [
        kind(rng.normal(size=(num, classes)).astype(np.float16), rng.integers(0, classes, num), rng.permutation(num))
        for kind in kinds
    ]
    root = tmp_path / str(seed)
    experiment = new_experiment(root) if not (root / "sim").exists() else Experiment.open(root, "sim")
    TrialFiles(str(experiment.root), "t00000", 0).write_predictions({"best": predictions})
    for part in predictions:
        read = experiment.predictions("t00000", type(part))
        for field in ("logits_NC", "labels_N", "example_ids_N"):
            assert np.array_equal(getattr(read, field), getattr(part, field))


def test_predictions_of_unequal_length_cannot_be_built() -> None:
    with pytest.raises(ValueError, match=r"disagree in length: logits \(3, 2\)"):
        SelectPredictions(np.zeros((3, 2), np.float16), np.zeros(2, np.int64), np.zeros(3, np.int64))


def test_a_log_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=1)
    gap = EpochReported(at=1.0, trial_id="t00000", node="", result=epoch_result(99, 0.5))
    stranger = EpochReported(at=1.0, trial_id="t00077", node="", result=epoch_result(1, 0.5))
    with experiment.driving():
        with pytest.raises(UsageError, match="epoch 99 of t00000 after epoch 9"):
            experiment.record(gap)
        with pytest.raises(UsageError, match="epoch of t00077, which never started"):
            experiment.record(stranger)
    assert len(Experiment.open(tmp_path, experiment.name).trials()) == 1  # neither was written


def test_diverged_results_are_known_by_their_figures() -> None:
    assert not epoch_result(1, 0.5).diverged
    assert epoch_result(1, 0.5, loss=math.inf).diverged
    assert epoch_result(1, 0.5, nll=math.nan).diverged


def test_a_log_without_its_beginning_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=3)
    first, *others = sorted((experiment.root / "events").iterdir())
    first.unlink()
    for segments in (others, []):
        for segment in set(others) - set(segments):
            segment.unlink()
        with pytest.raises(UsageError, match=r"000001.jsonl is missing|does not hold the beginning"):
            Experiment.open(tmp_path, experiment.name)
    assert len(pd.read_parquet(experiment.root / "trials")) == 3


def test_a_missing_segment_is_named_and_nothing_is_removed(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=3)
    experiment.rebuild()
    (experiment.root / "events" / "000002.jsonl").unlink()
    with pytest.raises(UsageError, match=r"000002.jsonl is missing; restore it"):
        Experiment.open(tmp_path, experiment.name)


def test_rows_that_a_cut_log_does_not_know_are_not_removed(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    run_search(experiment, LEARNING, num_trials=4)
    segment = experiment.root / "events" / "000002.jsonl"
    lines = segment.read_text().splitlines(keepends=True)
    segment.write_text("".join(lines[: len(lines) // 2]))
    cut = Experiment.open(tmp_path, experiment.name)
    with pytest.raises(UsageError, match=r"trials has t0000\d.*, which events/ knows nothing of: the log is damaged"):
        cut.rebuild()
    assert len(pd.read_parquet(experiment.root / "trials")) == 4

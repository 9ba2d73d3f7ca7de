"""What is kept is the same on a disk and in an object store."""

from __future__ import annotations

import pickle
from pathlib import Path

import pandas as pd
import pytest

from orchestrator import cli, ensemble
from orchestrator.ray_cluster import check_reachable
from results.analysis import ensemble_scores, leaderboard, learning_curves
from results.schema import UsageError
from results.store import Experiment, Superseded, names
from tests.simulation import LEARNING, ledger_of, new_experiment, run_search, run_with_predictions
from tests.test_event_log import snapshot


@pytest.fixture(params=["disk", "object store"])
def place(request: pytest.FixtureRequest, results: str, tmp_path: Path) -> str:
    return results if request.param == "object store" else str(tmp_path / "disk")


def test_a_search_leaves_the_same_tables(place: str, tmp_path: Path) -> None:
    expected = new_experiment(tmp_path / "expected", num_trials=12)
    run_search(expected, LEARNING, num_trials=12)
    experiment = new_experiment(place, num_trials=12)
    run_search(experiment, LEARNING, num_trials=12)
    times = ["started_at", "finished_at"]
    ours, theirs = experiment.trials().drop(columns=times), expected.trials().drop(columns=times)
    pd.testing.assert_frame_equal(ours, theirs)
    pd.testing.assert_frame_equal(
        pd.read_parquet(f"{place.partition('?')[0]}/sim/trials{'?' if '?' in place else ''}{place.partition('?')[2]}"),
        experiment.trials(),
    )
    assert names(place) == ["sim"]
    assert len(leaderboard(place)) == (experiment.trials()["status"] == "completed").sum()
    assert len(learning_curves(place)) == len(experiment.epochs())
    reopened = Experiment.open(place, "sim")
    before = snapshot(reopened.root)
    reopened.rebuild()
    assert snapshot(Experiment.open(place, "sim").root) == before
    assert reopened.disk_bytes() > 10_000


def test_experiments_exist_once(place: str) -> None:
    experiment = new_experiment(place, name="twice")
    run_search(experiment, LEARNING, num_trials=1)
    with pytest.raises(UsageError, match=r"'twice' exists already .* add --resume .* or choose another --name"):
        Experiment.create(place, name="twice", info=experiment.info)
    with pytest.raises(UsageError, match=r"no experiment 'thrice' in .*; there are: twice"):
        Experiment.open(place, "thrice")


def test_a_trials_files_are_replaced_read_and_removed_by_the_current_driver_alone(place: str) -> None:
    experiment = new_experiment(place)
    with experiment.driving():
        files = pickle.loads(pickle.dumps(experiment.files("t00000")))  # noqa: S301  # as Ray does
        assert not files.exists(files.resume)
        files.replace(files.resume, b"first")
        files.replace(files.resume, b"second")
        assert files.exists(files.resume)
        with files.open(files.resume) as file:
            assert file.read() == b"second"
        files.remove(files.resume)
        files.remove(files.resume)
        assert not files.exists(files.resume)
        files.replace(files.best, b"weights")
    Experiment.open(place, "sim").rebuild()
    with pytest.raises(Superseded, match="driver 1; driver 2 has taken over"):
        files.replace(files.best, b"late")


def test_an_ended_trial_keeps_its_weights_alone_and_none_once_they_are_surplus(place: str) -> None:
    experiment = new_experiment(place)
    kept: list[str] = []
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=4, keep_checkpoints=1)
        while (assignment := ledger.next_trial()) is not None:
            files = experiment.files(assignment.trial_id)
            for path in (files.resume, files.best):
                files.replace(path, b"content")
            for epoch in range(1, 10):
                if not ledger.report(assignment.trial_id, LEARNING(assignment, epoch), node="here"):
                    break
    for trial_id in experiment.history.trials:
        files = experiment.files(trial_id)
        assert not files.exists(files.resume)
        kept += [trial_id] * files.exists(files.best)
    table = experiment.trials()
    assert kept == list(table.loc[table["checkpoint"] != "", "trial_id"])
    assert len(kept) == 1


def test_an_ensemble_has_the_same_scores_and_members(place: str, tmp_path: Path) -> None:
    scores = {}
    for where in (place, str(tmp_path / "expected")):
        experiment = new_experiment(where, num_trials=6)
        run_with_predictions(experiment, num_trials=6)
        assert ensemble.main(["--results-dir", where, "--top-k", "2"]) == cli.DONE
        scores[where] = ensemble_scores(where)
    expected = scores[str(tmp_path / "expected")]
    assert len(expected) > 50
    speed = ["training_seconds"]
    pd.testing.assert_frame_equal(scores[place].drop(columns=speed), expected.drop(columns=speed))


def test_all_nodes_of_a_cluster_reach_an_object_store() -> None:
    check_reachable("s3://bucket/runs")  # without asking any of them: no Ray runs here

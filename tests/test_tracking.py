"""Epochs told to trackers: each of them has the figures, a resumed training goes on with its run, and none stops it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import tracking
from orchestrator.tracking import TRACKERS, Track, Tracked, Tracker, figures_of
from results.schema import DataWarning, UsageError
from tests.simulation import epoch_result, new_experiment


@pytest.fixture
def tracked(tmp_path: Path) -> Tracked:
    return Tracked(new_experiment(tmp_path / "runs"), "t00000", {"lr": 0.1, "backbone": "small_cnn", "dropout": 0.5})


def tell(name: str, tracked: Tracked, *epochs: int) -> None:
    with tracking.tracking(name, tracked) as track:
        for epoch in epochs:
            track(epoch_result(epoch, epoch / 10))


def test_what_an_epoch_does_not_have_is_left_out() -> None:
    figures = figures_of(replace(epoch_result(1, 0.5), val_ece=None))
    assert figures["val_accuracy"] == 0.5
    assert "val_ece" not in figures
    assert "epoch" not in figures


def test_tensorboard_has_every_epoch_once_also_after_a_resume(tracked: Tracked) -> None:
    pytest.importorskip("tensorboardX")
    tell("tensorboard", tracked, 1, 2)
    tell("tensorboard", tracked, 3)
    assert scalars(tracked.experiment.tensorboard_folder("t00000"), "val_accuracy") == {1: 0.1, 2: 0.2, 3: 0.3}


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """A tag's values in TensorBoard's files: records of length, checksum, protocol buffer, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                if value.tag == tag:
                    found[event.step] = round(value.simple_value, 6)
            content = content[16 + length :]
    return found


@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_has_one_run_a_trial_also_after_a_resume(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tracked.experiment.root}/mlflow.db")
    tell("mlflow", tracked, 1, 2)
    tell("mlflow", tracked, 3)
    (run,) = mlflow.search_runs(experiment_names=[tracked.experiment.name], output_format="list")
    assert run.data.params["backbone"] == "small_cnn"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_accuracy")
    assert {metric.step: metric.value for metric in history} == {1: 0.1, 2: 0.2, 3: pytest.approx(0.3)}


def test_wandb_is_told(tracked: Tracked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell("wandb", tracked, 1, 2)
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"val_accuracy" in log.read_bytes()


def test_a_tracker_that_cannot_begin_is_refused_with_what_it_said(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def unreachable(tracked: Tracked) -> Iterator[Track]:
        raise ValueError("No API key found.\nmore of it")
        yield

    monkeypatch.setitem(TRACKERS, "unreachable", Tracker("json", "json", unreachable))
    with pytest.raises(UsageError, match=r"--track unreachable cannot begin \(No API key found.\); .* and --resume"):
        tell("unreachable", tracked, 1)


def test_a_tracker_that_fails_is_warned_of_once_and_stops_nothing(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    @contextlib.contextmanager
    def failing(tracked: Tracked) -> Iterator[Track]:
        def track(result: object) -> None:
            told.append(result)
            raise ConnectionError("the server is gone")

        yield track

    monkeypatch.setitem(TRACKERS, "failing", Tracker("json", "json", failing))
    with pytest.warns(DataWarning, match="--track failing failed .the server is gone.; the training goes on") as caught:
        tell("failing", tracked, 1, 2, 3)
    assert (len(caught), len(told)) == (1, 3)


def test_a_missing_package_is_refused_with_the_command_that_installs_it() -> None:
    with pytest.raises(UsageError, match="not installed: pip install that-package"):
        Tracker("no_such_module", "that-package", TRACKERS["wandb"].begin).check_installed()

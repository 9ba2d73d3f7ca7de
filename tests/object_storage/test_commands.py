"""Whole commands with results in an object store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from orchestrator.serving import load_ensemble
from results.analysis import ensemble_scores
from results.objects import within
from results.schema import SelectPredictions
from results.store import Experiment, names
from tests.conftest import CommandLine, command_environment
from tests.object_storage.places import be_on, eventually, log_in, stored, through
from tests.object_storage.server import Gate

FIGURES = ["trial_id", "status", "epochs_trained", "best_epoch", "val_accuracy", "val_nll", "config.dropout"]


@pytest.mark.ray
@pytest.mark.slow
def test_commands_leave_in_a_store_what_they_leave_on_a_disk(
    results: str, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {}
    for place in (results, str(tmp_path / "disk")):
        for module, *arguments in (
            ("search", "digits", "--num-trials", "4", "--max-epochs", "2", "--max-concurrent", "1"),
            ("ensemble", "--top-k", "2", "--include-stopped"),
            ("distill", "--max-epochs", "1", "--without-control", "--name", "student"),
            ("rebuild", "digits"),
        ):
            done = command(f"orchestrator.{module}", *arguments, "--results-dir", place)
            assert done.returncode == 0, done.stderr
        experiment = Experiment.open(place, "digits")
        best = experiment.predictions("t00000", SelectPredictions)
        tables[place] = (experiment.trials()[FIGURES], ensemble_scores(place), best.logits_NC, names(place))
    ours, theirs = tables.values()
    pd.testing.assert_frame_equal(ours[0], theirs[0])
    timed = ["training_seconds", "images_per_second"]
    pd.testing.assert_frame_equal(ours[1].drop(columns=timed), theirs[1].drop(columns=timed))
    assert (ours[2] == theirs[2]).all()
    assert ours[3] == theirs[3] == ["digits", "student"]
    assert not (tmp_path / "s3:").exists()
    be_on("second", tmp_path, monkeypatch)
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
    places = (results, str(tmp_path / "disk"))
    probs = [load_ensemble(within(place, "digits/ensembles/e0001")).predict(images) for place in places]
    assert (probs[0] == probs[1]).all()


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_goes_on_after_an_outage_as_if_there_had_been_none(
    results: str, port: int, command: CommandLine, tmp_path: Path
) -> None:
    arguments = ["digits", "--num-trials", "6", "--max-epochs", "3", "--max-concurrent", "1"]
    done = command("orchestrator.search", *arguments, "--results-dir", str(tmp_path / "disk"))
    assert done.returncode == 0, done.stderr
    with Gate(port) as gate:
        search_command = [sys.executable, "-m", "orchestrator.search", *arguments]
        process = subprocess.Popen(
            [*search_command, "--results-dir", through(gate, results)],
            cwd=tmp_path,
            env=command_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        store = stored(results, "digits")
        eventually(lambda: any('"epoch"' in line for line in log_in(store, tmp_path / "log")))
        gate.is_shut = True
        refused = gate.num_refused
        eventually(lambda: gate.num_refused > refused + 10)
        assert process.poll() is None
        gate.is_shut = False
        said = process.communicate()[1]
    assert process.returncode == 0, said
    ours, theirs = (Experiment.open(place, "digits").trials() for place in (results, str(tmp_path / "disk")))
    pd.testing.assert_frame_equal(ours[FIGURES], theirs[FIGURES])
    assert (ours["retries"] == 0).all()

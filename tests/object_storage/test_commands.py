"""Whole commands with results in an object store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from orchestrator.serving import load_ensemble
from results.analysis import ensemble_scores
from results.objects import within
from results.schema import SelectPredictions
from results.store import Experiment, names
from tests.background import PATIENCE, running, wait_until
from tests.conftest import CommandLine
from tests.object_storage.places import be_on, log_in, stored, through
from tests.object_storage.server import Gate

FIGURES = ["trial_id", "status", "epochs_trained", "best_epoch", "val_accuracy", "val_nll", "config.dropout"]


TIMED = ["training_seconds", "images_per_second"]
SEARCH = ["digits", "--num-trials", "6", "--max-epochs", "3", "--max-concurrent", "1"]
LATER = (
    ("ensemble", "--top-k", "2", "--include-stopped"),
    ("distill", "--max-epochs", "1", "--without-control", "--name", "student"),
    ("rebuild", "digits"),
)


@pytest.mark.ray
@pytest.mark.slow
def test_commands_leave_in_a_store_that_was_away_for_a_while_what_they_leave_on_a_disk(
    results: str, port: int, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = str(tmp_path / "disk")
    done = command("orchestrator.search", *SEARCH, "--results-dir", disk)
    assert done.returncode == 0, done.stderr
    search_with_an_outage(results, port, tmp_path)
    tables = {}
    for place in (results, disk):
        for module, *arguments in LATER:
            done = command(f"orchestrator.{module}", *arguments, "--results-dir", place)
            assert done.returncode == 0, done.stderr
        experiment = Experiment.open(place, "digits")
        trials = experiment.trials()
        best = experiment.predictions(trials.query("status == 'completed'")["trial_id"].iloc[0], SelectPredictions)
        tables[place] = (trials, ensemble_scores(place), best.logits_NC, names(place))
    ours, theirs = tables.values()
    pd.testing.assert_frame_equal(ours[0][FIGURES], theirs[0][FIGURES])
    assert (ours[0]["retries"] == 0).all()
    pd.testing.assert_frame_equal(ours[1].drop(columns=TIMED), theirs[1].drop(columns=TIMED))
    assert (ours[2] == theirs[2]).all()
    assert ours[3] == theirs[3] == ["digits", "student"]
    assert not (tmp_path / "s3:").exists()
    be_on("second", tmp_path, monkeypatch)
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
    probs = [load_ensemble(within(place, "digits/ensembles/e0001")).predict(images) for place in (results, disk)]
    assert (probs[0] == probs[1]).all()


def search_with_an_outage(results: str, port: int, folder: Path) -> None:
    """Search with results in a store that refuses to answer after the first epoch, and then answers again."""
    output, store = folder / "output", stored(results, "digits")
    with Gate(port) as gate:
        arguments = [*SEARCH, "--results-dir", through(gate, results)]
        with running(folder, "orchestrator.search", *arguments, output=output) as process:
            wait_until(lambda: any('"epoch"' in line for line in log_in(store, folder / "log")), process, output)
            gate.is_shut = True
            refused = gate.num_refused
            wait_until(lambda: gate.num_refused > refused + 10, process, output)
            assert process.poll() is None
            gate.is_shut = False
            assert process.wait(timeout=PATIENCE) == 0, output.read_text()

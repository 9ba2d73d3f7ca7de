"""A search on real images: what it prints of early stopping, and what optuna-dashboard shows of it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import CommandLine

pytestmark = pytest.mark.ray

STATES = {"completed": "Complete", "pruned": "Pruned", "failed": "Fail"}


def test_a_search_prints_its_audit_and_opens_in_the_dashboard(command: CommandLine, tmp_path: Path) -> None:
    done = command(
        *("orchestrator.search", "digits", "--num-trials", "26", "--max-epochs", "6", "--train-fraction", "0.2"),
        *("--control-fraction", "0.5", "--finalists", "1", "--results-dir", "runs", "--name", "audited"),
    )
    assert done.returncode == 0, done.stderr
    trials = pd.read_parquet(tmp_path / "runs/audited/trials")
    epochs = pd.read_parquet(tmp_path / "runs/audited/epochs")
    controls = trials[trials["control"] & (trials["stage"] == "search")]
    assert len(controls) >= 10
    assert set(controls["status"]) == {"completed"}

    rows = epochs[epochs["rung"].notna() & epochs["trial_id"].isin(controls["trial_id"])].set_index("trial_id")
    assert set(rows["epoch"]) == {2}
    assert set(rows["decision"]) <= {"continue", "spared"}
    final = controls.set_index("trial_id")["val_accuracy"]
    correlation = rows["val_accuracy"].rank().corr(final.loc[rows.index].rank())
    assert f"rung 1 (epoch 2), {len(rows)} controls: rank correlation with the final value {correlation:+.2f}" in (
        done.stdout
    )
    spared = rows.index[rows["decision"] == "spared"]
    best = final.drop(spared).max()
    printed = re.search(r"of (\d+) that would have been stopped, (\d+) ended best", done.stdout)
    assert bool(printed) == bool(len(spared))
    if printed:
        assert [int(number) for number in printed.groups()] == [len(spared), int((final[spared] > best).sum())]

    (finalist,) = trials[trials["stage"] == "finalist"].to_dict("records")
    assert f"{finalist['finalist_of']}  val_accuracy" in done.stdout
    check_dashboard(tmp_path / "runs/audited/study.journal", trials, epochs)


def check_dashboard(journal: Path, trials: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """The states and values that optuna-dashboard serves are those of the tables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dashboard = [str(Path(sys.executable).with_name("optuna-dashboard")), str(journal)]
    process = subprocess.Popen([*dashboard, "--port", str(port), "--server", "wsgiref", "--quiet"])
    try:
        (study,) = fetched(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
        shown = fetched(f"http://127.0.0.1:{port}/api/studies/{study['study_id']}")["trials"]
    finally:
        process.kill()
        process.wait()
    assert [f"t{trial['number']:05d}" for trial in shown] == trials["trial_id"].tolist()
    for trial, row in zip(shown, trials.to_dict("records"), strict=True):
        assert trial["state"] == STATES[row["status"]]
        if row["status"] == "completed":
            assert trial["values"] == [row["val_accuracy"]]
        curve = epochs[epochs["trial_id"] == row["trial_id"]].set_index("epoch")["val_accuracy"]
        assert {v["step"]: v["value"] for v in trial["intermediate_values"]} == curve.to_dict()


def fetched(url: str) -> dict[str, Any]:
    """JSON from a server that may be about to start."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.URLError:
            assert time.monotonic() < deadline, url
            time.sleep(0.2)

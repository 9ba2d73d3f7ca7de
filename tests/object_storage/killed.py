"""A search whose process kills itself: python -m tests.object_storage.killed RESULTS NUM_PUTS."""

from __future__ import annotations

import itertools
import os
import platform
import signal
import sys
import time
from typing import Any

from orchestrator.ledger import Assignment
from results import lock, mirror
from results.objects import ObjectStore
from results.schema import EpochResult
from tests.simulation import LEARNING, new_experiment, run_search

NUM_TRIALS = 30


def main(results: str, num_puts: int) -> None:
    """Search on the first host, and kill this process before it puts so many objects; 0: never."""
    mirror.EVENTS_SECONDS, mirror.TABLES_SECONDS, lock.SETTLING_SECONDS = 0.05, 0.2, 0.05
    platform.node = lambda: "first"
    experiment = new_experiment(results, num_trials=NUM_TRIALS)  # type: ignore[arg-type]
    puts, put = itertools.count(1), ObjectStore.put

    def put_or_die(store: ObjectStore, name: str, content: bytes, **options: Any) -> None:
        if "/t0" not in name and next(puts) == num_puts:  # what workers put does not count
            os.kill(os.getpid(), signal.SIGKILL)
        put(store, name, content, **options)

    def curve(assignment: Assignment, epoch: int) -> EpochResult:
        time.sleep(0.02)
        files = experiment.files(assignment.trial_id)
        files.replace(files.resume, f"{assignment.config['dropout']} {epoch}".encode())
        return LEARNING(assignment, epoch)

    ObjectStore.put = put_or_die  # type: ignore[method-assign]
    run_search(experiment, curve, num_trials=NUM_TRIALS)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

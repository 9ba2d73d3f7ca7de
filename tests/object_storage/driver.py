"""A driver in a process of its own, on a host of its own, which is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from results import mirror
from tests.conftest import command_environment
from tests.object_storage.places import eventually, log_in, stored

DRIVER = """
import itertools, os, platform, signal, sys, time
from results import lock, mirror
mirror.EVENTS_SECONDS, mirror.TABLES_SECONDS, lock.SETTLING_SECONDS = 0.05, 0.2, 0.05
platform.node = lambda: "first"
from results.objects import ObjectStore
from tests.simulation import LEARNING, new_experiment, run_search
place, num_puts = sys.argv[1], int(sys.argv[2])
experiment = new_experiment(place, num_trials=30)
puts = itertools.count(1)
put = ObjectStore.put
def put_or_die(store, name, content, **options):
    if "/t0" not in name and next(puts) == num_puts:  # what workers put does not count
        os.kill(os.getpid(), signal.SIGKILL)
    put(store, name, content, **options)
ObjectStore.put = put_or_die
print("began", flush=True)
def curve(assignment, epoch):
    time.sleep(0.02)
    files = experiment.files(assignment.trial_id)
    files.replace(files.resume, f"{assignment.config['dropout']} {epoch}".encode())
    return LEARNING(assignment, epoch)
run_search(experiment, curve, num_trials=30)
"""


def start_driver(results: str, tmp_path: Path, *, num_puts: int = 0) -> subprocess.Popen[bytes]:
    """A driver on the first host, another process, which is killed before it puts so many objects."""
    env = {**command_environment(), mirror.CACHE_VARIABLE: str(tmp_path / "first")}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, results, str(num_puts)], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"began\n"
    return process


def killed_driver(results: str, tmp_path: Path, *, after: int = 0, num_puts: int = 0) -> list[str]:
    """Kill a driver once the store has so many events, or before a put of its own; the log in the store then."""
    process = start_driver(results, tmp_path, num_puts=num_puts)
    if not num_puts:
        eventually(lambda: len(log_in(stored(results), tmp_path / "log")) > after)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stdout is not None
    process.stdout.close()
    return log_in(stored(results), tmp_path / "log")

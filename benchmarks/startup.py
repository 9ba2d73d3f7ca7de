"""Seconds from `search digits` to the first recorded epoch, with this code against another commit's: the ratio.

    python benchmarks/startup.py COMMIT

Both versions run in turns in an empty folder, and each run ends after its first epoch. Seconds of a CPU are those of
all processes together: on a machine that has other work they say more.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from against_version import HERE, other_version

SECONDS_BETWEEN_LOOKS = 0.1
LOOKS_A_SUM = 10  # to go through all processes of a machine takes a while


@dataclass(frozen=True)
class Start:
    """What it took until the first epoch was in the event log."""

    seconds: float
    cpu_seconds: float


def first_epoch(code: Path, folder: Path, *, name: str, arguments: list[str]) -> Start:
    """Run a search with one version's code until its first epoch has been recorded."""
    command = [sys.executable, "-m", "orchestrator.search", "digits", "--results-dir", str(folder), "--name", name]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    began = time.monotonic()
    with subprocess.Popen([*command, *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL) as search:
        cpu_seconds: dict[int, float] = {}
        looks = 0
        while not _has_epoch(folder / name / "events"):
            if search.poll() is not None:
                raise RuntimeError(f"{name}: the search ended before its first epoch")
            if looks % LOOKS_A_SUM == 0:
                cpu_seconds |= _cpu_seconds(search.pid)
            looks += 1
            time.sleep(SECONDS_BETWEEN_LOOKS)
        seconds = time.monotonic() - began
        cpu_seconds |= _cpu_seconds(search.pid)
        start = Start(seconds, sum(cpu_seconds.values()))
        search.send_signal(signal.SIGTERM)
    return start


def _has_epoch(events: Path) -> bool:
    return any('"event": "epoch"' in segment.read_text() for segment in events.glob("*"))


def _cpu_seconds(pid: int) -> dict[int, float]:
    """What each process of a search has used so far."""
    used = {}
    try:
        search = psutil.Process(pid)
        for process in (search, *search.children(recursive=True)):
            times = process.cpu_times()
            used[process.pid] = times.user + times.system
    except psutil.NoSuchProcess:
        pass
    return used


def main() -> None:
    """Print both starts in each round, and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-trials", default="2")
    args = parser.parse_args()
    ratios, cpu_ratios = [], []
    with tempfile.TemporaryDirectory() as temporary, other_version(args.commit) as other:
        for number in range(-1, args.rounds):  # the first round fills the caches of files, and does not count
            starts = {
                version: first_epoch(
                    code,
                    Path(temporary),
                    name=f"{version}{number}",
                    arguments=["--num-trials", args.num_trials, "--device", "cpu"],
                )
                for version, code in (("other", other), ("this", HERE))
            }
            if number < 0:
                continue
            ratios.append(starts["this"].seconds / starts["other"].seconds)
            cpu_ratios.append(starts["this"].cpu_seconds / starts["other"].cpu_seconds)
            print(
                "  ".join(f"{v}: {s.seconds:.1f} s, {s.cpu_seconds:.1f} s of a CPU" for v, s in starts.items()),
                flush=True,
            )
    for what, of in (("seconds", ratios), ("seconds of a CPU", cpu_ratios)):
        print(f"ratio of {what}: {statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})")


if __name__ == "__main__":
    main()

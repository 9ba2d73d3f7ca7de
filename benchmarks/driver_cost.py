"""What the driver itself costs a report and a trial, for searches of 100 to 10,000 trials, without Ray or training.

    python benchmarks/driver_cost.py
    python benchmarks/driver_cost.py 100 1000 --sampler random --folder /mnt/disk

The real experiment, ledger, halving and console are driven as a search drives them, eight trials at a time, each
replaying a learning curve drawn with replacement from recorded ones (those of the folder given that were trained to
their end). What workers would write (a small file for weights, one for predictions) is written between the timed
calls. Afterwards the experiment is opened, its tables are read and it is taken over as a resume does.

A report's milliseconds are all that the driver did divided by the number of reports, starts and ends of trials
included. They are divided among the event log (waiting for the disk, mostly), the tables, halving, the sampler with
its study, and the rest; "cpu" is what of them the processor was busy, which other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import pandas as pd
from interleaved import machine
from rich.console import Console

from orchestrator import driver
from orchestrator.console import SearchConsole
from orchestrator.halving import HALVINGS
from orchestrator.ledger import Assignment, Ledger
from orchestrator.plan import SearchPlan
from orchestrator.proposals import Proposer
from results.events import EventLog
from results.parts import Tables
from results.schema import EpochResult
from results.store import Experiment
from search_spaces.space import load_space
from trainables.datasets import LabelledImages, split

REFERENCE = Path(__file__).parents[1] / "results" / "reference" / "cifar100_small_cnn"
CONCURRENT = 8
PARTS = ("log", "tables", "halving", "sampler")
Curve = list[EpochResult]


def recorded_curves(folder: Path) -> list[Curve]:
    """The learning curves of `epochs.parquet` that have the most epochs; figures that it lacks are made up."""
    epochs = pd.read_parquet(folder / "epochs.parquet").sort_values(["trial_id", "epoch"])
    longest = epochs["epoch"].max()
    curves = []
    for _, rows in epochs.groupby("trial_id"):
        if len(rows) < longest:
            continue
        best = rows["val_accuracy"].cummax()
        best_epochs = rows["epoch"].where(rows["val_accuracy"] == best).ffill()
        shared = rows.drop(columns=["trial_id", "reported_at", "rung", "decision"]).to_dict("records")
        curves.append(
            [
                EpochResult(
                    **row,
                    val_ece=0.1,
                    num_parameters=106_372,
                    multiply_adds=10_000_000,
                    peak_memory_bytes=500_000_000,
                    best_epoch=int(best_epoch),
                    out_of_patience=False,
                )
                for row, best_epoch in zip(shared, best_epochs, strict=True)
            ]
        )
    return curves


class Stopwatch:
    """Seconds spent in each part, those of the processor among them, and how often it was called."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.cpu_seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as that of a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start, cpu_start = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start
                self.cpu_seconds[part] += time.process_time() - cpu_start
                self.calls[part] += 1

        return run

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count the time of what a driver is made of for as long as the context lasts."""
        parts: list[tuple[str, Any, str]] = [
            ("log", EventLog, "append"),
            ("tables", Tables, "follow"),
            ("sampler", Proposer, "ask"),
            ("sampler", Proposer, "tell"),
            *(("halving", halving, "judge") for halving in HALVINGS.values()),
        ]
        with contextlib.ExitStack() as stack:
            for part, owner, name in parts:
                stack.enter_context(mock.patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield


def drive(ledger: Ledger, curves: list[Curve], watch: Stopwatch) -> None:
    """Run a search to its end, the epochs of concurrent trials taking turns."""
    rng = np.random.default_rng(0)
    running: deque[tuple[Assignment, Curve, int]] = deque()
    start, report = (watch.timed(part, getattr(ledger, part)) for part in ("next_trial", "report"))
    while True:
        while len(running) < CONCURRENT and (assignment := start()) is not None:
            running.append((assignment, curves[rng.integers(len(curves))], assignment.epochs_recorded))
        if not running:
            return
        assignment, curve, epoch = running.popleft()
        files = ledger.experiment.files(assignment.trial_id)
        if epoch == 0:
            for path in (files.best, files.predictions):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
        if report(assignment.trial_id, curve[epoch], node="here"):
            running.append((assignment, curve, epoch + 1))


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def random_sampler(**_: Any) -> optuna.samplers.BaseSampler:
    """What is drawn without a model."""
    return optuna.samplers.RandomSampler(seed=0)


def measure(folder: Path, curves: list[Curve], *, num_trials: int, sampler: str) -> dict[str, float]:
    """Seconds, and milliseconds a report and a trial, of one search."""
    name = f"{sampler}-{num_trials}"
    overrides = {"max_epochs": len(curves[0])}
    space = load_space("cifar100_resnet18")
    plan = SearchPlan(source=space, overrides=overrides, num_trials=num_trials, seed=0, halving="asha")
    images = np.zeros((1000, 1, 4, 4), np.uint8)
    data = split(LabelledImages(images, np.arange(1000) % 2, 0, ("a", "b")))
    experiment = Experiment.create(folder, name=name, info=plan.info(name=name, data=data, command="benchmark"))
    console = SearchConsole(Console(quiet=True), num_trials=num_trials, metric=plan.space.metric)
    watch = Stopwatch()
    with contextlib.ExitStack() as stack:
        if sampler == "random":
            stack.enter_context(mock.patch.object(driver, "make_sampler", random_sampler))
        stack.enter_context(experiment.driving())
        ledger = driver.make_ledger(experiment, plan, max_concurrent=CONCURRENT, notify=console.changed)
        stack.enter_context(console.watching(ledger))
        stack.enter_context(watch.watching())
        drive(ledger, curves, watch)
    reports = watch.calls["report"]
    per_report = {
        kind: {part: 1000 * seconds[part] / reports for part in seconds}
        for kind, seconds in (("wall", watch.seconds), ("cpu", watch.cpu_seconds))
    }
    figures: dict[str, float] = {"trials": num_trials, "reports": reports}
    for kind, parts in per_report.items():
        whole = parts["report"] + parts["next_trial"]
        named = {part: parts.get(part, 0.0) for part in PARTS}
        prefix = "" if kind == "wall" else "cpu "
        figures[f"{prefix}ms a report"] = whole
        figures |= {f"{prefix}{part}": value for part, value in named.items()}
        figures[f"{prefix}rest"] = whole - sum(named.values())
    figures["ms a trial"] = figures["ms a report"] * reports / num_trials
    figures["total s"] = figures["ms a report"] * reports / 1000
    read = Experiment.open(folder, name)
    row_seconds = {
        "open s": seconds(lambda: Experiment.open(folder, name)),
        "trials() s": seconds(read.trials),
        "epochs() s": seconds(read.epochs),
        "take over s": seconds(read.rebuild),
    }
    if len(read.trials()) != num_trials or len(read.epochs()) != reports:
        raise RuntimeError(f"{name}: {len(read.trials())} trials and {len(read.epochs())} epochs in the tables")
    return figures | row_seconds


def main() -> None:
    """Print a line for each number of trials, and how the cost of a report grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--sampler", choices=("tpe", "random"), default="tpe")
    parser.add_argument("--curves", type=Path, default=REFERENCE, help="a folder with an epochs.parquet")
    parser.add_argument("--folder", type=Path, help="where experiments are written (default: a temporary folder)")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    curves = recorded_curves(args.curves)
    print(f"{machine('cpu')}; {len(curves)} curves of {len(curves[0])} epochs; sampler {args.sampler}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = []
        for num_trials in args.trials:
            rows.append(measure(folder, curves, num_trials=num_trials, sampler=args.sampler))
            print(f"{num_trials} trials: {rows[-1]['total s']:.1f} s", flush=True)
    by_size = sorted(rows, key=lambda row: row["trials"])
    print(pd.DataFrame(by_size).set_index("trials").round(3).T.to_string())
    for figure in ("ms a report", "cpu ms a report"):
        print(f"{figure}, largest to smallest: {by_size[-1][figure] / by_size[0][figure]:.2f}")


if __name__ == "__main__":
    main()

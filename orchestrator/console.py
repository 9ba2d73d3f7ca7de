"""What a search shows while it runs and at its end."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.audit import audit, findings
from orchestrator.ledger import Ledger
from orchestrator.pareto import non_dominated
from orchestrator.time_left import LATEST_TRIALS, seconds_left, so_far
from results.history import TrialHistory
from results.schema import Scalar, Status
from results.study import values_at_best
from search_spaces.space import METRICS, SearchSpace
from trainables.course import num_epochs
from trainables.progress import read_progress

LEADERS = 5
SECONDS_BETWEEN_LINES = 30.0
MARKS: dict[Status, str] = {"completed": "done", "pruned": "stopped", "failed": "failed"}


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """Bytes as `12.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def settings(params: dict[str, Scalar]) -> str:
    """Searched values on one line."""
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


class SearchConsole:
    """A live panel in a terminal; elsewhere a plain line a finished trial."""

    def __init__(self, console: Console, *, num_trials: int, metric: str) -> None:
        self._console = console
        self._num_trials = num_trials
        self._metric = metric
        self._ledger: Ledger | None = None
        self._started = time.monotonic()
        self._workers = 1
        self._endings_shown = 0
        self._retries_shown = 0
        self._leader: TrialHistory | None = None
        self._best_shown: str | None = None
        self._live: Live | None = None
        self._said_at = time.monotonic()

    def watching(self, ledger: Ledger) -> AbstractContextManager[object]:
        """Show a ledger's search for as long as the context lasts."""
        self._ledger = ledger
        history = ledger.experiment.history
        self._retries_shown = len(history.retries)
        self._endings_shown = len(history.endings)
        for trial in history.endings:
            self._compare(trial)
        self._started = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=2, transient=True)
            return self._live
        return nullcontext()

    def changed(self) -> None:
        """Something happened in the ledger: print a line for what has ended, failed or become the best."""
        if self._ledger is None:
            return
        history = self._ledger.experiment.history
        for retry in history.retries[self._retries_shown :]:
            self._print(f"{retry.trial_id}  its worker failed; going on from the checkpoint")
        self._retries_shown = len(history.retries)
        for trial in history.endings[self._endings_shown :]:
            self._endings_shown += 1
            self._compare(trial)
            self._print(self._line(trial))
            self._print_new_best()

    def _compare(self, trial: TrialHistory) -> None:
        """Remember the best of the completed trials."""
        assert self._ledger is not None
        assert trial.ended is not None
        if trial.ended.status == "completed" and (
            self._leader is None or self._ledger.rank(trial) < self._ledger.rank(self._leader)
        ):
            self._leader = trial

    def look(self) -> None:
        """Print how far the running trials' epochs are, where nothing has been printed for a while."""
        if self._ledger is None or self._live is not None or time.monotonic() - self._said_at < SECONDS_BETWEEN_LINES:
            return
        told = [line for trial_id in sorted(self._ledger.running) if (line := self._steps_line(trial_id))]
        self._said_at = time.monotonic()
        if told:
            self._print(f"{'; '.join(told)}  {self._progress()}")

    def _steps_line(self, trial_id: str) -> str:
        """Return how far a trial's epoch in progress is; empty while its worker has not said so."""
        assert self._ledger is not None
        experiment = self._ledger.experiment
        path = experiment.files(trial_id).progress
        progress = None if path is None else read_progress(path)
        if progress is None or progress.epoch != experiment.history.trials[trial_id].last_epoch + 1:
            return ""
        return f"{trial_id}  epoch {progress.epoch}: step {progress.steps:,} of {progress.of:,}"

    def _print(self, line: str) -> None:
        self._said_at = time.monotonic()
        self._console.print(Text(line), soft_wrap=True)

    def _print_new_best(self) -> None:
        best = self._best_line()
        if best is not None and best != self._best_shown and self._live is None:
            self._best_shown = best
            self._print(best)

    def _best_line(self) -> str | None:
        leader = self._leader
        if leader is None:
            return None
        value = getattr(leader.best, self._metric)
        return f"best so far: {leader.trial_id}  {self._metric} {value:.4f}  {settings(leader.started.params)}"

    def _line(self, trial: TrialHistory) -> str:
        assert trial.ended is not None
        what = MARKS[trial.ended.status]
        if trial.ended.stop_reason:
            what += f" ({trial.ended.stop_reason})"
        best = f"{getattr(trial.best, self._metric):.4f}" if trial.best else "-"
        return f"{trial.trial_id}  {what:<16}  {best} after {trial.last_epoch} epochs  {self._progress()}"

    def _progress(self) -> str:
        assert self._ledger is not None
        history = self._ledger.experiment.history
        counts = ", ".join(f"{history.num_ended[s]} {mark}" for s, mark in MARKS.items() if history.num_ended[s])
        parts = [f"{len(history.endings)}/{self._num_trials}" + (f": {counts}" if counts else "")]
        parts.append(f"{len(self._ledger.running)} running")
        left = self._seconds_left()
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return f"[{', '.join(parts)}]"

    def _seconds_left(self) -> float | None:
        """See orchestrator/time_left.py; from the latest trials, so that it costs the same however many there are."""
        assert self._ledger is not None
        history, halving = self._ledger.experiment.history, self._ledger.halving
        self._workers = max(self._workers, len(self._ledger.running))
        latest = [*history.endings[-LATEST_TRIALS:], *history.unfinished]
        return seconds_left(
            [so_far(trial, now=time.time()) for trial in latest],
            to_start=max(0, self._num_trials - len(history.trials)),
            workers=self._workers,
            max_epochs=num_epochs(halving.course),
            rungs=halving.rung_epochs,
        )

    def _panel(self) -> Table:
        assert self._ledger is not None
        history = self._ledger.experiment.history
        grid = Table.grid()
        grid.add_row(Text(f"{self._progress()} after {duration(time.monotonic() - self._started)}"))
        best = self._best_line()
        if best is not None:
            grid.add_row(Text(best))
        for trial in (history.trials[trial_id] for trial_id in sorted(self._ledger.running)):
            value = f"{getattr(trial.epochs[-1].result, self._metric):.4f}" if trial.epochs else "-"
            grid.add_row(Text(f"{trial.trial_id}  epoch {trial.last_epoch}: {self._metric} {value}", style="dim"))
            if steps := self._steps_line(trial.trial_id):
                grid.add_row(Text(steps, style="dim"))
        return grid


def cells(trial: TrialHistory, names: list[str]) -> list[str]:
    """A trial's searched values; "-" for a dimension that was not active."""
    params = trial.started.params
    values = [params.get(name, "-") for name in names]
    return [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]


def print_front(console: Console, completed: list[TrialHistory], space: SearchSpace) -> None:
    """The completed trials that no other one is better than in every objective, by the first one."""
    objectives = list(space.objectives)
    values = {t.trial_id: found for t in completed if (found := values_at_best(t, objectives)) is not None}
    trials = [trial for trial in completed if trial.trial_id in values]
    modes = list(space.objectives.values())
    places = non_dominated(np.reshape(list(values.values()), (-1, len(modes))), modes)
    front = [trials[place] for place in places]
    front.sort(key=lambda trial: values[trial.trial_id][0], reverse=space.mode == "max")
    title = f"Pareto front of {', '.join(objectives)}: {len(front)} of {len(trials)} completed trials"
    console.print(title, highlight=False, soft_wrap=True)
    table = Table(box=None)
    names = list(space.dimensions)
    for heading in ("trial", *objectives, *names):
        table.add_column(heading, justify="left" if heading == "trial" else "right")
    for trial in front:
        shown = [
            f"{value:.4f}" if name in METRICS else f"{value:,.0f}"
            for name, value in zip(objectives, values[trial.trial_id], strict=True)
        ]
        table.add_row(trial.trial_id, *shown, *cells(trial, names))
    console.print(table)


def print_summary(console: Console, ledger: Ledger) -> None:
    """Counts, where the suggestions came from, the best trials and the disk used."""
    history, metric = ledger.experiment.history, ledger.space.metric
    ended = history.ended
    statuses = [t.ended.status for t in ended if t.ended]
    origins = [t.started.origin for t in history.trials.values()]
    console.print(
        f"{len(ended)} trials: {statuses.count('completed')} done, {statuses.count('pruned')} stopped early, "
        f"{statuses.count('failed')} failed; {origins.count('baseline')} baselines, "
        f"{origins.count('startup')} random, {origins.count('model')} suggested by TPE's model"
        + (f", {origins.count('finalist')} finalists" if "finalist" in origins else ""),
        highlight=False,
    )
    names = list(ledger.space.dimensions)
    table = Table(title=f"best by {metric} (validation: the select split)", title_justify="left", box=None)
    for heading in ("trial", metric, "epoch", *names):
        table.add_column(heading, justify="left" if heading == "trial" else "right")
    completed = [trial for trial in ended if trial.completed]
    for trial in ledger.ranked(completed)[:LEADERS]:
        assert trial.best is not None
        table.add_row(trial.trial_id, f"{getattr(trial.best, metric):.4f}", str(trial.best.epoch), *cells(trial, names))
    console.print(table)
    for line in finalist_lines(ledger):
        console.print(Text(line), soft_wrap=True)
    if ledger.space.further_objectives:
        print_front(console, completed, ledger.space)
    where = ledger.experiment.where
    console.print(f"{where}: {size(ledger.experiment.disk_bytes())} on disk", highlight=False, soft_wrap=True)


def finalist_lines(ledger: Ledger) -> list[str]:
    """For each configuration trained again with other seeds: what it was chosen for, and what the seeds gave."""
    metric, trials = ledger.space.metric, ledger.experiment.history.trials
    repeats: dict[str, list[float]] = {}
    for trial in trials.values():
        if trial.started.finalist_of and trial.completed and trial.best:
            repeats.setdefault(trial.started.finalist_of, []).append(getattr(trial.best, metric))
    lines = [
        f"{trial_id}  {metric} {getattr(trials[trial_id].best, metric):.4f} when chosen; with {len(values)} other "
        f"seeds {statistics.mean(values):.4f}" + (f" (sd {statistics.stdev(values):.4f})" if len(values) > 1 else "")
        for trial_id, values in repeats.items()
    ]
    if ledger.finished and len(repeats) < ledger.rules.finalists:
        lines.append(
            f"only {len(repeats)} of {ledger.rules.finalists} finalists: no more trials were trained to their end"
        )
    return lines


def print_audit(console: Console, ledger: Ledger) -> None:
    """What early stopping did, as far as the controls tell."""
    if not ledger.halving.rung_epochs:
        return
    experiment, space = ledger.experiment, ledger.space
    trials = experiment.trials()
    controls = trials["control"] & (trials["status"] == "completed")
    console.print(f"early stopping, judged by the {controls.sum()} controls it could not stop", highlight=False)
    judged = space.metric if ledger.halving.judges_average else f"raw_{space.metric}"
    audits = audit(trials, experiment.epochs(), metric=space.metric, mode=space.mode, judged=judged)
    for line in findings(audits) or ["not enough data (no controls; raise --control-fraction or --num-trials)"]:
        console.print(Text(line), soft_wrap=True)

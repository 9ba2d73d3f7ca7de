"""What students kept of their teacher: each against the network trained alone with the same seed."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from scipy import stats

from results.history import TrialHistory
from results.schema import PREDICTIONS, DataWarning, DistillationRecord, Split
from results.store import Experiment
from trainables.validation import accuracy, log_softmax, nll

METRICS = ("accuracy", "nll")
CONFIDENCE = 0.95
SHOWN: tuple[Split, ...] = ("estimate", "test")
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference over seeds, and a 95% t-interval of it, which a single seed does not give."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, differences: Sequence[float]) -> PairedDifference:
        """Of paired differences, one for each seed (Student 1908)."""
        mean = statistics.fmean(differences)
        if len(differences) < 2:
            return cls(mean, None, None)
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
        return cls(mean, mean - reach, mean + reach)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero. One without width comes of few images, and shows nothing."""
        return self.low is not None and self.high is not None and (0 < self.low < self.high or self.low < self.high < 0)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.mean:+.4f}{interval}"


def compare(students: Experiment, alone: Experiment) -> list[DistillationRecord]:
    """A record for each seed that both have completed, each split and metric, of the stored predictions."""
    others = _by_seed(alone)
    return [
        record
        for seed, student in _by_seed(students).items()
        if seed in others
        for record in _records(students, student, alone, others[seed])
    ]


def _by_seed(experiment: Experiment) -> dict[int, TrialHistory]:
    completed = [trial for trial in experiment.history.ended if trial.completed]
    return {trial.started.seed: trial for trial in sorted(completed, key=lambda trial: trial.number)}


def _records(
    students: Experiment, student: TrialHistory, alone: Experiment, other: TrialHistory
) -> Iterable[DistillationRecord]:
    for split in get_args(Split):
        values, paired = (
            _figures(experiment, trial, split) for experiment, trial in ((students, student), (alone, other))
        )
        for metric in METRICS if values else ():
            yield DistillationRecord(
                seed=student.started.seed,
                student=f"{students.name}/{student.trial_id}",
                alone=f"{alone.name}/{other.trial_id}",
                split=split,
                metric=metric,
                student_value=values[metric],
                alone_value=paired[metric],
                difference=values[metric] - paired[metric],
            )


def _figures(experiment: Experiment, trial: TrialHistory, split: Split) -> dict[str, float]:
    """Accuracy and NLL of the stored logits, as they are; none where the split has no images."""
    found = experiment.predictions(trial.trial_id, PREDICTIONS[split])
    if not len(found.labels_N):
        return {}
    log_probs_NC = log_softmax(found.logits_NC)
    return {"accuracy": accuracy(found.logits_NC, found.labels_N), "nll": nll(log_probs_NC, found.labels_N)}


def ensemble_accuracies(experiment: Experiment, ensemble_id: str) -> dict[str, float]:
    """The accuracy of the chosen ensemble on each split, as it was scored; empty when that cannot be read."""
    path = experiment.ensemble_folder(ensemble_id) / "scores.parquet"
    try:
        scores = pd.read_parquet(path)
    except (OSError, pa.ArrowException) as error:
        warnings.warn(f"{path} cannot be read ({str(error).splitlines()[0]})", DataWarning, stacklevel=2)
        return {}
    chosen = scores[scores["chosen"] & (scores["metric"] == "accuracy") & scores["value"].notna()]
    return {str(split): float(value) for split, value in zip(chosen["split"], chosen["value"], strict=True)}


def kept_share(records: Sequence[DistillationRecord], ensemble_accuracy: float | None) -> str:
    """One sentence: how much of the ensemble's gain over the network alone the students have, on estimate.

    Only where the interval of their difference in accuracy excludes zero: a share of a gain that may be none says
    nothing.
    """
    rows = _of(records, "estimate", "accuracy")
    difference = PairedDifference.of([row.difference for row in rows])
    if difference.low is None:
        return "one seed gives no interval: --resume with --seeds 2 or more"
    if difference.low == difference.high:
        return f"accuracy on estimate: the seeds agree to the image ({difference.mean:+.4f}); more of them tell more"
    if not difference.excludes_zero:
        return f"accuracy on estimate: {NO_DIFFERENCE} (student - alone {difference})"
    word = "better" if difference.mean > 0 else "worse"
    said = f"accuracy on estimate: students are {word} than alone: {difference}"
    if ensemble_accuracy is None or difference.mean < 0:
        return said
    gain = ensemble_accuracy - statistics.fmean(row.alone_value for row in rows)
    if gain <= 0:
        return f"{said}; the ensemble has no gain over the network alone ({gain:+.4f})"
    return f"{said}, {difference.mean / gain:.0%} of the ensemble's gain ({gain:+.4f})"


def _of(records: Sequence[DistillationRecord], split: Split, metric: str) -> list[DistillationRecord]:
    return [record for record in records if (record.split, record.metric) == (split, metric)]


def show(console: Console, records: Sequence[DistillationRecord], accuracies: dict[str, float]) -> None:
    """A table for estimate and, for information, one for test; then what estimate says."""
    for split, title in zip(SHOWN, ("estimate: read once, after training", "test: for information"), strict=True):
        if any(record.split == split for record in records):
            console.print(_table(title, records, split, accuracies.get(split)))
    if _of(records, "estimate", "accuracy"):
        console.print(kept_share(records, accuracies.get("estimate")), highlight=False, soft_wrap=True)


def _table(title: str, records: Sequence[DistillationRecord], split: Split, ensemble: float | None) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    headings = ("", "accuracy: student", "alone", "difference (95%)", "NLL: student", "alone", "difference (95%)")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    columns = [_of(records, split, metric) for metric in METRICS]
    for pair in zip(*columns, strict=True):
        cells = [f"{value:.4f}" for row in pair for value in (row.student_value, row.alone_value)]
        differences = [f"{row.difference:+.4f}" for row in pair]
        table.add_row(f"seed {pair[0].seed}", *cells[:2], differences[0], *cells[2:], differences[1])
    cells = []
    for rows in columns:
        cells += [f"{statistics.fmean(getattr(row, name) for row in rows):.4f}" for name in MEANS]
        cells.append(str(PairedDifference.of([row.difference for row in rows])))
    table.add_row("mean", *cells)
    if ensemble is not None:
        table.add_row("the ensemble", f"{ensemble:.4f}")
    return table


MEANS = ("student_value", "alone_value")


def show_alone(console: Console, students: Experiment, accuracies: dict[str, float]) -> None:
    """The students' figures where there is nothing to compare them with."""
    table = Table(title="students, without networks trained alone to compare with", title_justify="left", box=None)
    for heading in ("", "split", "accuracy", "NLL"):
        table.add_column(heading, justify="right" if heading in {"accuracy", "NLL"} else "left")
    for seed, trial in _by_seed(students).items():
        for split in SHOWN:
            if found := _figures(students, trial, split):
                table.add_row(f"seed {seed}", split, f"{found['accuracy']:.4f}", f"{found['nll']:.4f}")
    for split in SHOWN:
        if split in accuracies:
            table.add_row("the ensemble", split, f"{accuracies[split]:.4f}", "")
    console.print(table)

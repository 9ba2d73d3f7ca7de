"""Finalists: the best configurations of a search trained again, with other seeds, to their end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from results.history import TIME_BUDGET, TrialHistory


def lacking(
    best: Sequence[TrialHistory], started: Iterable[TrialHistory], *, finalists: int, seeds: int
) -> list[TrialHistory]:
    """The configurations that lack trainings, one entry for each that is to come.

    `best`: the completed trials of the search, the best first; `started`: all trials so far. One that the time budget
    cut off is made up for; one that failed is not, lest it fails again for ever.
    """
    trained = Counter(t.started.finalist_of for t in started if t.started.finalist_of and not _cut_off(t))
    return [trial for trial in best[:finalists] for _ in range(seeds - trained[trial.trial_id])]


def _cut_off(trial: TrialHistory) -> bool:
    return trial.ended is not None and trial.ended.stop_reason == TIME_BUDGET

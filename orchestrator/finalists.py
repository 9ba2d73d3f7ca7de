"""Finalists: the best configurations of a search trained again, with other seeds, to their end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from results.history import TrialHistory


def lacking(
    best: Sequence[TrialHistory], started: Iterable[TrialHistory], *, finalists: int, seeds: int
) -> list[TrialHistory]:
    """The configurations that lack trainings, one entry for each that is to come.

    `best`: the completed trials of the search, the best first; `started`: all trials so far.
    """
    trained = Counter(trial.started.finalist_of for trial in started if trial.started.finalist_of)
    return [trial for trial in best[:finalists] for _ in range(seeds - trained[trial.trial_id])]

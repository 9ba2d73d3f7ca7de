"""What is left of a search in seconds, from what its trials did so far. Arithmetic only."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from results.history import TrialHistory

PRIOR_TRIALS = 2.0
PRIOR_STOPPED = 0.4
"""Before anything is known: of the trials that come to a rung, the share that ends there, and how many trials it counts
for."""
LATEST_TRIALS = 200


@dataclass(frozen=True)
class TrialSoFar:
    """Seconds of each epoch of a trial, evaluation and storing included; and those since the last one, if it trains."""

    epoch_seconds: Sequence[float]
    ended: bool
    seconds_since: float = 0.0


def so_far(trial: TrialHistory, *, now: float) -> TrialSoFar:
    """Return what a trial's history says. Its first epoch counts without the start of its worker.

    `now`: a unix time, in seconds; an epoch that a pause of the search lies in counts without it too.
    """
    seconds: list[float] = []
    for before, epoch in zip([None, *trial.epochs], trial.epochs, strict=False):
        trained = epoch.result.epoch_seconds
        passed = trained if before is None else epoch.at - before.at
        seconds.append(trained if passed > 10 * trained + 60 else passed)
    since = now - trial.epochs[-1].at if trial.epochs else 0.0
    return TrialSoFar(seconds, trial.ended is not None, since)


def seconds_left(
    trials: Sequence[TrialSoFar], *, to_start: int, workers: int, max_epochs: int, rungs: Collection[int]
) -> float | None:
    """Return the seconds until a search has ended; None before its first epoch.

    `trials`: those that have ended and those that train. `to_start`: how many more there will be. `workers`: how many
    train at a time. `max_epochs`: of a trial that nothing stops. `rungs`: after how many epochs it may be stopped.
    """
    seconds = _seconds_by_epoch(trials, max_epochs)
    if seconds is None:
        return None
    reaching = _shares_reaching(trials, max_epochs=max_epochs, rungs=rungs)
    of_new = sum(share * epoch for share, epoch in zip(reaching, seconds, strict=True))
    free_after = []
    for trial in (t for t in trials if not t.ended):
        done = min(len(trial.epoch_seconds), max_epochs)
        to_come = [reaching[k] / reaching[done] * seconds[k] for k in range(done, max_epochs) if reaching[done]]
        begun = min(trial.seconds_since, to_come[0]) if to_come else 0.0
        free_after.append(sum(to_come) - begun)
    free_after = sorted(free_after)[-workers:]
    heapq.heapify(free_after)
    for _ in range(workers - len(free_after)):
        heapq.heappush(free_after, 0.0)
    for _ in range(to_start):
        heapq.heapreplace(free_after, free_after[0] + of_new)
    return max(free_after)


def _seconds_by_epoch(trials: Sequence[TrialSoFar], max_epochs: int) -> list[float] | None:
    """What each epoch of a trial takes: the median of those seen, or that of the nearest one before (or after) it."""
    seen = {
        k: statistics.median(times)
        for k in range(max_epochs)
        if (times := [t.epoch_seconds[k] for t in trials if len(t.epoch_seconds) > k])
    }
    if not seen:
        return None
    first = next(iter(seen.values()))
    filled: list[float] = []
    for k in range(max_epochs):
        filled.append(seen.get(k, filled[-1] if filled else first))
    return filled


def _shares_reaching(trials: Sequence[TrialSoFar], *, max_epochs: int, rungs: Collection[int]) -> list[float]:
    """The share of the trials that train each epoch; those that have not ended count too (Kaplan & Meier 1958)."""
    shares = [1.0]
    for epochs in range(1, max_epochs):
        stopped = sum(t.ended and len(t.epoch_seconds) == epochs for t in trials)
        went_on = sum(len(t.epoch_seconds) > epochs for t in trials)
        weight = PRIOR_TRIALS if epochs in rungs else 0.0
        known = stopped + went_on + weight
        share = (stopped + weight * PRIOR_STOPPED) / known if known else 0.0
        shares.append(shares[-1] * (1 - share))
    return shares

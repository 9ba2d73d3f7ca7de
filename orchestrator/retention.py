"""Which weights stay on disk: those of the best so many trials."""

from __future__ import annotations

import bisect

from results.history import TrialHistory

Rank = tuple[bool, float, int]


class Retention:
    """Ended trials that have weights, the best first."""

    def __init__(self, *, keep: int) -> None:
        self._keep = keep
        self._ranked: list[tuple[Rank, str]] = []

    def note(self, trial: TrialHistory, *, rank: Rank) -> None:
        """Put an ended trial to its place, if it has weights. A lower rank is better."""
        if trial.ended is not None and trial.ended.has_checkpoint and not trial.checkpoint_removed:
            bisect.insort(self._ranked, (rank, trial.trial_id))

    def surplus(self) -> list[str]:
        """Take out the trials whose weights need not be kept any longer."""
        surplus = [trial_id for _, trial_id in self._ranked[self._keep :]]
        del self._ranked[self._keep :]
        return surplus

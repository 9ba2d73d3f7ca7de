"""Early stopping by rungs. What is decided here is a pure function of what came before.

A rung is a number of epochs at which a trial is compared with those that came to it earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class Judgement:
    """`rung`: 1 for the first, None between rungs."""

    go_on: bool
    rung: int | None = None


class Halving(Protocol):
    """A strategy of early stopping. Its state is what `judge` has been told; replaying a log restores it."""

    rung_epochs: list[int]

    def judge(self, trial_id: str, *, epoch: int, value: float) -> Judgement:
        """Take note of a trial's metric after an epoch, and say whether it goes on."""


class Asha:
    """Asynchronous successive halving, the stopping variant of Ray Tune (Li et al. 2020, "A system for massively
    parallel hyperparameter tuning"): a trial that comes to a rung goes on unless its value is below the
    (1 - 1/factor) quantile of the values recorded there before it. The first one always goes on.
    """

    def __init__(self, *, grace_epochs: int, max_epochs: int, factor: float, mode: Literal["max", "min"]) -> None:
        self.rung_epochs: list[int] = []
        epochs = float(grace_epochs)
        while int(epochs) < max_epochs:
            if int(epochs) not in self.rung_epochs:
                self.rung_epochs.append(int(epochs))
            epochs *= factor
        self.rungs: list[dict[str, float]] = [{} for _ in self.rung_epochs]
        self._sign = 1.0 if mode == "max" else -1.0
        self._quantile = 1 - 1 / factor

    def judge(self, trial_id: str, *, epoch: int, value: float) -> Judgement:
        """See Halving. Recorded values are negated when lower is better."""
        if epoch not in self.rung_epochs:
            return Judgement(go_on=True)
        index = self.rung_epochs.index(epoch)
        recorded = self.rungs[index]
        value *= self._sign
        go_on = not recorded or value >= float(np.quantile(list(recorded.values()), self._quantile))
        recorded[trial_id] = value
        return Judgement(go_on=go_on, rung=index + 1)


class NoHalving:
    """Every trial is trained to its end."""

    def __init__(self, *, grace_epochs: int, max_epochs: int, factor: float, mode: Literal["max", "min"]) -> None:
        self.rung_epochs: list[int] = []

    def judge(self, trial_id: str, *, epoch: int, value: float) -> Judgement:
        """See Halving."""
        return Judgement(go_on=True)


HALVINGS: dict[str, Callable[..., Halving]] = {"asha": Asha, "none": NoHalving}

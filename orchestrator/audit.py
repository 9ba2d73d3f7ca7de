"""What early stopping did to a search, seen from the trials that it was not allowed to stop.

A control is chosen before anything is known of it, so what holds for controls holds for all configurations that the
search proposed. Everything here is computed from the tables `trials/` and `epochs/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

CONTROLS = 4  # the stream of randomness that chooses them
FEWEST = 10
TERCILES = ("weak", "medium", "strong")
FEWEST_STOPPED = 5
HURTING_PROBABILITY = 0.1
LEVEL = 0.95


def is_control(number: int, *, share: float, seed: int) -> bool:
    """Whether the trial of a number is a control: every so-many-th, beginning at a place that the seed decides."""
    offset = float(np.random.default_rng([seed, CONTROLS]).random())
    return math.floor((number + 1) * share + offset) > math.floor(number * share + offset)


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share with its 95% interval (Jeffreys: Brown, Cai and DasGupta 2001)."""

    successes: int
    of: int

    @property
    def value(self) -> float:
        """The share itself."""
        return self.successes / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """The equal-tailed interval of a Beta(1/2, 1/2) prior; exact at the ends."""
        from scipy.stats import beta  # slow to import, and wanted at the end of a search

        low, high = beta.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2], self.successes + 0.5, self.of - self.successes + 0.5)
        return (0.0 if self.successes == 0 else float(low), 1.0 if self.successes == self.of else float(high))


@dataclass(frozen=True, kw_only=True)
class RungAudit:
    """What a rung's values say of the final ones. Correlations are Spearman's; None: not enough data, or no variation.

    `stopped_wins`: of the controls that the strategy would have stopped here, those that ended above every control
    that it let go on to the end.
    """

    rung: int
    epoch: int
    num_controls: int
    num_stopped: int
    correlation: float | None
    by_tercile: dict[str, float | None]
    stopped_wins: Share | None

    @property
    def is_hurting(self) -> bool:
        """Whether stopped trials would have won more often than one time in ten, by the interval's lower end.

        Of fewer than five nothing is concluded: one of one proves nothing.
        """
        wins = self.stopped_wins
        return wins is not None and wins.of >= FEWEST_STOPPED and wins.interval[0] > HURTING_PROBABILITY


def audit(
    trials: pd.DataFrame, epochs: pd.DataFrame, *, metric: str, mode: Literal["max", "min"], judged: str | None = None
) -> list[RungAudit]:
    """The audit of each rung, from the controls of stage search that were trained to their end.

    `judged`: the column of `epochs` that rungs compared, by default the metric's.
    """
    controls = trials[trials["control"] & (trials["stage"] == "search") & (trials["status"] == "completed")]
    controls = controls.set_index("trial_id")
    at_rungs = epochs[epochs["rung"].notna() & epochs["trial_id"].isin(controls.index)]
    sign = 1.0 if mode == "max" else -1.0
    final = sign * controls[metric]
    spared = set(at_rungs.loc[at_rungs["decision"] == "spared", "trial_id"])
    let_through = final[~final.index.isin(spared)]
    return [
        _rung_audit(
            int(rung),
            rows.set_index("trial_id"),
            value=sign * rows.set_index("trial_id")[judged or metric],
            final=final,
            strength=controls["regularization_strength"],
            best_let_through=let_through.max() if len(let_through) else None,
        )
        for rung, rows in at_rungs.groupby("rung")
    ]


def _rung_audit(
    rung: int,
    rows: pd.DataFrame,
    *,
    value: pd.Series,
    final: pd.Series,
    strength: pd.Series,
    best_let_through: float | None,
) -> RungAudit:
    final, strength = final.loc[rows.index], strength.loc[rows.index]
    stopped = final[rows["decision"] == "spared"]
    wins = None
    if len(rows) >= FEWEST and len(stopped) and best_let_through is not None:
        wins = Share(successes=int((stopped > best_let_through).sum()), of=len(stopped))
    return RungAudit(
        rung=rung,
        epoch=int(rows["epoch"].iloc[0]),
        num_controls=len(rows),
        num_stopped=len(stopped),
        correlation=_correlation(value, final),
        by_tercile={
            name: _correlation(value[inside], final[inside])
            for name, inside in zip(TERCILES, _terciles(strength), strict=True)
        },
        stopped_wins=wins,
    )


def _terciles(strength: pd.Series) -> list[pd.Series]:
    """Which controls lie in each third, by their place in the order of strength."""
    place = strength.rank(method="first") - 1
    return [(place * 3 // max(1, strength.notna().sum())) == third for third in range(3)]


def _correlation(value: pd.Series, final: pd.Series) -> float | None:
    """Spearman's rank correlation; None below FEWEST controls or where one side does not vary."""
    if len(value) < FEWEST or value.nunique() < 2 or final.nunique() < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(value, final).statistic)


def findings(audits: list[RungAudit]) -> list[str]:
    """The audit in sentences, a line each."""
    lines = []
    for a in audits:
        head = f"rung {a.rung} (epoch {a.epoch}), {a.num_controls} controls:"
        if a.num_controls < FEWEST:
            lines.append(f"{head} not enough data (below {FEWEST}; raise --control-fraction or --num-trials)")
            continue
        terciles = ", ".join(f"{name} {_shown(c)}" for name, c in a.by_tercile.items())
        lines.append(f"{head} rank correlation with the final value {_shown(a.correlation)}")
        lines.append(f"  by strength of regularization: {terciles}")
        if a.stopped_wins is not None:
            low, high = a.stopped_wins.interval
            lines.append(
                f"  of {a.stopped_wins.of} that would have been stopped, {a.stopped_wins.successes} ended best: a "
                f"stopped trial would have won with probability {a.stopped_wins.value:.2f} [{low:.2f}, {high:.2f}]"
            )
        elif a.num_stopped:
            lines.append(f"  all {a.num_stopped} would have been stopped, and none is left to compare them with")
        if a.is_hurting:
            lines.append(
                f"  early stopping is hurting: at rung {a.rung} it ends trials that would have won; "
                f"raise grace_epochs, or give --halving forecast or none"
            )
    return lines


def _shown(correlation: float | None) -> str:
    return "not enough data" if correlation is None or np.isnan(correlation) else f"{correlation:+.2f}"

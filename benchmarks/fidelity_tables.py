"""Tables of regret with intervals: 95%, by bootstrap over seeds or over recorded configurations (Efron 1979)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from resampling import interval, resampled_means
from rich.console import Console
from rich.table import Table

from results.schema import FloatArray

REFERENCE = "asha"
POINTS = 100
SETTING = ["grace_epochs", "budget_epochs", "max_epochs", "severity"]
Figure = tuple[float, float, float]


def with_interval(values_N: FloatArray) -> Figure:
    """Mean over the seeds and its interval."""
    low, high = interval(resampled_means(values_N[:, None], np.random.default_rng(0))[:, 0])
    return float(values_N.mean()), low, high


def ratio_with_interval(values_N: FloatArray, to_N: FloatArray) -> Figure:
    """Ratio of two means over the same seeds, and its interval by paired resampling."""
    means_R2 = resampled_means(np.stack([values_N, to_N], axis=1), np.random.default_rng(0))
    low, high = interval(means_R2[:, 0] / means_R2[:, 1])
    return float(values_N.mean() / to_N.mean()), low, high


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A strategy in one setting. `regret` in points; `ratio`: to REFERENCE without controls, None if it is missing."""

    severity: float
    grace_epochs: int
    control_fraction: float
    strategy: str
    regret: Figure
    ratio: Figure | None
    num_trials: float
    completed: float
    picked_strength: float


def summaries(rows: pd.DataFrame) -> Iterator[Summary]:
    """Of every strategy in every setting."""
    for setting, here in rows.groupby(SETTING):
        plain = here[(here["strategy"] == REFERENCE) & (here["control_fraction"] == 0)]
        reference = plain.set_index("seed")["regret"]
        for (control_fraction, strategy), own in here.groupby(["control_fraction", "strategy"], sort=False):
            regret = own.set_index("seed")["regret"]
            paired = len(reference) > 0 and set(regret.index) <= set(reference.index)
            yield Summary(
                grace_epochs=setting[0],
                severity=setting[3],
                control_fraction=float(control_fraction),
                strategy=str(strategy),
                regret=with_interval(POINTS * regret.to_numpy(float)),
                ratio=ratio_with_interval(regret.to_numpy(float), reference[regret.index].to_numpy(float))
                if paired
                else None,
                num_trials=float(own["num_trials"].mean()),
                completed=float(own["completed"].mean()),
                picked_strength=float(own["picked_strength"].mean()),
            )


def cell(figure: Figure | None) -> str:
    """A figure with its interval."""
    return "" if figure is None else f"{figure[0]:.2f} [{figure[1]:.2f}, {figure[2]:.2f}]"


def print_synthetic(rows: pd.DataFrame, console: Console) -> None:
    """The table of regrets on invented curves; last: trials begun, trials trained to their end, strength picked."""
    titles = ("grace", "severity", "controls", "strategy", "regret, points (95%)", f"ratio to {REFERENCE}")
    table = Table(*titles, "trials", "ended", "x")
    for row in summaries(rows):
        setting = (str(row.grace_epochs), f"{row.severity:g}", f"{row.control_fraction:g}", row.strategy)
        counts = (f"{row.num_trials:.0f}", f"{row.completed:.0f}", f"{row.picked_strength:.2f}")
        table.add_row(*setting, cell(row.regret), cell(row.ratio), *counts)
    console.print(table)


def print_replays(rows: pd.DataFrame, console: Console) -> None:
    """The table of regrets on a recorded pool. Rows of pool_draw -1 are the pool itself, the others resampled ones."""
    first = rows.iloc[0]
    told = f"{first['configurations']} configurations, {first['max_epochs']} epochs, scored by {first['scored_by']}"
    table = Table("budget", "strategy", "regret, points (95%)", "best tenth kept (95%)", "epochs spent", title=told)
    for (budget, strategy), own in rows.groupby(["budget_epochs", "strategy"], sort=False):
        means = own.groupby("pool_draw")[["regret", "kept_best", "epochs"]].mean()
        itself, resampled = means.loc[-1], means.drop(index=-1)
        regret = POINTS * itself["regret"], *interval(POINTS * resampled["regret"].to_numpy(float))
        kept = itself["kept_best"], *interval(resampled["kept_best"].to_numpy(float))
        name = f"{budget / first['max_epochs']:g} E"
        table.add_row(name, str(strategy), cell(regret), cell(kept), f"{itself['epochs']:.0f}")
    console.print(table)

"""Learning from earlier searches: their trials, as far as they lie in the space that is searched now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.plan import SearchPlan
from results.history import TrialHistory
from results.schema import UsageError
from results.store import Experiment, names
from results.study import objectives_of


@dataclass(frozen=True)
class WarmStart:
    """Ended trials of earlier searches, and a line for each search that says how many of its trials there are."""

    trials: list[TrialHistory]
    lines: list[str]


def load_warm_start(results_dir: str | Path, plan: SearchPlan, *, split_hash: str, resuming: bool = False) -> WarmStart:
    """The ended trials of the experiments that a plan names, those that lie in its space.

    Raises UsageError, naming both values, when what they measured is not what the plan's trials will. `resuming`: one
    that is not there any more is left out.
    """
    found = WarmStart([], [])
    for name in dict.fromkeys(plan.warm_start):
        if resuming and name not in names(results_dir):
            found.lines.append(f"warm start: {name} is not in {results_dir} any more; going on without it")
            continue
        experiment = Experiment.open(results_dir, name)
        _check_comparable(experiment.info, plan, split_hash=split_hash)
        ended = [trial for trial in experiment.history.ended if trial.started.stage == "search"]
        inside = [trial for trial in ended if plan.space.locate(trial.started.config) is not None]
        found.trials.extend(inside)
        found.lines.append(f"warm start: {len(inside)} of {len(ended)} trials of {name} lie in this space")
    return found


def _check_comparable(info: Mapping[str, Any], plan: SearchPlan, *, split_hash: str) -> None:
    """Raise UsageError when figures of an experiment's trials mean something else than those of a plan's."""
    space = plan.space
    ours = {
        "split hash": split_hash,
        "objectives": _shown(space.objectives),
        "max_epochs": str(space.budget.max_epochs),
    }
    theirs = {
        "split hash": info["split_hash"],
        "objectives": _shown(objectives_of(info)),
        "max_epochs": str(info["max_epochs"]),
    }
    for what, value in ours.items():
        if theirs[what] != value:
            raise UsageError(
                f"--warm-start {info['name']}: its {what} is {theirs[what]}, and this search's is {value}; "
                f"trials are compared with equal ones only, so leave it out or make them equal"
            )


def _shown(objectives: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({mode})" for name, mode in objectives.items())

"""Searches driven without Ray and without training: the real ledger, store, study and halving, invented curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution

from orchestrator.driver import make_ledger
from orchestrator.ledger import Assignment, Ledger
from orchestrator.plan import SearchPlan
from results.schema import PREDICTIONS, EpochResult
from results.store import Experiment
from search_spaces.space import Budget, NamedSpace, SearchSpace
from trainables.config import TrainConfig
from trainables.datasets import LabelledImages, split

MAX_EPOCHS = 9
NUM_IMAGES = 200
Curve = Callable[[Assignment, int], EpochResult]


def epoch_result(
    epoch: int, accuracy: float, *, loss: float = 1.0, nll: float | None = 1.0, best_epoch: int | None = None
) -> EpochResult:
    """An epoch with one figure that matters."""
    return EpochResult(
        epoch=epoch,
        lr=0.1,
        train_loss=loss,
        train_accuracy=accuracy,
        clean_train_accuracy=accuracy,
        val_accuracy=accuracy,
        val_nll=nll,
        val_ece=0.1,
        raw_val_accuracy=accuracy,
        raw_val_nll=nll,
        grad_norm=1.0,
        epoch_seconds=2.0,
        images_per_second=50.0,
        num_parameters=10,
        multiply_adds=100,
        peak_memory_bytes=1000,
        best_epoch=best_epoch or epoch,
        out_of_patience=False,
    )


def LEARNING(assignment: Assignment, epoch: int) -> EpochResult:  # noqa: N802 - a constant curve
    """Better with every epoch, and with lower dropout; dropout above .45 diverges at epoch 2."""
    dropout = float(assignment.config["dropout"] or 0)
    if dropout > 0.45 and epoch == 2:
        return epoch_result(epoch, 0.1, loss=math.nan)
    return epoch_result(epoch, round(0.9 - dropout - 0.3 / epoch, 6))


BASELINES = ({"dropout": 0.0}, {"dropout": 0.499})


def plan(
    *,
    num_trials: int = 8,
    seed: int = 0,
    halving: str = "asha",
    keep_checkpoints: int = 10,
    baselines: tuple[dict[str, float], ...] = BASELINES,
    base: TrainConfig | None = None,
    grace_epochs: int | None = None,
    max_total_epochs: int | None = None,
    dimensions: dict[str, BaseDistribution] | None = None,
    **of_plan: Any,
) -> SearchPlan:
    """A search over dropout and weight decay, by default with two baselines."""
    space = SearchSpace(
        base=base or TrainConfig(),
        dimensions=dimensions
        or {
            "dropout": FloatDistribution(0.0, 0.5),
            "weight_decay": FloatDistribution(1e-5, 1e-2, log=True),
        },
        baselines=baselines,
        budget=Budget(
            num_trials=num_trials,
            max_epochs=MAX_EPOCHS,
            grace_epochs=grace_epochs,
            max_total_epochs=max_total_epochs,
        ),
    )
    source = NamedSpace("sim", space, "0" * 16)
    return SearchPlan(
        source=source,
        overrides={},
        num_trials=num_trials,
        seed=seed,
        halving=halving,
        keep_checkpoints=keep_checkpoints,
        **of_plan,
    )


def new_experiment(results_dir: Path, *, name: str = "sim", num_trials: int = 8) -> Experiment:
    """An experiment on grey squares."""
    images = np.zeros((NUM_IMAGES, 1, 4, 4), np.uint8)
    data = split(LabelledImages(images, np.arange(NUM_IMAGES) % 2, 0, ("a", "b")))
    info = plan(num_trials=num_trials).info(name=name, data=data, command="simulated")
    return Experiment.create(results_dir, name=name, info=info)


def ledger_of(experiment: Experiment, **of_plan: Any) -> Ledger:
    """The ledger of an experiment that is being driven, two trials at a time."""
    return make_ledger(experiment, plan(**of_plan), max_concurrent=2)


def run_search(experiment: Experiment, curve: Curve, *, num_trials: int, concurrent: int = 2) -> Ledger:
    """Drive a search to its end, epochs of concurrent trials taking turns."""
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=num_trials)
        advance(ledger, curve, concurrent=concurrent)
        return ledger


def taken_up(ledger: Ledger, first: Sequence[str], *, concurrent: int) -> list[tuple[Assignment, int]]:
    """The trials that an earlier driver left, in the order in which they are to report."""
    taken = {}
    while len(taken) < min(len(first), concurrent) and (assignment := ledger.next_trial()) is not None:
        taken[assignment.trial_id] = assignment
    assert sorted(taken) == sorted(first)
    return [(taken[trial_id], taken[trial_id].epochs_recorded) for trial_id in first]


def advance(
    ledger: Ledger, curve: Curve, *, concurrent: int = 2, steps: int | None = None, first: Sequence[str] = ()
) -> list[str]:
    """Let trials report in turns, until none is left or `steps` reports were made; the trials that then train.

    `first`: those that trained when an earlier driver was killed, whose turns come as they would have come.
    """
    running = taken_up(ledger, first, concurrent=concurrent)
    made = 0
    while steps is None or made < steps:
        while len(running) < concurrent and (assignment := ledger.next_trial()) is not None:
            running.append((assignment, assignment.epochs_recorded))
        if not running:
            return []
        assignment, epoch = running.pop(0)
        made += 1
        if ledger.report(assignment.trial_id, curve(assignment, epoch + 1), node="here"):
            running.append((assignment, epoch + 1))
    return [assignment.trial_id for assignment, _ in running]


def run_with_predictions(experiment: Experiment, *, num_trials: int) -> None:
    """A search whose trials have stored predictions for two classes."""
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=num_trials)

        def curve(assignment: Assignment, epoch: int) -> EpochResult:
            rng = np.random.default_rng(int(assignment.trial_id[1:]))
            parts = []
            for split_name, kind in PREDICTIONS.items():
                labels = np.arange(experiment.info["split_sizes"][split_name]) % 2
                logits = (np.eye(2)[labels] + rng.normal(size=(len(labels), 2))).astype(np.float16)
                parts.append(kind(logits, labels, np.arange(len(labels))))
            experiment.files(assignment.trial_id).write_predictions({"best": parts})
            return LEARNING(assignment, epoch)

        advance(ledger, curve)

"""Ensembles of real networks, trained for a moment on the digits, as the ensemble command stores them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.combination import COMBINERS, Combination
from orchestrator.driver import make_ledger
from orchestrator.keeping import Chosen, keep
from orchestrator.plan import SearchPlan
from results.events import EnsembleMade
from results.schema import PREDICTIONS, Predictions, ScoreRecord, SelectPredictions, Split, arrow_schema
from results.store import Experiment
from search_spaces.space import Budget, NamedSpace, SearchSpace
from trainables.config import TrainConfig
from trainables.resident import ResidentImages
from trainables.trial import run_trial
from trainables.validation import Probabilities, accuracy, log_softmax

CONFIG = TrainConfig(
    max_epochs=2, batch_size=64, lr=0.05, crop_padding=1, flip=False, test_time_augmentation="flip_shift", ema_decay=0.9
)
MEMBERS = (("t00000", "best"), ("t00000", "tta"), ("t00001", "best"))


def trained_experiment(results_dir: Path, data: ResidentImages, *, name: str = "digits") -> Experiment:
    """Two trainings with different seeds, with weights and predictions."""
    space = SearchSpace(base=CONFIG, dimensions={}, baselines=({},), budget=Budget(num_trials=2, max_epochs=2))
    source = NamedSpace("trained", space, "0" * 16)
    plan = SearchPlan(source=source, overrides={}, num_trials=None, seed=0, halving="none", stage="single")
    experiment = Experiment.create(
        results_dir, name=name, info=plan.info(name=name, data=data.split, command="trained by a test")
    )
    with experiment.driving():
        ledger = make_ledger(experiment, plan, max_concurrent=1)
        while (assignment := ledger.next_trial()) is not None:
            config = TrainConfig(**assignment.config)  # type: ignore[arg-type]
            for result in run_trial(config, data, files=experiment.files(assignment.trial_id)):
                ledger.report(assignment.trial_id, result, node="here")
    return experiment


def stored_log_probs(
    experiment: Experiment, members: Sequence[tuple[str, str]], of: type[Predictions]
) -> Probabilities:
    """The members' stored predictions as log-probabilities [M, N, C]."""
    parts = [experiment.predictions(trial_id, of, variant=variant) for trial_id, variant in members]
    return log_softmax(np.stack([part.logits_NC for part in parts]))


def fitted(experiment: Experiment, combiner: str, members: Sequence[tuple[str, str]] = MEMBERS) -> Combination:
    """A combiner fitted on select, with members' temperatures that differ."""
    labels_N = experiment.predictions("t00000", SelectPredictions).labels_N
    return Combination.fit(
        combiner,
        stored_log_probs(experiment, members, SelectPredictions),
        labels_N,
        weights_M=np.linspace(3, 1, len(members)) / np.linspace(3, 1, len(members)).sum(),
        temperatures_M=np.linspace(0.8, 1.4, len(members)),
    )


def make_ensemble(
    experiment: Experiment,
    combiner: str = "mean",
    *,
    ensemble_id: str = "e0001",
    members: Sequence[tuple[str, str]] = MEMBERS,
) -> Path:
    """Store an ensemble of trials in an experiment; its folder."""
    combination, folder = fitted(experiment, combiner, members), experiment.ensemble_folder(ensemble_id)
    shown_M = combination.weights if combination.weights.ndim == 1 else combination.weights.mean(1)
    chosen = [Chosen(experiment, t, v, float(weight)) for (t, v), weight in zip(members, shown_M, strict=True)]
    description = keep(folder, chosen, combination, ensemble_id=ensemble_id, further={"selection": "by hand"})
    with experiment.driving():
        scores = [_score(experiment, combination, ensemble_id, members, split) for split in PREDICTIONS]
        experiment.write_ensemble(ensemble_id, content=description.to_json(), scores=scores, classes=[])
        made = [f"{experiment.name}/{trial_id}" for trial_id, _ in members]
        experiment.record(EnsembleMade(at=time.time(), ensemble_id=ensemble_id, members=made))
    return folder


def _score(
    experiment: Experiment,
    combination: Combination,
    ensemble_id: str,
    members: Sequence[tuple[str, str]],
    split: Split,
) -> ScoreRecord:
    labels_N = experiment.predictions("t00000", PREDICTIONS[split]).labels_N
    scores_NC = combination.combine(stored_log_probs(experiment, members, PREDICTIONS[split])).scores_NC
    known = {"ensemble_id": ensemble_id, "kind": "ensemble", "combiner": combination.combiner, "k": len(members)}
    scored = {"split": split, "metric": "accuracy", "value": accuracy(scores_NC, labels_N), "chosen": True}
    return ScoreRecord(**{**dict.fromkeys(arrow_schema(ScoreRecord).names), **known, **scored})


def with_probabilities() -> list[str]:
    """The combiners that give probabilities."""
    log_probs_MNC = log_softmax(np.zeros((1, 1, 2)))
    weights = {name: np.ones((1, 2)) if name == "per_class" else np.ones(1) for name in COMBINERS}
    return [n for n, c in COMBINERS.items() if c.combine(log_probs_MNC, weights[n]).log_probs_NC is not None]

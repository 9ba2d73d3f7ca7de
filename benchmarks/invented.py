"""Experiments whose trials were never trained: invented predictions, stored as a search stores them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from orchestrator.plan import SearchPlan
from results.events import Decided, EpochReported, TrialEnded, TrialStarted
from results.schema import PREDICTIONS, EpochResult, FloatArray, IntArray, Predictions, Scalar, Split
from results.store import Experiment
from search_spaces.space import Budget, NamedSpace, SearchSpace
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.validation import accuracy, log_softmax, nll

SPLITS: tuple[Split, ...] = ("select", "estimate", "test")
Variants = Mapping[str, Mapping[Split, FloatArray]]
"""Logits [N, C] by variant and split."""


def store_models(
    results_dir: Path,
    models: Callable[[int], Variants],
    labels: Mapping[Split, IntArray],
    *,
    num_models: int,
    num_classes: int,
    name: str = "invented",
    finalist_of: Sequence[str] = (),
    changes: Mapping[int, Mapping[str, Scalar]] | None = None,
    split_hash: str = "invented",
) -> Experiment:
    """An experiment of so many completed trials. `finalist_of`: of each, what it trains again, empty for none.

    `changes`: fields of some trials' configurations.
    """
    data = _data(labels, num_classes=num_classes, split_hash=split_hash)
    space = SearchSpace(base=TrainConfig(max_epochs=1), dimensions={}, baselines=({},), budget=Budget(max_epochs=1))
    plan = SearchPlan(
        source=NamedSpace(name, space, "0" * 16), overrides={}, num_trials=num_models, seed=0, halving="none"
    )
    info = plan.info(name=name, data=data, command="invented")
    experiment = Experiment.create(results_dir, name=name, info=info)
    with experiment.driving():
        for number in range(num_models):
            variants = models(number)
            trial_id = f"t{number:05d}"
            ids = {split: getattr(data, split) for split in SPLITS}
            stored: dict[str, list[Predictions]] = {
                variant: [
                    PREDICTIONS[split](logits_NC.astype(np.float16), labels[split], ids[split])
                    for split, logits_NC in of_variant.items()
                ]
                for variant, of_variant in variants.items()
            }
            experiment.files(trial_id).write_predictions(stored)
            again = finalist_of[number] if finalist_of else ""
            config = TrainConfig(**{"max_epochs": 1, "seed": number, **((changes or {}).get(number, {}))})  # type: ignore[arg-type]
            log_probs_NC = log_softmax(np.nan_to_num(variants["best"]["select"], posinf=0, neginf=0))
            _record(
                experiment,
                trial_id,
                config,
                finalist_of=again,
                val_accuracy=accuracy(log_probs_NC, labels["select"]),
                val_nll=nll(log_probs_NC, labels["select"]),
            )
    return experiment


def _data(labels: Mapping[Split, IntArray], *, num_classes: int, split_hash: str) -> SplitImages:
    ends = np.cumsum([1, *(len(labels[split]) for split in SPLITS)])
    indices = {split: np.arange(start, end) for split, start, end in zip(SPLITS, ends, ends[1:], strict=False)}
    return SplitImages(
        images_NCHW=np.zeros((0, 1, 8, 8), np.uint8),
        labels_N=np.concatenate([[0], *(labels[split] for split in SPLITS)]),
        train=np.arange(1),
        class_names=tuple(f"class {c}" for c in range(num_classes)),
        split_hash=split_hash,
        mean_C=np.zeros(1, np.float32),
        std_C=np.ones(1, np.float32),
        **indices,
    )


def _record(
    experiment: Experiment,
    trial_id: str,
    config: TrainConfig,
    *,
    finalist_of: str,
    val_accuracy: float,
    val_nll: float,
) -> None:
    now = time.time()
    result = EpochResult(
        epoch=1,
        lr=0.1,
        train_loss=1.0,
        train_accuracy=val_accuracy,
        clean_train_accuracy=val_accuracy,
        val_accuracy=val_accuracy,
        val_nll=val_nll,
        val_ece=0.1,
        raw_val_accuracy=val_accuracy,
        raw_val_nll=val_nll,
        grad_norm=1.0,
        epoch_seconds=2.0,
        images_per_second=50.0,
        inference_images_per_second=200.0,
        num_parameters=10,
        multiply_adds=100,
        peak_memory_bytes=1000,
        best_epoch=1,
        out_of_patience=False,
    )
    experiment.record(
        TrialStarted(
            at=now,
            trial_id=trial_id,
            stage="finalist" if finalist_of else "search",
            origin="finalist" if finalist_of else "baseline",
            seed=config.seed,
            config=config.to_dict(),
            params={},
            distributions={},
            finalist_of=finalist_of,
        )
    )
    experiment.record(
        EpochReported(at=now, trial_id=trial_id, node="here", result=result),
        Decided(at=now, trial_id=trial_id, epoch=1, rung=None, decision="stop"),
        TrialEnded(
            at=now,
            trial_id=trial_id,
            status="completed",
            stop_reason="",
            has_predictions=True,
            has_checkpoint=experiment.files(trial_id).best.exists(),
        ),
    )

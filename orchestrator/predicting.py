"""Predictions made from stored weights when somebody asks for them: of trials that were stopped early, and of variants
that a trial does not predict with at its end.

    from orchestrator.predicting import predict_stopped, predict_variant

    experiment = Experiment.open("results/runs", "digits")
    predict_stopped(experiment, ["t00003"])
    experiment.predictions("t00003", SelectPredictions)
    predict_variant(experiment, ["t00000"], "raw_tta")
    experiment.predictions("t00000", SelectPredictions, variant="raw_tta")

Both need the experiment's images, and are its one driver meanwhile. Each trial's predictions are stored in one step and
recorded: what a killed process leaves undone, the next call does. They raise UsageError, with the fix, for a trial
without weights, and for images that are missing or others by now; ExperimentLocked while another process drives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from orchestrator import cli
from orchestrator.driver import load_images
from orchestrator.training import choose_device
from results.events import TrialPredicted
from results.history import TrialHistory
from results.schema import PREDICTIONS, Predictions, TestPredictions, UsageError
from results.store import Experiment
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.process import prepared_for_a_while
from trainables.resident import TrainingImages, WatchedImages
from trainables.stored import best_predictions, variant_predictions
from trainables.trial import images_on

NAMED_AT_MOST = 5
Say = Callable[[str], None]
Variants = Mapping[str, Sequence[Predictions]]
Predict = Callable[[TrialHistory, TrainConfig, TrainingImages], Variants]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an experiment's images are, and what predicts. `dataset`: as it is called now, if no longer as it was."""

    data_dir: str = cli.DEFAULT_DATA_DIR
    dataset: str | None = None
    device: str = "auto"


def _in_silence(line: str) -> None:
    pass


def predict_stopped(
    experiment: Experiment, trial_ids: Iterable[str], source: Source | None = None, *, say: Say = _in_silence
) -> None:
    """Predict with the best weights of those of these trials that have no predictions.

    `say` takes a line that says what is going to be done.
    """
    wanted = list(trial_ids)

    def best(trial: TrialHistory, config: TrainConfig, images: TrainingImages) -> Variants:
        return best_predictions(experiment.files(trial.trial_id), config, images, _splits(experiment))

    with experiment.driving():
        trials = [experiment.history.trials[trial_id] for trial_id in wanted]
        lacking = [trial for trial in trials if not trial.has_predictions]
        _predict(experiment, lacking, best, source or Source(), say=say)


def predict_variant(
    experiment: Experiment,
    trial_ids: Iterable[str],
    variant: str,
    source: Source | None = None,
    *,
    say: Say = _in_silence,
) -> None:
    """Add a variant to the predictions of those of these trials that have others and lack it. See `predict_stopped`."""
    wanted = list(trial_ids)

    def with_variant(trial: TrialHistory, config: TrainConfig, images: TrainingImages) -> Variants:
        files, splits = experiment.files(trial.trial_id), _splits(experiment)
        before: dict[str, list[Predictions]] = {
            name: [experiment.predictions(trial.trial_id, cls, variant=name) for cls in splits]
            for name in experiment.stored_counts(trial.trial_id)
        }
        return {**before, variant: variant_predictions(files, variant, config, images, splits)}

    with experiment.driving():
        lacking = [trial_id for trial_id in wanted if variant not in experiment.stored_counts(trial_id)]
        trials = [experiment.history.trials[trial_id] for trial_id in lacking]
        _predict(experiment, trials, with_variant, source or Source(), say=say)


def predict_test(
    experiment: Experiment, trial_ids: Iterable[str], source: Source | None = None, *, say: Say = _in_silence
) -> None:
    """Add the test split to the predictions of those of these trials that lack it, for each variant that they have.

    A search or a training with --no-test leaves it out. See `predict_stopped`.
    """
    wanted = list(trial_ids)

    def with_test(trial: TrialHistory, config: TrainConfig, images: TrainingImages) -> Variants:
        files, counts = experiment.files(trial.trial_id), experiment.stored_counts(trial.trial_id)
        return {
            variant: [
                *(experiment.predictions(trial.trial_id, PREDICTIONS[split], variant=variant) for split in stored),
                *variant_predictions(files, variant, config, images, [TestPredictions]),
            ]
            for variant, stored in counts.items()
        }

    with experiment.driving():
        lacking = [
            experiment.history.trials[trial_id]
            for trial_id in wanted
            if any(not stored.get("test") for stored in experiment.stored_counts(trial_id).values())
        ]
        _predict(experiment, lacking, with_test, source or Source(), say=say, what="the test split")


def _predict(
    experiment: Experiment,
    trials: Sequence[TrialHistory],
    predict: Predict,
    source: Source,
    *,
    say: Say,
    what: str = "",
) -> None:
    """Predict with each trial, store what comes of it, and record that it is there. `what`: the images."""
    what = what or f"{sum(experiment.info['split_sizes'][split] for split in PREDICTIONS):,} images"
    for trial in trials:
        _check_has_weights(trial, experiment)
    if not trials:
        return
    data, device = _images_of(experiment, source), choose_device(source.device)
    say(_announcement(experiment, trials, what))
    with prepared_for_a_while(threads=torch.get_num_threads()), cli.INTERRUPTS.deferred():
        images: TrainingImages | None = None
        for trial in trials:
            config = TrainConfig(**trial.started.config)  # type: ignore[arg-type]  # written by to_dict
            images = images or WatchedImages(images_on(device, data, config=config), cli.INTERRUPTS.check)
            experiment.files(trial.trial_id).write_predictions(predict(trial, config, images))
            if not trial.has_predictions:
                experiment.record(TrialPredicted(at=time.time(), trial_id=trial.trial_id))


def _check_has_weights(trial: TrialHistory, experiment: Experiment) -> None:
    if not trial.has_weights:
        cause = "its weights were removed" if trial.checkpoint_removed else "it has no weights"
        raise UsageError(
            f"Cannot predict with {experiment.name}/{trial.trial_id}: {cause}. Fix: leave it out, or search with a "
            f"larger --keep-checkpoints."
        )


def _splits(experiment: Experiment) -> list[type[Predictions]]:
    """The splits that an experiment's trials predict."""
    return [cls for split, cls in PREDICTIONS.items() if experiment.info["split_sizes"][split]]


def _announcement(experiment: Experiment, trials: Sequence[TrialHistory], what: str) -> str:
    """Return a line that says what is going to be predicted."""
    named = ", ".join(trial.trial_id for trial in trials[:NAMED_AT_MOST])
    more = len(trials) - NAMED_AT_MOST
    with_all = f"{named} and {more} more" if more > 0 else named
    why = "" if trials[0].has_predictions else " (stopped early, so they have weights and no predictions yet)"
    return f"{experiment.name}: predicting {what} with {with_all}{why}"


def _images_of(experiment: Experiment, source: Source) -> SplitImages:
    """An experiment's images. Raises UsageError when they are not there, or are others by now."""
    base = TrainConfig(**{**TrainConfig().to_dict(), **experiment.info["space"]["base"]})
    if source.dataset is not None:
        base = base.having({"dataset": source.dataset})
    try:
        data = load_images(base, source.data_dir)
    except UsageError as error:
        raise _no_images(experiment, str(error)) from error
    recorded = experiment.info["split_hash"]
    if data.split_hash != recorded:
        raise _no_images(experiment, f"{base.dataset} has split hash {data.split_hash}, wanted {recorded}")
    return data


def _no_images(experiment: Experiment, cause: str) -> UsageError:
    return UsageError(
        f"Cannot predict with trials of {experiment.name}: {cause}. Fix: say where the images that it was trained on "
        f"are now, with --data-dir or --dataset, or leave --include-stopped out; --no-test needs no test images."
    )

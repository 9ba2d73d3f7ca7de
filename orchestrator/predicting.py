"""Predictions of trials that were stopped early, made from their stored weights when somebody asks for them.

from orchestrator.predicting import predict_stopped

experiment = Experiment.open("results/runs", "digits")
predict_stopped(experiment, ["t00003"])
experiment.predictions("t00003", SelectPredictions)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from orchestrator import cli
from orchestrator.driver import load_images
from orchestrator.training import choose_device, prepare
from results.events import TrialPredicted
from results.history import TrialHistory
from results.schema import PREDICTIONS, Predictions, UsageError
from results.store import Experiment
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.resident import TrainingImages, WatchedImages
from trainables.stored import best_predictions
from trainables.trial import images_on

NAMED_AT_MOST = 5


def predict_stopped(
    experiment: Experiment,
    trial_ids: Iterable[str],
    *,
    data_dir: str = cli.DEFAULT_DATA_DIR,
    dataset: str | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Predict with the best weights of these trials, those that have predictions left out, and store what comes of it.

    Needs the experiment's images, and is its one driver meanwhile. Each trial's predictions are stored in one step and
    recorded: killed half-way, the next call predicts the others. `dataset`: where the images are, if not where they
    were. `say` takes a line that says what is going to be done.

    Raises UsageError, saying the fix, for a trial without weights, and for images that are missing or others by now;
    ExperimentLocked while another process drives.
    """
    wanted = list(trial_ids)
    with experiment.driving():
        trials = [experiment.history.trials[trial_id] for trial_id in wanted]
        lacking = [trial for trial in trials if not trial.has_predictions]
        for trial in lacking:
            _check_has_weights(trial, experiment)
        if lacking:
            data = _images_of(experiment, data_dir=data_dir, dataset=dataset)
            say(_announcement(experiment, lacking))
            _predict(experiment, lacking, data, device=choose_device(device))


def _check_has_weights(trial: TrialHistory, experiment: Experiment) -> None:
    if not trial.has_weights:
        cause = "its weights were removed" if trial.checkpoint_removed else "it has no weights"
        raise UsageError(
            f"Cannot predict with {experiment.name}/{trial.trial_id}: {cause}. Fix: leave it out, or search with a "
            f"larger --keep-checkpoints."
        )


def _predict(experiment: Experiment, trials: Sequence[TrialHistory], data: SplitImages, *, device: str) -> None:
    prepare(None)
    with cli.INTERRUPTS.deferred():
        images: TrainingImages | None = None
        for trial in trials:
            config = TrainConfig(**trial.started.config)  # type: ignore[arg-type]  # written by to_dict
            images = images or WatchedImages(images_on(device, data, config=config), cli.INTERRUPTS.check)
            files = experiment.files(trial.trial_id)
            files.write_predictions(best_predictions(files, config, images, _splits(experiment)))
            experiment.record(TrialPredicted(at=time.time(), trial_id=trial.trial_id))


def _splits(experiment: Experiment) -> list[type[Predictions]]:
    """The splits that an experiment's trials predict."""
    return [cls for split, cls in PREDICTIONS.items() if experiment.info["split_sizes"][split]]


def _announcement(experiment: Experiment, trials: Sequence[TrialHistory]) -> str:
    """A line that says what is going to be predicted."""
    num_images = sum(experiment.info["split_sizes"][split] for split in PREDICTIONS)
    named = ", ".join(trial.trial_id for trial in trials[:NAMED_AT_MOST])
    more = len(trials) - NAMED_AT_MOST
    with_all = f"{named} and {more} more" if more > 0 else named
    why = "stopped early, so they have weights and no predictions yet"
    return f"{experiment.name}: predicting {num_images:,} images with {with_all} ({why})"


def _images_of(experiment: Experiment, *, data_dir: str, dataset: str | None) -> SplitImages:
    """An experiment's images. Raises UsageError when they are not there, or are others by now."""
    base = TrainConfig(**{**TrainConfig().to_dict(), **experiment.info["space"]["base"]})
    if dataset is not None:
        base = base.having({"dataset": dataset})
    try:
        data = load_images(base, data_dir)
    except UsageError as error:
        raise _no_images(experiment, str(error)) from error
    recorded = experiment.info["split_hash"]
    if data.split_hash != recorded:
        raise _no_images(experiment, f"{base.dataset} has split hash {data.split_hash}, wanted {recorded}")
    return data


def _no_images(experiment: Experiment, cause: str) -> UsageError:
    return UsageError(
        f"Cannot predict with stopped trials of {experiment.name}: {cause}. Fix: say where the images that it was "
        f"trained on are now, with --data-dir or --dataset, or leave --include-stopped out."
    )

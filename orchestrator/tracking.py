"""A training's epochs for TensorBoard, MLflow or Weights & Biases, beside what is recorded; each is an optional extra.

MLflow and Weights & Biases are set up by Ray's own integrations and by their environment variables, such as
MLFLOW_TRACKING_URI, WANDB_API_KEY and WANDB_MODE. What a tracker cannot take is no reason to stop a training.
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass

from results.schema import DataWarning, EpochResult, Scalar, UsageError
from results.store import Experiment

Track = Callable[[EpochResult], object]
Figures = dict[str, float]


@dataclass(frozen=True)
class Tracked:
    """The trial whose epochs are told."""

    experiment: Experiment
    trial_id: str
    config: dict[str, Scalar]

    @property
    def name(self) -> str:
        """What a tracker that holds many experiments calls it."""
        return f"{self.experiment.name}-{self.trial_id}"


def figures_of(result: EpochResult) -> Figures:
    """An epoch's figures, those left out that it does not have."""
    return {name: value for name, value in asdict(result).items() if isinstance(value, float)}


@contextmanager
def _tensorboard(tracked: Tracked) -> Iterator[Track]:
    from tensorboardX import SummaryWriter

    folder = tracked.experiment.tensorboard_folder(tracked.trial_id)
    # Names count seconds, and a file of the same second would be lost.
    with SummaryWriter(str(folder), filename_suffix=f".{time.monotonic_ns()}") as writer:

        def track(result: EpochResult) -> None:
            for name, value in figures_of(result).items():
                writer.add_scalar(name, value, result.epoch)
            writer.flush()

        yield track


@contextmanager
def _mlflow(tracked: Tracked) -> Iterator[Track]:
    import mlflow
    from ray.air.integrations.mlflow import setup_mlflow

    name = tracked.experiment.name
    begun = mlflow.search_runs(
        experiment_names=[name], filter_string=f"attributes.run_name = '{tracked.trial_id}'", output_format="list"
    )
    if begun:
        mlflow.start_run(begun[0].info.run_id)  # which the integration then goes on with
    setup_mlflow(
        config=None if begun else dict(tracked.config),
        tracking_uri=mlflow.get_tracking_uri(),
        experiment_name=name,
        run_name=tracked.trial_id,
        create_experiment_if_not_exists=True,
    )
    try:
        yield lambda result: mlflow.log_metrics(figures_of(result), step=result.epoch)
    finally:
        mlflow.end_run()


@contextmanager
def _wandb(tracked: Tracked) -> Iterator[Track]:
    from ray.air.integrations.wandb import setup_wandb

    run = setup_wandb(
        config=dict(tracked.config),
        rank_zero_only=False,
        project=os.environ.get("WANDB_PROJECT", tracked.experiment.name),
        trial_id=tracked.name,
        trial_name=tracked.name,
    )
    try:
        yield lambda result: run.log(figures_of(result), step=result.epoch)
    finally:
        run.finish()


@dataclass(frozen=True)
class Tracker:
    """Where epochs can be told: the package it wants, and how it is done."""

    module: str
    package: str
    begin: Callable[[Tracked], AbstractContextManager[Track]]

    def check_installed(self) -> None:
        """Raise UsageError when its package is missing."""
        if importlib.util.find_spec(self.module) is None:
            raise UsageError(f"--track wants {self.package}, which is not installed: pip install {self.package}")


TRACKERS = {
    "tensorboard": Tracker("tensorboardX", "tensorboardX", _tensorboard),
    "mlflow": Tracker("mlflow", "mlflow-skinny", _mlflow),
    "wandb": Tracker("wandb", "wandb", _wandb),
}


@contextmanager
def tracking(name: str, tracked: Tracked) -> Iterator[Track]:
    """Tell one of the TRACKERS of a trial's epochs; raises UsageError when it cannot begin, and later only warns."""
    begun = TRACKERS[name].begin(tracked)
    try:
        track = begun.__enter__()
    except Exception as error:
        said = (str(error) or repr(error)).splitlines()[0]
        raise UsageError(f"--track {name} cannot begin ({said}); mend that, or leave it out, and --resume") from error
    failed = False

    def guarded(result: EpochResult) -> None:
        nonlocal failed
        try:
            track(result)
        except Exception as error:  # noqa: BLE001  # whatever a tracker's package raises
            if not failed:
                warnings.warn(f"--track {name} failed ({error}); the training goes on", DataWarning, stacklevel=2)
            failed = True

    try:
        yield guarded
    finally:
        try:
            begun.__exit__(None, None, None)
        except Exception as error:  # noqa: BLE001
            warnings.warn(f"--track {name} failed ({error}); all is recorded", DataWarning, stacklevel=2)

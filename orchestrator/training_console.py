"""What one training shows while it runs and at its end; and the list of recipes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orchestrator import cli
from orchestrator.console import duration, size
from orchestrator.metrics import MEANS, score
from results.diagnosis import explained
from results.schema import PREDICTIONS, EpochResult
from results.store import Experiment
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.recipes import RECIPES, Recipe
from trainables.resident import batch_size_of
from trainables.schedules import image_size_in
from trainables.validation import log_softmax

REDRAWS_PER_SECOND = 4


class TrainingConsole(AbstractContextManager["TrainingConsole"]):
    """A line an epoch; in a terminal also a bar of the steps with the time that is left."""

    def __init__(self, console: Console, config: TrainConfig, data: SplitImages, *, after_epoch: int) -> None:
        self._console = console
        self._max_epochs = config.max_epochs
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=REDRAWS_PER_SECOND,
        )
        steps = len(data.train) // batch_size_of(config, data)
        self._task = self._bar.add_task("steps", total=config.max_epochs * steps, completed=after_epoch * steps)
        self._steps = steps
        self._weights = epoch_weights(config, full_size=data.image_size)
        self._last_epoch = after_epoch
        self._first_epoch = after_epoch + 1
        self._started = time.monotonic()
        self.peak_flops: float | None = None
        """Of all devices together, where it is known: epochs then show how much of it is used."""

    def __enter__(self) -> TrainingConsole:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def step(self) -> None:
        """One more step has been handed to the device."""
        self._bar.advance(self._task)

    def advanced(self, epoch: int, steps: int) -> None:
        """So many steps of an epoch have been handed to the devices."""
        self._bar.update(self._task, completed=(epoch - 1) * self._steps + steps)

    def begin(self) -> None:
        """What is left is estimated from what is trained from now on."""
        self._first_epoch = self._last_epoch + 1
        self._started = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(Text(line), soft_wrap=True)

    def epoch(self, result: EpochResult) -> None:
        """Print an epoch's figures and the time left."""
        self._last_epoch = result.epoch
        trained = sum(self._weights[self._first_epoch - 1 : result.epoch])
        left = (time.monotonic() - self._started) / trained * sum(self._weights[result.epoch :])
        figures = [f"loss {result.train_loss:.4f}", f"train {result.train_accuracy:.4f}"]
        if result.val_accuracy is not None:
            figures.append(f"val {result.val_accuracy:.4f}")
        figures.append(f"{result.images_per_second:,.0f} images/s")
        if self.peak_flops is not None:
            used = 6 * result.multiply_adds * result.images_per_second / self.peak_flops
            figures.append(f"MFU {used:.1%}")
        figures.append(f"about {duration(left)} left")
        self._console.print(Text(f"epoch {result.epoch}/{self._max_epochs}  " + "  ".join(figures)), soft_wrap=True)


def epoch_weights(config: TrainConfig, *, full_size: int) -> list[int]:
    """Return what the epochs of a training cost in comparison with each other: the pixels of their images."""
    sides = (image_size_in(epoch, full_size=full_size, config=config) for epoch in range(1, config.max_epochs + 1))
    return [side**2 for side in sides]


def print_results(console: Console, experiment: Experiment) -> int:
    """How the training ended, and its figures on every split that it has predictions for. Returns the exit status."""
    (trial,) = experiment.history.ended
    row = experiment.history.trial_row(trial)
    if row["status"] == "failed":
        said = (row["error"] or "").strip().splitlines()[-1:]
        advice = said[0] if said else f"the training {row['stop_reason']}; lower lr"
        print(f"error: {advice}; with another --name", file=sys.stderr)
        return cli.FAILED
    epochs = f"{row['epochs_trained']} epoch{'s' if row['epochs_trained'] > 1 else ''}"
    why = f" ({row['stop_reason']})" if row["stop_reason"] else ""
    console.print(f"{row['status']} after {epochs}{why}", highlight=False)
    if row["predictions"]:
        variants = list(experiment.stored_counts(trial.trial_id))
        table = Table(box=None)
        for heading in ("split", "variant", "images", *MEANS):
            table.add_column(heading, justify="left" if heading in {"split", "variant"} else "right")
        for split, of in PREDICTIONS.items():
            for variant in variants:
                found = experiment.predictions(trial.trial_id, of, variant=variant)
                if len(found.labels_N):
                    scored = score(found.logits_NC, found.labels_N, log_probs_NC=log_softmax(found.logits_NC))
                    figures = scored.metrics(scored.columns_NK.mean(0))
                    shown = [f"{figures[name]:.4f}" for name in MEANS]
                    table.add_row(split, variant, f"{len(found.labels_N):,}", *shown)
        console.print(table)
    _print_published(console, experiment)
    if row["regularization_verdict"]:
        fit, val = row["clean_train_accuracy"], row["val_accuracy"]
        verdict = explained(row["regularization_verdict"], clean_train_accuracy=fit, val_accuracy=val)
        console.print(f"regularization: {verdict}", highlight=False, soft_wrap=True)
    console.print(f"{experiment.where}: {size(experiment.disk_bytes())} on disk", highlight=False, soft_wrap=True)
    return cli.DONE


def _print_published(console: Console, experiment: Experiment) -> None:
    """What was published for the experiment's recipe, and what the figures above it are."""
    recipe = RECIPES.get(experiment.info["space"]["name"])
    if recipe is None:
        return
    if not experiment.info["split_sizes"]["select"]:
        said = "trained on all images; test is that of the last epoch, and nothing was chosen"
    else:
        said = "the epoch was chosen on select, which training did not see; test was not looked at for it"
    for line in (said, f"published for {experiment.info['space']['name']}: {recipe.published}"):
        console.print(Text(line), soft_wrap=True)


def print_recipes(console: Console, recipes: Mapping[str, Recipe]) -> None:
    """Every recipe: what it trains, what it costs, what was published, where it departs from its source."""
    for name, recipe in recipes.items():
        config = recipe.config
        console.print(Text(name, style="bold"))
        epochs, batch = config.max_epochs, config.batch_size
        lines = [
            f"{config.backbone} on {config.dataset}, {epochs} epochs, batch {batch}, {config.optimizer}",
            f"cost: {recipe.multiply_adds / 1e6:,.0f} million multiply-adds an image, "
            f"{recipe.training_flops / 1e15:,.2f} PFLOP in all",
            f"source: {recipe.source}",
            f"published: {recipe.published}",
            f"differs: {recipe.differs}" if recipe.differs else "",
        ]
        for line in filter(None, lines):
            console.print(Text(f"  {line}"), soft_wrap=True)

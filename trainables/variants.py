"""What a trial stores of its models: weights at its rungs; at its end also their predictions of every split that has
examples.

Variants of one training: `best`, the best epoch's weights; `tta`, the same averaged over views of each image; `raw`,
the last raw weights, where an average is evaluated; `epoch_27`, a snapshot; `swa`, the mean of all snapshots; `soup`,
the mean of some. `raw_tta`, `raw` averaged over views, costs as much as `tta` and is predicted only when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from safetensors.torch import load, save
from torch import nn

from results.schema import Predictions, SelectPredictions
from results.trial_files import TrialFiles
from trainables.averaging import Soup, Weights, greedy_soup, mean, renew_batch_norms
from trainables.config import TrainConfig
from trainables.evaluation import predicted_splits, predictions
from trainables.loop import TrainState
from trainables.resident import TrainingImages
from trainables.stored import predicted_best
from trainables.validation import accuracy, log_softmax, nll

P = TypeVar("P", bound=Predictions)


def is_snapshot(epoch: int, config: TrainConfig) -> bool:
    """Whether a snapshot is taken after an epoch of the configuration's schedule."""
    every = config.snapshot_every
    return every > 0 and epoch % every == 0 and epoch / config.max_epochs >= config.snapshot_from


def snapshot(epoch: int) -> str:
    """The variant that is a snapshot; a trial on several legs counts epochs through all of them."""
    return f"epoch_{epoch}"


@dataclass(frozen=True)
class Variants:
    """The variants of one trial at one moment, and where they go."""

    config: TrainConfig
    data: TrainingImages
    state: TrainState
    files: TrialFiles

    def store_snapshot(self, epoch: int) -> None:
        """Store the evaluated model's present weights."""
        self._write(snapshot(epoch), self.state.evaluated.state_dict(), epochs=(epoch,))

    def store_best(self) -> None:
        """Store the best epoch's weights."""
        self._write("best", self.state.best_weights, epochs=(self.state.results[-1].best_epoch,))

    def store_all(self, snapshots: Sequence[int]) -> None:
        """Store the weights of every variant of a trial that has run to its end, and what they predict.

        `snapshots`: the epochs that are stored as such.

        `swa` and `soup` take two snapshots or more. The soup is chosen on select by the monitored figure: there is none
        without select, when it would be a single snapshot, nor when it would be all of them, which is `swa`.
        """
        self.store_best()
        stored = self._of_best()
        if self.state.learner.ema is not None:
            self._write("raw", self.state.learner.model.state_dict(), epochs=(self.state.results[-1].epoch,))
            stored["raw"] = self._predicted("raw", select=self.state.raw_select)
        stored |= {snapshot(epoch): self._predicted(snapshot(epoch)) for epoch in snapshots}
        if len(snapshots) > 1:
            self._write("swa", self._average(tuple(snapshots)), epochs=snapshots)
            stored["swa"] = self._predicted("swa")
            soup = self._soup(snapshots, stored)
            if soup is not None and len(soup.members) < len(snapshots):
                self._write("soup", soup.weights, epochs=soup.members)
                stored["soup"] = self._predicted("soup")
        if self._splits:
            self.files.write_predictions(stored)

    def _write(self, variant: str, weights: Weights, *, epochs: Sequence[int]) -> None:
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        key = "epoch" if len(epochs) == 1 else "epochs"
        self.files.replace(
            self.files.weights(variant), save(content, metadata={key: ",".join(str(epoch) for epoch in epochs)})
        )

    def _read(self, variant: str) -> Weights:
        with self.files.open(self.files.weights(variant)) as file:
            return load(file.read())

    def _of_best(self) -> dict[str, list[Predictions]]:
        """What the best epoch's model predicts; the epoch's figures were computed from its plain select predictions."""
        model, select = self.state.best_model(), self.state.best_select
        if self.config.test_time_augmentation != "none":
            return predicted_best(model, self.config, self.data, self._splits)
        return {"best": self._of_splits(model, select)}

    def _predicted(self, variant: str, *, select: SelectPredictions | None = None) -> list[Predictions]:
        """What a variant predicts with the weights that are stored; `select`: where that is known already."""
        return self._of_splits(self.state.learner.evaluated_copy(self._read(variant)), select)

    def _of_splits(self, model: nn.Module, select: SelectPredictions | None) -> list[Predictions]:
        return [
            select if cls is SelectPredictions and select is not None else self._predict(model, cls)
            for cls in self._splits
        ]

    @property
    def _splits(self) -> list[type[Predictions]]:
        return predicted_splits(self.data.split)

    def _predict(self, model: nn.Module, of: type[P]) -> P:
        return predictions(model, self.data, of, precision=self.config.precision)

    def _average(self, epochs: tuple[int, ...]) -> Weights:
        model = self.state.learner.evaluated_copy(mean(self._read(snapshot(epoch)) for epoch in epochs))
        renew_batch_norms(model, self.data, self.config)
        return model.state_dict()

    def _soup(self, snapshots: Sequence[int], stored: dict[str, list[Predictions]]) -> Soup | None:
        if not len(self.data.split.select):
            return None
        of_snapshots = [part for epoch in snapshots for part in stored[snapshot(epoch)]]
        figures = [self._figure(part) for part in of_snapshots if isinstance(part, SelectPredictions)]
        return greedy_soup(snapshots, figures, average=self._average, figure_of=self._figure_of)

    def _figure_of(self, weights: Weights) -> float:
        return self._figure(self._predict(self.state.learner.evaluated_copy(weights), SelectPredictions))

    def _figure(self, select: SelectPredictions) -> float:
        """The monitored figure, higher is better."""
        if not np.isfinite(select.logits_NC).all():
            return -math.inf
        if self.config.monitor == "val_accuracy":
            return accuracy(select.logits_NC, select.labels_N)
        return -nll(log_softmax(select.logits_NC), select.labels_N)

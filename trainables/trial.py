"""One trial on disk: train, keep what going on needs after every epoch, store predictions at rungs and at the end."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from typing import Any

import torch
from safetensors.torch import save

from results.schema import EpochResult, EstimatePredictions, SelectPredictions, TestPredictions
from results.store import TrialFiles
from trainables.config import TrainConfig
from trainables.loop import ResidentImages, TrainState, finished, predictions, train


def run_trial(
    config: TrainConfig,
    data: ResidentImages,
    *,
    files: TrialFiles,
    rung_epochs: Collection[int] = (),
    epochs_recorded: int = 0,
) -> Iterator[EpochResult]:
    """Train a trial, going on from its resume file if there is one; yields every epoch after `epochs_recorded`.

    Before an epoch is yielded everything it stands for is on disk: the resume file always, weights and
    predictions when the epoch is a rung or the last. Epochs that an earlier worker finished and nobody
    recorded are yielded from the resume file.
    """
    state = TrainState(config, data)
    if files.resume.exists():
        state.load_state_dict(torch.load(files.resume, map_location=data.device, weights_only=True))
        yield from (result for result in state.results if result.epoch > epochs_recorded)
    for result in train(config, data, state=state):
        if state.best_weights and (result.epoch in rung_epochs or finished(config, state)):
            save_best(state, data, files)
        files.replace(files.resume, _serialized(state))
        yield result


def _serialized(state: TrainState) -> bytes:
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    return buffer.getvalue()


def save_best(state: TrainState, data: ResidentImages, files: TrialFiles) -> None:
    """Store the best epoch's weights, and what they predict for every split that has examples."""
    weights: dict[str, Any] = {name: tensor.contiguous() for name, tensor in state.best_weights.items()}
    files.replace(files.best, save(weights, metadata={"epoch": str(state.results[-1].best_epoch)}))
    model = state.best_model()
    parts = [predictions(model, data, of) for of in (SelectPredictions, EstimatePredictions, TestPredictions)]
    files.write_predictions([part for part in parts if len(part.labels_N)], variant="best")

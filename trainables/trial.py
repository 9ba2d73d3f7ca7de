"""One trial on disk: train, keep what resuming needs after every epoch, store weights at rungs, predict at the end."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from results.schema import EpochResult, UsageError
from results.trial_files import TrialFiles
from trainables.backbones import BACKBONES
from trainables.config import TrainConfig
from trainables.course import Leg, Progress, whole, whole_so_far
from trainables.datasets import SplitImages
from trainables.learner import Learner
from trainables.loop import TrainState, train_epoch
from trainables.parallel import ALONE, Paused, Ranks
from trainables.resident import ResidentImages, TrainingImages, alone
from trainables.variants import Variants, is_snapshot, snapshot

Keep = Callable[[dict[str, Any]], None]


def images_on(device: str, split: SplitImages, *, config: TrainConfig, ranks: Ranks = ALONE) -> TrainingImages:
    """A dataset as the configuration's pipeline has it: resident on the device, or streamed to it."""
    if config.pipeline == "resident":
        return ResidentImages.on(device, split, ranks=ranks)
    from trainables.streaming import StreamedImages  # albumentations is slow to import

    return StreamedImages.on(device, split)


def run_trial(
    config: TrainConfig,
    data: TrainingImages,
    *,
    files: TrialFiles,
    course: tuple[Leg, ...] = (),
    state: TrainState | None = None,
    rung_epochs: Collection[int] = (),
    epochs_recorded: int = 0,
    on_step: Callable[[], None] = lambda: None,
    keep: Keep | None = None,
) -> Iterator[EpochResult]:
    """Train a trial, going on from its resume file if there is one; yields every epoch after `epochs_recorded`.

    Before an epoch is yielded everything it stands for is on disk: the resume file always, its weights when it is a
    snapshot, the best epoch's weights when it is a rung or the last, all variants with their predictions when it is the
    last and has not diverged. A trial that is stopped at a rung has no predictions: `trainables.stored` makes them when
    they are asked for. Epochs that an earlier worker finished and nobody recorded are yielded from the resume file.
    `course`: the legs of the training, by default the configuration's schedule; epochs count through all of them.
    `state`: a fresh one, made from a learner that an earlier trial left.

    Where several ranks train the trial, the first one alone writes. `keep` takes what going on needs in place of the
    resume file's writing, and has then to see to it. When `on_step` raises Paused, of all ranks after the same step,
    that is kept too before the exception goes on.
    """
    keep = keep or (lambda content: files.replace(files.resume, serialized(content)))
    state = TrainState(config, data) if state is None else state
    progress = Progress(course or whole(config.max_epochs))
    stored_epoch = 0  # the best epoch that is on disk, as far as this worker knows
    if files.exists(files.resume):
        saved = _read_resume_file(files, data.device)
        progress.load_state_dict(saved.pop("progress", None) or whole_so_far(saved["results"]))
        state.load_state_dict(saved)
    data.ranks.check_same((len(progress.results), state.begun.steps))
    if progress.results:
        yield from (result for result in progress.results if result.epoch > epochs_recorded)
    while not progress.finished:
        if progress.leg_ended:
            state = _begin_next_leg(config, data, progress, learner=state.learner)
            _drop_other_snapshots(progress, files)
        leg_config = progress.course[progress.leg].config(config)
        try:
            result = progress.add(train_epoch(leg_config, data, state, on_step=on_step))
        except Paused:
            state.pause()
            if data.ranks.is_first:
                keep(_content(state, progress))
            raise
        if data.ranks.is_first:
            variants = Variants(leg_config, alone(data), state, files)
            if is_snapshot(len(progress.numbers), leg_config) and not result.diverged:
                variants.store_snapshot(result.epoch)
            due = result.epoch in rung_epochs or progress.finished
            if progress.finished and not result.diverged:
                variants.store_all(_snapshots(progress, files))
            elif due and state.best_weights and stored_epoch != result.best_epoch:
                variants.store_best()
                stored_epoch = result.best_epoch
        if progress.leg_ended and progress.course[progress.leg].trunk:
            progress.trunk, progress.trunk_numbers = copy.deepcopy(state.state_dict()), list(progress.numbers)
        if data.ranks.is_first:
            keep(_content(state, progress))
        if result.epoch > epochs_recorded:
            yield result


def _begin_next_leg(config: TrainConfig, data: TrainingImages, progress: Progress, *, learner: Learner) -> TrainState:
    """The state at the beginning of a leg: that of the trunk's end, or one from scratch."""
    progress.leg += 1
    leg = progress.course[progress.leg]
    state = TrainState(leg.config(config), data, learner=learner)
    progress.numbers = []
    if leg.start:
        state.load_state_dict(copy.deepcopy(progress.trunk))
        progress.numbers = list(progress.trunk_numbers)
    return state


def _snapshots(progress: Progress, files: TrialFiles) -> list[int]:
    """The epochs of the present line of training whose weights are stored."""
    return [number for number in progress.numbers if files.exists(files.weights(snapshot(number)))]


def _drop_other_snapshots(progress: Progress, files: TrialFiles) -> None:
    """Remove the snapshots that neither the present line of training nor the trunk has."""
    for number in range(1, len(progress.results) + 1):
        if number not in (*progress.numbers, *progress.trunk_numbers):
            files.remove(files.weights(snapshot(number)))


def check_resumable(config: TrainConfig, split: SplitImages, files: TrialFiles) -> None:
    """Raise UsageError when a resume file, if there is one, is not of the network that a configuration trains."""
    if not files.exists(files.resume):
        return
    stored = {name: tuple(tensor.shape) for name, tensor in _read_resume_file(files, "cpu")["model"].items()}
    with torch.device("meta"):
        backbone = BACKBONES[config.backbone](
            num_classes=split.num_classes,
            dropout=config.dropout,
            image_size=split.image_size,
            channels=split.channels,
        )
    wanted = {f"backbone.{name}": tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            raise UsageError(
                f"{files.where(files.resume)} is of another network than {config.backbone} (it has {name} of shape "
                f"{stored.get(name, 'none')}, not {shape}); put the right one back, or remove it and resume again: the "
                f"trial is then trained anew, and its recorded epochs stay"
            )


def _read_resume_file(files: TrialFiles, device: str) -> dict[str, Any]:
    try:
        with files.open(files.resume) as file:
            state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{files.where(files.resume)} cannot be read ({str(error).splitlines()[0]}); remove it and resume again: "
            f"the trial is then trained anew, and its recorded epochs stay"
        ) from error
    return state


def _content(state: TrainState, progress: Progress) -> dict[str, Any]:
    """What going on needs."""
    return {**state.state_dict(), "progress": progress.state_dict()}


def serialized(content: dict[str, Any]) -> bytes:
    """The bytes of a resume file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()

"""What a trial spends on what is not training: one that is stopped at its rung, and one at its end.

    python benchmarks/evaluation_cost.py [--quick]

CPU-seconds of one thread; alternatives run in turns. A stopped trial is one epoch of small_cnn on 4,500 images of
noise, with splits as large as CIFAR-100's. At its end a speedrun_cnn with a moving average and six views predicts a
tenth of these splits. Each stands beside what it replaced: predictions of estimate and test at the rung, and four
variants that were predicted with one after the other at the end.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from interleaved import Seconds, in_turns, machine, ratio, spread, versions
from training_speed import USUAL, noise

from results.schema import EstimatePredictions, SelectPredictions, TestPredictions
from results.store import TrialFiles
from trainables.config import TrainConfig
from trainables.datasets import SplitImages, subsample_train
from trainables.evaluation import predicted_splits, predictions
from trainables.loop import TrainState, train_epoch, train_steps
from trainables.process import prepare_process
from trainables.resident import ResidentImages
from trainables.stored import best_predictions
from trainables.trial import run_trial
from trainables.variants import Variants

SMALL = replace(USUAL, backbone="small_cnn", val_fraction=0.1, max_epochs=3)
SPEEDRUN = replace(
    USUAL, backbone="speedrun_cnn", val_fraction=0.1, max_epochs=1, ema_decay=0.9, test_time_augmentation="flip_shift"
)


def training(data: ResidentImages) -> None:
    """An epoch's steps."""
    train_steps(SMALL, data, TrainState(SMALL, data), epoch=1)


def stopped(data: ResidentImages, folder: Path, *, predicting: bool) -> None:
    """A trial that is stopped at its first rung."""
    files = TrialFiles(str(folder), f"t0000{int(predicting)}", 0)
    files.resume.unlink(missing_ok=True)
    next(run_trial(SMALL, data, files=files, rung_epochs=(1,)))
    if predicting:
        files.write_predictions(best_predictions(files, SMALL, data, [EstimatePredictions, TestPredictions]))


def at_a_rung(data: SplitImages, folder: Path, rounds: int) -> None:
    """Print what a stopped trial costs, and how much of that is not training."""
    images = ResidentImages.on("cpu", data)
    print(f"small_cnn, {len(data.train):,} images, stopped after an epoch: CPU-seconds (share that is not training)")
    names = "weights", "weights, and predictions of estimate and test"
    alternatives: dict[str, Callable[[], None]] = {
        "steps": lambda: training(images),
        names[0]: lambda: stopped(images, folder, predicting=False),
        names[1]: lambda: stopped(images, folder, predicting=True),
    }
    cpu = in_turns(alternatives, rounds=rounds, clock=time.process_time)
    for name in names:
        share = 1 - ratio(cpu, "steps", name)
        print(f"  {name:46} {statistics.median(cpu[name]):.2f} ({share:.2f})", flush=True)
    _print_ratio(cpu, names[1], names[0])


def each_variant_alone(state: TrainState, data: ResidentImages, config: TrainConfig) -> None:
    """Predict with four variants as if they had nothing in common."""
    best, raw, views = state.best_model(), state.learner.model, config.test_time_augmentation
    for model, seen in ((best, "none"), (best, views), (raw, "none"), (raw, views)):
        for cls in predicted_splits(data.split):
            if not (model is best and seen == "none" and cls is SelectPredictions):  # it was known already
                predictions(model, data, cls, views=seen, precision=config.precision)


def at_the_end(data: SplitImages, folder: Path, rounds: int) -> None:
    """Print what the predictions at a trial's end cost."""
    tenth = replace(data, **{split: getattr(data, split)[::10] for split in ("select", "estimate", "test")})
    images = ResidentImages.on("cpu", subsample_train(tenth, 0.1))
    state, files = TrainState(SPEEDRUN, images), TrialFiles(str(folder), "t00002", 0)
    train_epoch(SPEEDRUN, images, state)
    num_images = sum(tenth.sizes()[split] for split in ("select", "estimate", "test"))
    print(f"speedrun_cnn at its end, six views, {num_images:,} images: CPU-seconds of predictions and weights")
    names = "what will be used", "each of four variants alone"
    alternatives: dict[str, Callable[[], None]] = {
        names[0]: lambda: Variants(SPEEDRUN, images, state, files).store_all([]),
        names[1]: lambda: each_variant_alone(state, images, SPEEDRUN),
    }
    cpu = in_turns(alternatives, rounds=rounds, clock=time.process_time)
    for name in names:
        print(f"  {name:46} {statistics.median(cpu[name]):.2f}")
    _print_ratio(cpu, names[1], names[0])


def _print_ratio(seconds: Seconds, of: str, to: str) -> None:
    print(f"  {of} takes {ratio(seconds, of, to):.2f} times ({spread(seconds, of, to)}) {to}", flush=True)


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, to see that everything runs")
    quick = parser.parse_args().quick
    prepare_process(threads=1)
    print(f"{machine('cpu')}; {versions()}")
    data = noise(5_000 if quick else 50_000, val_fraction=0.1)
    with tempfile.TemporaryDirectory() as folder:
        at_a_rung(subsample_train(data, 0.1), Path(folder), 1 if quick else 3)
        at_the_end(data, Path(folder), 1 if quick else 3)


if __name__ == "__main__":
    main()

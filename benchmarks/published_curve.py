"""ResNet44V2's published curve beside ours: train loss and test accuracy of the first epochs on real CIFAR-100.

    python benchmarks/published_curve.py --data-dir DIR --seconds 3600 --threads 2 --output curve.parquet

The published configuration on all 50,000 training images with its schedule of 100 epochs, broken off when the time
is up. Nothing is chosen: the test set is scored after every epoch only because the published runs report that.
The parquet is written anew after every epoch.
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

from results.schema import TestPredictions
from trainables.datasets import load_dataset
from trainables.evaluation import predictions
from trainables.loop import TrainState, train
from trainables.process import prepare_process
from trainables.recipes import RECIPES
from trainables.resident import ResidentImages
from trainables.validation import accuracy, log_softmax, nll

CONFIG = RECIPES["resnet44v2"].config


def main() -> None:
    """Train until the time is up, printing and storing each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    prepare_process(threads=args.threads)
    data = ResidentImages.on(args.device, load_dataset(CONFIG.dataset, data_dir=args.data_dir, val_fraction=0.0))
    state = TrainState(CONFIG, data)
    rows = []
    end = time.monotonic() + args.seconds
    for result in train(CONFIG, data, state=state):
        test = predictions(state.evaluated, data, TestPredictions)
        rows.append(
            {
                "recipe": "resnet44v2",
                "seed": CONFIG.seed,
                "epoch": result.epoch,
                "train_loss": result.train_loss,
                "train_accuracy": result.train_accuracy,
                "test_accuracy": accuracy(test.logits_NC, test.labels_N),
                "test_nll": nll(log_softmax(test.logits_NC), test.labels_N),
                "lr": result.lr,
                "epoch_seconds": result.epoch_seconds,
                "reported_at": datetime.now(UTC),
                "machine": f"{platform.machine()}, {args.threads} threads, {args.device}",
                "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
            }
        )
        pd.DataFrame(rows).to_parquet(args.output)
        print({k: rows[-1][k] for k in ("epoch", "train_loss", "train_accuracy", "test_accuracy")}, flush=True)
        if time.monotonic() + result.epoch_seconds > end:
            return


if __name__ == "__main__":
    main()

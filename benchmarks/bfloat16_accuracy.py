"""What bfloat16 does to accuracy and NLL: the same trainings in float32 and in bfloat16, seed by seed.

    python benchmarks/bfloat16_accuracy.py --data-dir DIR

Both of a pair begin with the same weights and see the same batches. Figures are of `select`, at each training's best
epoch, on a fraction of CIFAR-100; a difference is bfloat16 minus float32, its standard error that of the mean over the
seeds. The standard error over the images, also paired, says what the pairs could show at all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from interleaved import machine, versions

from results.schema import SelectPredictions
from trainables.config import TrainConfig
from trainables.datasets import SplitImages, load_dataset
from trainables.loop import TrainState, train
from trainables.process import prepare_process
from trainables.recipes import SPEEDRUN
from trainables.resident import ResidentImages
from trainables.validation import log_softmax

CONFIGS = {
    "speedrun_cnn": SPEEDRUN,
    "small_cnn": TrainConfig(
        dataset="cifar100", backbone="small_cnn", batch_size=128, lr=0.05, label_smoothing=0.1, cutout_size=8
    ),
}
TYPES = ("float32", "bfloat16")


def per_image(config: TrainConfig, data: ResidentImages) -> tuple[np.ndarray, float]:
    """Correctness and NLL of each select image at the best epoch [2, N], and the CPU seconds of the training."""
    start = time.process_time()
    state = TrainState(config, data)
    for _ in train(config, data, state=state):
        pass
    seconds = time.process_time() - start
    select = state.best_select
    assert isinstance(select, SelectPredictions)
    right_N = select.logits_NC.argmax(1) == select.labels_N
    nll_N = -log_softmax(select.logits_NC)[np.arange(len(right_N)), select.labels_N]
    return np.stack([right_N.astype(float), nll_N]), seconds


def compare(name: str, config: TrainConfig, data: SplitImages, seeds: Sequence[int]) -> None:
    """Train every seed in both types, and print the paired differences."""
    images = ResidentImages.on("cpu", data)
    differences_S2N = []
    for seed in seeds:
        (first_2N, slow), (second_2N, fast) = (
            per_image(replace(config, seed=seed, precision=precision), images) for precision in TYPES
        )
        differences_S2N.append(second_2N - first_2N)
        (accuracy, nll), (other_accuracy, other_nll) = first_2N.mean(1), second_2N.mean(1)
        print(
            f"  {name:13} seed {seed}  accuracy {accuracy:.4f} and {other_accuracy:.4f}  NLL {nll:.4f} and "
            f"{other_nll:.4f}  CPU seconds {slow:.0f} and {fast:.0f}",
            flush=True,
        )
    for what, differences_SN in zip(("accuracy", "NLL"), np.stack(differences_S2N, 1), strict=True):
        of_seeds_S = differences_SN.mean(1)
        over_seeds = of_seeds_S.std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else np.nan
        over_images = differences_SN.mean(0).std(ddof=1) / differences_SN.shape[1] ** 0.5
        print(
            f"  {name:13} {what}: bfloat16 minus float32 {of_seeds_S.mean():+.4f}, standard error {over_seeds:.4f} "
            f"over {len(seeds)} seeds, {over_images:.4f} over {differences_SN.shape[1]:,} images",
            flush=True,
        )


def main() -> None:
    """Compare on a fraction of CIFAR-100."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--train-fraction", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    args = parser.parse_args()
    prepare_process(threads=1)
    data = load_dataset("cifar100", data_dir=args.data_dir, train_fraction=args.train_fraction)
    print(f"{machine('cpu')}; {versions()}")
    print(f"{len(data.train):,} training images, {args.epochs} epochs, {len(data.select):,} select images")
    for name in args.only:
        config = replace(CONFIGS[name], max_epochs=args.epochs)
        config = replace(
            config,
            warmup_epochs=min(config.warmup_epochs, args.epochs / 2),
            stem_epochs=min(config.stem_epochs, args.epochs),
        )
        compare(name, config, data, range(args.seeds))


if __name__ == "__main__":
    main()

"""Training against the bare loop, precision=auto against float32, the input part against a DataLoader, each execution
switch, images/s per backbone.

    python benchmarks/training_speed.py [--quick] [--only PART ...]

One thread of a CPU; alternatives run in turns, and ratios are medians over the rounds. The bare loop is forward,
backward and optimizer step in the same number type on one fixed batch of floats, with nothing around it; training is
whole epochs with everything but evaluation: draws, augmentation, mixing, figures. Images are noise of CIFAR-100's
shape. Training is timed by the CPU time of its thread, which other processes disturb less than the wall clock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from interleaved import in_turns, machine, rate, ratio, spread, versions
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from trainables.backbones import BACKBONES
from trainables.config import TrainConfig
from trainables.datasets import LabelledImages, SplitImages, split, subsample_train
from trainables.loop import TrainState, train_steps
from trainables.precision import LEAST_GAIN, autocast
from trainables.process import prepare_process
from trainables.recipes import SPEEDRUN
from trainables.resident import ResidentImages, memory_format
from trainables.step_timing import Meter

BATCH = 128
USUAL = TrainConfig(
    dataset="noise",
    batch_size=BATCH,
    dropout=0.1,
    cutout_size=8,
    mixup_alpha=0.2,
    label_smoothing=0.1,
    max_epochs=10_000,
    lr=0.01,
    val_fraction=0.0,
)
POLICY = replace(USUAL, policy="autoaugment_cifar10")
AGAINST_BARE = (
    ("small_cnn", "crop, flip, cutout, mixup", USUAL, 0.95),
    ("efficient200k", "crop, flip, cutout, mixup", USUAL, 0.95),
    ("speedrun_cnn", "crop, flip, cutout, mixup", USUAL, 0.95),
    ("efficient200k", "the same and AutoAugment", POLICY, 0.90),
    ("small_cnn", "the first, in bfloat16", replace(USUAL, precision="bfloat16"), 0.95),
    ("speedrun_cnn", "the first, in bfloat16", replace(USUAL, precision="bfloat16"), 0.95),
)
AUTO_AGAINST_FLOAT32 = (
    ("speedrun_cnn", replace(SPEEDRUN, initial_image_size=None, max_epochs=10_000, val_fraction=0.0), 1.5),
    ("small_cnn", USUAL, 1.35),
)
SWITCHES: dict[str, dict[str, object]] = {
    "channels_last off": {"channels_last": False},
    "torch.compile": {"compile": True},
    "bfloat16": {"precision": "bfloat16"},
    "EMA": {"ema_decay": 0.999},
    "gradient clipping": {"gradient_clip": 1.0},
    "two accumulation steps": {"accumulation_steps": 2},
    "AdamW": {"optimizer": "adamw", "lr": 1e-3},
    "Muon": {"optimizer": "muon", "lr": 1e-3},
}
LIGHT = (
    "small_cnn",
    "efficient200k",
    "speedrun_cnn",
    "mobilenet_v3_small",
    "resnet44v2",
    "wide_resnet16_4",
    "resnet18",
)


def noise(num_images: int, *, val_fraction: float = 0.0) -> SplitImages:
    """Images of CIFAR-100's shape, 100 classes; a sixth more of them are the test set."""
    rng = np.random.default_rng(0)
    total = num_images + num_images // 6
    pixels = rng.integers(0, 256, size=(total, 3, 32, 32), dtype=np.uint8)
    data = LabelledImages(pixels, np.arange(total) % 100, total - num_images, tuple(map(str, range(100))))
    return split(data, val_fraction=val_fraction)


def bare_loop(
    config: TrainConfig, data: ResidentImages, *, steps: int, fused: bool = True, compiled: bool = False
) -> Callable[[], None]:
    """Forward, backward and step on one batch, as a loop with nothing else in it."""
    net = BACKBONES[config.backbone](num_classes=100, dropout=config.dropout, image_size=32, channels=3)
    net = net.to(data.device).to(memory_format=memory_format(config)).train()
    images = torch.randn(config.batch_size, 3, 32, 32, device=data.device)
    images = images.contiguous(memory_format=memory_format(config))
    labels = torch.arange(config.batch_size, device=data.device) % 100
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad],
        lr=config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
        fused=fused,
    )

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with autocast(config.precision, data.device):
            logits = net(images)
        return cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)

    loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss(images).backward()
            optimizer.step()

    return run


def training(config: TrainConfig, data: ResidentImages) -> Callable[[], None]:
    """An epoch's steps, one epoch further each time."""
    state = TrainState(config, data)
    epoch = 0

    def run() -> None:
        nonlocal epoch
        epoch += 1
        train_steps(config, data, state, epoch=epoch)

    return run


def against_the_bare_loop(rounds: int, steps: int) -> None:
    """Print what share of the bare loop's speed whole training has."""
    data = ResidentImages.on("cpu", noise(steps * BATCH))
    print("training against the bare loop (1 would be no overhead at all)")
    for backbone, what, config, wanted in AGAINST_BARE:
        config = replace(config, backbone=backbone)
        seconds = in_turns(
            {"bare": bare_loop(config, data, steps=steps), "training": training(config, data)},
            rounds=rounds,
            clock=time.thread_time,
        )
        print(
            f"  {backbone:14} {what:26} {ratio(seconds, 'bare', 'training'):.3f} "
            f"({spread(seconds, 'bare', 'training')}; goal {wanted})  "
            f"{rate(seconds, 'training', images=steps * BATCH):,.0f} images/s",
            flush=True,
        )


def auto_against_float32(rounds: int, steps: int) -> None:
    """Print what precision=auto decides here for a long run, and how fast whole training then is."""
    print("precision=auto against float32, batch sizes of the recipes")
    for backbone, config, wanted in AUTO_AGAINST_FLOAT32:
        config = replace(config, backbone=backbone)
        data = ResidentImages.on("cpu", noise(steps * config.batch_size))
        worst = min(Meter(data, 1).bfloat16_ratios(config, least=LEAST_GAIN))
        auto = replace(config, precision="bfloat16" if worst >= LEAST_GAIN else "float32")
        alternatives = {
            "float32": training(replace(config, precision="float32"), data),
            "auto": training(auto, data),
        }
        seconds = in_turns(alternatives, rounds=rounds, clock=time.thread_time)
        print(
            f"  {backbone:14} {auto.precision} (worst of the measured steps {worst:.2f})  "
            f"{ratio(seconds, 'float32', 'auto'):.3f} times as fast ({spread(seconds, 'float32', 'auto')}; "
            f"goal {wanted})  {rate(seconds, 'auto', images=steps * config.batch_size):,.0f} images/s",
            flush=True,
        )


class PerImage(Dataset[tuple[torch.Tensor, int]]):
    """What a torchvision user writes: one image at a time through transforms.v2."""

    def __init__(self, data: SplitImages, config: TrainConfig) -> None:
        self._images = torch.from_numpy(data.images_NCHW)
        self._labels = data.labels_N
        policy = [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)] if config.policy != "none" else []
        self._transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                *policy,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.25] * 3),
                v2.RandomErasing(p=1.0, scale=(1 / 16, 1 / 16), ratio=(1.0, 1.0)),
            ]
        )

    def __len__(self) -> int:
        return len(self._images) * 6 // 7

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(self._images[index]), int(self._labels[index])


def the_input_part(rounds: int, num_images: int) -> None:
    """Print the input part's images/s against a DataLoader's in the same process, mixup and cutout on both sides."""
    split_images = noise(num_images)
    data = ResidentImages.on("cpu", split_images)
    print("the input part alone: batches ready for the network, in one process")
    for what, config in (("crop, flip, cutout, mixup", USUAL), ("the same and AutoAugment", POLICY)):
        loader = DataLoader(PerImage(split_images, config), batch_size=BATCH, shuffle=True, drop_last=True)
        mixup = v2.MixUp(alpha=config.mixup_alpha, num_classes=100)
        epoch = 0

        def ours(config: TrainConfig = config) -> None:
            nonlocal epoch
            epoch += 1
            for _ in data.batches(config, epoch=epoch, image_size=32):
                pass

        def theirs(loader: DataLoader[tuple[torch.Tensor, int]] = loader, mixup: nn.Module = mixup) -> None:
            for images, labels in loader:
                mixup(images, labels)

        seconds = in_turns({"DataLoader": theirs, "ours": ours}, rounds=rounds)
        print(
            f"  {what:26} {ratio(seconds, 'DataLoader', 'ours'):.1f} times as fast "
            f"({spread(seconds, 'DataLoader', 'ours')}; goal 10): "
            f"{rate(seconds, 'ours', images=num_images):,.0f} against "
            f"{rate(seconds, 'DataLoader', images=num_images):,.0f} images/s",
            flush=True,
        )


def each_switch(rounds: int, steps: int) -> None:
    """Print what each execution switch does to the training of efficient200k, alone."""
    data = ResidentImages.on("cpu", noise(steps * BATCH))
    plain = replace(USUAL, backbone="efficient200k")
    alternatives = {"plain": training(plain, data)}
    alternatives |= {name: training(plain.having(changes), data) for name, changes in SWITCHES.items()}  # type: ignore[arg-type]
    alternatives |= {
        f"bare, fused={fused}": bare_loop(plain, data, steps=steps, fused=fused) for fused in (True, False)
    }
    seconds = in_turns(alternatives, rounds=rounds)
    print("one switch alone, efficient200k: speed relative to plain")
    for name in SWITCHES:
        print(f"  {name:24} {ratio(seconds, 'plain', name):.3f} ({spread(seconds, 'plain', name)})", flush=True)
    both = "bare, fused=True", "bare, fused=False"
    print(f"  {'SGD not fused':24} {ratio(seconds, *both):.3f} ({spread(seconds, *both)}), of the bare loop")


def each_backbone(rounds: int) -> None:
    """Print the images/s of training the backbones that a CPU can train."""
    print("images/s in training, 32x32, 100 classes")
    for backbone in LIGHT:
        steps = 8 if backbone in {"small_cnn", "efficient200k"} else 2
        data = ResidentImages.on("cpu", noise(steps * BATCH))
        seconds = in_turns({"training": training(replace(USUAL, backbone=backbone), data)}, rounds=rounds)
        print(f"  {backbone:20} {rate(seconds, 'training', images=steps * BATCH):,.0f}", flush=True)


def share_of_evaluation(shares_of_data: tuple[float, ...]) -> None:
    """Print what a search's trial on CIFAR-100's splits spends on what is not training: figures, predictions, files."""
    whole = noise(50_000, val_fraction=0.1)
    print("small_cnn, 3 epochs, rungs at 1 and 3: share of the trial that is not training")
    # Optuna comes with these, and the GPU's benchmark, which imports this file, is to run where there is none.
    from results.store import TrialFiles
    from trainables.trial import run_trial

    for fraction in shares_of_data:
        data = ResidentImages.on("cpu", subsample_train(whole, fraction))
        config = replace(USUAL, backbone="small_cnn", val_fraction=0.1, max_epochs=3)
        with tempfile.TemporaryDirectory() as folder:
            files = TrialFiles(folder, "t00000", 0)
            start = time.perf_counter()
            results = list(run_trial(config, data, files=files, rung_epochs=(1, 3)))
            seconds = time.perf_counter() - start
        print(f"  {len(data.train_N):,} training images: {1 - sum(r.epoch_seconds for r in results) / seconds:.3f}")


def main() -> None:
    """Run every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, to see that everything runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    args = parser.parse_args()
    prepare_process(threads=1)
    print(f"{machine('cpu')}; {versions()}")
    for name in args.only:
        PARTS[name](args.quick)


PARTS: dict[str, Callable[[bool], None]] = {
    "bare": lambda quick: against_the_bare_loop(*((1, 2) if quick else (7, 12))),
    "auto": lambda quick: auto_against_float32(*((1, 1) if quick else (7, 4))),
    "input": lambda quick: the_input_part(*((1, 4 * BATCH) if quick else (7, 24 * BATCH))),
    "switches": lambda quick: each_switch(*((1, 2) if quick else (3, 12))),
    "backbones": lambda quick: each_backbone(1 if quick else 3),
    "evaluation": lambda quick: share_of_evaluation((0.01,) if quick else (0.1, 1.0)),
}


if __name__ == "__main__":
    main()

"""RECIPES: named configurations, where each comes from, and what was published for it.

`python -m orchestrator.train RECIPE` runs one. What was measured with them here stands in `results/reference/` and the
README: an accuracy in this file is what others published, unless it says otherwise. In the sources "validation" is the
official test set; here test stays test, and a recipe with `val_fraction=0` reports the test figure of its last epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from results.schema import UsageError
from trainables.backbones import BACKBONES
from trainables.config import TrainConfig

CIFAR_SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A configuration, its source, the figure published for it or aimed at, and where it departs from the source."""

    config: TrainConfig
    source: str
    published: str
    differs: str = ""
    num_images: int = 50_000

    @property
    def multiply_adds(self) -> int:
        """Of one image's forward pass, at full size and 100 classes or so."""
        side = self.config.image_size or CIFAR_SIDE
        with torch.device("meta"):
            net = BACKBONES[self.config.backbone](num_classes=100, dropout=0.0, image_size=side, channels=3).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(torch.empty(1, 3, side, side))
        return int(counter.get_total_flops()) // 2

    @property
    def training_flops(self) -> int:
        """Of the whole training: a backward pass counts as two forward ones, a multiply-add as two operations."""
        held_out = 0.1 if self.config.val_fraction is None else self.config.val_fraction
        images = int(self.num_images * (1 - held_out)) * self.config.max_epochs
        return 6 * self.multiply_adds * images


RESNET50_LARGE_BATCH = TrainConfig(
    dataset="cifar100",
    backbone="resnet50",
    val_fraction=0.0,
    max_epochs=200,
    batch_size=2048,
    lr=0.1,
    lr_batch_size=256,
    warmup_epochs=10,
    initial_lr_fraction=1e-5 / 0.8,
    final_lr_fraction=1e-6 / 0.8,
    weight_decay=5e-4,
    decay_norm_and_bias=True,
    label_smoothing=0.1,
    mixup_alpha=0.2,
    mixup_probability=0.5,
    resized_crop_probability=0.8,
    resized_crop_min_area=0.8,
    resized_crop_min_ratio=0.9,
    resized_crop_max_ratio=1.1,
    policy="autoaugment_cifar10",
    policy_probability=0.7,
    cutout_size=16,
    cutout_probability=0.5,
    seed=42,
)

RESNET44V2 = TrainConfig(
    dataset="cifar100",
    backbone="resnet44v2",
    val_fraction=0.0,
    max_epochs=100,
    batch_size=128,
    lr=0.1,
    warmup_epochs=0,
    nesterov=False,
    weight_decay=5e-4,
    decay_norm_and_bias=True,
    dropout=0.1,
)

EFFICIENT200K = TrainConfig(
    dataset="cifar10",
    backbone="efficient200k",
    pipeline="efficient200k",
    max_epochs=200,
    batch_size=128,
    lr=0.05,
    warmup_epochs=5,
    weight_decay=1e-4,
    decay_norm_and_bias=True,
    gradient_clip=1.0,
    ema_decay=0.999,
    patience=30,
    label_smoothing=0.1,
    dropout=0.2,
    mixup_alpha=0.2,
    mixup_probability=0.3,
    cutmix_alpha=1.0,
    cutmix_probability=0.3,
    ricap_beta=0.3,
    ricap_probability=0.2,
    test_time_augmentation="flip",
)

BALANCED = TrainConfig(
    dataset="cifar100",
    backbone="efficientnet_b0",
    max_epochs=100,
    batch_size=128,
    lr=0.1,
    warmup_epochs=5,
    unfreeze_epochs=10,
    weight_decay=5e-4,
    label_smoothing=0.1,
    dropout=0.2,
    mixup_alpha=0.2,
    mixup_probability=0.5,
    ema_decay=0.999,
    seed=42,
)

FOOD101 = TrainConfig(
    dataset="folder:food-101",
    backbone="efficientnet_b0",
    image_size=224,
    pipeline="food101",
    loader_workers=8,
    max_epochs=110,
    batch_size=24,
    optimizer="adamw",
    lr=1e-4,
    head_lr_factor=10.0,
    schedule="cosine_restarts",
    restart_epochs=15,
    warmup_epochs=5,
    unfreeze_epochs=10,
    weight_decay=1e-2,
    patience=15,
    label_smoothing=0.1,
    dropout=0.3,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
    test_time_augmentation="flip_shift",
)

MODERN = TrainConfig(
    dataset="cifar100",
    backbone="resnet50",
    max_epochs=200,
    batch_size=512,
    lr=0.1,
    lr_batch_size=256,
    warmup_epochs=5,
    weight_decay=5e-4,
    ema_decay=0.9995,
    label_smoothing=0.1,
    mixup_alpha=0.2,
    mixup_probability=0.3,
    cutmix_alpha=1.0,
    cutmix_probability=0.3,
    crop_fill="reflect",
    policy="trivialaugment",
    erasing_probability=0.25,
    test_time_augmentation="flip",
)

SPEEDRUN = TrainConfig(
    dataset="cifar100",
    backbone="speedrun_cnn",
    max_epochs=16,
    batch_size=512,
    optimizer="muon",
    lr=0.01,
    warmup_epochs=2,
    stem_epochs=3,
    weight_decay=0.01,
    ema_decay=0.97,
    label_smoothing=0.2,
    cutmix_alpha=1.0,
    cutmix_probability=0.25,
    crop_padding=2,
    crop_fill="reflect",
    alternating_flip=True,
    initial_image_size=24,
    full_size_at=0.5,
    test_time_augmentation="flip",
)

_SPEEDRUN_SOURCE = "this project, for tiny budgets; ideas of Jordan 2024 and Page 2018, sources in the network's file"
FOOD101_IMAGES = 75_750
_FOOD101_DIFFERS = (
    "A plan that its authors had not carried out, and a reconstruction: rates, crop and probabilities that it leaves "
    "out are ours. It begins from pretrained weights, which are not downloaded here; its two stages (classifier, then "
    "all) are one run in which the parts join. Weight decay is ours."
)

RECIPES: dict[str, Recipe] = {
    "resnet50_large_batch": Recipe(
        config=RESNET50_LARGE_BATCH,
        source="a large-batch CIFAR-100 project: ResNet-50 with CIFAR stem, batch 2048, FP16",
        published="81.45% top-1, 95.70% top-5 on test in about an hour of an A100",
        differs="Mixup touches half of the images instead of half of the batches; bfloat16 instead of FP16.",
    ),
    "resnet44v2": Recipe(
        config=RESNET44V2,
        source="a CIFAR-100 study of pre-activation ResNets: two runs of one configuration, every epoch published",
        published="69.85% and 74.86% on test, with a 25-point gap to training",
        differs="Initialization (He et al. 2015, fan-out) is ours; the source gives none.",
    ),
    "efficient200k_cifar10": Recipe(
        config=EFFICIENT200K,
        source="a CIFAR-10 project with 150,690 parameters",
        published="87.42% claimed; the same source also says 84.08 at its peak and 47.24 with TTA: unproven",
        differs="A reconstruction: warmup length, patience, mixing strengths and the limits of the augmentations are "
        "the libraries' or ours. A tenth of the training images is held out for early stopping.",
    ),
    "efficientnet_b0_balanced": Recipe(
        config=BALANCED,
        source='a CIFAR-100 ensemble project\'s "balanced" configuration (before it, heavier regularization: 65.71%)',
        published="70 to 72% top-1, 91 to 92% top-5, in 4 to 5 hours",
        differs="A reconstruction: the source gives no hyperparameters.",
    ),
    "resnet18_balanced": Recipe(
        config=replace(BALANCED, backbone="resnet18"),
        source="the same project's ResNet, a member of its five-member ensembles (seeds 42, 123, 456, 789, 2024)",
        published="members of 70.8 to 71.5%; ensembles of 74 to 77%",
        differs="A reconstruction: the source gives neither depth nor hyperparameters.",
    ),
    "convnext_tiny_balanced": Recipe(
        config=replace(BALANCED, backbone="convnext_tiny", optimizer="adamw", lr=1e-3, weight_decay=0.05),
        source="the same project's ConvNeXt, a member of its five-member ensembles",
        published="members of 70.8 to 71.5%; ensembles of 74 to 77%",
        differs="A reconstruction: the source gives no hyperparameters; AdamW and its settings are ours.",
    ),
    "food101_efficientnet_b0": Recipe(
        config=FOOD101,
        source="a Food-101 plan, EfficientNet-B0 at 224",
        published="75 to 80%",
        differs=_FOOD101_DIFFERS,
        num_images=FOOD101_IMAGES,
    ),
    "food101_efficientnet_b3": Recipe(
        config=replace(FOOD101, backbone="efficientnet_b3", image_size=300, batch_size=16),
        source="the same plan, EfficientNet-B3 at 300",
        published="82 to 87%",
        differs=_FOOD101_DIFFERS,
        num_images=FOOD101_IMAGES,
    ),
    "food101_efficientnet_b4": Recipe(
        config=replace(FOOD101, backbone="efficientnet_b4", image_size=380, batch_size=8),
        source="the same plan, EfficientNet-B4 at 380",
        published="88 to 93%",
        differs=_FOOD101_DIFFERS,
        num_images=FOOD101_IMAGES,
    ),
    "food101_resnet50": Recipe(
        config=replace(FOOD101, backbone="resnet50"),
        source="the same plan, ResNet-50: a member of its three-model average",
        published="part of the plan's 95% for the average",
        differs=_FOOD101_DIFFERS,
        num_images=FOOD101_IMAGES,
    ),
    "food101_resnet101": Recipe(
        config=replace(FOOD101, backbone="resnet101", batch_size=16),
        source="the same plan, ResNet-101: a member of its three-model average",
        published="part of the plan's 95% for the average",
        differs=_FOOD101_DIFFERS,
        num_images=FOOD101_IMAGES,
    ),
    "resnet50_modern": Recipe(
        config=MODERN,
        source="this project, from TrivialAugment, CutMix with mixup, random erasing and averaged weights",
        published="goal: above 84.6% on test, the best figure published for this network with AutoAugment, cutout and "
        "mixup in 300 epochs; not measured yet",
    ),
    "resnet18_modern": Recipe(
        config=replace(MODERN, backbone="resnet18"),
        source="this project, as resnet50_modern",
        published="goal: above the recipes of its size here; not measured yet",
    ),
    "speedrun": Recipe(
        config=SPEEDRUN,
        source=_SPEEDRUN_SOURCE,
        published="no figure; a first result on a laptop",
    ),
    "speedrun_medium": Recipe(
        config=replace(SPEEDRUN, backbone="speedrun_cnn_medium"),
        source=_SPEEDRUN_SOURCE,
        published="no figure",
    ),
    "speedrun_large": Recipe(
        config=replace(SPEEDRUN, backbone="speedrun_cnn_large"),
        source=_SPEEDRUN_SOURCE,
        published="goal: 75% on test in an hour of a core; not measured yet",
    ),
}


def recipe_named(name: str) -> Recipe:
    """A recipe. Raises UsageError, listing them, for an unknown name."""
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]

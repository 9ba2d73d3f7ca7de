"""The training loop: it learns, repeats itself to the bit, and goes on where it stopped."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from results.schema import SelectPredictions, UsageError
from trainables import loop
from trainables.config import CHOICES, TrainConfig, parse_overrides
from trainables.datasets import LabelledImages, SplitImages, split
from trainables.evaluation import VIEWS, predict, predictions
from trainables.loop import TrainState, train
from trainables.policies import POLICIES
from trainables.resident import ResidentImages
from trainables.streaming import PIPELINES
from trainables.validation import ece, log_softmax, nll

EVERYTHING = TrainConfig(
    max_epochs=3,
    batch_size=64,
    lr=0.05,
    crop_padding=1,
    cutout_size=3,
    cutout_probability=0.5,
    mixup_alpha=0.4,
    mixup_probability=0.7,
    cutmix_alpha=1.0,
    cutmix_probability=0.3,
    label_smoothing=0.1,
    dropout=0.2,
    gradient_clip=2.0,
    ema_decay=0.95,
    test_time_augmentation="flip",
    seed=3,
)


def final_logits(config: TrainConfig, data: ResidentImages, state: TrainState) -> np.ndarray:
    for _ in train(config, data, state=state):
        pass
    return predictions(state.best_model(), data, SelectPredictions).logits_NC


def test_same_seed_same_logits_to_the_bit(resident_digits: ResidentImages) -> None:
    runs = [final_logits(EVERYTHING, resident_digits, TrainState(EVERYTHING, resident_digits)) for _ in range(2)]
    assert np.array_equal(*runs)
    other = replace(EVERYTHING, seed=4)
    assert not np.array_equal(runs[0], final_logits(other, resident_digits, TrainState(other, resident_digits)))


def test_a_resumed_run_equals_one_never_stopped_to_the_bit(resident_digits: ResidentImages) -> None:
    whole = TrainState(EVERYTHING, resident_digits)
    expected = final_logits(EVERYTHING, resident_digits, whole)
    begun = TrainState(EVERYTHING, resident_digits)
    next(train(EVERYTHING, resident_digits, state=begun))
    saved = io.BytesIO()
    torch.save(begun.state_dict(), saved)
    saved.seek(0)
    torch.rand(7)  # whatever else the process draws must not matter
    resumed = TrainState(EVERYTHING, resident_digits)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert np.array_equal(final_logits(EVERYTHING, resident_digits, resumed), expected)
    timings = {
        "epoch_seconds": 0.0,
        "images_per_second": 0.0,
        "inference_images_per_second": 0.0,
        "peak_memory_bytes": 0,
    }
    assert [replace(r, **timings) for r in resumed.results] == [replace(r, **timings) for r in whole.results]


def test_training_leaves_the_global_generator_alone(resident_digits: ResidentImages) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    next(train(EVERYTHING, resident_digits))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("backbone", ["small_cnn", "efficient200k", "resnet44v2", "speedrun_cnn"])
def test_64_images_can_be_learned_by_heart(backbone: str, digits: SplitImages) -> None:
    few = replace(digits, train=digits.train[:64])
    config = TrainConfig(
        backbone=backbone,
        max_epochs=25,
        batch_size=16,
        lr=0.05,
        weight_decay=0.0,
        crop_padding=0,
        flip=False,
    )
    assert list(train(config, ResidentImages.on("cpu", few)))[-1].clean_train_accuracy == 1.0


def test_a_loss_that_is_not_finite_ends_the_run(resident_digits: ResidentImages) -> None:
    results = list(train(TrainConfig(lr=1e30, max_epochs=5), resident_digits))
    assert results[-1].diverged
    assert len(results) < 5


def test_patience_ends_a_run_that_no_longer_improves(resident_digits: ResidentImages) -> None:
    config = TrainConfig(lr=1e-9, max_epochs=20, patience=2, flip=False, ema_decay=0.0)
    results = list(train(config, resident_digits))
    assert results[-1].out_of_patience
    assert results[-1].epoch == results[-1].best_epoch + 2 < 20


def test_without_validation_the_last_epoch_counts(digits: SplitImages) -> None:
    everything = replace(digits, train=np.concatenate([digits.train, digits.select, digits.estimate]))
    everything = replace(everything, select=digits.select[:0], estimate=digits.estimate[:0])
    results = list(train(TrainConfig(max_epochs=2), ResidentImages.on("cpu", everything)))
    assert [r.best_epoch for r in results] == [1, 2]
    assert results[-1].val_accuracy is None


@pytest.mark.parametrize(("monitor", "best"), [("val_accuracy", max), ("val_nll", min)])
def test_the_best_epoch_is_that_of_the_monitored_figure(
    monitor: str, best: Callable[..., float], resident_digits: ResidentImages
) -> None:
    config = replace(EVERYTHING, max_epochs=6, monitor=monitor, lr=0.3, warmup_epochs=0)
    results = list(train(config, resident_digits))
    figures = [getattr(r, monitor) for r in results]
    assert getattr(results[results[-1].best_epoch - 1], monitor) == best(figures)


def test_clean_train_accuracy_sees_every_class_of_ordered_images() -> None:
    labels = np.repeat(np.arange(20), 50)
    images = np.broadcast_to((labels * 12).astype(np.uint8)[:, None, None, None], (1000, 1, 8, 8)).copy()
    data = split(LabelledImages(images, labels, 0, tuple(map(str, range(20)))), val_fraction=0.1)

    class Seen(torch.nn.Module):
        seen: ClassVar[set[int]] = set()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.seen.update(images[:, 0, 0, 0].int().tolist())
            return torch.zeros(len(images), 20)

    loop._clean_train_accuracy(TrainConfig(), ResidentImages.on("cpu", data), Seen())
    assert len(Seen.seen) == 20


def test_best_weights_are_those_behind_the_best_epochs_figures(resident_digits: ResidentImages) -> None:
    state = TrainState(EVERYTHING, resident_digits)
    results = list(train(EVERYTHING, resident_digits, state=state))
    best = max(results, key=lambda r: (r.val_accuracy, -r.val_nll))
    assert results[-1].best_epoch == best.epoch
    stored = predictions(state.best_model(), resident_digits, SelectPredictions)
    assert nll(log_softmax(stored.logits_NC), stored.labels_N) == best.val_nll


# --- evaluation ---


def test_ece_of_a_case_worked_by_hand() -> None:
    # Two bins matter: confidence .6 twice, once right (gaps +.4 and -.6, sum -.2), and .9 once, right (+.1).
    probs = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]])
    assert ece(probs, np.array([0, 1, 1])) == pytest.approx((0.2 + 0.1) / 3)


def test_logits_beyond_float16_are_clamped(noise_images: SplitImages) -> None:
    class Huge(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 4), 1e9)

    data = ResidentImages.on("cpu", noise_images)
    assert np.isfinite(predict(Huge(), data, noise_images.train)).all()


# --- configuration ---


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("dropout=1", r"dropout=1.0: wanted a number in \[0, 1\)"),
        ("lr=nan", "lr=nan: wanted a finite number above 0"),
        ("lr=-1", "wanted a finite number above 0"),
        ("batch_size=1", "batch_size=1: wanted 2 or more"),
        ("batch_size=1.5", "wanted a whole number"),
        ("flip=maybe", "wanted true or false"),
        ("droput=0.1", "TrainConfig has no field 'droput'; there are dataset, backbone"),
        ("dropout", "wanted FIELD=VALUE"),
        ("train_fraction=0", r"wanted a fraction in \(0, 1\]"),
        ("policy=auto", "policy='auto': wanted one of none, autoaugment_cifar10, randaugment, trivialaugment"),
        ("schedule=step", "schedule='step': wanted one of cosine, cosine_restarts, one_cycle, warmup_stable_decay"),
        ("optimizer=adam", "optimizer='adam': wanted one of sgd, adamw, muon"),
        ("pipeline=dali", "pipeline='dali': wanted one of resident, efficient200k, food101"),
        ("warmup_epochs=10", "warmup_epochs=10 is more than max_epochs=9; lower the one or raise the other"),
        ("unfreeze_epochs=10", "unfreeze_epochs=10 is more than max_epochs=9"),
        ("val_fraction=0 patience=5", "patience=5 with val_fraction=0: there is no validation to go by"),
        ("snapshot_every=-1", "snapshot_every=-1: wanted 0 or more"),
        ("snapshot_from=1", r"snapshot_from=1.0: wanted a number in \[0, 1\)"),
        ("accumulation_steps=65", "leaves parts of a single image of batch_size=128"),
        ("resized_crop_min_ratio=2", "resized_crop_min_ratio=2 is above resized_crop_max_ratio"),
    ],
)
def test_wrong_settings_say_what_was_given_and_what_was_wanted(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**parse_overrides(assignment.split()))


def test_what_a_config_may_name_is_what_there_is() -> None:
    assert set(CHOICES["policy"]) == {"none", *POLICIES}
    assert set(CHOICES["test_time_augmentation"]) == set(VIEWS)
    assert set(CHOICES["pipeline"]) == {"resident", *PIPELINES}


def test_settings_are_parsed_by_their_type() -> None:
    assert parse_overrides(["flip=no", "lr=1", "image_size=none", "backbone=resnet18"]) == {
        "flip": False,
        "lr": 1.0,
        "image_size": None,
        "backbone": "resnet18",
    }


def test_unknown_backbone_lists_the_choices(resident_digits: ResidentImages) -> None:
    with pytest.raises(UsageError, match="no backbone 'vgg'; there are small_cnn, efficient200k, resnet18"):
        TrainState(TrainConfig(backbone="vgg"), resident_digits)


def test_config_is_frozen() -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        TrainConfig().lr = 0.2  # type: ignore[misc]

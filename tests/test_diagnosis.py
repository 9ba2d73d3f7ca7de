"""The verdict on regularization: its rule at hand-made figures, and on networks trained to deserve each one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from results.diagnosis import explained, is_regularized, regularization_verdict
from trainables.config import TrainConfig
from trainables.datasets import SplitImages, subsample_train
from trainables.loop import train
from trainables.resident import ResidentImages

ACCURACY = st.floats(0, 1)


@pytest.mark.parametrize(
    ("train_accuracy", "clean", "val", "verdict"),
    [
        # ResNet44V2's published end, a gap of 25 points: 25 of 30 points of error are gap, and training is easier.
        (0.95, 0.95, 0.70, "under-regularized"),
        # Mixed images keep training harder than validation, and plain ones are fitted.
        (0.60, 0.99, 0.82, "balanced"),
        # "Validation above training" with plain images fitted no better: 3 of 38 points of error are gap.
        (0.45, 0.65, 0.62, "over-regularized"),
        # The same accuracies with nothing that makes training harder.
        (0.63, 0.65, 0.62, "underfit"),
        # Hardly any error left, hardly any gap.
        (0.97, 0.98, 0.975, "balanced"),
        (1.0, 1.0, 1.0, "balanced"),
        (0.5, 0.6, None, None),
    ],
)
def test_verdicts_of_typical_trainings(
    train_accuracy: float, clean: float, val: float | None, verdict: str | None
) -> None:
    found = regularization_verdict(train_accuracy=train_accuracy, clean_train_accuracy=clean, val_accuracy=val)
    assert found == verdict


@pytest.mark.parametrize(
    ("train_accuracy", "clean", "val", "said"),
    [
        # 1 - 0.70 = 30 points of error, 0.95 - 0.70 = 25 of gap, half of 30 is 15.
        (
            0.95,
            0.95,
            0.70,
            "under-regularized: 25 of 30 points of validation error are generalization gap (15 or more:",
        ),
        # An epoch of speedrun_medium on CIFAR-100: 31.9 points, 13.8 of gap; half is 16.0, a quarter 8.0.
        (
            0.7255,
            0.8184,
            0.6807,
            "balanced: 14 of 32 points .* (under-regularized would be 16 or more, over-regularized less than 8)",
        ),
        # A gap of 17 of 18 points, and mixed images that are harder than those of validation.
        (
            0.60,
            0.99,
            0.82,
            "balanced: 17 of 18 points .* (but the images trained on stay harder than those of validation)",
        ),
        # 1 of 5 points: less than a quarter, with plain training images above 95%.
        (0.96, 0.96, 0.95, "balanced: 1 of 5 points .* (and training images are fitted)"),
        (
            0.45,
            0.65,
            0.62,
            "over-regularized: 3 of 38 points .* (less than 10, and regularization makes training harder)",
        ),
        (0.63, 0.65, 0.62, "underfit: 3 of 38 points .* (less than 10, and regularization is not the reason)"),
    ],
)
def test_a_verdict_says_what_it_rests_on(train_accuracy: float, clean: float, val: float, said: str) -> None:
    verdict = regularization_verdict(train_accuracy=train_accuracy, clean_train_accuracy=clean, val_accuracy=val)
    assert verdict is not None
    text = explained(verdict, clean_train_accuracy=clean, val_accuracy=val)
    beginning, _, end = said.partition(" .* ")
    assert text.startswith(beginning)
    assert end in text


@given(ACCURACY, ACCURACY, ACCURACY)
def test_validation_above_plain_training_never_means_too_little_regularization(a: float, b: float, c: float) -> None:
    clean, val = sorted((a, b))
    verdict = regularization_verdict(train_accuracy=c, clean_train_accuracy=clean, val_accuracy=val)
    assert verdict != "under-regularized"


@given(ACCURACY, ACCURACY, st.floats(0, 0.999))
def test_the_gap_alone_decides_between_fitting_too_well_and_not_fitting(train: float, clean: float, val: float) -> None:
    verdict = regularization_verdict(train_accuracy=train, clean_train_accuracy=clean, val_accuracy=val)
    gap_share = (clean - val) / (1 - val)
    if verdict in {"over-regularized", "underfit"}:
        assert gap_share < 0.25
    if verdict == "under-regularized":
        assert gap_share >= 0.5 or math.isclose(gap_share, 0.5)


@given(ACCURACY, ACCURACY, ACCURACY)
def test_without_regularization_nothing_is_over_regularized(train: float, clean: float, val: float) -> None:
    verdict = regularization_verdict(
        train_accuracy=train, clean_train_accuracy=clean, val_accuracy=val, regularized=False
    )
    assert verdict != "over-regularized"


def test_what_was_learned_within_the_epoch_is_not_blamed_on_regularization() -> None:
    figures = {"train_accuracy": 0.39, "clean_train_accuracy": 0.84, "val_accuracy": 0.81}
    assert regularization_verdict(**figures) == "over-regularized"
    assert regularization_verdict(**figures, progress=0.39) == "over-regularized"  # 6 points are left
    assert regularization_verdict(**figures, progress=0.41) == "underfit"


@pytest.mark.parametrize(
    ("changes", "regularized"),
    [
        ({}, False),
        ({"weight_decay": 5e-4}, False),
        ({"weight_decay": 1e-2}, True),
        ({"mixup_alpha": 0.2}, True),
        ({"mixup_alpha": 0.2, "mixup_probability": 0.0}, False),
        ({"policy": "randaugment"}, True),
        ({"dropout": 0.1}, True),
        ({"pipeline": "food101"}, True),
    ],
)
def test_what_counts_as_regularization(changes: dict[str, object], regularized: bool) -> None:
    assert is_regularized(replace(PLAIN, **changes).to_dict()) is regularized


PLAIN = TrainConfig(max_epochs=12, batch_size=32, lr=0.05, crop_padding=0, flip=False, weight_decay=0.0)


@pytest.mark.parametrize(
    ("changes", "fraction", "verdict"),
    [
        ({"max_epochs": 25}, 0.04, "under-regularized"),
        (
            {"mixup_alpha": 5.0, "label_smoothing": 0.3, "dropout": 0.9, "lr": 0.002, "max_epochs": 4},
            1.0,
            "over-regularized",
        ),
        ({"lr": 1e-3, "max_epochs": 5}, 0.5, "underfit"),
    ],
)
def test_a_network_gets_the_verdict_it_was_trained_to_deserve(
    changes: dict[str, object], fraction: float, verdict: str, digits: SplitImages
) -> None:
    data = ResidentImages.on("cpu", subsample_train(digits, fraction))
    *_, before, last = train(replace(PLAIN, **changes), data)
    figures = {
        "train_accuracy": last.train_accuracy / last.attainable_train_accuracy,
        "clean_train_accuracy": last.clean_train_accuracy,
        "val_accuracy": last.val_accuracy,
        "progress": last.train_accuracy - before.train_accuracy,
    }
    assert regularization_verdict(**figures) == verdict, figures

"""The training loop: it learns, repeats itself to the bit, and goes on where it stopped."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from results.schema import SelectPredictions, UsageError
from trainables import loop
from trainables.augment import EpochDraws, augment, cutout, shifted
from trainables.backbones import BACKBONES
from trainables.config import TrainConfig, parse_overrides
from trainables.datasets import LabelledImages, SplitImages, split
from trainables.evaluation import predict
from trainables.loop import ResidentImages, TrainState, predictions, train
from trainables.mixing import mixup
from trainables.optim import MovingAverage, learning_rate, sgd
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
    label_smoothing=0.1,
    dropout=0.2,
    ema_decay=0.95,
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
    timings = {"epoch_seconds": 0.0, "images_per_second": 0.0, "peak_memory_bytes": 0}
    assert [replace(r, **timings) for r in resumed.results] == [replace(r, **timings) for r in whole.results]


def test_training_leaves_the_global_generator_alone(resident_digits: ResidentImages) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    next(train(EVERYTHING, resident_digits))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_64_images_can_be_learned_by_heart(backbone: str, digits: SplitImages) -> None:
    few = replace(digits, train=digits.train[:64])
    config = TrainConfig(
        backbone=backbone,
        max_epochs=25 if backbone == "small_cnn" else 15,
        batch_size=16,
        lr=0.05,
        weight_decay=0.0,
        crop_padding=0,
        flip=False,
    )
    assert list(train(config, ResidentImages.on("cpu", few)))[-1].clean_train_accuracy == 1.0


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("image_size", "channels", "num_classes"), [(8, 1, 2), (32, 3, 100), (96, 3, 5)])
def test_backbones_give_logits_for_any_shape(backbone: str, image_size: int, channels: int, num_classes: int) -> None:
    net = BACKBONES[backbone](num_classes=num_classes, dropout=0.5, image_size=image_size, channels=channels).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, channels, image_size, image_size)).shape == (2, num_classes)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_drop_features_before_the_classifier(backbone: str) -> None:
    net = BACKBONES[backbone](num_classes=4, dropout=0.5, image_size=16, channels=3)
    net.eval()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
            assert module.p == 0.5
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(net(images), net(images))


@pytest.mark.parametrize(
    ("backbone", "num_classes", "parameters", "multiply_adds"),
    [
        # 3x3 convolutions 3-32, 32-64, 64-128, their batch norms, 128-100 linear:
        # 864 + 18,432 + 73,728 + 2 x (32 + 64 + 128) + 12,900; at 32, 16 and 8 pixels.
        ("small_cnn", 100, 106_372, 864 * 1024 + 18_432 * 256 + 73_728 * 64 + 12_800),
        ("efficient200k", 10, 150_690, None),
        ("resnet18", 100, 11_220_132, None),
    ],
)
def test_backbones_have_their_published_size(
    backbone: str, num_classes: int, parameters: int, multiply_adds: int | None, noise_images: SplitImages
) -> None:
    images = np.zeros((len(noise_images.labels_N), 3, 32, 32), np.uint8)
    names = tuple(map(str, range(num_classes)))
    data = ResidentImages.on("cpu", replace(noise_images, images_NCHW=images, class_names=names))
    state = TrainState(TrainConfig(backbone=backbone), data)
    assert state.num_parameters == parameters
    if multiply_adds is not None:
        assert state.multiply_adds == multiply_adds


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

    loop._clean_train_accuracy(ResidentImages.on("cpu", data), Seen())
    assert len(Seen.seen) == 20


def test_best_weights_are_those_behind_the_best_epochs_figures(resident_digits: ResidentImages) -> None:
    state = TrainState(EVERYTHING, resident_digits)
    results = list(train(EVERYTHING, resident_digits, state=state))
    best = max(results, key=lambda r: (r.val_accuracy, -r.val_nll))
    assert results[-1].best_epoch == best.epoch
    stored = predictions(state.best_model(), resident_digits, SelectPredictions)
    assert nll(log_softmax(stored.logits_NC), stored.labels_N) == best.val_nll


# --- augmentation ---


def test_an_images_augmentation_does_not_depend_on_its_batch(noise_images: SplitImages) -> None:
    config = replace(EVERYTHING, crop_padding=3, cutout_size=5)
    data = ResidentImages.on("cpu", noise_images)
    num_images = len(data.train_N)
    draws = EpochDraws.draw(config, epoch=2, num_images=num_images, image_size=16, device="cpu")

    def augmented(positions: list[int]) -> torch.Tensor:
        index = torch.tensor(positions)
        return augment(data.images_NCHW[data.train_N[index]], index, draws, config=config, fill_C=data.mean_C)

    together = augmented(list(range(num_images)))
    assert torch.equal(augmented([5, 2]), together[[5, 2]])
    again = EpochDraws.draw(config, epoch=2, num_images=num_images, image_size=16, device="cpu")
    assert torch.equal(again.shift_N2, draws.shift_N2)
    other = EpochDraws.draw(config, epoch=3, num_images=num_images, image_size=16, device="cpu")
    assert not torch.equal(other.shift_N2, draws.shift_N2)


def test_switching_one_operation_on_leaves_the_others_draws_alone() -> None:
    kwargs = {"epoch": 1, "num_images": 50, "image_size": 16, "device": "cpu"}
    plain = EpochDraws.draw(TrainConfig(), **kwargs)
    mixed = EpochDraws.draw(TrainConfig(mixup_alpha=1.0, cutout_size=4), **kwargs)
    assert torch.equal(plain.flip_N, mixed.flip_N)
    assert torch.equal(plain.order_N, mixed.order_N)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6))
def test_shifted_equals_padding_and_slicing(row: int, column: int) -> None:
    image = torch.arange(2 * 5 * 5, dtype=torch.uint8).reshape(1, 2, 5, 5)
    padded = torch.zeros(1, 2, 11, 11, dtype=torch.uint8)
    padded[:, :, 3:8, 3:8] = image
    expected = padded[:, :, row : row + 5, column : column + 5]
    assert torch.equal(shifted(image, torch.tensor([[row, column]]), padding=3), expected)


def test_cutout_never_hides_a_whole_small_image() -> None:
    config = TrainConfig(cutout_size=16, crop_padding=0, flip=False)
    draws = EpochDraws.draw(config, epoch=1, num_images=64, image_size=8, device="cpu")
    white = torch.full((64, 1, 8, 8), 255, dtype=torch.uint8)
    cut = augment(white, torch.arange(64), draws, config=config, fill_C=torch.zeros(1))
    assert ((cut == 0).sum((1, 2, 3)) <= 16).all()
    assert (cut == 0).any()


def test_cutout_fills_one_square_cut_off_at_the_border() -> None:
    images = torch.zeros(2, 1, 6, 6)
    filled = cutout(images, torch.tensor([[3, 3], [0, 5]]), size=4, fill_C=torch.tensor([7.0]))
    assert (filled[0, 0] == 7).nonzero().tolist() == [[r, c] for r in range(1, 5) for c in range(1, 5)]
    assert (filled[1, 0] == 7).nonzero().tolist() == [[r, c] for r in range(2) for c in range(3, 6)]


def test_mixup_is_the_loss_against_mixed_targets() -> None:
    torch.manual_seed(0)
    images, labels, weight = torch.rand(4, 1, 2, 2), torch.tensor([0, 2, 1, 2]), torch.tensor([1.0, 0.3, 0.5, 0.9])
    mixed, targets = mixup(images, labels, weight)
    assert torch.equal(mixed[0], images[0])
    assert torch.allclose(mixed[1], 0.3 * images[1] + 0.7 * images[0])
    logits = torch.randn(4, 3)
    one_hot = torch.eye(3)
    soft = weight[:, None] * one_hot[labels] + (1 - weight[:, None]) * one_hot[labels.roll(1)]
    assert targets.loss(logits, label_smoothing=0.1).item() == pytest.approx(
        cross_entropy(logits, soft, label_smoothing=0.1).item(), rel=1e-6
    )


# --- optimization ---


def test_learning_rate_warms_up_then_follows_half_a_cosine() -> None:
    config = TrainConfig(lr=0.4, warmup_epochs=2, max_epochs=6, final_lr_fraction=0.1)
    rates = [learning_rate(step, steps_per_epoch=10, config=config) for step in range(60)]
    assert rates[0] == pytest.approx(0.4 / 20)
    assert rates[19] == rates[20] == 0.4
    assert rates[40] == pytest.approx(0.4 * (0.1 + 0.9 * 0.5))  # half way down
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] > 0.04


def test_a_short_run_still_decays() -> None:
    config = TrainConfig(lr=1.0, warmup_epochs=5, max_epochs=2)
    assert learning_rate(19, steps_per_epoch=10, config=config) < 0.1


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_weight_decay_spares_vectors_unless_told_otherwise(decay_norm_and_bias: bool) -> None:
    net = BACKBONES["small_cnn"](num_classes=3, dropout=0.0, image_size=8, channels=1)
    config = TrainConfig(lr=0.5, weight_decay=0.1, momentum=0.0, decay_norm_and_bias=decay_norm_and_bias)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    sgd(net, config).step()
    for name, p in net.named_parameters():
        shrink = 1 - 0.5 * 0.1 if p.ndim > 1 or decay_norm_and_bias else 1.0
        assert torch.allclose(p, before[name] * shrink), name


def test_moving_average_follows_its_formula() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    average = MovingAverage(net, decay=0.5)
    values = [1.0, 2.0, 4.0]
    for value in values:
        net.weight.data.fill_(value)
        average.update(net)
    # The first update copies (1.0); then decays min(.5, 2/11) and min(.5, 3/12):
    # 1 + (2 - 1) x 9/11 = 1.8182; 1.8182 + (4 - 1.8182) x 9/12 = 3.4545.
    assert average.module.weight.item() == pytest.approx(3.4545, abs=1e-4)


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
    assert np.isfinite(predict(Huge(), data.images_NCHW, data.train_N)).all()


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
    ],
)
def test_wrong_settings_say_what_was_given_and_what_was_wanted(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**parse_overrides([assignment]))


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

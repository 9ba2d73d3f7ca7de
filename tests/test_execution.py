"""How a step is executed: kept warm between trials, compiled, accumulated, unfrozen, at growing sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from results.schema import SelectPredictions, UsageError
from trainables.config import TrainConfig
from trainables.datasets import LabelledImages, SplitImages, split
from trainables.evaluation import VIEWS, folded, predict, predictions
from trainables.learner import Learner, check_trainable, structure
from trainables.loop import TrainState, train
from trainables.memory import PROBES, largest_batch
from trainables.model import multiply_adds
from trainables.resident import ResidentImages

SMALL = TrainConfig(max_epochs=2, batch_size=64, lr=0.05, crop_padding=1, flip=False)
FIRST = replace(
    SMALL, lr=0.3, weight_decay=1e-2, dropout=0.4, label_smoothing=0.2, mixup_alpha=1.0, cutout_size=3, seed=5
)
SECOND = replace(SMALL, lr=0.02, weight_decay=1e-4, dropout=0.1, label_smoothing=0.0, cutmix_alpha=0.5, seed=6)


def logits_of(config: TrainConfig, data: ResidentImages, learner: Learner | None = None) -> tuple[np.ndarray, Learner]:
    state = TrainState(config, data, learner=learner)
    for _ in train(config, data, state=state):
        pass
    return predictions(state.best_model(), data, SelectPredictions).logits_NC, state.learner


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema_decay": 0.9}, {"optimizer": "adamw", "lr": 1e-3}, {"optimizer": "muon", "lr": 2e-3}, {"momentum": 0.0}],
)
def test_a_warm_learner_trains_the_next_trial_as_a_new_one_would(
    changes: dict[str, object], resident_digits: ResidentImages
) -> None:
    first, second = replace(FIRST, **changes), replace(SECOND, **changes)
    expected, _ = logits_of(second, resident_digits)
    _, used = logits_of(first, resident_digits)
    again, reused = logits_of(second, resident_digits, learner=used)
    assert reused is used
    assert np.array_equal(again, expected)


def test_what_diverged_leaves_nothing_behind(resident_digits: ResidentImages) -> None:
    expected, _ = logits_of(replace(SECOND, ema_decay=0.9), resident_digits)
    diverging = replace(FIRST, lr=1e30, ema_decay=0.5)
    state = TrainState(diverging, resident_digits)
    assert list(train(diverging, resident_digits, state=state))[-1].diverged
    again, _ = logits_of(replace(SECOND, ema_decay=0.9), resident_digits, learner=state.learner)
    assert np.array_equal(again, expected)


def test_a_learner_of_another_structure_or_data_is_not_used(
    digits: SplitImages, resident_digits: ResidentImages
) -> None:
    _, used = logits_of(replace(SMALL, max_epochs=1), resident_digits)
    assert not used.fits(replace(SMALL, ema_decay=0.9), resident_digits)
    assert not used.fits(replace(SMALL, backbone="efficient200k"), resident_digits)
    assert not used.fits(SMALL, ResidentImages.on("cpu", digits))
    assert structure(FIRST) == structure(SECOND)


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_the_second_trial_compiles_nothing(fresh_compiler: None, resident_digits: ResidentImages) -> None:
    first = replace(FIRST, compile=True)
    # Dropout is on in the first and off in the second, whose random numbers a compiled net draws in another order.
    second = replace(SECOND, compile=True, dropout=0.0, cutmix_alpha=0.0)
    _, used = logits_of(first, resident_digits)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled == 1
    logits, reused = logits_of(second, resident_digits, learner=used)
    assert reused is used
    assert counters["stats"]["unique_graphs"] == compiled
    eager, _ = logits_of(replace(second, compile=False), resident_digits)
    assert np.abs(logits.astype(float) - eager).max() < 0.02


def test_accumulated_parts_amount_to_the_whole_batch(noise_images: SplitImages) -> None:
    """Without batch statistics: the net's norms are in evaluation mode."""
    data = ResidentImages.on("cpu", noise_images)
    config = replace(SMALL, batch_size=16, mixup_alpha=0.5, weight_decay=0.0)
    found = []
    for parts in (1, 3):  # 16 images in parts of 6, 5 and 5
        learner = Learner(replace(config, accumulation_steps=parts), data)
        learner.begin_epoch()
        learner.model.eval()
        for images, targets in data.batches(config, epoch=1, image_size=16):
            learner.step(images, targets, lr=0.01)
        found.append((learner, [p.detach() for p in learner.model.parameters()]))
    (whole, expected), (parted, parameters) = found
    assert float(parted.loss_sum) == pytest.approx(float(whole.loss_sum), rel=1e-5)
    for mine, theirs in zip(parameters, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_frozen_parts_stay_as_they_were_until_they_join(resident_digits: ResidentImages) -> None:
    config = replace(SMALL, max_epochs=3, unfreeze_epochs=2)
    state = TrainState(config, resident_digits)
    start = {name: p.detach().clone() for name, p in state.learner.model.named_parameters()}
    moved = []
    for _ in train(config, resident_digits, state=state):
        now = dict(state.learner.model.named_parameters())
        moved.append({name for name in start if not torch.equal(now[name], start[name])})
    assert moved[0] == {"backbone.14.weight", "backbone.14.bias"}  # the classifier
    assert moved[0] < moved[1] < moved[2] == set(start)
    assert not any(name.startswith("backbone.0.") for name in moved[1])  # the first convolution joins last


def test_training_images_grow_and_evaluation_is_always_at_full_size(noise_images: SplitImages) -> None:
    data = ResidentImages.on("cpu", noise_images)
    config = replace(SMALL, batch_size=16, max_epochs=4, initial_image_size=8, full_size_at=0.75)
    seen: list[int] = []

    class Watching(ResidentImages):
        def batches(self, config: TrainConfig, *, epoch: int, image_size: int):  # type: ignore[no-untyped-def]
            for images, targets in super().batches(config, epoch=epoch, image_size=image_size):
                seen.append(images.shape[-1])
                assert images.min() >= 0
                assert images.max() <= 255
                yield images, targets

    watching = Watching(data.split, data.images_NCHW, data.labels_N, data.train_N, data.mean_C)
    results = list(train(config, watching))
    assert sorted(seen) == seen
    assert (seen[0], seen[-1]) == (8, 16)
    assert len(results) == 4
    assert all(batch.shape[-1] == 16 for batch in watching.evaluation_batches(noise_images.select))


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"precision": "float16"}, "cpu", "precision=float16 on a CPU: half precision trains on GPUs only"),
        ({"cuda_graph": True}, "cpu", "cuda_graph=true on cpu: only NVIDIA GPUs have CUDA graphs"),
        ({"cuda_graph": True, "unfreeze_epochs": 1}, "cuda", "the step changes along the way; leave one out"),
        ({"initial_image_size": 24}, "cpu", "initial_image_size=24 is more than the images' 16 pixels"),
        ({"backbone": "vgg"}, "cpu", "no backbone 'vgg'; there are small_cnn, efficient200k, resnet18"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(
    changes: dict[str, object], device: str, message: str, noise_images: SplitImages
) -> None:
    with pytest.raises(UsageError, match=message):
        check_trainable(replace(SMALL, **changes), noise_images, device=device)


def test_images_too_small_for_a_backbone_are_refused() -> None:
    tiny = split(LabelledImages(np.zeros((40, 3, 4, 4), np.uint8), np.arange(40) % 2, 0, ("a", "b")))
    with pytest.raises(UsageError, match="backbone convnext_tiny takes images of 8 pixels or more, not 4"):
        check_trainable(replace(SMALL, backbone="convnext_tiny"), tiny, device="cpu")


def test_the_largest_batch_is_read_off_the_line_through_two_small_ones() -> None:
    # 100 bytes for the network and 10 an image: 1,000 bytes take 90 images, 88 in multiples of 8.
    small, large = (100 + 10 * size for size in PROBES)
    assert largest_batch(small, large, available=1000) == 88
    assert largest_batch(small, large, available=150) == 5
    assert largest_batch(small, large, available=90) == 0


@pytest.mark.parametrize("views", VIEWS)
def test_views_of_an_image_that_looks_the_same_in_all_of_them_change_nothing(
    views: str, resident_digits: ResidentImages
) -> None:
    learner = Learner(SMALL, resident_digits)
    uniform = replace(resident_digits, images_NCHW=torch.full_like(resident_digits.images_NCHW, 90))
    some = resident_digits.split.select[:8]
    plain = predict(learner.model, uniform, some).astype(float)
    viewed = predict(learner.model, uniform, some, views=views).astype(float)
    shifts = plain - viewed
    assert np.abs(shifts - shifts[:, :1]).max() < 0.01  # logits may differ by a constant


def test_flipping_views_average_the_probabilities_of_both(resident_digits: ResidentImages) -> None:
    learner = Learner(SMALL, resident_digits)
    some = resident_digits.split.select[:8]
    mirrored = replace(resident_digits, images_NCHW=resident_digits.images_NCHW.flip(-1))
    of_both = [torch.tensor(predict(learner.model, data, some)).double() for data in (resident_digits, mirrored)]
    expected = torch.stack([logits.softmax(-1) for logits in of_both]).mean(0)
    found = torch.tensor(predict(learner.model, resident_digits, some, views="flip")).double().softmax(-1)
    assert torch.allclose(found, expected, atol=2e-3)


def test_shifted_views_move_by_one_pixel() -> None:
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    _, _, down_right, up_left, *_ = VIEWS["flip_shift"](image)
    assert torch.equal(down_right[0, 0, 1:, 1:], image[0, 0, :2, :2])
    assert torch.equal(up_left[0, 0, :2, :2], image[0, 0, 1:, 1:])


@pytest.mark.parametrize("backbone", ["small_cnn", "efficient200k", "mobilenet_v3_small", "resnet18"])
def test_norms_folded_into_convolutions_change_no_prediction(backbone: str, noise_images: SplitImages) -> None:
    data = ResidentImages.on("cpu", noise_images)
    state = TrainState(replace(SMALL, backbone=backbone, batch_size=16), data)
    next(train(replace(SMALL, backbone=backbone, batch_size=16), data, state=state))
    model = state.learner.model.eval()
    images = next(data.evaluation_batches(noise_images.select))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = folded(model)
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()) for net in (model, network)]
    assert norms[1] < norms[0]
    with torch.no_grad():
        assert torch.allclose(network(images), model(images), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_multiply_adds_of_a_linear_layer_are_its_weights() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 7))
    assert multiply_adds(net, channels=3, image_size=4) == 3 * 4 * 4 * 7

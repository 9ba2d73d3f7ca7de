"""Mixing: targets sum to one and weigh what their images fill; nothing in a step waits for the device.

Shape suffixes: B batch, S images, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tests.augmenting import MIXED, NOTHING, draws_for, noise
from trainables.augment import EpochDraws, augment
from trainables.config import TrainConfig
from trainables.draws import generator
from trainables.mixing import SoftTargets, cutmix_boxes, mix, ricap_patches, shares

# --- mixing ---

KINDS_OF_MIXING = {
    "mixup": (replace(NOTHING, mixup_alpha=1.0), 2),
    "cutmix": (replace(NOTHING, cutmix_alpha=1.0), 2),
    "ricap": (replace(NOTHING, ricap_beta=0.3), 4),
    "some": (replace(NOTHING, cutmix_alpha=1.0, cutmix_probability=0.3, mixup_alpha=1.0, mixup_probability=0.3), 2),
    "all": (replace(NOTHING, mixup_alpha=0.4, cutmix_alpha=1.0, ricap_beta=0.3), 4),
    "none": (NOTHING, 1),
}
MIXINGS = pytest.mark.parametrize(("config", "num_labels"), KINDS_OF_MIXING.values(), ids=KINDS_OF_MIXING.keys())


@MIXINGS
@pytest.mark.parametrize("size", [7, 8])
def test_labels_weigh_what_their_images_fill(config: TrainConfig, num_labels: int, size: int) -> None:
    batch_size = 16
    # Image b is 1 in channel b and 0 elsewhere: a mixed image's channel means are the shares of its sources.
    images = torch.eye(batch_size)[:, :, None, None].expand(-1, -1, size, size).contiguous()
    draws = EpochDraws.draw(config, epoch=1, num_images=64, image_size=size, device="cpu", batch_size=batch_size)
    for step in range(4):
        mixed, targets = mix(images, torch.arange(batch_size), draws.batch(step).mixing)
        assert targets.labels_BK.shape == targets.weights_BK.shape == (batch_size, num_labels)
        assert targets.weights_BK.dtype == torch.float32
        weight_of_source = torch.zeros(batch_size, batch_size).scatter_add_(1, targets.labels_BK, targets.weights_BK)
        assert torch.allclose(mixed.mean((2, 3)), weight_of_source, atol=1e-6)
        assert torch.allclose(targets.weights_BK.sum(1), torch.ones(batch_size), atol=1e-6)


def test_patches_are_whole_pieces_of_their_images() -> None:
    """RICAP by slicing, as in its paper's listing."""
    config = replace(NOTHING, ricap_beta=1.0)
    images = noise(12, size=9).float()
    draws = draws_for(config, images)
    mixed, targets = mix(images, torch.arange(12), draws.batch(0).mixing)
    numbers, _ = ricap_patches(generator(config, epoch=1, stream=13), 1.0, num_images=12, image_size=9)
    for b, (row, column, *moves) in enumerate(numbers):
        corners = [(0, 0, row, column), (0, column, row, 9), (row, 0, 9, column), (row, column, 9, 9)]
        for k, (top, left, bottom, right) in enumerate(corners):
            down, across = moves[k], moves[4 + k]
            piece = images[(b - k) % 12, :, top + down : bottom + down, left + across : right + across]
            assert torch.equal(mixed[b, :, top:bottom, left:right], piece)
            assert targets.weights_BK[b, k] == pytest.approx((bottom - top) * (right - left) / 81)


def test_cutmix_puts_a_box_of_the_partner_into_the_image() -> None:
    config = replace(NOTHING, cutmix_alpha=1.0)
    images = noise(12, size=9).float()
    mixed, targets = mix(images, torch.arange(12), draws_for(config, images).batch(0).mixing)
    boxes, _ = cutmix_boxes(generator(config, epoch=1, stream=12), 1.0, num_images=12, image_size=9)
    for b, (top, left, bottom, right) in enumerate(boxes):
        expected = images[b].clone()
        expected[:, top:bottom, left:right] = images[b - 1, :, top:bottom, left:right]
        assert torch.equal(mixed[b], expected)
        assert targets.weights_BK[b, 1] == pytest.approx((bottom - top) * (right - left) / 81)


def test_mixup_weights_are_those_that_past_runs_drew() -> None:
    config = replace(NOTHING, seed=4, mixup_alpha=0.5, mixup_probability=0.7)
    rng = np.random.default_rng([4, 3, 4])
    weight = rng.beta(0.5, 0.5, size=20).astype(np.float32)
    weight[rng.random(20) >= 0.7] = 1
    images = noise(20).float()
    mixed, targets = mix(images, torch.arange(20), draws_for(config, images, epoch=3).batch(0).mixing)
    assert (targets.weights_BK[:, 0].numpy() == weight).all()
    weight_B111 = torch.from_numpy(weight)[:, None, None, None]
    assert torch.equal(mixed, torch.lerp(images.roll(1, 0), images, weight_B111))


def test_shares_of_mixings_that_are_too_large_are_divided_by_their_sum() -> None:
    config = KINDS_OF_MIXING["all"][0]
    assert shares(config) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert shares(replace(config, mixup_probability=0.2, cutmix_probability=0.3, ricap_probability=0.1)) == (
        pytest.approx((0.2, 0.3, 0.1))
    )
    assert shares(replace(config, ricap_beta=0.0, mixup_probability=0.5)) == pytest.approx((1 / 3, 2 / 3, 0))
    draws = EpochDraws.draw(config, epoch=1, num_images=6000, image_size=32, device="cpu", batch_size=6000)
    mixing = draws.batch(0).mixing
    assert mixing.ricap is not None
    assert len(mixing.ricap.index_S) == pytest.approx(2000, abs=120)
    assert (mixing.mixup_weight_B < 1).sum().item() == pytest.approx(2000, abs=120)


def test_cutmix_boxes_have_the_size_that_is_drawn() -> None:
    _, share = cutmix_boxes(np.random.default_rng(0), 1.0, num_images=20_000, image_size=32)
    assert share.min() == 0
    # Half of the image on average before boxes are cut off at the borders, which a third of them loses.
    assert 0.3 < share.mean() < 0.5


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, torch.tensor(0.1)], ids=["none", "number", "tensor"])
def test_the_loss_is_the_cross_entropy_against_soft_targets(label_smoothing: float | torch.Tensor) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(5, (6, 4))
    weights = torch.rand(6, 4)
    weights /= weights.sum(1, keepdim=True)
    soft = torch.zeros(6, 5).scatter_add_(1, labels, weights)
    expected = cross_entropy(logits, soft, label_smoothing=float(label_smoothing))
    assert SoftTargets(labels, weights).loss(logits, label_smoothing).item() == pytest.approx(expected.item(), rel=1e-6)
    single = SoftTargets(labels[:, :1], torch.ones(6, 1)).loss(logits, label_smoothing)
    expected = cross_entropy(logits, labels[:, 0], label_smoothing=float(label_smoothing))
    assert single.item() == pytest.approx(expected.item(), rel=1e-6)


def test_right_predictions_count_by_the_weight_of_their_label() -> None:
    targets = SoftTargets(torch.tensor([[0, 1], [2, 2], [1, 0]]), torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]))
    logits = torch.eye(3)[[1, 2, 2]]
    # .3 of the first image, all of the second, nothing of the third.
    assert targets.correct(logits).item() == pytest.approx(1.3)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([7, 8, 31]), st.sampled_from([1, 3]))
def test_everything_at_once_keeps_pixels_and_weights_in_range(
    seed: int, batch_size: int, size: int, channels: int
) -> None:
    config = replace(MIXED, seed=seed)
    images = noise(2 * batch_size, channels, size, seed=seed)
    draws = EpochDraws.draw(
        config, epoch=1, num_images=len(images), image_size=size, device="cpu", batch_size=batch_size
    )
    for step in range(2):
        positions = draws.order_N[step * batch_size :][:batch_size]
        drawn = draws.batch(step)
        found = augment(images[positions], drawn, config=config, fill_C=torch.full((channels,), 7.0))
        mixed, targets = mix(found, positions, drawn.mixing)
        assert mixed.shape == (batch_size, channels, size, size)
        assert mixed.min() >= 0
        assert mixed.max() <= 255
        assert torch.allclose(targets.weights_BK.sum(1), torch.ones(batch_size), atol=1e-6)
        assert (targets.labels_BK[:, 0] == positions).all()


class OperatorNames(TorchDispatchMode):
    """Notes the names of the operators that are called, and of index types that hide a search."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        if func.overloadpacket.__name__.startswith("index"):
            indices = [x for arg in args if isinstance(arg, list | tuple) for x in arg if isinstance(x, torch.Tensor)]
            self.names |= {"boolean index" for x in indices if x.dtype == torch.bool}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["autoaugment_cifar10", "randaugment", "trivialaugment"])
def test_a_step_never_waits_for_the_device(policy: str) -> None:
    config = replace(MIXED, policy=policy)
    images = noise(64)
    draws = draws_for(config, images)
    with OperatorNames() as called:
        drawn = draws.batch(0)
        found = augment(images, drawn, config=config, fill_C=torch.full((3,), 7.0))
        mixed, targets = mix(found, torch.arange(64) % 3, drawn.mixing)
        logits = mixed.mean((2, 3))
        targets.correct(logits + targets.loss(logits, torch.tensor(0.1)))
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "boolean index"}
    assert "grid_sampler_2d" in called.names
    assert not called.names & (waiting | {"repeat_interleave", "histc", "equal", "item"})

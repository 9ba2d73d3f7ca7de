"""Optimizers, schedules, the moving average: against torch's own, against hand-worked values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainables.config import CHOICES, TrainConfig
from trainables.optim import ADAM_RMS, MovingAverage, Optimization, orthogonalized
from trainables.schedules import SCHEDULES, image_size_in, learning_rate, num_frozen_parts


def rates(config: TrainConfig, *, steps_per_epoch: int = 10) -> list[float]:
    """The rate of every step of a training."""
    steps = range(config.max_epochs * steps_per_epoch)
    return [learning_rate(step, steps_per_epoch=steps_per_epoch, batch_size=128, config=config) for step in steps]


def rates_of_torch(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """What a scheduler of torch sets for each step."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def an_optimizer(lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_learning_rate_warms_up_then_follows_half_a_cosine() -> None:
    found = rates(TrainConfig(lr=0.4, warmup_epochs=2, max_epochs=6, final_lr_fraction=0.1))
    assert found[0] == pytest.approx(0.4 / 20)
    assert found[19] == found[20] == 0.4
    assert found[40] == pytest.approx(0.4 * (0.1 + 0.9 * 0.5))  # half way down
    assert found[20:] == sorted(found[20:], reverse=True)
    assert found[-1] > 0.04


def test_cosine_is_torchs_cosine() -> None:
    config = TrainConfig(lr=0.3, warmup_epochs=0, max_epochs=5, final_lr_fraction=0.01)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(an_optimizer(0.3), T_max=50, eta_min=0.003)
    assert rates(config) == pytest.approx(rates_of_torch(theirs, 50), rel=1e-6)


def test_restarts_are_torchs_when_the_cycles_fill_the_training() -> None:
    config = TrainConfig(lr=0.3, warmup_epochs=0, max_epochs=7, schedule="cosine_restarts", restart_epochs=1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(an_optimizer(0.3), T_0=10, T_mult=2)
    assert rates(config) == pytest.approx(rates_of_torch(theirs, 70), rel=1e-6)  # cycles of 1, 2 and 4 epochs


def test_the_last_cycle_of_restarts_ends_with_the_training() -> None:
    found = rates(TrainConfig(lr=1.0, warmup_epochs=0, max_epochs=10, schedule="cosine_restarts", restart_epochs=2))
    # 2 epochs, then 4 would leave 4 for a cycle of 8: the second takes the 8 epochs that are left.
    restarts = [step for step in range(1, 100) if found[step] > found[step - 1]]
    assert restarts == [20]
    assert found[-1] < 0.01


def test_one_cycle_is_torchs_one_cycle() -> None:
    config = TrainConfig(
        lr=1.0, warmup_epochs=3, max_epochs=10, schedule="one_cycle", initial_lr_fraction=0.04, final_lr_fraction=4e-6
    )
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        an_optimizer(1.0), max_lr=1.0, total_steps=1000, pct_start=0.3, div_factor=25, final_div_factor=1e4,
        cycle_momentum=False,
    )  # fmt: skip
    found, wanted = rates(config, steps_per_epoch=100), rates_of_torch(theirs, 1000)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 0.007  # off by a step at the most


def test_warmup_stable_decay_is_flat_and_then_falls_in_a_line() -> None:
    found = rates(
        TrainConfig(lr=0.5, warmup_epochs=1, max_epochs=10, schedule="warmup_stable_decay", decay_fraction=0.2)
    )
    assert found[10:80] == [0.5] * 70
    assert found[90] == pytest.approx(0.25)
    assert found[99] == pytest.approx(0.5 / 20)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    max_epochs=st.integers(1, 40),
    warmup=st.floats(0, 1),
    restart_epochs=st.integers(1, 20),
    floor=st.floats(0, 1),
)
def test_every_schedule_stays_between_nothing_and_the_peak(
    schedule: str, max_epochs: int, warmup: float, restart_epochs: int, floor: float
) -> None:
    config = TrainConfig(
        schedule=schedule,
        lr=0.7,
        max_epochs=max_epochs,
        warmup_epochs=warmup * max_epochs,
        restart_epochs=restart_epochs,
        final_lr_fraction=floor,
    )
    found = rates(config, steps_per_epoch=7)
    assert all(0 <= rate <= 0.7 * (1 + 1e-9) for rate in found)
    assert found[-1] <= found[-2] * (1 + 1e-9)  # none ends while it rises


def test_the_schedules_are_those_a_config_may_name() -> None:
    assert set(SCHEDULES) == set(CHOICES["schedule"])


def test_a_short_run_still_decays() -> None:
    assert rates(TrainConfig(lr=1.0, warmup_epochs=2, max_epochs=2))[19] < 0.1


def test_the_rate_is_scaled_with_the_batch_when_the_batch_it_is_meant_for_is_said() -> None:
    config = TrainConfig(lr=0.1, lr_batch_size=256, warmup_epochs=0)
    assert learning_rate(0, steps_per_epoch=10, batch_size=2048, config=config) == pytest.approx(0.8)


def test_resolution_grows_to_the_full_size_in_few_steps() -> None:
    config = TrainConfig(max_epochs=20, initial_image_size=18, full_size_at=0.5)
    sizes = [image_size_in(epoch, full_size=32, config=config) for epoch in range(1, 21)]
    assert sizes[0] == 18
    assert sizes == sorted(sizes)
    assert sizes[10:] == [32] * 10
    assert len(set(sizes)) <= 5
    assert all(size % 4 == 0 for size in set(sizes[1:]) - {18})


def test_parts_join_from_the_top_until_all_learn() -> None:
    config = TrainConfig(max_epochs=10, unfreeze_epochs=4)
    frozen = [num_frozen_parts(epoch, num_parts=6, config=config) for epoch in range(1, 8)]
    assert frozen == [5, 4, 3, 2, 0, 0, 0]  # 5 parts above which the classifier alone learns: 5, 3.75, 2.5, 1.25


def test_the_stem_learns_for_its_epochs_alone_once_all_parts_have_joined() -> None:
    config = TrainConfig(max_epochs=10, stem_epochs=3)
    assert [num_frozen_parts(epoch, num_parts=6, config=config) for epoch in range(1, 6)] == [0, 0, 0, 1, 1]
    both = replace(config, unfreeze_epochs=4)
    # Parts join in epochs 1 to 4, as above; the stem's three epochs are over when it could.
    assert [num_frozen_parts(epoch, num_parts=6, config=both) for epoch in range(1, 7)] == [5, 4, 3, 2, 1, 1]
    # A network of one part is a classifier, which always learns.
    assert num_frozen_parts(5, num_parts=1, config=config) == 0


# --- optimizers ---


def small_net() -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5)
    )


def steps_of(net: torch.nn.Sequential, step: object, count: int = 5) -> None:
    """Take steps on the same few images; `step` uses the gradients."""
    torch.manual_seed(2)
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    for _ in range(count):
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        step()  # type: ignore[operator]


def ours(net: torch.nn.Sequential, config: TrainConfig) -> Optimization:
    optimization = Optimization([net[0], net[1], net[3]], config, device="cpu")
    optimization.begin(config)
    optimization.set_learning_rate(config.lr)
    return optimization


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_torchs_sgd(nesterov: bool) -> None:
    config = TrainConfig(lr=0.05, weight_decay=0.01, nesterov=nesterov, decay_norm_and_bias=True)
    net, other = small_net(), small_net()
    optimization = ours(net, config)
    reference = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    steps_of(net, lambda: optimization.step(clip=False))
    steps_of(other, reference.step)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_biases_of_norms_alone_get_a_rate_of_their_own(optimizer: str) -> None:
    config = TrainConfig(optimizer=optimizer, lr=0.01, weight_decay=0.0, norm_bias_lr_factor=3.0)
    plain, faster = small_net(), small_net()
    for net, of in ((plain, replace(config, norm_bias_lr_factor=1.0)), (faster, config)):
        optimization = ours(net, of)
        before = [p.detach().clone() for p in net.parameters()]
        steps_of(net, lambda optimization=optimization: optimization.step(clip=False), count=1)
        net.moved = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]
    names = [name for name, _ in plain.named_parameters()]
    for name, moved, moved_faster in zip(names, plain.moved, faster.moved, strict=True):
        assert moved.abs().max() > 0
        assert torch.allclose(moved_faster, moved * (3.0 if name == "1.bias" else 1.0), rtol=1e-4), name


def test_adamw_is_torchs_adamw() -> None:
    config = TrainConfig(optimizer="adamw", lr=0.01, weight_decay=0.1, decay_norm_and_bias=True)
    net, other = small_net(), small_net()
    optimization = ours(net, config)
    reference = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    steps_of(net, lambda: optimization.step(clip=False))
    steps_of(other, reference.step)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_clipping_is_torchs_clipping_and_the_norm_is_the_one_before() -> None:
    config = TrainConfig(lr=0.1, weight_decay=0.0, momentum=0.0, gradient_clip=0.3)
    net, other = small_net(), small_net()
    optimization = ours(net, config)
    reference = torch.optim.SGD(other.parameters(), lr=0.1)
    norms: list[float] = []

    def clipped() -> None:
        norms.append(float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.3)))
        reference.step()

    found: list[float] = []
    steps_of(net, lambda: found.append(float(optimization.step(clip=True))))
    steps_of(other, clipped)
    assert found == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 0.3
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_weight_decay_spares_vectors_unless_told_otherwise(optimizer: str, decay_norm_and_bias: bool) -> None:
    config = TrainConfig(
        optimizer=optimizer, lr=0.5, weight_decay=0.1, momentum=0.0, decay_norm_and_bias=decay_norm_and_bias
    )
    net = small_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ours(net, config).step(clip=False)
    for name, parameter in net.named_parameters():
        shrink = 1 - 0.5 * 0.1 if parameter.ndim > 1 or decay_norm_and_bias else 1.0
        assert torch.allclose(parameter, before[name] * shrink), name


@pytest.mark.parametrize("optimizer", CHOICES["optimizer"])
def test_begun_anew_an_optimizer_is_as_good_as_new(optimizer: str) -> None:
    config = TrainConfig(optimizer=optimizer, lr=0.01, weight_decay=0.05)
    net, other = small_net(), small_net()
    fresh = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    used = ours(net, replace(config, lr=0.5, weight_decay=0.3))
    steps_of(net, lambda: used.step(clip=False))
    net.load_state_dict(fresh)
    used.begin(config)
    used.set_learning_rate(0.01)
    unused = ours(other, config)
    steps_of(net, lambda: used.step(clip=False))
    steps_of(other, lambda: unused.step(clip=False))
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 5), st.sampled_from((torch.float32, torch.bfloat16)))
def test_muon_makes_matrices_nearly_orthogonal(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    found = orthogonalized(torch.randn(2, rows, columns), dtype=dtype)
    assert found.dtype == torch.float32
    singular_values = torch.linalg.svdvals(found)
    well_conditioned = singular_values.shape[1] < max(rows, columns)
    assert singular_values.max() < 1.25
    if well_conditioned:
        assert singular_values.min() > 0.4


def test_muons_update_has_the_size_that_adamws_has() -> None:
    net = small_net()
    config = TrainConfig(optimizer="muon", lr=0.01, weight_decay=0.0)
    before = net[0].weight.detach().clone()
    optimization = ours(net, config)
    steps_of(net, lambda: optimization.step(clip=False), count=1)
    update = (net[0].weight.detach() - before).square().mean().sqrt()
    assert float(update) == pytest.approx(0.01 * ADAM_RMS, rel=0.35)


def test_the_classifiers_rate_has_its_own_factor() -> None:
    net = small_net()
    config = TrainConfig(lr=0.1, weight_decay=0.0, momentum=0.0, head_lr_factor=3.0)
    before = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    ours(net, config).step(clip=False)
    *body, weight, bias = ((b - p.detach()).mean().item() for b, p in zip(before, net.parameters(), strict=True))
    assert body == pytest.approx([0.1] * len(body), rel=1e-4)
    assert [weight, bias] == pytest.approx([0.3, 0.3], rel=1e-4)


def test_moving_average_follows_its_formula() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    average = MovingAverage(net, decay=0.5)
    for value in (1.0, 2.0, 4.0):
        net.weight.data.fill_(value)
        average.update(net)
    # The first update copies (1.0); then decays min(.5, 2/11) and min(.5, 3/12):
    # 1 + (2 - 1) x 9/11 = 1.8182; 1.8182 + (4 - 1.8182) x 9/12 = 3.4545.
    assert average.module.weight.item() == pytest.approx(3.4545, abs=1e-4)


def test_a_moving_average_begun_anew_knows_nothing_of_what_diverged() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(net, decay=0.5)
    net.weight.data.fill_(math.nan)
    average.update(net)
    net.weight.data.fill_(2.0)
    average.begin(net, decay=0.9)
    average.update(net)
    assert average.module.weight.item() == 2.0

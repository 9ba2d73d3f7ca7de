"""One training divided among processes: the same batches, gradients and figures, however many there are."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scaling import LINK_BYTES, TARGETS, projection

from results.schema import SelectPredictions, UsageError
from results.store import TrialFiles
from tests.background import PATIENCE
from tests.ranks import in_processes, trained_by
from trainables.background import BackgroundWriter, copied_to_host
from trainables.config import TrainConfig
from trainables.datasets import SplitImages, load_dataset
from trainables.evaluation import predictions
from trainables.learner import Learner, check_trainable
from trainables.loop import TrainState, train
from trainables.parallel import Ranks
from trainables.resident import ResidentImages
from trainables.trial import run_trial, serialized

CIFAR100 = Path(__file__).parent.parent.parent / "shared" / "data" / "cifar100"

AUGMENTED = TrainConfig(
    backbone="small_cnn_groupnorm",
    precision="float64",
    max_epochs=2,
    batch_size=50,
    lr=0.05,
    crop_padding=1,
    affine_probability=0.5,
    policy="autoaugment_cifar10",
    policy_probability=0.7,
    cutout_size=3,
    cutout_probability=0.5,
    mixup_alpha=0.4,
    mixup_probability=0.5,
    label_smoothing=0.1,
    gradient_clip=2.0,
    ema_decay=0.9,
    seed=7,
)
EVERY_MIXING = {"cutmix_alpha": 1.0, "cutmix_probability": 0.3, "ricap_beta": 0.3, "ricap_probability": 0.3}
TO_ROUNDING = {"rtol": 1e-8, "atol": 0.0}


@pytest.fixture(scope="module")
def few_digits(digits: SplitImages) -> SplitImages:
    return replace(digits, train=digits.train[:260])


@given(count=st.integers(0, 3000), size=st.integers(1, 70))
def test_shares_are_every_thing_once_and_differ_by_one_at_most(count: int, size: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_before_a_share_are_counted_around_the_batch() -> None:
    assert Ranks(0, 2).rows(6, reach=1).tolist() == [5, 0, 1, 2]
    assert Ranks(1, 2).rows(6, reach=3).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "changes", [{}, EVERY_MIXING, {"mixup_alpha": 0.0}], ids=["mixup", "every mixing", "no mixing"]
)
@pytest.mark.parametrize("size", [2, 3, 7])
def test_shares_side_by_side_are_the_whole_batch(size: int, changes: dict[str, object], digits: SplitImages) -> None:
    config = replace(AUGMENTED, **changes)
    whole = ResidentImages.on("cpu", digits)
    parts = [ResidentImages.on("cpu", digits, ranks=Ranks(rank, size)) for rank in range(size)]
    batches = zip(*(d.batches(config, epoch=3, image_size=8) for d in (whole, *parts)), strict=True)
    for number, ((images, targets), *shares) in enumerate(batches):
        torch.testing.assert_close(torch.cat([share for share, _ in shares]), images, rtol=0, atol=1e-4)
        assert torch.equal(torch.cat([share.labels_BK for _, share in shares]), targets.labels_BK)
        assert torch.equal(torch.cat([share.weights_BK for _, share in shares]), targets.weights_BK)
        if number == 5:
            break


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"),
    [(2, {}), (3, {**EVERY_MIXING, "accumulation_steps": 2, "optimizer": "adamw", "lr": 1e-3})],
    ids=["two", "three with uneven shares in parts"],
)
def test_ranks_train_as_one_process_does(
    size: int, changes: dict[str, object], few_digits: SplitImages, tmp_path: Path
) -> None:
    config = replace(AUGMENTED, **changes)
    alone = trained_by(1, replace(config, accumulation_steps=1), few_digits, tmp_path / "alone")
    together = trained_by(size, config, few_digits, tmp_path / "together")
    assert len(alone.losses) == 10
    np.testing.assert_allclose(together.losses, alone.losses, **TO_ROUNDING)
    for ours, theirs in zip(together.epochs, alone.epochs, strict=True):
        for figure in ("train_loss", "train_accuracy", "grad_norm", "attainable_train_accuracy", "lr"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=1e-7), figure
        assert ours["val_nll"] == pytest.approx(theirs["val_nll"], abs=1e-3)  # of float16 logits
        assert ours["val_accuracy"] == pytest.approx(theirs["val_accuracy"], abs=0.02)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR100.is_dir(), reason="CIFAR-100 is not beside this checkout")
def test_two_workers_paused_in_an_epoch_and_gone_on_with_by_one_lose_as_one_on_real_images(tmp_path: Path) -> None:
    data = load_dataset("cifar100", data_dir=CIFAR100, train_fraction=0.012)
    data = replace(data, test=data.test[:100])
    config = replace(AUGMENTED, dataset="cifar100", train_fraction=0.012, batch_size=20, max_epochs=2, cutout_size=8)
    alone = trained_by(1, config, data, tmp_path / "alone")
    assert len(alone.losses) >= 50
    together = trained_by(2, config, data, tmp_path / "together")
    np.testing.assert_allclose(together.losses[:50], alone.losses[:50], **TO_ROUNDING)
    begun = trained_by(2, config, data, tmp_path / "paused", pause_after=10)
    assert len(begun.losses) == 11  # a wish is heard a step late
    more = trained_by(2, config, data, tmp_path / "paused", pause_after=20)
    rest = trained_by(1, config, data, tmp_path / "paused")
    losses = [*begun.losses, *more.losses, *rest.losses]
    assert len(losses) == len(alone.losses)
    np.testing.assert_allclose(losses[:50], alone.losses[:50], **TO_ROUNDING)
    last, expected = rest.epochs[-1], alone.epochs[-1]
    for figure in ("train_loss", "train_accuracy", "grad_norm", "attainable_train_accuracy"):
        assert last[figure] == pytest.approx(expected[figure], rel=1e-7), figure


@pytest.mark.slow
def test_norms_of_ranks_have_one_anothers_mean_statistics_and_unfreezing_reaches_all(
    few_digits: SplitImages, tmp_path: Path
) -> None:
    config = replace(AUGMENTED, backbone="small_cnn", precision="float32", unfreeze_epochs=2, max_epochs=3)
    together = trained_by(2, config, few_digits, tmp_path)  # which compares all weights and statistics of the ranks
    fresh = Learner(config, ResidentImages.on("cpu", few_digits)).model.state_dict()
    assert not torch.equal(together.weights["backbone.1.running_mean"], fresh["backbone.1.running_mean"])
    assert not torch.equal(together.weights["backbone.0.weight"], fresh["backbone.0.weight"])


@pytest.mark.slow
def test_compressed_gradients_train_a_little_otherwise(few_digits: SplitImages, tmp_path: Path) -> None:
    plain, compressed = (
        trained_by(2, replace(AUGMENTED, gradient_compression=how), few_digits, tmp_path / how).losses
        for how in ("none", "bfloat16")
    )
    assert plain[0] == compressed[0]
    assert plain[1:] != compressed[1:]
    np.testing.assert_allclose(compressed, plain, rtol=0.02)


@pytest.mark.parametrize("steps", [5, 7])  # of 5 in an epoch
def test_a_paused_training_gone_on_with_equals_one_never_paused_to_the_bit(
    steps: int, few_digits: SplitImages, tmp_path: Path
) -> None:
    config = replace(AUGMENTED, precision="float32", backbone="small_cnn")
    whole = trained_by(1, config, few_digits, tmp_path / "whole")
    begun = trained_by(1, config, few_digits, tmp_path / "paused", pause_after=steps)
    rest = trained_by(1, config, few_digits, tmp_path / "paused")
    assert [len(begun.losses), len(rest.losses)] == [steps, 10 - steps]
    timed = ("epoch_seconds", "images_per_second", "inference_images_per_second", "peak_memory_bytes")
    assert [{k: v for k, v in e.items() if k not in timed} for e in rest.epochs] == [
        {k: v for k, v in e.items() if k not in timed} for e in whole.epochs
    ]
    assert all(torch.equal(rest.weights[name], tensor) for name, tensor in whole.weights.items())


def _gathered_select(ranks: Ranks, config: TrainConfig, data: SplitImages) -> np.ndarray:
    images = ResidentImages.on("cpu", data, ranks=ranks)
    return predictions(Learner(config, images).model, images, SelectPredictions).logits_NC


@pytest.mark.slow
def test_ranks_divide_an_evaluation_and_all_have_it_whole(few_digits: SplitImages) -> None:
    config = replace(AUGMENTED, precision="float32")
    (expected,) = in_processes(1, _gathered_select, config, few_digits)
    for found in in_processes(2, _gathered_select, config, few_digits):
        np.testing.assert_allclose(found, expected, atol=1e-2)


def test_double_precision_is_of_weights_losses_and_averages(few_digits: SplitImages) -> None:
    data = ResidentImages.on("cpu", few_digits)
    state = TrainState(replace(AUGMENTED, max_epochs=1), data)
    (result,) = train(replace(AUGMENTED, max_epochs=1), data, state=state)
    assert {p.dtype for p in state.learner.model.parameters()} == {torch.float64}
    assert {p.dtype for p in state.evaluated.parameters()} == {torch.float64}
    assert result.train_loss != float(np.float32(result.train_loss))


@pytest.mark.parametrize(
    ("changes", "num_workers", "message"),
    [
        (
            {"batch_size": 8, "accumulation_steps": 4},
            4,
            "a batch of 8 images cannot be divided among 4 workers with acc",
        ),
        ({"batch_size": 8}, 8, "leaves parts of a single image to 8 workers .* raise batch_size to 16"),
        ({"snapshot_every": 1}, 2, "snapshot_every=1 with several workers"),
        ({"cuda_graph": True}, 2, "cuda_graph=true"),
        ({"sync_batch_norm": True}, 2, "sync_batch_norm=true on cpu: torch synchronizes batch norms on GPUs only"),
        ({"pipeline": "food101"}, 2, "pipeline=food101 with several workers: only images in memory are divided"),
    ],
)
def test_what_several_workers_cannot_train_is_refused(
    changes: dict[str, object], num_workers: int, message: str, few_digits: SplitImages
) -> None:
    with pytest.raises(UsageError, match=message):
        check_trainable(replace(AUGMENTED, **changes), few_digits, device="cpu", num_workers=num_workers)


# --- checkpoints in the background ---


def test_the_newest_checkpoint_is_written_while_training_goes_on_and_what_waits_is_replaced() -> None:
    begun, may_write = threading.Event(), threading.Event()
    written: list[int] = []

    def write(content: dict[str, object]) -> None:
        begun.set()
        assert may_write.wait(timeout=PATIENCE)

    with BackgroundWriter(write, lambda content: written.append(content["epoch"])) as writer:
        writer.keep({"epoch": 1})
        assert begun.wait(timeout=PATIENCE)
        writer.keep({"epoch": 2})
        writer.keep({"epoch": 3})
        may_write.set()
    assert written == [1, 3]


def test_what_fails_in_the_background_is_raised_where_training_is() -> None:
    def full(content: dict[str, object]) -> None:
        raise OSError("No space left on device")

    writer = BackgroundWriter(full, lambda content: None)
    writer.keep({})
    with pytest.raises(OSError, match="No space left"):
        writer.close()


def test_a_copy_does_not_change_with_what_it_is_of() -> None:
    weight = torch.zeros(3)
    content = {"model": {"w": weight}, "optimizer": [{"m": weight}], "best_weights": {"w": weight.clone()}, "n": 1}
    copied = copied_to_host(content)
    weight += 1
    assert copied["model"]["w"].sum() == copied["optimizer"][0]["m"].sum() == 0
    assert copied["n"] == 1


def test_a_trial_kept_in_the_background_is_gone_on_with_to_the_bit(few_digits: SplitImages, tmp_path: Path) -> None:
    config = replace(AUGMENTED, precision="float32", backbone="small_cnn", max_epochs=3)
    data = ResidentImages.on("cpu", few_digits)
    (tmp_path / "generation").write_text("1\n")
    expected = [r.train_loss for r in run_trial(config, data, files=TrialFiles(str(tmp_path), "t00001", 1))]
    files = TrialFiles(str(tmp_path), "t00000", 1)
    with BackgroundWriter(lambda c: files.replace(files.resume, serialized(c)), lambda c: None) as writer:
        training = run_trial(config, data, files=files, keep=writer.keep)
        losses = [next(training).train_loss]
    losses += [r.train_loss for r in run_trial(config, data, files=files, epochs_recorded=1)]
    assert losses == expected


# --- the projection of benchmarks/scaling.py ---


def test_a_projection_is_the_line_through_the_steps_and_the_bytes_over_the_link() -> None:
    # A step is 0.01 s and 0.001 s an image: of 2048 on 8 devices 0.01 + 0.256 s. A ring of 8 sends 2 x 7/8 of 4.5 GB.
    step_of = {share: 0.01 + 0.001 * share for share in (2048, 1024, 512)}
    rows = projection(
        replace(AUGMENTED, batch_size=2048),
        step_of=step_of,
        input_of_image=0.0,
        draw=0.0,
        gradient_bytes=4_500_000_000,
        device="cuda",
    )
    assert len(rows) == 2 * len(TARGETS) * len(LINK_BYTES["cuda"])
    by_key = {(row["workers"], row["link"], row["exchange_hidden"]): row for row in rows}
    link = next(name for name, speed in LINK_BYTES["cuda"].items() if speed == 450e9)
    shown = by_key[8, link, False]
    assert shown["exchange_seconds"] == pytest.approx(2 * 7 / 8 * 4.5e9 / 450e9)
    assert shown["images_per_second"] == pytest.approx(2048 / (0.266 + 0.0175))
    assert shown["efficiency"] == pytest.approx(2.058 / (0.266 + 0.0175) / 8)
    assert by_key[8, link, True]["images_per_second"] == pytest.approx(2048 / 0.266)
    assert {row["kind"] for row in rows} == {"projection"}

"""Several models of one training: snapshots and their averages, stored with what they predict, and kept or removed."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from orchestrator.plan import resumed
from results.events import CheckpointRemoved, EpochReported, TrialEnded, TrialStarted
from results.predictions import read_predictions, stored_counts
from results.schema import PREDICTIONS, EpochResult, SelectPredictions, Status, UsageError
from results.store import Experiment, TrialFiles
from tests.simulation import epoch_result, new_experiment, plan
from trainables.averaging import greedy_soup, mean, renew_batch_norms
from trainables.config import TrainConfig
from trainables.course import Leg, complete_schedules, trunk_and_branches, whole
from trainables.datasets import SplitImages
from trainables.evaluation import predictions
from trainables.loop import TrainState, train_epoch
from trainables.resident import ResidentImages
from trainables.trial import run_trial
from trainables.validation import accuracy, log_softmax, nll
from trainables.variants import Variants, is_snapshot

CONFIG = TrainConfig(
    max_epochs=4,
    batch_size=64,
    lr=0.1,
    train_fraction=0.4,
    crop_padding=1,
    mixup_alpha=0.2,
    dropout=0.1,
    ema_decay=0.9,
    snapshot_every=1,
    snapshot_from=0.4,
    test_time_augmentation="flip",
)
ALL = {"best", "tta", "raw", "epoch_2", "epoch_3", "epoch_4", "swa"}


@pytest.fixture(scope="module")
def images(digits: SplitImages) -> ResidentImages:
    return ResidentImages.on("cpu", replace(digits, train=digits.train[:256]))


def trained(
    config: TrainConfig, images: ResidentImages, folder: Path, *, course: tuple[Leg, ...] = ()
) -> tuple[TrialFiles, list[EpochResult]]:
    folder.mkdir(exist_ok=True)
    files = TrialFiles(str(folder), "t00000", 0)
    return files, list(run_trial(config, images, files=files, course=course))


def weight_files(files: TrialFiles) -> set[str]:
    return {path.stem for path in files.best.parent.glob("*.safetensors")}


# --- averages ---


def test_the_mean_of_weights_worked_by_hand() -> None:
    # (1 + 4) / 2 = 2.5, (2 - 2) / 2 = 0; of counts the last one counts.
    first = {"w": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)}
    second = {"w": torch.tensor([4.0, -2.0]), "count": torch.tensor(8)}
    averaged = mean([first, second])
    assert averaged["w"].tolist() == [2.5, 0.0]
    assert averaged["w"].dtype == torch.float32
    assert averaged["count"].item() == 8
    # 2**24 + 1 is no float32: summed in it, the mean of 2**24, 1 and 1 would be 2**24 / 3 = 5592405.33
    large = mean({"w": torch.tensor(x)} for x in (2.0**24, 1.0, 1.0))
    assert large["w"].item() == np.float32((2**24 + 2) / 3) == 5592406.0


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5), st.integers(1, 9))
def test_the_mean_of_copies_is_what_was_copied(values: list[float], copies: int) -> None:
    weights = {"w": torch.tensor(values)}
    assert torch.equal(mean([weights] * copies)["w"], weights["w"])


def test_renewed_batch_norms_have_the_statistics_of_the_training_images(noise_images: SplitImages) -> None:
    data = ResidentImages.on("cpu", noise_images)
    plain = TrainConfig(crop_padding=0, flip=False, batch_size=len(noise_images.train) // 2)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(1e6)
    renew_batch_norms(norm, data, plain)
    pixels = noise_images.images_NCHW[noise_images.train].astype(np.float64)
    assert norm.running_mean.tolist() == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-5)
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked.item() == 2


def test_nothing_is_renewed_where_there_are_no_batch_norms_and_nothing_is_drawn(images: ResidentImages) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    renew_batch_norms(model, images, CONFIG)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    renew_batch_norms(nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5)), images, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mean_of_equal_snapshots_is_that_snapshot_with_its_batch_norms_renewed(
    images: ResidentImages, tmp_path: Path
) -> None:
    state, files = TrainState(CONFIG, images), TrialFiles(str(tmp_path), "t00000", 0)
    train_epoch(CONFIG, images, state)
    variants = Variants(CONFIG, images, state, files)
    for epoch in (1, 2):
        variants.store_snapshot(epoch)
    variants.store_all([1, 2])
    model = state.learner.evaluated_copy(load_file(files.weights("epoch_1")))
    renew_batch_norms(model, images, CONFIG)
    averaged = load_file(files.weights("swa"))
    assert all(torch.equal(averaged[name], tensor) for name, tensor in model.state_dict().items())
    stored = read_predictions(files.predictions, SelectPredictions, variant="swa")
    assert np.array_equal(stored.logits_NC, predictions(model, images, SelectPredictions).logits_NC)
    assert "soup" not in stored_counts(files.predictions)


def soup_of(figures: Sequence[float], figure_of_mean: dict[tuple[int, ...], float]) -> tuple[int, ...]:
    soup = greedy_soup(
        list(range(1, len(figures) + 1)),
        figures,
        average=lambda members: {"members": torch.tensor(members)},
        figure_of=lambda weights: figure_of_mean[tuple(weights["members"].tolist())],
    )
    if soup is None:
        return ()
    assert tuple(soup.weights["members"].tolist()) == soup.members
    return soup.members


def test_a_soup_worked_by_hand() -> None:
    # Ranked 3, 1, 2: 3 with 1 gets worse and is left; 3 with 2 is as good as 3 alone and stays.
    assert soup_of([0.8, 0.7, 0.9], {(1, 3): 0.85, (2, 3): 0.9}) == (2, 3)
    assert soup_of([0.8, 0.9], {(1, 2): 0.85}) == ()
    # All equal: the first is where it begins, and 3 is compared with what 1 and 2 made.
    assert soup_of([0.5, 0.5, 0.5], {(1, 2): 0.6, (1, 2, 3): 0.55}) == (1, 2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_a_soup_is_never_worse_than_its_best_ingredient(values: list[int], seed: int) -> None:
    figures, epochs = [float(value) for value in values], range(1, len(values) + 1)
    subsets = [members for size in epochs for members in itertools.combinations(epochs, size)]
    rng = np.random.default_rng(seed)
    figure_of_mean = {members: float(rng.integers(0, 8)) for members in subsets}
    members = soup_of(figures, figure_of_mean)
    if members:
        assert figure_of_mean[members] >= max(figures)
        assert figures.index(max(figures)) + 1 in members
        assert len(members) > 1


# --- what a trial stores ---


def test_snapshots_are_taken_at_the_epochs_asked_for() -> None:
    def taken(every: int, start: float) -> list[int]:
        config = TrainConfig(max_epochs=100, snapshot_every=every, snapshot_from=start)
        return [epoch for epoch in range(1, 101) if is_snapshot(epoch, config)]

    assert taken(0, 0.0) == []
    assert taken(30, 0.0) == [30, 60, 90]
    assert taken(11, 0.55) == [55, 66, 77, 88, 99]  # 0.55 * 100 is more than 55 in float64
    assert taken(20, 0.81) == [100]


@pytest.mark.parametrize("monitor", ["val_accuracy", "val_nll"])
def test_what_is_stored_of_every_variant_is_what_its_stored_weights_predict(
    monitor: str, images: ResidentImages, tmp_path: Path
) -> None:
    config = replace(CONFIG, monitor=monitor)
    files, _ = trained(config, images, tmp_path)
    counts = stored_counts(files.predictions)
    assert set(counts) - {"soup"} == ALL
    assert list(counts)[:4] == ["best", "tta", "raw", "epoch_2"]
    assert weight_files(files) == set(counts) - {"tta"}
    fresh = TrainState(config, images).learner
    distinct = set()
    for variant in counts:
        model = fresh.evaluated_copy(load_file(files.weights(variant)))
        assert counts[variant] == {split: images.split.sizes()[split] for split in PREDICTIONS}
        for of in PREDICTIONS.values():
            stored = read_predictions(files.predictions, of, variant=variant)
            anew = predictions(model, images, of, views="flip" if variant.endswith("tta") else "none")
            assert np.array_equal(stored.logits_NC, anew.logits_NC)
            assert np.array_equal(stored.example_ids_N, anew.example_ids_N)
        distinct.add(stored.logits_NC.tobytes())
    assert len(distinct) >= len(counts) - 1  # the best epoch may be a snapshot


@pytest.mark.parametrize("monitor", ["val_accuracy", "val_nll"])
def test_a_stored_soup_is_as_good_on_select_as_any_snapshot(
    monitor: str, images: ResidentImages, tmp_path: Path
) -> None:
    def figure(variant: str) -> float:
        select = read_predictions(files.predictions, SelectPredictions, variant=variant)
        if monitor == "val_accuracy":
            return accuracy(select.logits_NC, select.labels_N)
        return -nll(log_softmax(select.logits_NC), select.labels_N)

    soups = 0
    for seed in range(4):
        files, _ = trained(replace(CONFIG, monitor=monitor, seed=seed), images, tmp_path / str(seed))
        if "soup" in stored_counts(files.predictions):
            soups += 1
            assert figure("soup") >= max(figure(f"epoch_{epoch}") for epoch in range(2, 5))
    assert soups


def test_a_trial_without_snapshots_and_average_stores_its_best_epoch_alone(
    images: ResidentImages, tmp_path: Path
) -> None:
    plain = replace(CONFIG, snapshot_every=0, test_time_augmentation="none")
    files, _ = trained(replace(plain, ema_decay=0.0), images, tmp_path / "plain")
    assert weight_files(files) == set(stored_counts(files.predictions)) == {"best"}
    files, _ = trained(plain, images, tmp_path / "average")
    assert weight_files(files) == set(stored_counts(files.predictions)) == {"best", "raw"}


def test_a_trial_without_select_has_a_mean_and_no_soup(images: ResidentImages, tmp_path: Path) -> None:
    everything = replace(images.split, select=images.split.select[:0], estimate=images.split.estimate[:0])
    files, results = trained(CONFIG, ResidentImages.on("cpu", everything), tmp_path)
    assert set(stored_counts(files.predictions)) == ALL
    assert results[-1].inference_images_per_second is None


def test_a_trial_at_a_rung_has_weights_alone(images: ResidentImages, tmp_path: Path) -> None:
    files = TrialFiles(str(tmp_path), "t00000", 0)
    list(itertools.islice(run_trial(CONFIG, images, files=files, rung_epochs=(3,)), 3))
    assert weight_files(files) == {"best", "epoch_2", "epoch_3"}
    assert not files.predictions.exists()


def test_a_trial_that_diverges_stores_no_snapshot_of_it(images: ResidentImages, tmp_path: Path) -> None:
    files, results = trained(replace(CONFIG, lr=1e30, snapshot_from=0.0), images, tmp_path)
    assert results[-1].diverged
    assert f"epoch_{len(results)}" not in weight_files(files)
    assert not files.weights("swa").exists()


@dataclass(frozen=True)
class CopiedFiles(TrialFiles):
    """Files of which there is a copy as a worker that is killed after a write, or before the next, would leave them."""

    copies: list[Path]

    def replace(self, path: Path, content: bytes) -> None:
        """See TrialFiles."""
        super().replace(path, content)
        self.copies.append(Path(f"{self.root}-{len(self.copies)}"))
        shutil.copytree(self.root, self.copies[-1])


COURSES = {
    "whole": whole(CONFIG.max_epochs),
    "promote": complete_schedules([2, 4]),
    "stable": trunk_and_branches([2], max_epochs=4, branch_epochs=[1]),
}


@pytest.mark.parametrize("name", COURSES)
def test_killed_between_any_two_writes_and_resumed_ends_with_the_same_files(
    name: str, images: ResidentImages, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    expected = CopiedFiles(str(tmp_path / "whole"), "t00000", 0, [])
    epochs = list(run_trial(CONFIG, images, files=expected, course=COURSES[name]))
    variants = weight_files(expected)
    assert len(expected.copies) >= len(epochs) + len(variants) + 1  # each of the three kinds of files
    for copy in expected.copies:
        files, _ = trained(CONFIG, images, copy, course=COURSES[name])
        assert weight_files(files) == variants
        for variant in variants:
            assert files.weights(variant).read_bytes() == expected.weights(variant).read_bytes(), (copy, variant)
        assert files.predictions.read_bytes() == expected.predictions.read_bytes(), copy


def test_snapshots_of_other_legs_are_dropped(images: ResidentImages, tmp_path: Path) -> None:
    # Promoted: epochs 1 and 2 are a training of their own, and the next one's second is epoch 4. Stable: the branch off
    # the trunk's second epoch is epoch 3; so is a training from scratch in the place of the branch.
    def snapshots(course: tuple[Leg, ...]) -> set[str]:
        files, _ = trained(CONFIG, images, tmp_path / uuid.uuid4().hex, course=course)
        assert {path.stem for path in files.best.parent.glob("epoch_*")} <= set(stored_counts(files.predictions))
        return {path.stem for path in files.best.parent.glob("epoch_*")}

    assert snapshots(COURSES["promote"]) == {"epoch_4", "epoch_5", "epoch_6"}
    assert snapshots(COURSES["stable"]) == {"epoch_2", "epoch_4", "epoch_5"}
    scratch = (Leg(end=2, trunk=True), Leg(end=1), Leg(start=2, end=4, trunk=True))
    assert snapshots(scratch) == {"epoch_2", "epoch_4", "epoch_5"}


# --- what stays on disk ---


def record_ended_trial(experiment: Experiment, status: Status, *, rates: Sequence[float | None] = (None, None)) -> None:
    """One trial of two epochs, the first of them the best, that has ended."""
    config = {"dataset": "sim", "backbone": "sim", "max_epochs": 2, "mixup_alpha": 0.0}
    begun = TrialStarted(
        at=1.0,
        trial_id="t00000",
        stage="search",
        origin="startup",
        seed=0,
        config=config,
        params={},
        distributions={},
    )
    results = [
        replace(epoch_result(epoch, 0.5, best_epoch=1), inference_images_per_second=rate)
        for epoch, rate in enumerate(rates, start=1)
    ]
    reports = [EpochReported(at=2.0, trial_id="t00000", node="", result=result) for result in results]
    ended = TrialEnded(
        at=3.0, trial_id="t00000", status=status, stop_reason="", has_predictions=True, has_checkpoint=True
    )
    for event in (begun, *reports, ended):
        experiment.record(event)


@pytest.mark.parametrize(
    ("status", "left"),
    [("completed", {"best", "epoch_1", "swa"}), ("pruned", {"best"}), ("failed", {"best"})],
)
def test_weights_stay_with_their_predictions_until_retention_removes_all(
    status: Status, left: set[str], tmp_path: Path
) -> None:
    experiment = new_experiment(tmp_path)
    files = experiment.files("t00000")
    files.best.parent.mkdir()
    for path in (*map(files.weights, ("best", "epoch_1", "swa")), files.resume):
        path.write_bytes(b"")
    with experiment.driving():
        record_ended_trial(experiment, status)
        experiment.tidy(experiment.history.trials["t00000"])
        assert {path.name for path in files.best.parent.iterdir()} == {f"{name}.safetensors" for name in left}
        experiment.record(CheckpointRemoved(at=4.0, trial_id="t00000"))
        experiment.tidy(experiment.history.trials["t00000"])
        assert not files.best.parent.exists()


# --- how fast a model predicts ---


def test_the_rate_of_inference_is_that_of_select_and_of_the_best_epoch(images: ResidentImages, tmp_path: Path) -> None:
    start = time.perf_counter()
    _, results = trained(CONFIG, images, tmp_path / "one")
    seconds = time.perf_counter() - start
    rates = [result.inference_images_per_second for result in results]
    assert all(rates)
    assert sum(len(images.split.select) / rate for rate in rates if rate) < seconds
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        record_ended_trial(experiment, "completed", rates=(100.0, 300.0))
    assert experiment.trials()["inference_images_per_second"].tolist() == [100.0]


def test_events_and_tables_of_versions_that_did_not_measure_inference_are_read(tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    with experiment.driving():
        record_ended_trial(experiment, "completed", rates=(100.0, 300.0))
    for part in (experiment.root / "trials").glob("*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns("inference_images_per_second"), part)
    (trial,) = experiment.trials().to_dict("records")
    assert math.isnan(trial["inference_images_per_second"])
    assert trial["images_per_second"] == 50.0
    for segment in (experiment.root / "events").iterdir():
        events = [json.loads(line) for line in segment.read_text().splitlines()]
        for event in events:
            event.get("result", {}).pop("inference_images_per_second", None)
        segment.write_text("".join(json.dumps(event) + "\n" for event in events))
    old = Experiment.open(tmp_path, experiment.name)
    old.rebuild()
    assert old.trials()["inference_images_per_second"].isna().all()


def test_an_experiment_of_a_version_without_snapshots_is_gone_on_with(tmp_path: Path) -> None:
    info = new_experiment(tmp_path).info
    base = {name: value for name, value in info["space"]["base"].items() if not name.startswith("snapshot_")}
    assert len(base) == len(info["space"]["base"]) - 2
    old = {**info, "space": {**info["space"], "base": base}}
    assert resumed(plan(), old).space.base.snapshot_every == 0
    with pytest.raises(UsageError, match=r"base\.snapshot_every was 0 and is 2"):
        resumed(plan(base=TrainConfig(snapshot_every=2)), old)

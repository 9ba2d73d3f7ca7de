"""Streamed images: decoded and augmented along the way, the same for any number of processes."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import albumentations as alb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from results.schema import DataWarning, UsageError
from tests.background import PATIENCE
from tests.conftest import ROOT, command_environment
from trainables.config import CHOICES, TrainConfig
from trainables.datasets import LabelledImages, SplitImages, load_dataset, split
from trainables.loop import TrainState, train
from trainables.resident import ResidentImages, TrainingImages
from trainables.streaming import PIPELINES, AugmentedBatches, Request, StreamedImages, build_pipeline

# torch advises against more workers than cores; results must be the same on a machine with one.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth colours that differ everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def photo_folder(root: Path, *, per_class: int = 12) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            photo(100 * label + i, (36 + i, 60 - i)).save(root / name / f"{i:02}.jpg", quality=90)
    return root


@pytest.fixture
def photos(tmp_path: Path) -> SplitImages:
    return load_dataset(f"folder:{photo_folder(tmp_path / 'photos')}", data_dir="unused", image_size=24, resident=False)


def noise(count: int, *, channels: int = 3, side: int = 16) -> SplitImages:
    images = np.random.default_rng(0).integers(0, 256, (count, channels, side, side), dtype=np.uint8)
    return split(LabelledImages(images, np.arange(count) % 2, 0, ("a", "b")))


def config(**values: object) -> TrainConfig:
    return TrainConfig(batch_size=4, pipeline="food101").having(values)  # type: ignore[arg-type]


def epoch_of(
    data: SplitImages, config: TrainConfig, *, epoch: int = 1, image_size: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    """An epoch's images, labels and weights of labels."""
    batches = list(StreamedImages.on("cpu", data).batches(config, epoch=epoch, image_size=image_size))
    return (
        torch.cat([images for images, _ in batches]),
        torch.cat([targets.labels_BK for _, targets in batches]),
        torch.cat([targets.weights_BK for _, targets in batches]),
    )


def test_streamed_images_are_training_images(photos: SplitImages) -> None:
    data: TrainingImages = StreamedImages.on("cpu", photos)
    assert (data.split, data.device) == (photos, "cpu")


def test_the_pipelines_are_those_that_a_configuration_can_name() -> None:
    assert {"resident", *PIPELINES} == set(CHOICES["pipeline"])


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_epoch_is_the_same_to_the_bit_for_any_number_of_workers(pipeline: str, photos: SplitImages) -> None:
    mixed = config(pipeline=pipeline, mixup_alpha=0.3, mixup_probability=0.5, cutmix_alpha=1.0, cutmix_probability=0.5)
    before = torch.get_rng_state()
    alone, *workers = (epoch_of(photos, mixed.having({"loader_workers": n})) for n in (0, 1, 2))
    for with_workers in workers:
        for part, other in zip(alone, with_workers, strict=True):
            assert torch.equal(part, other)
    # Dropout draws from these: a loader must not.
    assert torch.equal(torch.get_rng_state(), before)


def test_resident_arrays_stream_the_same_for_any_number_of_workers() -> None:
    data = noise(40)
    assert torch.equal(epoch_of(data, config())[0], epoch_of(data, config(loader_workers=2))[0])


def test_what_an_image_gets_does_not_depend_on_its_batch() -> None:
    data = noise(40)
    assert len(data.train) == 26  # of which batches of 4 and of 8 both use the first 24 of the epoch's order
    fours, eights = (epoch_of(data, config(batch_size=size))[0] for size in (4, 8))
    assert torch.equal(fours[:24], eights[:24])


def test_epochs_and_seeds_differ(photos: SplitImages) -> None:
    first, again, second, other_seed = (
        epoch_of(photos, config(seed=seed), epoch=epoch)[0] for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_seed)


def test_images_keep_their_labels() -> None:
    """Images of one class are dark and of the other bright, whatever the pipeline does to them."""
    images = np.repeat(np.array([20, 230] * 20, np.uint8), 3 * 16 * 16).reshape(40, 3, 16, 16)
    data = split(LabelledImages(images, np.arange(40) % 2, 0, ("dark", "bright")))
    images_NCHW, labels_NK, weights_NK = epoch_of(data, config(pipeline="efficient200k"), image_size=16)
    assert torch.equal((images_NCHW.mean((1, 2, 3)) > 100).long(), labels_NK[:, 0])
    assert labels_NK.shape == weights_NK.shape == (len(images_NCHW), 1)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 16, 40])
def test_pipelines_give_bytes_of_the_size_asked_for(pipeline: str, channels: int, image_size: int) -> None:
    data = noise(60, channels=channels)
    for channels_last in (False, True):
        batch_config = config(pipeline=pipeline, batch_size=32, channels_last=channels_last)
        images_NCHW, _, _ = epoch_of(data, batch_config, image_size=image_size)
        assert images_NCHW.shape == (32, channels, image_size, image_size)
        assert images_NCHW.dtype == torch.float32
        assert images_NCHW.min() >= 0
        assert images_NCHW.max() <= 255
        assert torch.equal(images_NCHW, images_NCHW.round())
        ((batch, _),) = StreamedImages.on("cpu", data).batches(batch_config, epoch=1, image_size=image_size)
        assert batch.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_operations_of_one_probability_are_drawn_independently(monkeypatch: pytest.MonkeyPatch) -> None:
    flips = alb.Compose([alb.HorizontalFlip(p=0.5), alb.VerticalFlip(p=0.5)])
    monkeypatch.setitem(PIPELINES, "flips", lambda image_size: flips)
    image = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    batch = AugmentedBatches("flips", image_size=4, channels=3)[[Request((0, 1, 2, i), image) for i in range(200)]]
    assert isinstance(batch, Tensor)
    outcomes = torch.unique(batch, dim=0, return_counts=True)[1]
    # Four outcomes of a quarter each: 50 of 200, with a standard deviation of 6.1.
    assert len(outcomes) == 4
    assert outcomes.min() > 50 - 4 * 6.1


def test_an_argument_that_a_pipeline_gets_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIPELINES, "old", lambda size: alb.Compose([alb.CoarseDropout(max_holes=8, max_height=32)]))
    monkeypatch.setitem(PIPELINES, "wrong", lambda size: alb.Compose([alb.CenterCrop(size, size, pad_if_needed="?")]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what raises is build_pipeline's own filter, not the test session's
        with pytest.raises(UserWarning, match="'max_holes, max_height' are not valid for transform CoarseDropout"):
            build_pipeline("old", image_size=8)
        with pytest.raises(ValueError, match="pad_if_needed"):
            build_pipeline("wrong", image_size=8)


def evaluated(data: TrainingImages, indices: np.ndarray) -> Tensor:
    return torch.cat(list(data.evaluation_batches(indices)))


def test_evaluation_sees_the_pixels_that_resident_images_have(photos: SplitImages, tmp_path: Path) -> None:
    resident = load_dataset(f"folder:{tmp_path / 'photos'}", data_dir="unused", image_size=24)
    indices = np.random.default_rng(0).permutation(len(photos.labels_N))
    streamed_NCHW = evaluated(StreamedImages.on("cpu", photos), indices)
    assert streamed_NCHW.dtype == torch.float32
    assert torch.equal(streamed_NCHW, evaluated(ResidentImages.on("cpu", resident), indices))
    assert torch.equal(streamed_NCHW, evaluated(StreamedImages.on("cpu", resident), indices))
    for name in ("labels_N", "train", "select", "estimate", "test"):
        assert np.array_equal(getattr(photos, name), getattr(resident, name))
    assert photos.class_names == resident.class_names
    # Fewer than 1,000 training images: the sample is all of them.
    assert np.array_equal(photos.mean_C, resident.mean_C)
    assert np.array_equal(photos.std_C, resident.std_C)


def test_evaluation_scales_the_short_side_and_crops_the_middle(photos: SplitImages) -> None:
    (streamed_CHW,) = evaluated(StreamedImages.on("cpu", photos), np.array([5]))
    assert photos.encoded is not None
    with Image.open(str(photos.encoded[5].source)) as image:
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        scaled = image.resize((24, 24), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    assert np.abs(streamed_CHW.numpy().transpose(1, 2, 0) - np.asarray(scaled, np.float32)).max() <= 1


def test_evaluation_comes_in_batches_of_at_most_500() -> None:
    data = noise(1100, side=2)
    batches = StreamedImages.on("cpu", data).evaluation_batches(np.arange(1001))
    assert [len(batch) for batch in batches] == [500, 500, 1]


def test_a_streamed_folder_holds_paths_and_no_pixels(photos: SplitImages) -> None:
    assert photos.images_NCHW.nbytes == 0
    assert (photos.channels, photos.image_size) == (3, 24)
    assert photos.encoded is not None
    assert all(isinstance(image.source, Path) for image in photos.encoded)
    assert len(pickle.dumps(photos.encoded)) / len(photos.encoded) < 500


def test_the_default_size_of_streamed_images_is_the_median_short_side_up_to_224(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("L", (100 + i, 150)).save(tmp_path / name / f"{i}.png")
    data = load_dataset(f"folder:{tmp_path}", data_dir="unused", resident=False)
    assert (data.image_size, data.channels) == (102, 1)
    Image.new("RGB", (300, 400)).save(tmp_path / "a" / "large.png")
    for path in (tmp_path / "b").iterdir():
        Image.new("L", (500, 400)).save(path)
    data = load_dataset(f"folder:{tmp_path}", data_dir="unused", resident=False)
    assert (data.image_size, data.channels) == (224, 3)


def test_files_that_cannot_be_decoded_to_the_end_are_named_and_left_out(tmp_path: Path) -> None:
    root = photo_folder(tmp_path)
    cut_off = root / "cat" / "03.jpg"
    cut_off.write_bytes(cut_off.read_bytes()[:-200])
    with Image.open(cut_off) as image:  # its header tells nothing
        assert image.size == (39, 57)
    (root / "dog" / "empty.jpg").write_bytes(b"")
    with pytest.warns(DataWarning, match=r"2 of 25 images cannot be read .*: cat/03.jpg \(OSError\), dog/empty.jpg"):
        data = load_dataset(f"folder:{root}", data_dir="unused", image_size=24, resident=False)
    assert data.encoded is not None
    assert len(data.encoded) == len(data.labels_N) == 23
    assert not {"cat/03.jpg", "dog/empty.jpg"} & {image.name for image in data.encoded}
    assert epoch_of(data, config())[0].shape[0] == len(data.train) // 4 * 4


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_file_that_goes_while_a_model_trains_is_named(photos: SplitImages, loader_workers: int) -> None:
    assert photos.encoded is not None
    gone = photos.encoded[photos.train[0]]
    assert isinstance(gone.source, Path)
    gone.source.unlink()
    with pytest.raises(UsageError, match=rf"^{gone.name} could be read when the dataset was loaded and cannot be now"):
        epoch_of(photos, config(loader_workers=loader_workers, batch_size=len(photos.train)))
    with pytest.raises(UsageError, match=gone.name):
        evaluated(StreamedImages.on("cpu", photos), photos.train)


def test_the_split_hash_covers_the_content_of_every_file(photos: SplitImages, tmp_path: Path) -> None:
    def split_hash(**values: object) -> str:
        arguments = {"data_dir": "unused", "image_size": 24, "resident": False, **values}
        return load_dataset(f"folder:{tmp_path / 'photos'}", **arguments).split_hash  # type: ignore[arg-type]

    assert split_hash() == photos.split_hash
    hashes = {photos.split_hash, split_hash(image_size=23), split_hash(val_fraction=0.5)}
    photo(7, (48, 48)).save(tmp_path / "photos" / "cat" / "00.jpg")
    hashes.add(split_hash())
    (tmp_path / "photos" / "cat" / "00.jpg").rename(tmp_path / "photos" / "dog" / "00a.jpg")
    assert len({*hashes, split_hash()}) == 5


def test_parquet_files_stream_their_bytes(tmp_path: Path) -> None:
    contents = []
    for seed in range(20):
        buffer = io.BytesIO()
        photo(seed, (30, 40)).save(buffer, "PNG")
        contents.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": contents, "label": ["yes", "no"] * 10}), tmp_path / "mine.parquet")
    streamed, resident = (
        load_dataset(f"parquet:{tmp_path / 'mine.parquet'}", data_dir="unused", image_size=12, resident=resident)
        for resident in (False, True)
    )
    assert streamed.encoded is not None
    assert [image.source for image in streamed.encoded] == [content["bytes"] for content in contents]
    everything = np.arange(20)
    pixels = evaluated(StreamedImages.on("cpu", streamed), everything)
    assert torch.equal(pixels, evaluated(ResidentImages.on("cpu", resident), everything))
    alone, workers = (epoch_of(streamed, config(loader_workers=n), image_size=12)[0] for n in (0, 1))
    assert torch.equal(alone, workers)


def test_small_datasets_are_resident_whatever_is_asked_for(digits: SplitImages) -> None:
    assert load_dataset("digits", data_dir="unused", resident=False).split_hash == digits.split_hash


def test_a_run_resumed_with_other_workers_equals_one_never_stopped() -> None:
    data = StreamedImages.on("cpu", noise(40))
    alone = config(max_epochs=2, dropout=0.3, mixup_alpha=0.4)
    whole, begun, resumed = (TrainState(alone, data) for _ in range(3))
    expected = [result.train_loss for result in train(alone, data, state=whole)]
    next(train(alone, data, state=begun))
    resumed.load_state_dict(begun.state_dict())
    (last,) = train(alone.having({"loader_workers": 1}), data, state=resumed)
    assert last.train_loss == expected[-1]
    weights, others = (state.evaluated.state_dict() for state in (whole, resumed))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


TRAINER = """
import sys, time
from tests.test_streaming import config, noise
from trainables.streaming import StreamedImages

if __name__ == "__main__":
    batches = StreamedImages.on("cpu", noise(400)).batches(config(loader_workers=2), epoch=1, image_size=16)
    next(batches)
    print("training", flush=True)
    time.sleep(600)
"""


def processes_with(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_workers_end_when_the_trainer_is_killed(tmp_path: Path) -> None:
    mark = str(uuid.uuid4())
    (tmp_path / "trainer.py").write_text(TRAINER)
    command = [sys.executable, str(tmp_path / "trainer.py")]
    environment = command_environment() | {"TEST_MARK": mark}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "training\n"
        assert len(processes_with(mark)) >= 4  # the trainer, the fork server and two workers
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.stdout.close()
    deadline = time.monotonic() + PATIENCE
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(mark) == []

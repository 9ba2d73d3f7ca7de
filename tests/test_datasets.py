"""Datasets become one uint8 array with four honest splits."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from results.schema import DataWarning, UsageError
from trainables.config import TrainConfig
from trainables.datasets import DATASETS, LabelledImages, SplitImages, load_dataset, split, subsample_train
from trainables.loop import train
from trainables.resident import ResidentImages

CIFAR100 = Path(__file__).parent.parent.parent / "shared" / "data" / "cifar100"


def labelled(counts: list[int], *, num_test: int = 0) -> LabelledImages:
    labels = np.concatenate([np.full(n, i) for i, n in enumerate(counts)] + [np.zeros(num_test, int)])
    images = np.random.default_rng(1).integers(0, 256, (len(labels), 1, 4, 4), dtype=np.uint8)
    return LabelledImages(images, labels, num_test, tuple(f"c{i}" for i in range(len(counts))))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(4, 60), min_size=2, max_size=5), st.integers(0, 9), st.sampled_from([None, 0.0, 0.3]))
def test_splits_are_disjoint_cover_everything_and_hold_every_class(
    counts: list[int], num_test: int, val_fraction: float | None
) -> None:
    data = split(labelled(counts, num_test=num_test), val_fraction=val_fraction)
    parts = [data.train, data.select, data.estimate, data.test]
    together = np.concatenate(parts)
    assert sorted(together) == list(range(sum(counts) + num_test))
    for part in parts[:1] if val_fraction == 0 else parts[:3]:
        assert set(data.labels_N[part]) == set(range(len(counts)))
    if num_test:
        assert list(data.test) == list(range(sum(counts), sum(counts) + num_test))


def test_split_sizes_are_those_of_the_design() -> None:
    # 100 of each of two classes, no official test: a fifth is test (40), of the other 160 a fifth (32) is held
    # out and divided 3:2 (per class 16 -> round(9.6) = 10 and 6).
    assert split(labelled([100, 100])).sizes() == {"train": 128, "select": 20, "estimate": 12, "test": 40}
    # 5,000 of each with an official test: a tenth (500 a class) is held out and divided into 300 and 200.
    sizes = split(labelled([5000, 5000], num_test=10)).sizes()
    assert sizes == {"train": 9000, "select": 600, "estimate": 400, "test": 10}


def test_split_hash_tells_other_pixels_labels_and_splits_apart() -> None:
    data = labelled([20, 20])
    other_pixels = LabelledImages(data.images_NCHW ^ 1, data.labels_N, 0, data.class_names)
    other_labels = LabelledImages(data.images_NCHW, data.labels_N[::-1].copy(), 0, data.class_names)
    hashes = {split(d).split_hash for d in (data, other_pixels, other_labels)} | {
        split(data, val_fraction=0.4).split_hash
    }
    assert len(hashes) == 4
    assert split(data).split_hash == split(data).split_hash


def test_train_fraction_leaves_all_but_train_alone(digits: SplitImages) -> None:
    tenth = subsample_train(digits, 0.1)
    assert len(tenth.train) == pytest.approx(len(digits.train) / 10, abs=6)
    assert set(tenth.train) < set(digits.train)
    assert set(tenth.labels_N[tenth.train]) == set(range(10))
    for part in ("select", "estimate", "test"):
        assert np.array_equal(getattr(tenth, part), getattr(digits, part))
    assert tenth.split_hash == digits.split_hash


def test_channel_statistics_are_those_of_the_training_pixels(noise_images: SplitImages) -> None:
    pixels = noise_images.images_NCHW[noise_images.train].astype(np.float64)
    assert noise_images.mean_C == pytest.approx(pixels.mean((0, 2, 3)))
    assert noise_images.std_C == pytest.approx(pixels.std((0, 2, 3)))


def test_a_class_too_small_for_the_splits_is_named() -> None:
    with pytest.raises(UsageError, match=r"class 'c1' has 3 images .* at least 4"):
        split(labelled([10, 3]))
    with pytest.raises(UsageError, match=r"class 'c0' has 2 images .* at least 3"):
        split(labelled([2, 10], num_test=4))


def write_image(path: Path, *, mode: str = "RGB", size: tuple[int, int] = (20, 20), level: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, {"RGB": (level, 0, 0), "L": level, "RGBA": (level, 0, 0, 0)}[mode]).save(path)


def image_folder(root: Path, *, per_class: int = 8, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for label, name in enumerate(classes):
        for i in range(per_class):
            write_image(root / name / f"{i}.png", level=60 * (label + 1) + i, size=(20 + i, 30))
    return root


def test_a_folder_of_mixed_images_is_read_and_the_corrupt_one_is_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    write_image(root / "cat" / "grey.png", mode="L")
    write_image(root / "dog" / "alpha.png", mode="RGBA")
    (root / "dog" / "broken.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    (root / "dog" / "notes.txt").write_text("not an image")
    with pytest.warns(DataWarning, match=r"1 of 19 images cannot be read and are left out: dog/broken.jpg"):
        data = load_dataset(f"folder:{root}", data_dir="unused")
    # Short sides: 20 four times (two of size 20, grey, alpha), then 21 to 27 twice each; the median is 23.
    assert data.images_NCHW.shape == (18, 3, 23, 23)
    assert data.class_names == ("cat", "dog")
    results = list(train(TrainConfig(max_epochs=2, batch_size=4), ResidentImages.on("cpu", data)))
    assert [r.epoch for r in results] == [1, 2]


def test_a_test_set_that_cannot_be_read_is_not_replaced_by_another(tmp_path: Path) -> None:
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test", per_class=2)
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"not an image")
    with (
        pytest.warns(DataWarning, match="4 of 20 images cannot be read"),
        pytest.raises(UsageError, match=r"none of the 4 test images of .* can be read"),
    ):
        load_dataset(f"folder:{tmp_path}", data_dir="unused")


def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    exif[0x0100] = 20
    content = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(content, "JPEG", exif=exif)
    damaged = (
        content.getvalue()
        .replace(b"\x01\x00\x00\x04", b"\x01\x00\x00\x02")
        .replace(b"\x00\x01\x00\x04", b"\x00\x01\x00\x02")
    )
    assert damaged != content.getvalue()
    (root / "cat" / "damaged.jpg").write_bytes(damaged)
    assert len(load_dataset(f"folder:{root}", data_dir="unused").labels_N) == 17


def test_alpha_shows_white_and_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    root = image_folder(tmp_path, per_class=4)
    for path in (root / "cat").iterdir():
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
    for path in (root / "dog").iterdir():
        Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(path)
    data = load_dataset(f"folder:{root}", data_dir="unused")
    assert set(np.unique(data.images_NCHW[data.labels_N == 0])) == {255}
    assert set(np.unique(data.images_NCHW[data.labels_N == 1])) == {128}


def test_a_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(5):
            write_image(tmp_path / name / "nested" / f"{i}.PNG", mode="L", level=i)
    assert load_dataset(f"folder:{tmp_path}", data_dir="unused", image_size=8).images_NCHW.shape == (10, 1, 8, 8)


def test_train_and_test_folders_keep_the_official_test_set(tmp_path: Path) -> None:
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test", per_class=3)
    data = load_dataset(f"folder:{tmp_path}", data_dir="unused", image_size=8)
    assert data.sizes()["test"] == 6
    assert sum(data.sizes().values()) == 22


def test_folders_that_cannot_be_classified_say_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        load_dataset(f"folder:{tmp_path / 'nowhere'}", data_dir="unused")
    with pytest.raises(UsageError, match="no images in"):
        load_dataset(f"folder:{tmp_path}", data_dir="unused")
    image_folder(tmp_path, classes=("cat",))
    with pytest.raises(UsageError, match=r"holds one class \(cat\)"):
        load_dataset(f"folder:{tmp_path}", data_dir="unused")
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test", classes=("cow",))
    with pytest.raises(UsageError, match=r"classes that .* has not: cow"):
        load_dataset(f"folder:{tmp_path}", data_dir="unused")


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 6), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_files_with_text_labels_are_read(tmp_path: Path) -> None:
    images = [{"bytes": png(i), "path": None} for i in range(20)]
    table = pa.table({"image": images, "label": ["yes", "no"] * 10})
    pq.write_table(table, tmp_path / "mine.parquet")
    data = load_dataset(f"parquet:{tmp_path / 'mine.parquet'}", data_dir="unused")
    assert data.class_names == ("no", "yes")
    assert list(data.images_NCHW[:, 0, 0, 0]) == list(range(20))
    assert list(data.labels_N[:4]) == [1, 0, 1, 0]


def test_parquet_rows_without_a_label_are_counted_and_left_out(tmp_path: Path) -> None:
    images = [{"bytes": png(i), "path": None} for i in range(21)]
    table = pa.table({"image": images, "label": [*["yes", "no"] * 10, None]})
    pq.write_table(table, tmp_path / "mine.parquet")
    with pytest.warns(DataWarning, match=r"1 of 21 rows of .*mine.parquet have no label"):
        data = load_dataset(f"parquet:{tmp_path / 'mine.parquet'}", data_dir="unused")
    assert (data.class_names, len(data.labels_N)) == (("no", "yes"), 20)
    pq.write_table(table.set_column(1, "label", pa.array([[1]] * 21)), tmp_path / "mine.parquet")
    with pytest.raises(UsageError, match=r"labels in 'label' are of type list.*; wanted whole numbers or text"):
        load_dataset(f"parquet:{tmp_path / 'mine.parquet'}", data_dir="unused")


def test_parquet_files_without_the_columns_say_which_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"pixels": [png(1)], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match=r"no image column: it has pixels, label"):
        load_dataset(f"parquet:{tmp_path / 'x.parquet'}", data_dir="unused")


def cifar_like(folder: Path, num_classes: int, label: str) -> None:
    """The hub's layout with four training images and one test image of each class."""
    folder.mkdir()
    names = json.dumps({"info": {"features": {label: {"names": [f"class {i}" for i in range(num_classes)]}}}})
    for part, per_class in (("train-00000-of-00001", 4), ("test-00000-of-00001", 1)):
        labels = list(range(num_classes)) * per_class
        table = pa.table({"img": [{"bytes": png(v), "path": None} for v in labels], label: labels})
        pq.write_table(table.replace_schema_metadata({"huggingface": names}), folder / f"{part}.parquet")


@pytest.mark.parametrize("name", [*DATASETS, "folder", "parquet"])
def test_datasets_keep_their_promises(name: str, tmp_path: Path) -> None:
    if name in ("cifar10", "cifar100"):
        cifar_like(tmp_path / name, int(name[5:]), "fine_label" if name == "cifar100" else "label")
    elif name == "folder":
        name = f"folder:{image_folder(tmp_path / 'images')}"
    elif name == "parquet":
        cifar_like(tmp_path / "images", 3, "label")
        name = f"parquet:{tmp_path / 'images'}"
    data = load_dataset(name, data_dir=tmp_path, image_size=6)
    assert data.images_NCHW.dtype == np.uint8
    assert data.images_NCHW.shape == (len(data.labels_N), data.channels, 6, 6)
    assert len(data.class_names) == data.num_classes == len(set(data.labels_N[data.train]))
    assert all(data.sizes().values())
    assert load_dataset(name, data_dir=tmp_path, image_size=6).split_hash == data.split_hash
    assert data.mean_C.shape == data.std_C.shape == (data.channels,)


def test_cifar_without_its_test_part_is_refused(tmp_path: Path) -> None:
    cifar_like(tmp_path / "cifar10", 10, "label")
    (tmp_path / "cifar10" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(UsageError, match=r"has train-\*.parquet and no test-\*.parquet"):
        load_dataset("cifar10", data_dir=tmp_path)


def test_another_sets_folder_is_refused(tmp_path: Path) -> None:
    cifar_like(tmp_path / "mine", 7, "label")
    with pytest.raises(UsageError, match="holds 7 classes, cifar10 has 10"):
        load_dataset("cifar10", data_dir=tmp_path / "mine")


def test_a_validation_folder_beside_a_test_folder_is_said_to_be_unused(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        image_folder(tmp_path / part, per_class=5)
    with pytest.warns(DataWarning, match="val: not used, since there is an official test set"):
        data = load_dataset(f"folder:{tmp_path}", data_dir="unused", image_size=8)
    assert len(data.labels_N) == 20


def test_unknown_datasets_list_the_choices() -> None:
    with pytest.raises(UsageError, match="there is no dataset 'mnist'; there are digits, cifar10, cifar100"):
        load_dataset("mnist", data_dir="unused")


def test_no_network_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy that nobody listens on: no machine running this test downloads anything.
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"put cifar-10-python.tar.gz there, or train-\*.parquet"):
        load_dataset("cifar10", data_dir=tmp_path)


@pytest.mark.skipif(not CIFAR100.is_dir(), reason="CIFAR-100 is not beside this checkout")
def test_real_cifar100_has_its_sizes_names_and_pixels() -> None:
    data = load_dataset("cifar100", data_dir=CIFAR100)
    assert data.sizes() == {"train": 45_000, "select": 3_000, "estimate": 2_000, "test": 10_000}
    assert data.class_names[:2] == ("apple", "aquarium_fish")
    assert np.bincount(data.labels_N[data.test]).tolist() == [100] * 100
    # The channel means of CIFAR-100's training images that are quoted everywhere: 0.507, 0.487, 0.441.
    assert data.mean_C / 255 == pytest.approx([0.507, 0.487, 0.441], abs=2e-3)

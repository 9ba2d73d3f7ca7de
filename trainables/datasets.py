"""DATASETS, and the four splits every dataset is cut into.

Shape suffixes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from results.schema import FloatArray, IntArray, UsageError
from trainables.image_files import (
    EncodedImage,
    check_memory,
    class_folders,
    decode_all,
    decode_squares,
    images_in,
    inspect_all,
    read_parquet_images,
)
from trainables.pixel_cache import Decoded, PixelCache, Pixels, default_folder, warn_of_data

SMALL_SET = 10_000
SELECT_SHARE = 0.6
TEST_SHARE = 0.2
DOWNLOAD_TIMEOUT_SECONDS = 30.0
STATISTICS_SAMPLE = 1_000


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A dataset before it is split: training images first, then `num_test` official test images (maybe 0).

    Images that stay encoded are in `encoded`; `images_NCHW` is then [0, C, S, S], which says what they become, and
    `content_digest` stands for their pixels.
    """

    images_NCHW: Pixels
    labels_N: IntArray
    num_test: int
    class_names: tuple[str, ...]
    encoded: tuple[EncodedImage, ...] | None = None
    content_digest: bytes = b""


LoadPath = Callable[[Path, int | None, bool], LabelledImages]


@dataclass(frozen=True, eq=False)
class SplitImages:
    """A dataset with its four splits, each an array of indices into the images.

    `train` is what may be trained on, after `--train-fraction`; `select` and `estimate` are empty when
    nothing is held out. An index is the `example_id` of stored predictions. `split_hash` covers pixels
    (or encoded bytes), labels and the splits before `--train-fraction`. `mean_C` and `std_C` are those of the
    training pixels, in 0 to 255; of encoded images, those of a sample of 1,000.

    The images are in memory, as `images_NCHW`; or they stay as `encoded` and are decoded whenever they are used.
    `images_NCHW` is then [0, C, S, S].
    """

    images_NCHW: Pixels
    labels_N: IntArray
    train: IntArray
    select: IntArray
    estimate: IntArray
    test: IntArray
    class_names: tuple[str, ...]
    split_hash: str
    mean_C: FloatArray
    std_C: FloatArray
    encoded: tuple[EncodedImage, ...] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return int(self.images_NCHW.shape[1])

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return int(self.images_NCHW.shape[2])

    def without_test(self) -> SplitImages:
        """Return the same dataset with an empty test split; the images and the hash stay."""
        return replace(self, test=self.test[:0])

    def sizes(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {name: len(getattr(self, name)) for name in ("train", "select", "estimate", "test")}


def load_dataset(
    name: str,
    *,
    data_dir: str | Path,
    image_size: int | None = None,
    train_fraction: float = 1.0,
    val_fraction: float | None = None,
    resident: bool = True,
) -> SplitImages:
    """Load a dataset of DATASETS, `folder:PATH` or `parquet:PATH`, and split it.

    `resident` False: the images of the latter two stay encoded, as paths or as the bytes in the parquet files,
    and are decoded once here to find those that cannot be. Datasets of DATASETS fit in memory and always are.

    Raises UsageError for an unknown name, missing data, one class, or a class too small to split.
    """
    scheme, separator, path = name.partition(":")
    if separator and scheme in PATH_DATASETS:
        load, root = PATH_DATASETS[scheme], Path(path).expanduser().absolute()
        raw = _cached(load, root, image_size) if resident else load(root, image_size, False)
    elif name in DATASETS:
        raw = DATASETS[name](Path(data_dir).expanduser(), image_size)
    else:
        raise UsageError(f"there is no dataset {name!r}; there are {', '.join(DATASETS)}, folder:PATH and parquet:PATH")
    return subsample_train(split(_at_size(raw, image_size), val_fraction=val_fraction), train_fraction)


def split(data: LabelledImages, *, val_fraction: float | None = None) -> SplitImages:
    """Cut a dataset into train, select, estimate and test: stratified, disjoint, the same every time.

    Without an official test set a fifth is held out as test. Of the training images `val_fraction` (None: a
    tenth, or a fifth of fewer than 10,000) is held out and divided 3:2 into select and estimate.
    """
    num_images = len(data.labels_N)
    official_train = num_images - data.num_test
    if val_fraction is None:
        val_fraction = 0.1 if official_train >= SMALL_SET else 0.2
    parts: dict[str, list[IntArray]] = {"train": [], "select": [], "estimate": [], "test": []}
    for label, class_name in enumerate(data.class_names):
        indices = np.flatnonzero(data.labels_N[:official_train] == label)
        indices = np.random.default_rng([label]).permutation(indices)
        counts = _split_counts(len(indices), class_name, val_fraction=val_fraction, hold_out_test=data.num_test == 0)
        for part, chunk in zip(parts, np.split(indices, np.cumsum(counts)[:-1]), strict=True):
            parts[part].append(chunk)
    if data.num_test:
        parts["test"].append(np.arange(official_train, num_images))
    indices_of = {part: np.sort(np.concatenate(chunks)).astype(np.int64) for part, chunks in parts.items()}
    mean_C, std_C = _channel_statistics(data, indices_of["train"])
    return SplitImages(
        mean_C=mean_C,
        std_C=std_C,
        images_NCHW=data.images_NCHW,
        labels_N=data.labels_N,
        class_names=data.class_names,
        encoded=data.encoded,
        split_hash=_hash(data, indices_of),
        **indices_of,
    )


def _split_counts(count: int, class_name: str, *, val_fraction: float, hold_out_test: bool) -> list[int]:
    """How many of a class's images go to train, select, estimate and test."""
    needed = 1 + (2 if val_fraction else 0) + (1 if hold_out_test else 0)
    if count < needed:
        raise UsageError(
            f"class {class_name!r} has {count} images that can be trained on and the splits need at least "
            f"{needed}; add images or remove the class"
        )
    test = max(1, round(count * TEST_SHARE)) if hold_out_test else 0
    held = min(max(2, round((count - test) * val_fraction)), count - test - 1) if val_fraction else 0
    select = min(max(1, round(held * SELECT_SHARE)), held - 1) if held else 0
    return [count - test - held, select, held - select, test]


def _hash(data: LabelledImages, indices_of: dict[str, IntArray]) -> str:
    digest = hashlib.sha256()
    digest.update(repr((data.images_NCHW.shape, data.class_names)).encode())
    for array in (data.images_NCHW, data.labels_N, *indices_of.values()):
        digest.update(np.ascontiguousarray(array).data)
        digest.update(b"|")
    digest.update(data.content_digest)
    return digest.hexdigest()[:16]


def subsample_train(data: SplitImages, fraction: float) -> SplitImages:
    """Keep a fraction of each class's training images, at least one; the other splits stay as they are."""
    if fraction == 1:
        return data
    kept = []
    for label in range(data.num_classes):
        indices = data.train[data.labels_N[data.train] == label]
        count = max(1, round(fraction * len(indices)))
        kept.append(np.random.default_rng([label, 1]).permutation(indices)[:count])
    train = np.sort(np.concatenate(kept))
    mean_C, std_C = _channel_statistics(data, train)
    return replace(data, train=train, mean_C=mean_C, std_C=std_C)


def _channel_statistics(data: LabelledImages | SplitImages, train: IntArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation [C] of the training pixels. The deviation is at least one level of 256."""
    images_NCHW = data.images_NCHW
    if data.encoded is not None:
        # Evenly spread: images of a class often lie together.
        spread = np.linspace(0, len(train) - 1, min(len(train), STATISTICS_SAMPLE)).astype(np.int64)
        sample = [data.encoded[index] for index in train[spread]]
        images_NCHW = decode_squares(sample, image_size=images_NCHW.shape[2], channels=images_NCHW.shape[1])
        train = np.arange(len(sample))
    levels = np.arange(256.0)
    means, deviations = [], []
    for channel in range(images_NCHW.shape[1]):
        counts = np.zeros(256)
        for chunk in np.array_split(train, max(1, len(train) // 4096)):
            counts += np.bincount(images_NCHW[chunk, channel].reshape(-1), minlength=256)
        mean = (counts * levels).sum() / counts.sum()
        means.append(mean)
        deviations.append(max(1.0, float(np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum()))))
    return np.array(means, np.float32), np.array(deviations, np.float32)


def _at_size(data: LabelledImages, image_size: int | None) -> LabelledImages:
    if image_size is None or data.images_NCHW.shape[2] == image_size:
        return data
    import torch  # slow to import, and wanted here alone
    from torch.nn.functional import interpolate

    check_memory(len(data.images_NCHW), image_size)
    chunks = torch.from_numpy(data.images_NCHW).split(1000)
    resized = [
        interpolate(chunk.float(), size=image_size, mode="bilinear", antialias=True).round_().clamp_(0, 255).byte()
        for chunk in chunks
    ]
    return replace(data, images_NCHW=torch.cat(resized).numpy())


def _digits(data_dir: Path, image_size: int | None) -> LabelledImages:
    """scikit-learn's bundled scans: 1,797 grey 8x8 images of ten digits, no download (UCI, Alpaydin 1998).

    Its file is read without importing scikit-learn, which takes 3 s of a CPU. A row holds 64 levels of 0 to 16 and the
    digit.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return LabelledImages(images, rows[:, 64].astype(np.int64), 0, tuple(str(d) for d in range(10)))


def _cifar10(data_dir: Path, image_size: int | None) -> LabelledImages:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 RGB 32x32 images of 10 classes."""
    return _cifar("cifar10", "CIFAR10", "cifar-10-python.tar.gz", 10, data_dir, image_size)


def _cifar100(data_dir: Path, image_size: int | None) -> LabelledImages:
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 RGB 32x32 images of 100 fine classes."""
    return _cifar("cifar100", "CIFAR100", "cifar-100-python.tar.gz", 100, data_dir, image_size)


def _cifar(
    name: str, torchvision_name: str, archive: str, num_classes: int, data_dir: Path, image_size: int | None
) -> LabelledImages:
    for folder in (data_dir, data_dir / name):
        if any(folder.glob("train-*.parquet")):
            if not any(folder.glob("test-*.parquet")):
                raise UsageError(f"{folder} has train-*.parquet and no test-*.parquet; put {name}'s there")
            data = _cached(_parquet, folder, image_size)
            if len(data.class_names) != num_classes:
                raise UsageError(
                    f"{folder} holds {len(data.class_names)} classes, {name} has {num_classes}; "
                    f"give the folder of {name} as --data-dir"
                )
            return data
    from torchvision import datasets

    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT_SECONDS):
            train, test = (
                getattr(datasets, torchvision_name)(root=data_dir, train=train, download=True)
                for train in (True, False)
            )
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{name} is not in {data_dir} and cannot be downloaded ({error}); put {archive} there, or "
            f"train-*.parquet and test-*.parquet as its hub publishes them, or point --data-dir to them"
        ) from error
    images = np.concatenate([train.data, test.data]).transpose(0, 3, 1, 2)
    labels = np.array([*train.targets, *test.targets], dtype=np.int64)
    return LabelledImages(np.ascontiguousarray(images), labels, len(test.targets), tuple(train.classes))


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _cached(load: LoadPath, root: Path, image_size: int | None) -> LabelledImages:
    """What `load` decodes, from the cache of decoded pixels where it is there. Raises UsageError as `load` does."""

    def decode() -> Decoded:
        data = load(root, image_size, True)
        return Decoded(data.images_NCHW, data.labels_N, {"num_test": data.num_test, "class_names": data.class_names})

    def paths() -> Iterable[Path]:
        return [root] if root.is_file() else root.rglob("*") if load is _folder else root.glob("*.parquet")

    found = PixelCache(default_folder()).get(paths, image_size=image_size, decode=decode)
    check_memory(len(found.labels_N), found.pixels_NCHW.shape[2])
    return LabelledImages(
        found.pixels_NCHW, found.labels_N, int(found.about["num_test"]), tuple(found.about["class_names"])
    )


def _folder(root: Path, image_size: int | None, resident: bool) -> LabelledImages:
    """Class folders below `root`, or below `root/train` with `root/test` (or `val`) as the official test set."""
    if not root.is_dir():
        raise UsageError(f"folder:{root} is not a folder; give one with a folder of images for each class")
    train_root = root / "train" if (root / "train").is_dir() else root
    official = [root / n for n in ("test", "val", "valid", "validation") if (root / n).is_dir()]
    test_root = official[0] if official and train_root != root else None
    if test_root is not None:
        _say_what_is_unused(official[1:])
    names = [path.name for path in class_folders(train_root)]
    train = images_in(train_root, names)
    if not train:
        raise UsageError(
            f"no images in {train_root}: wanted a folder of images for each class, such as {train_root}/cat/1.png"
        )
    test: list[EncodedImage] = []
    if test_root is not None:
        unknown = [path.name for path in class_folders(test_root) if path.name not in names]
        if unknown:
            raise UsageError(f"{test_root} has classes that {train_root} has not: {', '.join(unknown)}")
        test = images_in(test_root, names)
        if not test:
            raise UsageError(f"no images in {test_root}; add some or remove the folder")
    return _labelled(train, test, names, root, image_size=image_size, resident=resident)


def _parquet(path: Path, image_size: int | None, resident: bool) -> LabelledImages:
    """One parquet file, or a folder with train*.parquet and test*.parquet (or files of any name, all training)."""
    if path.is_file():
        train_parts, test_parts = [path], []
    else:
        parts = sorted(path.glob("*.parquet"))
        by_prefix = {prefix: [p for p in parts if p.name.startswith(prefix)] for prefix in ("train", "test", "val")}
        test_parts = by_prefix["test"] or by_prefix["val"]
        _say_what_is_unused(by_prefix["val"] if by_prefix["test"] else [])
        train_parts = by_prefix["train"] or [p for p in parts if not p.name.startswith(("test", "val"))]
    if not train_parts:
        raise UsageError(f"no parquet files with training images in {path}; wanted train-*.parquet there")
    train, names, values = read_parquet_images(train_parts)
    test, _, test_values = read_parquet_images(test_parts)
    if names is None:
        distinct = sorted({*values, *test_values}, key=lambda v: (str(type(v)), v))
        names = [str(value) for value in distinct]
        code = {value: index for index, value in enumerate(distinct)}
        values, test_values = [code[v] for v in values], [code[v] for v in test_values]
    wrong = [v for v in (*values, *test_values) if not isinstance(v, int) or not 0 <= v < len(names)]
    if wrong:
        raise UsageError(f"{path} has a label {wrong[0]!r} and {len(names)} class names; wanted 0 to {len(names) - 1}")
    train = [replace(image, label=label) for image, label in zip(train, values, strict=True)]
    test = [replace(image, label=label) for image, label in zip(test, test_values, strict=True)]
    return _labelled(train, test, names, path, image_size=image_size, resident=resident)


def _say_what_is_unused(paths: Sequence[Path]) -> None:
    if paths:
        warn_of_data(
            f"{', '.join(map(str, paths))}: not used, since there is an official test set and validation is split "
            f"off the training images",
            stacklevel=4,
        )


def _labelled(
    train: Sequence[EncodedImage],
    test: Sequence[EncodedImage],
    names: Sequence[str],
    where: Path,
    *,
    image_size: int | None,
    resident: bool,
) -> LabelledImages:
    """The readable images, decoded or not, with their labels."""
    if len(names) < 2:
        raise UsageError(f"{where} holds one class ({', '.join(names)}); classification wants two or more")
    images = [*train, *test]
    encoded, content_digest = None, b""
    if resident:
        pixels, readable, _ = decode_all(images, image_size=image_size)
    else:
        inspected = inspect_all(images, image_size=image_size)
        readable, content_digest = inspected.readable, inspected.content_digest
        encoded = tuple(image for image, good in zip(images, readable, strict=True) if good)
        pixels = np.empty((0, inspected.channels, inspected.image_size, inspected.image_size), np.uint8)
    labels = np.array([image.label for image in images], dtype=np.int64)
    num_test = int(readable[len(train) :].sum())
    if test and not num_test:
        raise UsageError(f"none of the {len(test)} test images of {where} can be read; mend them or remove them")
    return LabelledImages(pixels, labels[readable], num_test, tuple(names), encoded, content_digest)


DATASETS: dict[str, Callable[[Path, int | None], LabelledImages]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
}
PATH_DATASETS: dict[str, LoadPath] = {"folder": _folder, "parquet": _parquet}

"""Images of any kind, from class folders or parquet files: found, checked, decoded into uint8 arrays."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from results.schema import UsageError
from trainables.pixel_cache import Pixels, warn_of_data

T = TypeVar("T")

LARGEST_DEFAULT_SIDE = 64
LARGEST_DEFAULT_STREAMED_SIDE = 224
SIZE_SAMPLE = 200
NAMED_IN_WARNING = 5
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("fine_label", "label", "labels", "class")
GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "F"}
# Tried first: every wrong guess costs a good part of what decoding a small image does.
COMMON_FORMATS = ("PNG", "JPEG", "WEBP")
WORKERS = 4
CHUNK = 256


@dataclass(frozen=True)
class EncodedImage:
    """An image that has not been decoded: `source` is a path or the file's bytes, `name` what to call it."""

    source: Path | bytes
    name: str
    label: int

    def open(self) -> Image.Image:
        """The image, its pixels not read yet."""
        try:
            return Image.open(self._file(), formats=COMMON_FORMATS)
        except UnidentifiedImageError:
            return Image.open(self._file())

    def _file(self) -> io.BytesIO | Path:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source


def decode_all(images: Sequence[EncodedImage], *, image_size: int | None) -> tuple[Pixels, npt.NDArray[np.bool_], int]:
    """Decode, scale the short side to the size, crop the centre square.

    Returns pixels [N, C, S, S] of those that could be read, a mask [len(images)] of which these are, and S.
    C is 1 when every image is grey. `image_size` None: the median short side, at most 64.
    Warns, with a count and names, of images that cannot be read.
    """
    side = image_size or _typical_side(images)
    check_memory(len(images), side)
    decoded = _in_threads(lambda image: _decode(image, side), images)
    readable, good = _without_unreadable(images, decoded)
    channels = 1 if all(grey for _, grey in good) else 3
    pixels_NCHW = np.empty((len(good), channels, side, side), np.uint8)
    for index, (pixels_HWC, _) in enumerate(good):
        pixels_NCHW[index] = pixels_HWC.transpose(2, 0, 1)[:channels]
    return pixels_NCHW, readable, side


@dataclass(frozen=True)
class Inspection:
    """What is known of images that stay encoded.

    `readable`: a mask [len(images)] of those that can be decoded; `channels`: 1 when every one of these is grey,
    else 3; `image_size`: the side that was asked for, or the median short side, at most 224; `content_digest`: the
    SHA-256 of each readable image's encoded bytes, one after the other.
    """

    readable: npt.NDArray[np.bool_]
    channels: int
    image_size: int
    content_digest: bytes


def inspect_all(images: Sequence[EncodedImage], *, image_size: int | None) -> Inspection:
    """Find out, by decoding each image once and keeping no pixels, which ones a training run can rely on.

    A header tells nothing of a file that was cut off, and such a file must not end a run in a late epoch. The cost
    is that of one epoch's decoding, in four threads.
    Warns, with a count and names, of images that cannot be read.
    """
    readable, good = _without_unreadable(images, _in_threads(_inspect, images))
    sides = [side for side, _, _ in good]
    return Inspection(
        readable=readable,
        channels=1 if all(grey for _, grey, _ in good) else 3,
        image_size=image_size or min(LARGEST_DEFAULT_STREAMED_SIDE, int(np.median(sides))),
        content_digest=b"".join(digest for _, _, digest in good),
    )


def decode_squares(
    images: Sequence[EncodedImage],
    *,
    image_size: int,
    channels: int,
    explained: Callable[[EncodedImage, str], str] | None = None,
) -> Pixels:
    """Pixels [N, C, S, S], the same that `decode_all` gives, of images that were found readable.

    Raises UsageError for an image that cannot be read: `explained` says of it and of why what is to be done; by
    default, that it could be read before.
    """
    decoded = _in_threads(lambda image: _decode(image, image_size), images)
    pixels_NCHW = np.empty((len(images), channels, image_size, image_size), np.uint8)
    for index, (image, result) in enumerate(zip(images, decoded, strict=True)):
        if isinstance(result, str):
            raise UsageError((explained or _no_longer_readable)(image, result))
        pixels_NCHW[index] = result[0].transpose(2, 0, 1)[:channels]
    return pixels_NCHW


def decode_whole(image: EncodedImage) -> Pixels:
    """RGB pixels [H, W, 3] at the image's own size; a grey image has three equal channels.

    Raises UsageError, naming it, for an image that can no longer be read.
    """
    result = _read(image, lambda rgb, _: np.array(rgb, dtype=np.uint8))
    if isinstance(result, str):
        raise UsageError(_no_longer_readable(image, result))
    return result


def _no_longer_readable(image: EncodedImage, why: str) -> str:
    return f"{image.name} could be read when the dataset was loaded and cannot be now ({why}); restore it and resume"


def _in_threads(function: Callable[[EncodedImage], T], images: Sequence[EncodedImage]) -> list[T]:
    size = max(1, min(CHUNK, -(-len(images) // WORKERS)))
    chunks = [images[start : start + size] for start in range(0, len(images), size)]
    pool = ThreadPoolExecutor(WORKERS)
    try:
        return [result for part in pool.map(lambda chunk: [function(i) for i in chunk], chunks) for result in part]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what has not begun


def _without_unreadable(
    images: Sequence[EncodedImage], results: list[T | str]
) -> tuple[npt.NDArray[np.bool_], list[T]]:
    """A mask of the images that have a result, and these results; a text says why there is none."""
    bad = [f"{image.name} ({r})" for image, r in zip(images, results, strict=True) if isinstance(r, str)]
    if bad:
        more = f" and {len(bad) - NAMED_IN_WARNING} more" if len(bad) > NAMED_IN_WARNING else ""
        warn_of_data(
            f"{len(bad)} of {len(images)} images cannot be read and are left out: "
            f"{', '.join(bad[:NAMED_IN_WARNING])}{more}",
            stacklevel=4,
        )
    good = [r for r in results if not isinstance(r, str)]
    if not good:
        raise UsageError(f"none of the {len(images)} images can be read")
    return np.array([not isinstance(r, str) for r in results]), good


def check_memory(count: int, side: int) -> None:
    """Raise UsageError when so many images of a side would take more than a quarter of the machine's memory."""
    wanted = count * 3 * side * side
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > available / 4:
        raise UsageError(
            f"{count} images of {side}x{side} would take {wanted / 2**30:.1f} GiB resident, more than a quarter of "
            f"this machine's memory; lower it with --set image_size=..."
        )


def _typical_side(images: Sequence[EncodedImage]) -> int:
    sides = []
    for image in images[:: max(1, len(images) // SIZE_SAMPLE)]:
        try:
            with image.open() as opened:
                sides.append(min(opened.size))
        except Exception:  # noqa: BLE001 - `decode_all` counts and names it
            continue
    return max(1, min(LARGEST_DEFAULT_SIDE, int(np.median(sides)))) if sides else LARGEST_DEFAULT_SIDE


def _decode(image: EncodedImage, side: int) -> tuple[Pixels, bool] | str:
    """Pixels [S, S, 3] and whether the image is grey; or why it cannot be read."""

    def square(rgb: Image.Image, grey: bool) -> tuple[Pixels, bool]:
        if rgb.size != (side, side):
            rgb = ImageOps.fit(rgb, (side, side), Image.Resampling.BILINEAR)
        return np.asarray(rgb, dtype=np.uint8), grey

    return _read(image, square)


def _inspect(image: EncodedImage) -> tuple[int, bool, bytes] | str:
    """The short side, whether the image is grey, and its bytes' SHA-256; or why it cannot be read."""
    try:
        content = image.source if isinstance(image.source, bytes) else image.source.read_bytes()
    except OSError as error:
        return type(error).__name__
    digest = hashlib.sha256(content).digest()
    return _read(replace(image, source=content), lambda rgb, grey: (min(rgb.size), grey, digest))


def _read(image: EncodedImage, use: Callable[[Image.Image, bool], T]) -> T | str:
    """What `use` makes of the decoded RGB image and of whether it was grey; or why it cannot be read."""
    try:
        with image.open() as opened:
            upright = _upright(opened)
            grey = upright.mode in GREY_MODES
            return use(_to_rgb(upright), grey)
    except Image.DecompressionBombError:
        return "too large"
    except Exception as error:  # noqa: BLE001 - what decoders raise on damaged files has no common base
        return "empty file" if image.source == b"" else type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; as it is where that cannot be made out."""
    if image.format not in {"JPEG", "TIFF", "MPO"}:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - damaged EXIF raises anything; a pixel error is raised again by the caller's use
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB; alpha over white, 16-bit and float greys scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if image.mode in {"LA", "PA", "RGBA"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def class_folders(root: Path) -> list[Path]:
    """The subfolders of `root` that stand for classes, sorted by name."""
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._")


def images_in(root: Path, class_names: Sequence[str]) -> list[EncodedImage]:
    """The image files below `root/<class name>`, at any depth, sorted by path."""
    extensions = Image.registered_extensions()
    return [
        EncodedImage(path, str(path.relative_to(root)), label)
        for label, name in enumerate(class_names)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in extensions and path.name[0] != "." and path.is_file()
    ]


def read_parquet_images(parts: Sequence[Path]) -> tuple[list[EncodedImage], list[str] | None, list[Any]]:
    """Images, class names if the schema's metadata has them, and raw label values of parquet files.

    Each file holds an image column (`image` or `img`: {bytes, path} or binary) and a label column
    (`fine_label`, `label`, `labels` or `class`). Raises UsageError, naming file and columns, otherwise.
    """
    images: list[EncodedImage] = []
    values: list[Any] = []
    names: list[str] | None = None
    for part in parts:
        try:
            table = pq.read_table(part)
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{part} cannot be read as parquet ({str(error).splitlines()[0]})") from error
        image_column = _column(part, table, IMAGE_COLUMNS, "an image")
        label_column = _column(part, table, LABEL_COLUMNS, "a label")
        names = names or _class_names(table.schema, label_column)
        labels = _labels(part, table, label_column)
        for row, (content, value) in enumerate(zip(_contents(table[image_column]), labels, strict=True)):
            if value is not None:
                images.append(EncodedImage(content, f"{part.name} row {row}", 0))
                values.append(value)
    return images, names, values


def _labels(part: Path, table: pa.Table, column: str) -> list[Any]:
    """A label column's values, None where there is none, which is warned of."""
    kind = table.schema.field(column).type
    simple = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_kind(value_type) for is_kind in simple):
        raise UsageError(f"{part}: labels in {column!r} are of type {kind}; wanted whole numbers or text")
    labels: list[Any] = table[column].to_pylist()
    if table[column].null_count:
        warn_of_data(
            f"{table[column].null_count} of {len(labels)} rows of {part} have no {column} and are left out",
            stacklevel=5,
        )
    return labels


def _column(part: Path, table: pa.Table, wanted: Sequence[str], what: str) -> str:
    for name in wanted:
        if name in table.column_names:
            return name
    raise UsageError(
        f"{part} has no {what[what.index(' ') + 1 :]} column: it has {', '.join(table.column_names)}; "
        f"name one of them {' or '.join(wanted)}"
    )


def _contents(column: pa.ChunkedArray) -> Iterator[bytes]:
    for value in column.to_pylist():
        content = value.get("bytes") if isinstance(value, dict) else value
        yield content if isinstance(content, bytes) else b""


def _class_names(schema: pa.Schema, label_column: str) -> list[str] | None:
    """The names that the `datasets` library keeps in the schema's metadata, if it wrote the file."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(label_column, {})
    names: list[str] | None = feature.get("names")
    return names

"""Decoding images of any kind, from class folders or parquet files, into one uint8 array."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError

from results.schema import DataWarning, UsageError

Pixels = npt.NDArray[np.uint8]

LARGEST_DEFAULT_SIDE = 64
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
    _check_memory(len(images), side)
    chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    pool = ThreadPoolExecutor(WORKERS)
    try:
        decoded = [d for part in pool.map(lambda chunk: [_decode(i, side) for i in chunk], chunks) for d in part]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for what has not begun
    readable = np.array([not isinstance(d, str) for d in decoded])
    bad = [f"{image.name} ({d})" for image, d in zip(images, decoded, strict=True) if isinstance(d, str)]
    if bad:
        more = f" and {len(bad) - NAMED_IN_WARNING} more" if len(bad) > NAMED_IN_WARNING else ""
        warnings.warn(
            f"{len(bad)} of {len(images)} images cannot be read and are left out: "
            f"{', '.join(bad[:NAMED_IN_WARNING])}{more}",
            DataWarning,
            stacklevel=3,
        )
    good = [d for d in decoded if not isinstance(d, str)]
    if not good:
        raise UsageError(f"none of the {len(images)} images can be read")
    channels = 1 if all(grey for _, grey in good) else 3
    pixels_NCHW = np.empty((len(good), channels, side, side), np.uint8)
    for index, (pixels_HWC, _) in enumerate(good):
        pixels_NCHW[index] = pixels_HWC.transpose(2, 0, 1)[:channels]
    return pixels_NCHW, readable, side


def _check_memory(count: int, side: int) -> None:
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
    try:
        with image.open() as opened:
            upright = _upright(opened)
            grey = upright.mode in GREY_MODES
            rgb = _to_rgb(upright)
            if rgb.size != (side, side):
                rgb = ImageOps.fit(rgb, (side, side), Image.Resampling.BILINEAR)
            return np.asarray(rgb, dtype=np.uint8), grey
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
        warnings.warn(
            f"{table[column].null_count} of {len(labels)} rows of {part} have no {column} and are left out",
            DataWarning,
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

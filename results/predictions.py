"""The file of one trial's stored predictions: logits by variant and split, a parquet row group for each pair."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from results.schema import PREDICTIONS, Predictions, Split, UsageError, predictions_schema

P = TypeVar("P", bound=Predictions)
KEYS = ("variant", "split")
PAYLOAD = ("example_id", "label", "logits")


def predictions_bytes(variants: Mapping[str, Sequence[Predictions]]) -> bytes:
    """The parquet file of each variant's predictions for its splits, in the order given."""
    tables = [_table(variant, part) for variant, parts in variants.items() for part in parts if len(part.labels_N)]
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        tables[0].schema,
        compression="zstd",
        use_dictionary=list(KEYS),
        column_encoding={"logits.list.element": "BYTE_STREAM_SPLIT"},
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
    return buffer.getvalue()


def _table(variant: str, part: Predictions) -> pa.Table:
    split = next(split for split, cls in PREDICTIONS.items() if cls is type(part))
    count, num_classes = part.logits_NC.shape
    logits = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(part.logits_NC).reshape(-1), pa.float16()), num_classes
    )
    columns = [
        pa.array([variant] * count),
        pa.array([split] * count),
        pa.array(part.example_ids_N),
        pa.array(part.labels_N),
        logits,
    ]
    return pa.Table.from_arrays(columns, schema=predictions_schema(num_classes))


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """The file of predictions. Raises UsageError, naming it, when it is missing or damaged."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error


def read_predictions(path: Path, of: type[P], *, variant: str) -> P:
    """A variant's predictions for the split that `of` stands for; no other is decoded.

    Raises UsageError, naming the file, when it is missing or damaged.
    """
    split: Split = next(split for split, cls in PREDICTIONS.items() if cls is of)
    with _opened(path) as file:
        table = _rows(file, variant, split)
    # Combining copies, even a single chunk.
    logits = table["logits"].chunk(0) if table["logits"].num_chunks == 1 else table["logits"].combine_chunks()
    num_classes = table.schema.field("logits").type.list_size
    return of(
        logits_NC=logits.flatten().to_numpy().reshape(-1, num_classes),
        labels_N=table["label"].to_numpy(),
        example_ids_N=table["example_id"].to_numpy(),
    )


def _rows(file: pq.ParquetFile, variant: str, split: Split) -> pa.Table:
    """The rows of one pair: whole row groups, or what is the pair's of files written before there was one for each."""
    pairs = _pairs(file)
    if None not in pairs:
        wanted = [number for number, pair in enumerate(pairs) if pair == (variant, split)]
        return file.read_row_groups(wanted, columns=list(PAYLOAD), use_threads=False)
    table = file.read(use_threads=False)
    return table.filter((pc.field("variant") == variant) & (pc.field("split") == split))


def _pairs(file: pq.ParquetFile) -> list[tuple[str, Split] | None]:
    """The variant and split of each row group by its statistics; None for one that holds several."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    statistics = [[group.column(number).statistics for number in range(len(KEYS))] for group in groups]
    return [
        (variant.min, split.min) if (variant.min, split.min) == (variant.max, split.max) else None
        for variant, split in statistics
    ]


SEEN_FROM_VIEWS = {"tta": "best", "raw_tta": "raw"}
"""Variants that are another one's weights with test-time augmentation, and that one."""


def stored_counts(path: Path) -> dict[str, dict[Split, int]]:
    """How many rows each variant has of each split, in the order of the file; logits are not decoded.

    Raises UsageError, naming the file, when it is missing or damaged.
    """
    counts: dict[str, dict[Split, int]] = {}
    with _opened(path) as file:
        for variant, split, count in _counted(file):
            counts.setdefault(variant, {})[split] = count
    return counts


def _counted(file: pq.ParquetFile) -> list[tuple[str, Split, int]]:
    pairs = [pair for pair in _pairs(file) if pair is not None]
    if len(pairs) == file.num_row_groups:
        return [(*pair, file.metadata.row_group(number).num_rows) for number, pair in enumerate(pairs)]
    keys = file.read(columns=list(KEYS), use_threads=False)
    rows = keys.group_by(list(KEYS), use_threads=False).aggregate([([], "count_all")]).to_pylist()
    return [(row["variant"], row["split"], row["count_all"]) for row in rows]

"""The file of one trial's stored predictions: logits by variant and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from results.files import parquet_bytes
from results.schema import PREDICTIONS, Predictions, Split, UsageError, predictions_schema

P = TypeVar("P", bound=Predictions)


def predictions_bytes(variants: Mapping[str, Sequence[Predictions]]) -> bytes:
    """The parquet file of each variant's predictions for its splits, in the order given."""
    tables = [_table(variant, part) for variant, parts in variants.items() for part in parts]
    return parquet_bytes(
        pa.concat_tables(tables),
        use_dictionary=["variant", "split"],
        column_encoding={"logits.list.element": "BYTE_STREAM_SPLIT"},
    )


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


def read_predictions(path: Path, of: type[P], *, variant: str) -> P:
    """A variant's predictions for the split that `of` stands for.

    Raises UsageError, naming the file, when it is missing or damaged.
    """
    split: Split = next(split for split, cls in PREDICTIONS.items() if cls is of)
    try:
        table = pq.read_table(path, filters=(pc.field("variant") == variant) & (pc.field("split") == split))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    logits = table["logits"].combine_chunks()
    num_classes = table.schema.field("logits").type.list_size
    return of(
        logits_NC=logits.flatten().to_numpy().reshape(-1, num_classes),
        labels_N=table["label"].to_numpy(),
        example_ids_N=table["example_id"].to_numpy(),
    )


def is_readable(path: Path) -> bool:
    """Whether the file is there and whole, as far as its footer tells."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return False
    return True

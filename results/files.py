"""Files that are there whole or not at all, and what is written into them as bytes."""

from __future__ import annotations

import errno
import io
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


CACHE_VARIABLE = "HYPERPARAMETER_ENSEMBLES_CACHE"


def cache_folder() -> Path:
    """Return the folder for what can be made again: CACHE_VARIABLE's, or one in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(caches, "hyperparameter-ensembles"))


def replace_file(path: Path, content: bytes, *, sync: bool, permitted: Callable[[], None] = lambda: None) -> None:
    """Write a file in one step: it is there whole or, whatever happens, as it was before.

    `sync`: survive a power failure too. `permitted` is asked just before, and may raise. A full disk is an OSError
    with its errno, which libraries that write files themselves do not all give.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        permitted()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link_file(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where there cannot be one; there whole or not at all.

    Raises FileNotFoundError when there is no such file. What later replaces the first does not change the second.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        os.link(source, temporary)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        replace_file(target, source.read_bytes(), sync=True)
        return
    try:
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # replacing a name of the same file does nothing


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    """A table as a zstd-compressed parquet file; `options` go to `pyarrow.parquet.write_table`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def rows_bytes(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> bytes:
    """Rows as a parquet file of the schema."""
    return parquet_bytes(pa.Table.from_pylist(list(rows), schema=schema))


def json_bytes(content: dict[str, Any]) -> bytes:
    """Indented JSON."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

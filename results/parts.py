"""The parquet parts of `trials/` and `epochs/`, written so that a reader finds every row once at any moment.

A part holds the rows of BLOCK consecutive trial numbers and is named after them: `t00200-t00399.parquet`. Which part a
row is in follows from its trial's number alone, and a part is only ever replaced, in one step, by one with the same
rows and more. So no row is ever in two parts or in none, whenever a reader lists and opens them and wherever a writer
is killed, and there is nothing to compact: a file for each trial would be thousands, and a merged one could not take
the place of many in one step. What remains is to write a whole part for one new row, which costs little more than a
part with that row alone: most of the time goes into the hundred columns, not into the rows.

`schema.parquet` has no rows, comes first and never changes: a reader that looks into the first file before it reads
them all (polars' lazy frames keep its footer until they are collected) does not find another one in its place, and a
table that has no rows yet can be read. A reader that opens a file twice, or asks for its size before (polars, DuckDB),
can meet a replacement in between: it then fails, loudly, and succeeds when called again. It never gets wrong rows.

Rows of `trials/` are written when a trial ends, after those of its epochs, so who reads a trial and then its epochs
finds them all. The epochs of running trials are written at most every EPOCHS_SECONDS.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from results.events import CheckpointRemoved, Decided, EpochReported, Event, TrialEnded, TrialPredicted
from results.files import parquet_bytes, replace_file
from results.history import EPOCH_SCHEMA, History, TrialHistory, epoch_rows
from results.schema import UsageError, trial_schema

BLOCK = 200
EPOCHS_SECONDS = 2.0
NAMED_AT_MOST = 5
LATER_COLUMNS = ("inference_images_per_second",)


def part_paths(folder: Path) -> list[Path]:
    """The parts of a table in the order of their trials, those of a trial each that older versions wrote too."""
    return sorted(folder.glob("*.parquet"), key=lambda path: (len(path.stem.split("-")[0]), path.name))


def conformed(part: pa.Table, schema: pa.Schema) -> pa.Table:
    """A part as the schema has it; a column that versions before it did not write is null. Raises KeyError."""
    for name in LATER_COLUMNS:
        if name in schema.names and name not in part.column_names:
            part = part.append_column(name, pa.nulls(len(part), schema.field(name).type))
    return part.select(schema.names).cast(schema)


class Parts:
    """The parts of one table. `table_of` gives the rows of several trials, `num_rows` how many are a trial's."""

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        *,
        table_of: Callable[[Sequence[TrialHistory]], pa.Table],
        num_rows: Callable[[TrialHistory], int],
    ) -> None:
        self._folder = folder
        self._table_of = table_of
        self._num_rows = num_rows
        self._empty = schema.empty_table()
        self._written: dict[int, tuple[pa.Table, dict[int, int]]] = {}

    def path(self, block: int) -> Path:
        """Where the rows of a block of trial numbers lie."""
        return self._folder / f"t{block * BLOCK:05d}-t{(block + 1) * BLOCK - 1:05d}.parquet"

    def write(self, trials: Iterable[TrialHistory]) -> None:
        """Bring the rows of these trials up to date."""
        by_block: dict[int, list[TrialHistory]] = {}
        for trial in trials:
            by_block.setdefault(trial.number // BLOCK, []).append(trial)
        for block, members in by_block.items():
            self._write_block(block, members)

    def _write_block(self, block: int, trials: Iterable[TrialHistory]) -> None:
        changed = sorted(trials, key=lambda trial: trial.number)
        before, lengths = self._written.get(block, (self._empty, {}))
        rows = self._table_of(changed)
        pieces, taken_before, taken = [], 0, 0
        for trial in changed:
            start = sum(length for number, length in lengths.items() if number < trial.number)
            pieces += [before.slice(taken_before, start - taken_before), rows.slice(taken, self._num_rows(trial))]
            taken_before = start + lengths.get(trial.number, 0)
            taken += self._num_rows(trial)
        table = pa.concat_tables([*pieces, before.slice(taken_before)]).combine_chunks() if len(before) else rows
        replace_file(self.path(block), parquet_bytes(table, use_dictionary=False), sync=False)
        self._written[block] = (table, lengths | {t.number: self._num_rows(t) for t in changed})

    def rebuild(self, trials: Collection[TrialHistory]) -> None:
        """Write every part anew and remove what is none: a part of an older version goes before its rows come back."""
        schema_path, empty = self._folder / "schema.parquet", parquet_bytes(self._empty)
        if not schema_path.exists() or schema_path.read_bytes() != empty:
            replace_file(schema_path, empty, sync=False)
        expected = {schema_path, *(self.path(trial.number // BLOCK) for trial in trials)}
        for path in part_paths(self._folder):
            if path not in expected:
                path.unlink()
        self._written.clear()
        self.write(trials)


class Tables:
    """`trials/` and `epochs/` of an experiment, following its history."""

    def __init__(self, root: Path, history: History) -> None:
        schema = trial_schema(history.info["config_fields"])
        self._history = history
        self._folder = root / "trials"
        self._trials = Parts(
            self._folder,
            schema,
            table_of=lambda trials: pa.Table.from_pylist([history.trial_row(trial) for trial in trials], schema=schema),
            num_rows=lambda trial: 1,
        )
        self._epochs = Parts(
            root / "epochs", EPOCH_SCHEMA, table_of=epoch_rows, num_rows=lambda trial: len(trial.epochs)
        )
        self._behind: dict[str, TrialHistory] = {}
        self._written_at = time.monotonic()

    def follow(self, events: Sequence[Event]) -> None:
        """Take note of events that the history has applied; write what cannot wait."""
        changed: dict[str, TrialHistory] = {}
        for event in events:
            if isinstance(event, EpochReported | Decided):
                self._behind[event.trial_id] = self._history.trials[event.trial_id]
            elif isinstance(event, TrialEnded | TrialPredicted | CheckpointRemoved):
                changed[event.trial_id] = self._history.trials[event.trial_id]
        self._write_epochs([trial for trial_id, trial in changed.items() if trial_id in self._behind])
        self._trials.write(trial for trial in changed.values() if trial.ended is not None)
        self.catch_up()

    def catch_up(self, *, now: bool = False) -> None:
        """Write the epochs that `epochs/` lacks, unless that was done less than EPOCHS_SECONDS ago."""
        if self._behind and (now or time.monotonic() - self._written_at >= EPOCHS_SECONDS):
            self._write_epochs(list(self._behind.values()))
            self._written_at = time.monotonic()

    def _write_epochs(self, trials: Collection[TrialHistory]) -> None:
        self._epochs.write(trials)
        for trial in trials:
            del self._behind[trial.trial_id]

    def rebuild(self) -> None:
        """Write all parts anew. Raises UsageError when a row is of a trial whose end the log does not know."""
        self._check_rows_are_known()
        trials = self._history.trials.values()
        self._epochs.rebuild([trial for trial in trials if trial.epochs])
        self._trials.rebuild(self._history.ended)
        self._behind.clear()

    def _check_rows_are_known(self) -> None:
        # A row is written after its events have been synced: one that the log does not know means a damaged log.
        rows: set[str] = set()
        for path in part_paths(self._folder):
            with contextlib.suppress(pa.ArrowException, OSError, KeyError):  # a damaged part is about to be replaced
                rows.update(pq.read_table(path, columns=["trial_id"])["trial_id"].to_pylist())
        unknown = sorted(rows - {trial.trial_id for trial in self._history.endings})
        if unknown:
            more = f" and {len(unknown) - NAMED_AT_MOST} more" if len(unknown) > NAMED_AT_MOST else ""
            raise UsageError(
                f"{self._folder} has {', '.join(unknown[:NAMED_AT_MOST])}{more}, which events/ knows nothing of: the "
                f"log is damaged; restore events/ from a copy"
            )

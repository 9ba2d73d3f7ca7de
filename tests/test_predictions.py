"""The file of a trial's predictions: one pair of variant and split is read without the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from results.predictions import predictions_bytes, read_predictions, stored_counts
from results.schema import (
    PREDICTIONS,
    EstimatePredictions,
    Predictions,
    SelectPredictions,
    TestPredictions,
    UsageError,
)
from tests.simulation import new_experiment

SIZES = {SelectPredictions: 30, EstimatePredictions: 20, TestPredictions: 50}
COUNTS = {split: SIZES[of] for split, of in PREDICTIONS.items()}
Stored = dict[str, list[Predictions]]


@pytest.fixture
def stored() -> Stored:
    rng = np.random.default_rng(0)
    return {
        variant: [
            of(rng.normal(size=(num, 7)).astype(np.float16), rng.integers(0, 7, num), rng.permutation(num))
            for of, num in SIZES.items()
        ]
        for variant in ("tta", "best", "epoch_27")
    }


def check_equal(path: Path, variant: str, part: Predictions) -> None:
    read = read_predictions(path, type(part), variant=variant)
    for field in ("logits_NC", "labels_N", "example_ids_N"):
        assert np.array_equal(getattr(read, field), getattr(part, field))
        assert getattr(read, field).dtype == getattr(part, field).dtype


@pytest.mark.parametrize("pair", [("best", SelectPredictions), ("epoch_27", TestPredictions)])
def test_nothing_but_the_rows_asked_for_is_decoded(
    pair: tuple[str, type[Predictions]], stored: Stored, tmp_path: Path
) -> None:
    path = tmp_path / "t00000.parquet"
    path.write_bytes(predictions_bytes(stored))
    content = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path)
    pairs = [(variant, part) for variant, parts in stored.items() for part in parts]
    assert metadata.num_row_groups == len(pairs)
    for number, (variant, part) in enumerate(pairs):
        logits = metadata.row_group(number).column(4)
        if (variant, type(part)) != pair:
            start, size = logits.data_page_offset, logits.total_compressed_size
            content[start : start + size] = bytes(size)
    path.write_bytes(content)
    for variant, part in pairs:
        if (variant, type(part)) == pair:
            check_equal(path, variant, part)
        else:
            with pytest.raises(UsageError, match=r"t00000\.parquet cannot be read"):
                read_predictions(path, type(part), variant=variant)
    assert stored_counts(path) == dict.fromkeys(stored, COUNTS)  # nor are logits


def test_a_file_with_a_single_row_group_is_still_read(stored: Stored, tmp_path: Path) -> None:
    path = tmp_path / "t00000.parquet"
    path.write_bytes(predictions_bytes(stored))
    pq.write_table(pq.read_table(path), path, use_dictionary=["variant", "split"])
    assert pq.read_metadata(path).num_row_groups == 1
    for variant, parts in stored.items():
        for part in parts:
            check_equal(path, variant, part)
    assert stored_counts(path) == dict.fromkeys(stored, COUNTS)


def test_variants_are_counted_in_the_order_in_which_they_were_stored(stored: Stored, tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    stored["raw"] = [part for part in stored["best"] if not isinstance(part, EstimatePredictions)]
    experiment.files("t00000").write_predictions(stored)
    counts = experiment.stored_counts("t00000")
    assert list(counts) == ["tta", "best", "epoch_27", "raw"]
    assert list(counts["best"].items()) == [("select", 30), ("estimate", 20), ("test", 50)]
    assert counts["raw"] == {"select": 30, "test": 50}


def test_a_pair_that_is_not_there_has_no_rows(stored: Stored, tmp_path: Path) -> None:
    path = tmp_path / "t00000.parquet"
    path.write_bytes(predictions_bytes({"best": stored["best"][:1]}))
    assert read_predictions(path, SelectPredictions, variant="swa").logits_NC.shape == (0, 7)
    assert read_predictions(path, TestPredictions, variant="best").logits_NC.shape == (0, 7)


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and then nothing"])
def test_files_that_cannot_be_counted_are_named(content: bytes | None, tmp_path: Path) -> None:
    experiment = new_experiment(tmp_path)
    if content is not None:
        (experiment.root / "predictions" / "t00000.parquet").write_bytes(content)
    with pytest.raises(UsageError, match=r"t00000\.parquet cannot be read"):
        experiment.stored_counts("t00000")

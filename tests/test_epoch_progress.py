"""Long epochs tell how far they are; short ones, and places that cannot be written, change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from results.trial_files import TrialFiles
from trainables import progress
from trainables.progress import EpochProgress, ProgressFile, read_progress


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t00000" / "progress.txt"


def test_steps_of_a_long_epoch_are_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_UNTIL_TOLD", 0.0)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN", 0.0)
    told = ProgressFile(path, epoch=3, steps_an_epoch=10)
    told.step()
    told.step()
    assert read_progress(path) == EpochProgress(3, 2, 10)
    told.epoch_ended(3)
    told.step()
    assert read_progress(path) == EpochProgress(4, 1, 10)


def test_a_short_epoch_writes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_UNTIL_TOLD", 1e6)
    ProgressFile(path, epoch=1, steps_an_epoch=10).step()
    assert not path.parent.exists()


def test_where_nothing_can_be_written_training_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_UNTIL_TOLD", 0.0)
    (tmp_path / "file").touch()
    ProgressFile(tmp_path / "file" / "progress.txt", epoch=1, steps_an_epoch=10).step()
    ProgressFile(None, epoch=1, steps_an_epoch=10).step()


@pytest.mark.parametrize("content", ["", "1 2", "1 2 three"])
def test_a_file_that_is_just_being_written_tells_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "progress.txt").write_text(content)
    assert read_progress(tmp_path / "progress.txt") is None
    assert read_progress(tmp_path / "none") is None


def test_a_bucket_has_no_progress_file(tmp_path: Path) -> None:
    assert TrialFiles(str(tmp_path), "t00000", 1, remote="s3://bucket/runs/name").progress is None
    assert TrialFiles(str(tmp_path), "t00000", 1).progress == tmp_path / "checkpoints" / "t00000" / "progress.txt"

"""What workers tell their driver, and what it makes of it: epochs recorded, failures counted, nothing thrown away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import cli, workers
from orchestrator.training_console import TrainingConsole
from results.history import TrialHistory
from results.schema import UsageError
from tests.simulation import epoch_result, ledger_of, new_experiment
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.mailbox import Advanced, Began, Formed, Left, Mailbox, Trained


@pytest.fixture
def recorder(tmp_path: Path, digits: SplitImages) -> Iterator[workers.Recorder]:
    """A recorder of the first trial of an experiment, as the driver has it."""
    experiment = new_experiment(tmp_path, num_trials=1)
    with experiment.driving():
        ledger = ledger_of(experiment, num_trials=1, halving="none")
        assignment = ledger.next_trial()
        assert assignment is not None
        console = TrainingConsole(cli.make_console(), TrainConfig(), digits, after_epoch=0)
        yield workers.Recorder(ledger, assignment.trial_id, console, [])


def of_trial(recorder: workers.Recorder) -> TrialHistory:
    return recorder._ledger.experiment.history.trials[recorder._trial_id]


def test_groups_that_fail_before_they_train_are_counted_and_end_the_trial_with_the_reason(
    recorder: workers.Recorder,
) -> None:
    for number in range(4):
        recorder.read([Formed(2)])
        assert bool(recorder.failure) == (number == 3)
        recorder.read([Left(1, "error", "Traceback\nRuntimeError: no NCCL"), Left(0, "error", "the other is gone")])
    ended = of_trial(recorder).ended
    assert ended is not None
    assert (ended.stop_reason, ended.error) == ("error", "Traceback\nRuntimeError: no NCCL")


def test_groups_that_fail_after_an_epoch_leave_the_trial_to_be_gone_on_with(recorder: workers.Recorder) -> None:
    recorder.read([Formed(2), Began(2, "here", ""), Trained("here", epoch_result(1, 0.5))])
    for _ in range(3):
        recorder.read([Left(0, "error", "RuntimeError: the disk is away"), Formed(2)])
    assert recorder.failure == "RuntimeError: the disk is away"
    assert of_trial(recorder).ended is None


def test_epochs_pauses_and_more_workers_are_no_failures(recorder: workers.Recorder) -> None:
    recorder.read([Formed(2), Trained("here", epoch_result(1, 0.5))])
    for number in range(2, 9):
        recorder.read([Formed(2), Trained("here", epoch_result(number, 0.5))])  # lost, and an epoch further
        recorder.read([Left(0, "paused", ""), Formed(2)])
        recorder.read([Formed(number + 1)])
    assert not recorder.failure
    assert of_trial(recorder).retries == 7


def test_a_batch_that_no_longer_fits_is_said_with_what_goes_on(recorder: workers.Recorder) -> None:
    recorder.read([Formed(2), Trained("here", epoch_result(1, 0.5)), Formed(1)])
    with pytest.raises(UsageError, match=r"too large; .* with --resume, which goes on after epoch 1"):
        recorder.read([Left(0, "does_not_fit", "too large; use more workers")])
    assert of_trial(recorder).ended is None


def test_a_mailbox_hands_letters_out_once_and_passes_the_wish_to_stop_on() -> None:
    mailbox = Mailbox()
    assert not mailbox.post(Advanced(1, 3), Advanced(1, 4))
    assert mailbox.take() == [Advanced(1, 3), Advanced(1, 4)]
    assert mailbox.take() == []
    mailbox.stop()
    assert mailbox.post()

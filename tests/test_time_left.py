"""The time left of a search is about right from its first epoch on, whatever ends early."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import pytest

from orchestrator.time_left import TrialSoFar, seconds_left, so_far
from orchestrator.training_console import epoch_weights
from results.events import EpochReported, TrialStarted
from results.history import TrialHistory
from tests.simulation import epoch_result
from trainables.config import TrainConfig

MAX_EPOCHS, RUNGS = 9, (3,)


def left(trials: Sequence[TrialSoFar], *, to_start: int, workers: int = 1) -> float | None:
    return seconds_left(trials, to_start=to_start, workers=workers, max_epochs=MAX_EPOCHS, rungs=RUNGS)


def test_nothing_is_said_before_the_first_epoch() -> None:
    assert left([TrialSoFar([], ended=False)], to_start=5) is None


def test_what_trains_alone_has_its_own_epochs_left() -> None:
    """It has passed the rung: 5 more epochs of 2 s, of which 1 s has passed."""
    assert left([TrialSoFar([2.0] * 4, ended=False, seconds_since=1.0)], to_start=0) == pytest.approx(9.0)


def test_the_last_trials_do_not_share_all_workers() -> None:
    """Three trials of 9 s for two workers take 18 s, not 13.5."""
    ended = [TrialSoFar([1.0] * 9, ended=True)] * 1000  # that none is stopped is certain
    assert left(ended, to_start=3, workers=2) == pytest.approx(18.0, rel=0.01)


def test_trials_that_are_stopped_early_shorten_those_to_come() -> None:
    """Of ten half stop after three epochs: 6 s on average."""
    ended = [TrialSoFar([1.0] * 9, ended=True)] * 500 + [TrialSoFar([1.0] * 3, ended=True)] * 500
    assert left(ended, to_start=10) == pytest.approx(60.0, rel=0.01)


def test_epochs_that_become_slower_count_as_they_are() -> None:
    slower = [*[1.0] * 3, *[2.0] * 3, *[4.0] * 3]
    trained = TrialSoFar(slower[:4], ended=False)
    assert left([TrialSoFar(slower, ended=True), trained], to_start=0) == pytest.approx(2 + 2 + 3 * 4)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_within_a_quarter_of_the_truth_most_of_the_time(workers: int, seed: int) -> None:
    """An invented search of 30 trials, of which about 40% end at the rung; epochs differ by a tenth."""
    rng = np.random.default_rng(seed)
    trials = [
        rng.normal(1.0, 0.1, RUNGS[0] if rng.random() < 0.4 else MAX_EPOCHS).clip(0.5).tolist() for _ in range(30)
    ]
    free = [(0.0, worker) for worker in range(workers)]
    began = []
    for times in trials:
        start, worker = heapq.heappop(free)
        began.append(start)
        heapq.heappush(free, (start + sum(times), worker))
    end = max(free)[0]
    moments = [share * end for share in np.linspace(0.05, 0.9, 40)]
    right = []
    for now in moments:
        seen = []
        for start, times in zip(began, trials, strict=True):
            ends = start + np.cumsum(times)
            done = int((ends <= now).sum())
            if start <= now:
                since = now - (ends[done - 1] if done else start)
                seen.append(TrialSoFar(times[:done], ended=done == len(times), seconds_since=since))
        estimate = left(seen, to_start=sum(start > now for start in began), workers=workers)
        assert estimate is not None
        right.append(abs(estimate - (end - now)) <= 0.25 * (end - now))
    assert np.mean(right) >= 0.6


def test_neither_the_start_of_a_worker_nor_a_pause_of_the_search_counts() -> None:
    """Epochs train for 2 s each; the second one is stored 3 s after the first, the third one after a night."""
    started = TrialStarted(
        at=0.0, trial_id="t00000", stage="search", origin="startup", seed=0, config={}, params={}, distributions={}
    )
    epochs = [
        EpochReported(at=at, trial_id="t00000", node="", result=epoch_result(epoch, 0.5))
        for epoch, at in enumerate((100.0, 103.0, 36_000.0), start=1)
    ]
    assert so_far(TrialHistory(started, epochs), now=36_001.0) == TrialSoFar([2.0, 3.0, 2.0], False, 1.0)


def test_larger_images_weigh_as_many_pixels_as_they_have() -> None:
    config = TrainConfig(max_epochs=4, initial_image_size=16, full_size_at=0.5)
    assert epoch_weights(config, full_size=32) == [256, 576, 1024, 1024]
